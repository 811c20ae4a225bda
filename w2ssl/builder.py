"""W2SSL (Zhao et al., TCSVT 2023, doi 10.1109/TCSVT.2023.3298937): montages of half images, a crop loss, a location loss."""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from utils.data.photometric import normalized
from utils.learning import amp, backbones, health
from utils.learning.contrast import ema_, key_copy
from utils.learning.drawing import SHOWN, as_uint8, boxed
from utils.learning.method import Batch, Method, Stats, Step, Targets, ViewSpec
from utils.learning.optim import cosine
from utils.learning.sync_bn import synchronized
from utils.run import dist, flags
from w2ssl.losses import location, supervised_contrastive
from w2ssl.montage import SLOTS, compose, deal, separate

SIDES = ("left half", "right half")  # of the targets' side
COLOURS = dict(zip(SIDES, ("blue", "red"), strict=True))  # in pictures
BASE_TEMPERATURE = 0.07  # the crop loss is multiplied by temperature / this


def mlp(a: int, b: int, c: int, last_bn: bool) -> nn.Sequential:
    """Linear a -> b, BatchNorm, ReLU, Linear b -> c, both without bias; last_bn: then a BatchNorm without affine parameters."""
    layers = [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, c, bias=False)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(c, affine=False)] if last_bn else []))


class W2SSLTargets(Targets):
    def part(self, images: slice):
        raise ValueError("W2SSL: its losses and its BatchNorm span the whole batch, so no slice can be trained alone")


