"""Methods with memory banks: CMC (arXiv 1906.05849) contrasts colour channels, InsDis (1805.01978) contrasts crops."""

import re
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cmc.base import MemoryBank
from cmc.color import PARTS, SCALES, SPACES, channels_of, color_views, view_names
from cmc.nets import ARCHS, STRIDES, Branches
from cmc.views import Views, bank_names, branch_names, chosen, graph_pairs
from utils.data.views import moco_v1_view
from utils.learning import backbones, mixture
from utils.learning.drawing import SHOWN, grey
from utils.learning.method import Batch, Targets, ViewSpec
from utils.learning.probes import of_cmc_code


def _view(name: str, views: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W of the loader -> one view, normalized."""
    return color_views(views, name)[0]


def check_arch(args: Namespace) -> None:
    if args.arch not in ARCHS:
        raise ValueError(f"--arch {args.arch}: CMC has {', '.join(ARCHS)}; pass one of them")
    if args.arch == "alexnet" and args.size != 224:
        raise ValueError(f"--size {args.size}: AlexNet's fully connected layers need 224; pass 224")
    strides = (0,) if args.arch == "alexnet" else (0, *STRIDES)
    if args.output_stride not in strides:
        known = ", ".join(map(str, strides))
        raise ValueError(f"--output-stride {args.output_stride}: {args.arch} has {known}; pass one of them")


class CMC(MemoryBank):
    """Each view of a crop is contrasted with the banks of the other views: L with that of ab, ab with that of L."""

    ARCH = "resnet50v1"
    IDENTITY = ("space", "graph")

    @staticmethod
    def add_flags(group) -> None:
        MemoryBank.add_flags(group)
        backbones.add_flags(group, default=0)
        add = group.add_argument
        add("--space", action=Views, default="Lab", metavar="SPACE",
            help=f"colour space of two views, its first channel and its other two: {', '.join(SPACES)}")  # fmt: skip
        add("--views", action=Views, dest="space", nargs="+", default=SUPPRESS, metavar="PART",
            help="two or more views, instead of --space: parts of colour spaces, such as L ab Y CbCr HSV-H")  # fmt: skip
        add("--graph", choices=("full", "core"), default="full",
            help="pairs of views to contrast: all of them, or the first of --views with each other one")  # fmt: skip
        group.set_defaults(arch=CMC.ARCH)

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        MemoryBank.check(args, samples)
        check_arch(args)
        if args.graph == "core" and len(view_names(args.space)) == 2:
            raise ValueError("--graph core: is the full graph if there are two views; leave it out, or pass more --views")
        if args.arch == "alexnet":
            mixture.check_group(args, 2, "AlexNet's fully connected layers need two")

    @staticmethod
    def views(args: Namespace) -> list[ViewSpec]:
        return [ViewSpec("crop", args.size, (args.crop_min, 1.0))]

    @staticmethod
    def add_probe_flags(group) -> None:
        backbones.add_flags(group)
        add = group.add_argument
        add("--space", action=Views, metavar="SPACE",
            help="colour space, or views joined by +; default: the checkpoint's, or Lab for `random`")  # fmt: skip
        add("--only-views", nargs="+", metavar="PART", help="take the features of these views alone; default: of all")

    @classmethod
    def probe(cls, arch: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        if arch == "alexnet":
            return of_cmc_code({"crop_min": 0.2, **trained}, lr=0.1)
        return of_cmc_code(trained, lr=50.0 if arch.endswith("v3") else 30.0)

    @staticmethod
    def frozen(args: Namespace) -> backbones.Probed:
        """The branches of the chosen views; layers 1 to 5 of AlexNet, 6 of a ResNet."""
        check_arch(args)
        names, views = branch_names(args.space), chosen(args)
        trunk = Branches(args.arch, {names[view]: channels_of(view) for view in views}, output_stride=args.output_stride)
        space = "+".join(views)
        return backbones.Probed(
            trunk, trunk.layers, "fc",
            features=lambda x, of: trunk.features(color_views(x, space), of),
            maps=lambda x: trunk.last_maps(color_views(x, space)),
        )  # fmt: skip

    @staticmethod
    def networks(trunk: Any, args: Namespace) -> dict[str, backbones.Network]:
        """The branches of ResNets, by the names of their banks: timm's ResNets with other widths. timm lacks this AlexNet."""
        found: dict[str, backbones.Network] = {}
        for view, bank in zip(view_names(args.space), bank_names(args.space), strict=True):
            if args.arch != "alexnet" and view in chosen(args):
                branch, (space, part) = trunk.get_submodule(branch_names(args.space)[view]), PARTS[view]
                channels = [branch.get_submodule(f"layer{stage}.0.conv1").out_channels for stage in (1, 2, 3, 4)]
                options = {"in_chans": channels_of(view), "channels": channels} | backbones.dilation(args.output_stride)
                pixels = f"{view} of {space} in its usual units"
                mean, std = (tuple(values)[part] for values in SCALES[space])
                found[bank] = backbones.Network(branch, args.arch[:-2], options, partial(_view, view), pixels, mean, std)
        return found

    @staticmethod
    def trunk(state_dict, args):
        """The branches of the chosen views, as this code or the released one saved them, without their fc layers."""
        names = {re.sub("^(module[.])?(encoder[.])?(module[.])?", "", name): value for name, value in state_dict.items()}
        wanted = [branch_names(args.space)[view] for view in chosen(args)]
        found = {name: value for name, value in names.items() if name.partition(".")[0] in wanted}
        return {name: value for name, value in found.items() if not name.split(".")[1].startswith("fc")}

    def __init__(self, args: Namespace, samples: int):
        channels = {name: channels_of(view) for view, name in branch_names(args.space).items()}
        banks = bank_names(args.space)
        pairs = graph_pairs(len(banks), args.graph)
        # a Z for each pair, as published: it depends on encoder and bank. With two views a bank has one pair, and names it
        criteria = {banks[b] if len(banks) == 2 else f"{banks[q]}_{banks[b]}": (q, b) for q, b in pairs}
        super().__init__(args, samples, Branches(args.arch, channels, args.nce_dim, args.output_stride), banks, criteria)
        self.space = args.space

    def encoders(self) -> list[nn.Module]:
        return list(self.encoder.children())

    def inputs(self, batch: Batch, rng: np.random.Generator) -> list[torch.Tensor]:
        """n x 1 or 2 x H x W each. As published, the conversion is first, then the mixture, of all channels as one image."""
        views = color_views(batch.views[0], self.space)
        (mixed,) = self.mixture([torch.cat(views, 1)], rng)
        return list(mixed.split([view.shape[1] for view in views], 1))

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also each channel of each view, as its network gets it."""
        rows = super(MemoryBank, self).pictures(batch, targets)
        for name, view in zip(view_names(self.space), targets.views, strict=True):
            title = f"view {name}" + (", channel {}" if view.shape[1] > 1 else "")
            rows += [(title.format(i), grey(x[:SHOWN])) for i, x in enumerate(view.unbind(1), 1)]
        return rows


class InsDis(MemoryBank):
    """One encoder and one bank: an image is compared with its own older features."""

    @staticmethod
    def add_flags(group) -> None:
        MemoryBank.add_flags(group)
        backbones.add_flags(group, default=0)

    @classmethod
    def probe(cls, arch: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """On jittered images, as in its training."""
        return of_cmc_code(trained) | {"aug": "v1"}

    @staticmethod
    def views(args: Namespace) -> list[ViewSpec]:
        return [moco_v1_view("crop", args.size, (args.crop_min, 1.0))]

    def __init__(self, args: Namespace, samples: int):
        backbones.feature_shape(backbones.build_trunk(args), args.arch, args.size, args.size)  # refuses a bad arch
        encoder = backbones.build(args.arch, args.output_stride, zero_init_last=False, num_classes=args.nce_dim)
        super().__init__(args, samples, encoder, ["image"], {"image": (0, 0)})

    def encoders(self) -> list[nn.Module]:
        return [self.encoder]
