"""MosRep (ICLR 2023, openreview JAezPMehaUu): MoCo-v2 whose query side also sees mosaics of local crops of four images."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from moco.builder import MoCo
from mosrep.mosaic import compose, cut_tiles, draw_offset, shift, sources, tile_boxes, tile_weights
from utils.data.photometric import normalized
from utils.learning import amp, backbones
from utils.learning.contrast import Step, info_nce, key_copy, shuffled_keys
from utils.run import dist
from utils.run.flags import in_range, positive


class Projector(nn.Module):
    """The head that whole views and tiles share: Conv1x1 - BN - ReLU - pool - Linear - ReLU - Linear. No trunk has an fc."""

    def __init__(self, channels, dim):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))

    def forward(self, x):  # n x channels x h x w -> n x dim
        return self.projector(self.conv(x).mean((2, 3)))


class MosRep(MoCo):
    @staticmethod
    def add_flags(group):
        MoCo.add_shared_flags(group)
        group.set_defaults(local_crops=4)  # a mosaic is 2 x 2
        group.add_argument("--shift-enable", type=float, default=1.0, help="probability that a step's mosaics are shifted")
        group.add_argument("--shift-range", type=int, default=48, help="largest shift of a mosaic in pixels")
        group.add_argument("--shift-beta", type=float, default=0.5, help="both parameters of the Beta law of the shift")

    @staticmethod
    def check(args, samples):
        MoCo.check(args, samples)
        positive(["--shift-beta"], args)
        in_range("--shift-enable", args.shift_enable, 0, 1)
        in_range("--shift-range", args.shift_range, 0, args.size // 2 - 2)
        if args.size % 2:
            raise ValueError(f"--size {args.size}: two tiles must fill a side; {args.size + 1} would do")
        n = args.batch_size // dist.world() // args.bn_splits
        if n < 4:
            raise ValueError(
                f"--batch-size {args.batch_size}: leaves {n} images for each process and BatchNorm group, and a mosaic takes "
                f"four different ones; {4 * dist.world() * args.bn_splits} would do"
            )

    def build_encoders(self, args):
        self.size = args.size
        self.shift = {"enable": args.shift_enable, "reach": args.shift_range, "beta": args.shift_beta}
        self.encoder_q, self.encoder_k = (backbones.build_trunk(args) for _ in range(2))
        self.map = backbones.feature_shape(self.encoder_q, args.arch, args.size, args.size)
        self.projector_q, self.projector_k = (Projector(self.map.channels, args.moco_dim) for _ in range(2))
        for query, key in self.pairs():
            key_copy(query, key)

    def pairs(self):
        return [(self.encoder_q, self.encoder_k), (self.projector_q, self.projector_k)]

    def embed_q(self, x):  # n x 3 x H x W -> n x C
        return self.embed(nn.Sequential(self.encoder_q, self.projector_q), x)

    def embed_k(self, x):
        return self.embed(nn.Sequential(self.encoder_k, self.projector_k), x)

    def embed_tiles(self, crops, offset):
        """n x 4 x 3 x s x s -> 4n x C and 4n weights, tile by tile of each mosaic."""
        boxes = tile_boxes(self.size, offset)
        mosaics = compose(crops).contiguous(memory_format=torch.channels_last)  # n x 3 x 2s x 2s
        mosaics = shift(normalized(mosaics), offset)
        with amp.autocast(crops.device, self.amp):
            features = self.encoder_q(mosaics)
            with torch.autocast(crops.device.type, enabled=False):
                tiles = cut_tiles(features, boxes, self.map.stride)  # 4n x channels x h x w
            z = self.projector_q(tiles)  # 4n x C
        weights = tile_weights(boxes, self.size).to(crops.device, non_blocking=True).repeat(len(crops))
        return normalize(z.float(), dim=1), weights

    def contrast(self, q, keys, target, reduction="mean"):
        """The right key among all N keys of the batch and the queue: images that share a mosaic are explicit negatives."""
        logits = torch.cat([q @ keys.T, q @ self.queue], dim=1)  # n x (N + K)
        return info_nce(logits, target, self.criterion.temperature, reduction)

    def chance(self, batch: int) -> float:
        # a shifted tile counts with its weight; the mean weight is that of 2,000 draws of the offset
        rng = np.random.default_rng(0)
        boxes = [tile_boxes(self.size, draw_offset(rng, **self.shift)) for _ in range(2000)]
        weight = torch.stack([tile_weights(b, self.size) for b in boxes]).mean().item()
        return (1 + weight) * self.criterion.chance(batch + self.queue.shape[1])

    def forward(self, views, index, step: Step):
        x_q, x_k, crops = views  # n x 3 x H x W, n x 3 x H x W, n x 4 x 3 x H/2 x W/2
        n = len(x_q)
        self.new_keys = keys = shuffled_keys(self.embed_k, x_k, step.rng)  # N x C
        images = dist.rank() * n + torch.arange(n)  # places in the global batch
        loss_query, top1 = self.contrast(self.embed_q(x_q), keys, images.to(keys.device, non_blocking=True))

        offsets = [draw_offset(step.rng, **self.shift) for _ in range(dist.world() * self.bn_splits)]
        offsets = dist.own(offsets, self.bn_splits)
        parts = [self.embed_tiles(part, o) for part, o in zip(crops.chunk(self.bn_splits), offsets, strict=True)]
        q, weights = (torch.cat(p) for p in zip(*parts, strict=True))  # 4n x C, 4n
        target = torch.cat([part[sources(len(part))].flatten() for part in images.chunk(self.bn_splits)])
        loss_tile, top1_tile = self.contrast(q, keys, target.to(keys.device, non_blocking=True), reduction="none")
        loss_tile = (loss_tile * weights).mean()
        stats = {"top1": top1, "top1_tile": top1_tile, "loss_query": loss_query.detach(), "loss_tile": loss_tile.detach()}
        return loss_query + loss_tile, stats
