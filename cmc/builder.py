"""Contrast with a memory bank: CMC (arXiv 1906.05849) between colour spaces of a crop, InsDis (1805.01978) between crops."""

import re

import torch
from torch import nn

from cmc.color import SPACES, color_views
from cmc.memory import Bank, Scores, draw_rows, last_places
from cmc.nets import ARCHS, TwoBranches
from utils.data.views import ViewSpec, moco_v1_view
from utils.evaluation.probe import Frozen, timm_trunk
from utils.learning import backbones, layouts, mixture
from utils.learning.contrast import Step, embed
from utils.learning.criterion import criterion
from utils.run import dist
from utils.run.flags import in_range, positive


def check_arch(args):
    if args.arch not in ARCHS:
        raise ValueError(f"--arch {args.arch}: CMC has {', '.join(ARCHS)}; pass one of them")
    if args.arch == "alexnet" and args.size != 224:
        raise ValueError(f"--size {args.size}: AlexNet's fully connected layers take 224; pass that")


class MemoryBank(nn.Module):
    """What CMC and InsDis share: an encoder whose embeddings are contrasted with rows of banks."""

    PER_IMAGE = True  # its state belongs to the images of one data set, in their order
    # differs from the published probe: because its lr is not scaled by the batch, and ours is, as every --lr; at 256 they agree
    PROBE = {"epochs": 60, "batch_size": 256, "lr": 30.0, "trust": 0.0, "lr_steps": [30, 40, 50], "lr_gamma": 0.2}

    @staticmethod
    def add_flags(group):
        add = group.add_argument
        add("--bn-splits", type=int, default=1, help="groups of a process's batch that BatchNorm treats as separate processes")
        add("--size", type=int, default=224, help="side of a view in pixels")
        add("--crop-min", type=float, default=0.08, help="smallest area of a crop, as a share of the image")
        add("--nce-dim", type=int, default=128, help="dimensions of an embedding")
        add("--nce-k", type=int, default=16384, help="rows of a bank that an image is contrasted with, drawn at random")
        add("--nce-t", type=float, default=0.07, help="temperature of the scores")
        add("--nce-m", type=float, default=0.5, help="what a row of a bank keeps of itself when its image was seen")
        add("--loss", choices=["nce", "softmax"], default="nce", help="noise-contrastive estimation, or cross-entropy")
        mixture.add_flags(group)
        group.set_defaults(batch_size=128, lr=0.06, epochs=240, lr_steps=[120, 160, 200])  # 0.06 is 0.03 for a batch of 128

    @staticmethod
    def check(args, samples):
        mixture.check(args)
        positive(["--size", "--nce-dim", "--nce-k", "--nce-t"], args)
        in_range("--crop-min", args.crop_min, 1e-8, 1)
        in_range("--nce-m", args.nce_m, 0, 1)
        if args.nce_k > samples and dist.rank() == 0:
            print(f"warning: --nce-k {args.nce_k} is more than the data set has images ({samples}), whose rows come "
                  f"several times; {max(1, samples // 4)} would do", flush=True)  # fmt: skip

    def __init__(self, args, encoder, banks: list[str]):
        super().__init__()
        self.amp, self.bn_splits, self.samples = args.amp, args.bn_splits, args.samples
        self.negatives, self.momentum = args.nce_k, args.nce_m
        self.mixture = mixture.Mixture(args)
        self.encoder = encoder
        self.banks = nn.ModuleDict({name: Bank(args.samples, args.nce_dim) for name in banks})
        self.criteria = nn.ModuleDict({name: criterion(args.loss, args.nce_t, args.samples) for name in banks})

    def embed(self, encoder, x):  # n x channels x H x W -> n x C
        return embed(encoder, x, self.amp, self.bn_splits)

    def chance(self, batch: int) -> float:
        """The loss of guessing, summed over the banks."""
        return sum(c.chance(1 + self.negatives) for c in self.criteria.values())

    def contrast(self, features: dict[str, torch.Tensor], index, step: Step):
        """features: bank -> n x C, what is contrasted with that bank's rows. -> (loss, stats)."""
        n = len(index)
        places = range(dist.rank() * n, (dist.rank() + 1) * n)
        negatives = dist.on_device(draw_rows(step.seed, step.number, places, self.samples, self.negatives), index.device)
        rows = torch.cat([index.unsqueeze(1).to(negatives.dtype), negatives], 1)  # n x (1 + K)
        found = {name: self.criteria[name](Scores.apply(f, self.banks[name].memory, rows)) for name, f in features.items()}
        stats = {f"top1_{name}": top1 for name, (_, top1) in found.items()} if len(found) > 1 else {}
        stats["top1"] = sum(top1 for _, top1 in found.values()) / len(found)
        return sum(loss for loss, _ in found.values()), stats

    @torch.no_grad()
    def commit(self, step: Step):
        """After the optimizer's update: the rows of the images that were seen, and, after the first step, Z."""
        index = dist.gather(self.index)
        last = last_places(index, self.samples)
        for name, bank in self.banks.items():
            bank.update(dist.gather(self.seen[name])[last], index, self.momentum)
            self.criteria[name].commit()