class W2SSL(Method):
    """Online trunk with a head for crops, a predictor and a location head; trunk and crop head have a moving average."""

    average = staticmethod(ema_)
    deal = staticmethod(dist.permute)  # the crops of this process's images -> those of its montages
    PROBE = {"epochs": 100, "batch_size": 256, "lr": 0.1, "trust": 0.0}

    @staticmethod
    def add_flags(group):
        backbones.add_flags(group, default=0)
        add = group.add_argument
        add("--size", type=int, default=224, help="side of a montage in pixels; its four crops have half of it")
        add("--crop-min", type=float, default=0.2, help="smallest area of a crop, as a share of the half image")
        add("--overlap", type=float, default=0.6, help="width that both halves contain, as a share of the image")
        add("--moco-dim", type=int, default=256, help="dimensions of an embedding")
        add("--moco-mlp-dim", type=int, default=4096, help="width of the heads' hidden layer")
        add("--moco-m", type=float, default=0.99, help="initial momentum of the moving average")
        add("--moco-m-cos", action=argparse.BooleanOptionalAction, default=True, help="increase --moco-m to 1 by a half cosine")
        add("--loss-t", type=float, default=0.3, help="temperature of the crop loss")
        add("--loss-loc", type=float, default=1.0, help="weight of the location loss")
        add("--loss-crop", type=float, default=1.0, help="weight of the crop loss")
        add("--flip-aware-location", action="store_true",
            help="exchange the side label of a mirrored crop; else the location loss may have nothing to learn")  # fmt: skip
        # the paper counts montages, half as many as images: its batch 256
        group.set_defaults(batch_size=512, lr=0.6, weight_decay=1e-6, trust=0.001, warmup_epochs=10.0, lr_per="step")

    @staticmethod
    def check(args, samples):
        flags.positive(["--size", "--moco-dim", "--moco-mlp-dim", "--loss-t"], args)
        flags.in_range("--crop-min", args.crop_min, 1e-8, 1)
        flags.in_range("--overlap", args.overlap, 0, 1)
        flags.in_range("--moco-m", args.moco_m, 0, 1)
        flags.in_range("--loss-loc", args.loss_loc, 0, math.inf)
        flags.in_range("--loss-crop", args.loss_crop, 0, math.inf)
        if args.loss_loc == args.loss_crop == 0:
            raise ValueError("--loss-loc 0 --loss-crop 0: nothing would be learned; 1 and 1 are published")
        if args.flip_aware_location and not args.loss_loc:
            raise ValueError("--flip-aware-location: changes the location loss, which --loss-loc 0 leaves out; "
                             "leave out one of them")  # fmt: skip
        if args.size % 2:
            raise ValueError(f"--size {args.size}: two crops must fill a side; pass {args.size + 1}")
        whole = 2 * dist.world()
        if args.batch_size % whole:
            raise ValueError(f"--batch-size {args.batch_size}: the halves of its images must fill montages of four, equally "
                             f"many on each of {dist.world()} processes; "
                             f"pass {max(1, args.batch_size // whole) * whole}")  # fmt: skip

    @staticmethod
    def views(args) -> list[ViewSpec]:
        crop = ViewSpec("", args.size // 2, (args.crop_min, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
        numbers = replace(crop, blur_p=1.0), replace(crop, blur_p=0.1, solarize_p=0.2)
        halves = {"left": (0.0, (1 + args.overlap) / 2), "right": ((1 - args.overlap) / 2, 1.0)}  # exactly .8 and .2
        return [replace(v, name=f"{h} {i}", part=part) for i, v in enumerate(numbers, 1) for h, part in halves.items()]

    def __init__(self, args: argparse.Namespace, samples: int):
        super().__init__(args, samples)
        self.flip_aware = args.flip_aware_location
        self.m, self.m_cos, self.temperature = args.moco_m, args.moco_m_cos, args.loss_t
        self.weights = {"loc": args.loss_loc, "crop": args.loss_crop}
        self.base_encoder, self.momentum_encoder = (backbones.build_trunk(args, zero_init_last=False) for _ in range(2))
        width, _ = backbones.feature_shape(self.base_encoder, args.arch, args.size, args.size // 2)
        for encoder in self.encoders():
            encoder.fc_crop = mlp(width, args.moco_mlp_dim, args.moco_dim, last_bn=True)
        key_copy(self.base_encoder, self.momentum_encoder)
        self.predictor = mlp(args.moco_dim, args.moco_mlp_dim, args.moco_dim, last_bn=False)
        self.fc_loc = nn.Linear(width, 2)
        synchronized(self)

    def encoders(self) -> list[nn.Module]:
        return [self.base_encoder, self.momentum_encoder]

    def features(self, encoder: Any, montages: torch.Tensor) -> torch.Tensor:  # n/2 x 3 x H x W -> 2n x C, one for each crop
        return separate(encoder(normalized(montages.contiguous(memory_format=torch.channels_last))).float())

    def chance(self, batch_size: int) -> float:
        """ln 2 for the side; for each direction of the crop loss, ln of the number of candidates."""
        crop = 2 * math.log(4 * batch_size - 1) * self.temperature / BASE_TEMPERATURE
        return self.weights["loc"] * math.log(2) + self.weights["crop"] * crop

    def facts(self, batch_size: int) -> dict[str, Any]:
        """An embedding is compared with all others of both views: two of each half image, of which three are positives."""
        dim = self.predictor[-1].out_features
        return {"dim": dim, "candidates": 4 * batch_size - 1, "positives": 3, "temperature": self.temperature,
                "temperature_flag": "--loss-t"}  # fmt: skip

    @torch.no_grad()
    def targets(self, batch: Batch, step: Step) -> W2SSLTargets:
        left_1, right_1, left_2, right_2 = batch.views  # n x 3 x h x w each
        n = len(batch)
        order = deal(dist.world() * n, step.rng)  # 2N
        crops = torch.stack([torch.stack([left_1, left_2], 1), torch.stack([right_1, right_2], 1)], 1)  # n x half x view x ...
        crops = self.deal(crops.flatten(0, 1), order)  # 2n x view x 3 x h x w, the montages of this process
        montages = [compose(view) for view in crops.unbind(1)]  # n/2 x 3 x H x W each
        number = dist.on_device(order, crops.device)  # 2N
        side = dist.own(number % 2, 2 * n)  # 2n, 0 for a crop of a left half, 1 for a right one
        if self.flip_aware:
            flips = torch.cat(batch.flips[:2], 1).flatten().long()  # n x half
            side = side ^ self.deal(dist.on_device(flips, crops.device), order)
        encoder: Any = self.momentum_encoder
        with amp.autocast(crops.device, self.amp):
            keys = [encoder.fc_crop(self.features(encoder, x)) for x in montages]
        keys = [nn.functional.normalize(k.float(), dim=1) for k in keys]  # 2n x C for each view
        return W2SSLTargets(montages=montages, keys=keys, image=number // 2, side=side)

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also the montages, with the side of the image that each crop is from."""
        half = targets.montages[0].shape[-1] // 2
        boxes = torch.tensor([(x, y, x + half - 1, y + half - 1) for y in (0, half) for x in (0, half)])
        sides = [[SIDES[side] for side in four] for four in targets.side.view(-1, SLOTS)[:SHOWN].tolist()]
        drawn = [boxed(as_uint8(view[:SHOWN]), boxes, sides, COLOURS) for view in targets.montages]
        title = ", ".join(f"{COLOURS[side]}: {side}" for side in SIDES)
        return [*super().pictures(batch, targets), *((f"montages {i}; {title}", x) for i, x in enumerate(drawn, 1))]

    def forward(self, batch: Batch, targets: W2SSLTargets, step: Step) -> tuple[torch.Tensor, Stats]:
        encoder: Any = self.base_encoder
        with amp.autocast(targets.image.device, self.amp):
            f = [self.features(encoder, x) for x in targets.montages]  # 2n x C each
            online = [self.predictor(encoder.fc_crop(x)) for x in f]
            scores = self.fc_loc(f[0]).float()  # 2n x 2
        z, k = [nn.functional.normalize(x.float(), dim=1) for x in online], targets.keys
        loss_12, top1 = supervised_contrastive(z[0], k[1], targets.image, self.temperature)
        loss_21, _ = supervised_contrastive(z[1], k[0], targets.image, self.temperature)
        loss_crop = (loss_12 + loss_21) * self.temperature / BASE_TEMPERATURE
        loss_loc, accuracy = location(scores, targets.side)
        stats = {"location": accuracy, "top1": top1, "loss_loc": loss_loc.detach(), "loss_crop": loss_crop.detach()}
        if step.watched:
            stats |= health.of_pairs(z[0], k[1])
        return self.weights["loc"] * loss_loc + self.weights["crop"] * loss_crop, stats

    def commit(self, step: Step) -> None:
        """Update the averaged branch, with the momentum of the next step."""
        momentum = 1 - cosine(1 - self.m, (step.number + 1) / step.total) if self.m_cos else self.m
        self.average([(self.base_encoder, self.momentum_encoder)], momentum)
