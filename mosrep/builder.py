"""MosRep (ICLR 2023, openreview JAezPMehaUu): MoCo-v2, and mosaics of local crops of four images on the query side."""

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from torch import nn

from mosrep.mosaic import compose, cut_tiles, draw_offset, drawn, shift, sources, tile_boxes, tile_weights
from utils.data.photometric import normalized
from utils.learning import amp, backbones, mixture
from utils.learning.contrast import info_nce, key_copy
from utils.learning.drawing import SHOWN
from utils.learning.key_queue import KeyQueue
from utils.learning.method import Batch, Stats, Step, Targets
from utils.run import dist, flags

TILES = 4  # local crops of an image, and tiles of a mosaic
POSITIONS = ("upper_left", "upper_right", "lower_left", "lower_right")  # of the tiles, in their order


class Projector(nn.Module):
    """The head that whole views and tiles share: Conv1x1 - BN - ReLU - pool - Linear - ReLU - Linear. The trunk has no fc."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))

    def forward(self, x):  # n x channels x h x w -> n x dim
        return self.projector(self.conv(x).mean((2, 3)))


class MosRep(KeyQueue):
    """Whole views and tiles of shifted mosaics are compared with the keys of the global batch and the queue."""

    @staticmethod
    def add_flags(group) -> None:
        KeyQueue.add_flags(group)
        add = group.add_argument
        add("--shift-enable", type=float, default=1.0, help="probability that the mosaics of a step are shifted")
        add("--shift-range", type=int, default=48, help="largest shift of a mosaic in pixels")
        add("--shift-beta", type=float, default=0.5, help="both parameters of the Beta distribution of the shift")

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        KeyQueue.check(args, samples)
        flags.positive(["--shift-beta"], args)
        flags.in_range("--shift-enable", args.shift_enable, 0, 1)
        flags.in_range("--shift-range", args.shift_range, 0, args.size // 2 - 2)
        if args.size % 2:
            raise ValueError(f"--size {args.size}: two tiles must fill a side; pass {args.size + 1}")
        mixture.check_group(args, TILES, "a mosaic takes four different ones")

    @staticmethod
    def views(args: Namespace):
        return KeyQueue.key_views(args, TILES)

    def __init__(self, args: Namespace, samples: int):
        super().__init__(args, samples)
        self.size = args.size
        self.shift = {"enable": args.shift_enable, "reach": args.shift_range, "beta": args.shift_beta}
        self.encoder_q, self.encoder_k = (backbones.build_trunk(args) for _ in range(2))
        channels, self.stride = backbones.feature_shape(self.encoder_q, args.arch, args.size, args.size)
        self.projector_q, self.projector_k = (Projector(channels, args.moco_dim) for _ in range(2))
        for query, key in self.pairs():
            key_copy(query, key)
        self.add_queue(args.moco_dim, args.moco_k)

    def pairs(self):
        return [(self.encoder_q, self.encoder_k), (self.projector_q, self.projector_k)]

    def chance(self, batch_size: int) -> float:
        # the loss of a shifted tile has a weight; its mean is estimated from 2,000 offsets
        rng = np.random.default_rng(0)
        boxes = [tile_boxes(self.size, draw_offset(rng, **self.shift)) for _ in range(2000)]
        weight = torch.stack([tile_weights(b, self.size) for b in boxes]).mean().item()
        return (1 + weight) * float(np.log(batch_size + self.queue.shape[1]))

    def facts(self, batch_size: int) -> dict[str, Any]:
        return super().facts(batch_size) | {"candidates": batch_size + self.queue.shape[1]}

    @torch.no_grad()
    def targets(self, batch: Batch, step: Step) -> Targets:
        """group_size: images in a BatchNorm group; offsets: n x 2, (x, y) in pixels, one offset for each group."""
        n = len(batch)
        keys = self.keys(nn.Sequential(self.encoder_k, self.projector_k), batch.views[1], step)  # N x C
        drawn = [draw_offset(step.rng, **self.shift) for _ in range(dist.world() * self.bn_splits)]
        offsets = np.repeat(dist.own(drawn, self.bn_splits), n // self.bn_splits, axis=0)  # n x 2
        places = dist.rank() * n + np.arange(n)  # of the images in the global batch
        return Targets({"keys": keys, "group_size": n // self.bn_splits}, places=places, offsets=offsets)

    def contrast(self, q: torch.Tensor, keys: torch.Tensor, places: torch.Tensor, reduction: str = "mean"):
        """InfoNCE with all keys of the global batch and the queue as candidates, so the images of one mosaic are negatives.

        q: m x C; keys: N x C; places: m, the row of each query's key. -> (loss, top-1 in %).
        """
        logits = torch.cat([q @ keys.T, q @ self.queue], dim=1)  # m x (N + K)
        return info_nce(logits, places, self.temperature, reduction)

    def embed_tiles(self, crops: torch.Tensor, offset: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Local crops of one BatchNorm group, n x 4 x 3 x s x s -> 4n x C and 4n weights, mosaic by mosaic, tile by tile."""
        boxes = tile_boxes(self.size, offset)
        mosaics = shift(normalized(compose(crops)), offset)  # n x 3 x 2s x 2s
        with amp.autocast(crops.device, self.amp):
            features = self.encoder_q(mosaics)
            with torch.autocast(crops.device.type, enabled=False):
                tiles = cut_tiles(features, boxes, self.stride)  # 4n x channels x h x w
            z = self.projector_q(tiles)  # 4n x C
        weights = dist.on_device(tile_weights(boxes, self.size).repeat(len(crops)), crops.device)
        return nn.functional.normalize(z.float(), dim=1), weights

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also the mosaics of the first BatchNorm group, with their boxes."""
        offset = tuple(targets.offsets[0])
        mosaics = compose(batch.views[2][: targets.group_size])[:SHOWN]
        title = f"mosaics, shifted by {offset[0]} and {offset[1]} pixels"
        return [*super().pictures(batch, targets), (title, drawn(shift(normalized(mosaics), offset), offset))]

    def forward(self, batch: Batch, targets: Targets, step: Step) -> tuple[torch.Tensor, Stats]:
        x_q, _, crops = batch.views  # n x 3 x H x W, n x 3 x H x W, n x 4 x 3 x H/2 x W/2
        size, starts = targets.group_size, range(0, len(x_q), targets.group_size)
        q = self.embed(nn.Sequential(self.encoder_q, self.projector_q), x_q, size)  # n x C
        of_tiles = [targets.places[i : i + size][sources(size)].flatten() for i in starts]  # 4n together
        places, of_tiles = dist.on_device(np.concatenate([targets.places, *of_tiles]), q.device).split([len(q), 4 * len(q)])
        loss_query, top1 = self.contrast(q, targets.keys, places)

        parts = [self.embed_tiles(crops[i : i + size], tuple(targets.offsets[i])) for i in starts]
        q_tile, weights = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))  # 4n x C, 4n
        loss_tile, top1_tile = self.contrast(q_tile, targets.keys, of_tiles, reduction="none")
        loss_tile = (loss_tile * weights).mean()
        stats = {"top1": top1, "top1_tile": top1_tile, "loss_query": loss_query.detach(), "loss_tile": loss_tile.detach()}
        if step.watched:
            stats |= self.health(q, targets.keys[places], step)
            for tile, position in enumerate(POSITIONS):
                part = q_tile[tile::TILES].detach(), targets.keys, of_tiles[tile::TILES]
                stats[f"health_top1_{position}"] = self.contrast(*part)[1]
        return loss_query + loss_tile, stats