class CMC(MemoryBank):
    """L is contrasted with the bank of ab, ab with the bank of L."""

    ARCH = "resnet50v1"
    PROBE = MemoryBank.PROBE | {"lr": None}  # by the arch

    @staticmethod
    def add_flags(group):
        MemoryBank.add_flags(group)
        group.add_argument("--space", choices=SPACES, default="Lab", help="colour space: its first channel, and the other two")
        group.set_defaults(arch=CMC.ARCH)

    @staticmethod
    def check(args, samples):
        MemoryBank.check(args, samples)
        check_arch(args)
        groups = dist.world() * args.bn_splits
        if args.arch == "alexnet" and args.batch_size // groups < 2:
            raise ValueError(f"--batch-size {args.batch_size}: leaves one image for each process and BatchNorm group, of which "
                             f"AlexNet's fully connected layers need two; {2 * groups} would do")  # fmt: skip

    @staticmethod
    def views(args) -> list[ViewSpec]:
        return [ViewSpec("crop", args.size, (args.crop_min, 1.0))]

    @staticmethod
    def add_probe_flags(parser):
        parser.add_argument("--space", choices=SPACES, help="space of the views; default: the checkpoint's; of random: Lab")

    @staticmethod
    def frozen(args):
        """Both branches; layers 1 to 5 of AlexNet, 6 of a ResNet."""
        check_arch(args)
        if args.space is None and args.pretrained != "random":
            raise ValueError(f"--space: {args.pretrained} does not tell the colour space of its views; pass it, such as Lab")
        args.space = args.space or "Lab"
        if args.lr is None:
            args.lr = 0.1 if args.arch == "alexnet" else 50.0 if args.arch.endswith("v3") else 30.0
        trunk = TwoBranches(args.arch)
        return Frozen(trunk, trunk.layers, "fc", lambda trunk, x, layers: trunk.features(*color_views(x, args.space), layers))

    @staticmethod
    def trunk(state_dict, args):
        """Of the encoder that this code or the released one saved; both branches without what begins with fc."""
        names = {re.sub("^(module[.])?(encoder[.])?(module[.])?", "", name): value for name, value in state_dict.items()}
        branches = {name: value for name, value in names.items() if name.startswith(("l_to_ab.", "ab_to_l."))}
        return {name: value for name, value in branches.items() if not name.split(".")[1].startswith("fc")}

    def __init__(self, args):
        super().__init__(args, TwoBranches(args.arch, args.nce_dim), ["l", "ab"])
        self.space = args.space

    def encoders(self):
        """The modules that --compile compiles."""
        return [self.encoder.l_to_ab, self.encoder.ab_to_l]

    def forward(self, views, index, step: Step):
        pair = color_views(*self.mixture(views, step.rng), self.space)  # n x 1 x H x W, n x 2 x H x W
        first, others = (self.embed(branch, x) for branch, x in zip(self.encoders(), pair, strict=True))  # n x C each
        self.seen, self.index = {"l": first.detach(), "ab": others.detach()}, index
        return self.contrast({"ab": first, "l": others}, index, step)


class InsDis(MemoryBank):
    """One encoder and one bank: an image against what it looked like before."""

    frozen, add_probe_flags = staticmethod(timm_trunk), staticmethod(backbones.add_flags)

    @staticmethod
    def add_flags(group):
        MemoryBank.add_flags(group)
        backbones.add_flags(group, default=0)

    @staticmethod
    def views(args) -> list[ViewSpec]:
        return [moco_v1_view("crop", args.size, (args.crop_min, 1.0))]

    @staticmethod
    def trunk(state_dict, args):
        return layouts.trunk_state(state_dict)

    def __init__(self, args):
        backbones.feature_shape(backbones.build_trunk(args), args.arch, args.size, args.size)  # refuses what cannot work
        super().__init__(args, backbones.build(args.arch, args.output_stride, num_classes=args.nce_dim), ["image"])

    def encoders(self):
        """The modules that --compile compiles."""
        return [self.encoder]

    def forward(self, views, index, step: Step):
        f = self.embed(self.encoder, *self.mixture(views, step.rng))  # n x C
        self.seen, self.index = {"image": f.detach()}, index
        return self.contrast({"image": f}, index, step)
