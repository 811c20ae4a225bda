"""Methods with memory banks: CMC (arXiv 1906.05849) contrasts colour channels, InsDis (1805.01978) contrasts crops."""

import re
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cmc.color import PARTS, SCALES, SPACES, channels_of, color_views, view_names
from cmc.memory import Bank, DrawnAhead, Scores, last_places
from cmc.nets import ARCHS, STRIDES, Branches
from cmc.views import Views, bank_names, branch_names, chosen, graph_pairs
from utils.data.views import moco_v1_view
from utils.learning import backbones, health, mixture
from utils.learning.contrast import statistics_kept
from utils.learning.criterion import criterion
from utils.learning.drawing import SHOWN, as_uint8, grey
from utils.learning.method import Batch, Method, Stats, Step, Targets, ViewSpec
from utils.learning.probes import of_cmc_code
from utils.run import dist, flags


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


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


class MemoryBank(Method):
    """Embeddings of an encoder, contrasted with the rows of memory banks: the base of CMC and InsDis."""

    scores = staticmethod(Scores.apply)
    PER_IMAGE = True

    @staticmethod
    def add_flags(group) -> None:
        add = group.add_argument
        add("--bn-splits", type=int, default=1, help="BatchNorm groups of a process's batch; each has its own statistics")
        add("--size", type=int, default=224, help="side of a view in pixels")
        add("--crop-min", type=float, default=0.08, help="smallest area of a crop, as a share of the image")
        add("--nce-dim", type=int, default=128, help="dimensions of an embedding")
        add("--nce-k", type=int, default=16384, help="number of negatives: random rows of a bank")
        add("--nce-t", type=float, default=0.07, help="temperature of the scores")
        add("--nce-m", type=float, default=0.5, help="momentum of a bank's row: share of the old row in the new row")
        add("--fill-banks", action="store_true",
            help="write features of the untrained encoders into the banks, in a pass before the first epoch")  # fmt: skip
        add("--loss", choices=["nce", "softmax"], default="nce", help="loss: noise-contrastive estimation, or cross-entropy")
        mixture.add_flags(group)
        group.set_defaults(batch_size=128, lr=0.06, epochs=240, lr_steps=[120, 160, 200])  # 0.06 is 0.03 for a batch of 128
        group.set_defaults(amp="fp32")  # its authors lost 0.5 to 1 % of accuracy in fp16

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        mixture.check(args)
        flags.positive(["--size", "--nce-dim", "--nce-k", "--nce-t"], args)
        flags.in_range("--crop-min", args.crop_min, 1e-8, 1)
        flags.in_range("--nce-m", args.nce_m, 0, 1)

    @staticmethod
    def bn_groups(args: Namespace) -> int:
        return args.bn_splits

    def __init__(self, args: Namespace, samples: int, encoder: Any, banks: list[str], pairs: dict[str, tuple[int, int]]):
        """banks: one for each encoder. pairs: name of a criterion -> (number of the encoder, number of its queries' bank)."""
        super().__init__(args, samples)
        self.bn_splits, self.samples, self.negatives = args.bn_splits, samples, args.nce_k
        self.momentum, self.temperature, self.prepares = args.nce_m, args.nce_t, args.fill_banks
        self.mixture = mixture.Mixture(args)
        self.encoder = encoder
        self.banks: Any = nn.ModuleDict({name: Bank(samples, args.nce_dim) for name in banks})
        self.pairs, self.drawn = pairs, DrawnAhead()
        self.criteria: Any = nn.ModuleDict({name: criterion(args.loss, args.nce_t, samples) for name in pairs})

    def chance(self, batch_size: int) -> float:
        return sum(c.chance(1 + self.negatives) for c in self.criteria.values())

    def facts(self, batch_size: int) -> dict[str, Any]:
        """negatives: rows of a bank for each image."""
        dim = next(iter(self.banks.values())).memory.shape[1]
        return {"dim": dim, "candidates": 1 + self.negatives, "temperature": self.temperature, "temperature_flag": "--nce-t",
                "negatives": self.negatives}  # fmt: skip

    def health(self, features: list[torch.Tensor], targets: Targets) -> Stats:
        """Of the first of `pairs`, where a bank's row is the positive; of the bank; of the views after --space."""
        query, bank = next(iter(self.pairs.values()))
        memory = list(self.banks.values())[bank].memory
        found = health.of_pairs(features[query].detach(), memory[targets.rows[:, 0]]) | health.of_bank(memory)
        names = zip(self.banks, targets.views, strict=True)
        return found | ({f"health_flat_{name}": health.flat(view) for name, view in names} if len(targets.views) > 1 else {})

    def inputs(self, batch: Batch, rng: np.random.Generator) -> list[torch.Tensor]:
        """The encoders' inputs, n x channels x H x W each, mixed by --im-type."""
        return self.mixture(batch.views, rng)

    @torch.no_grad()
    def targets(self, batch: Batch, step: Step) -> Targets:
        """group_size: images in a BatchNorm group; rows: of the banks, first of the image itself, then of its negatives."""
        n, ids = len(batch), batch.sample_ids
        views = tuple(self.inputs(batch, step.rng))
        places = range(dist.rank() * n, (dist.rank() + 1) * n)
        negatives = dist.on_device(self.drawn(step.seed, step.number, places, self.samples, self.negatives), ids.device)
        rows = torch.cat([ids.unsqueeze(1).to(negatives.dtype), negatives], 1)  # n x (1 + K)
        targets = Targets({"group_size": n // self.bn_splits}, views=views, rows=rows)
        self.sample_ids = ids
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in self.banks}
        if not all(c.ready for c in self.criteria.values()):  # the first step of NCE
            with statistics_kept(self.encoder):
                for pair, _, scores in self.scored(self.features(targets), rows):
                    self.criteria[pair].start(scores)
        return targets

    @torch.no_grad()
    def prepare(self, batch: Batch, step: Step) -> None:
        """Replace the rows of the images by their features. Z of NCE is that of the random rows, as without this pass."""
        targets = self.targets(batch, step)
        with statistics_kept(self.encoder):
            self.keep(self.features(targets))
        self.write(0)

    def features(self, targets: Targets) -> list[torch.Tensor]:
        """n x C of each encoder."""
        return [self.embed(e, x, targets.group_size) for e, x in zip(self.encoders(), targets.views, strict=True)]

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also the mixed crops."""
        mixed = [("crop, mixed", as_uint8(targets.views[0][:SHOWN]))] if self.mixture.type else []
        return [*super().pictures(batch, targets), *mixed]

    def scored(self, features: list[torch.Tensor], rows: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(pair, name of its bank, scores n x (1 + K)) for each of `pairs`."""
        names = list(self.banks)
        for pair, (query, bank) in self.pairs.items():
            yield pair, names[bank], self.scores(features[query], self.banks[names[bank]].memory, rows)

    def forward(self, batch: Batch, targets: Targets, step: Step) -> tuple[torch.Tensor, Stats]:
        """The features of each encoder go into its own bank, and are contrasted with the banks of `pairs`."""
        features = self.features(targets)
        self.keep(features)
        losses, top1 = [], dict[str, list[torch.Tensor]]()
        for pair, name, scores in self.scored(features, targets.rows):
            loss, right = self.criteria[pair](scores)
            losses.append(loss)
            top1.setdefault(name, []).append(right)
        stats: Stats = {f"top1_{name}": mean(found) for name, found in top1.items()} if len(losses) > 1 else {}
        stats |= {"top1": mean([x for found in top1.values() for x in found])}
        return sum(losses), stats | (self.health(features, targets) if step.watched else {})

    def keep(self, features: list[torch.Tensor]) -> None:
        """Keep the features of a step, or of a slice of it, for `write`."""
        for name, f in zip(self.banks, features, strict=True):
            self.seen[name].append(f.detach())

    def commit(self, step: Step) -> None:
        """Update the rows of the step's images and, after the first step, keep Z."""
        self.write(self.momentum)

    @torch.no_grad()
    def write(self, momentum: float) -> None:
        sample_ids = dist.gather(self.sample_ids)
        last = last_places(sample_ids, self.samples)
        for name, bank in self.banks.items():
            bank.update(dist.gather(torch.cat(self.seen[name]))[last], sample_ids, momentum)
        for c in self.criteria.values():
            c.commit()


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
                stride = {"output_stride": args.output_stride} if args.output_stride else {}
                options = {"in_chans": channels_of(view), "channels": channels} | stride
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
