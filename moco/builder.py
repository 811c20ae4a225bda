"""MoCo-v2 (arXiv 1911.05722, 2003.04297), with two crops or with local crops on the query side (multi-crop), and MoCo-v1."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.data.views import moco_v1_view, moco_v2_view
from utils.learning import backbones, mixture
from utils.learning.contrast import key_copy, statistics_kept
from utils.learning.criterion import criterion
from utils.learning.drawing import SHOWN, as_uint8
from utils.learning.key_queue import KeyQueue
from utils.learning.method import Batch, Stats, Step, Targets
from utils.learning.probes import of_cmc_code
from utils.run import dist, flags

UNMIX_PROBE = {"epochs": 100, "batch_size": 256, "lr": 30.0, "trust": 0.0, "lr_steps": [60, 80], "lr_gamma": 0.1}


class MoCo(KeyQueue):
    """Each query is compared with the key of its image and with the queue."""

    @staticmethod
    def add_flags(group) -> None:
        KeyQueue.add_flags(group)
        add = group.add_argument
        add("--local-crops", type=int, default=0, help="number of local crops for the query encoder; side: half of --size")
        add("--moco-head", choices=["mlp", "linear"], default="mlp", help="head of MoCo-v2 (mlp) or MoCo-v1 (linear)")
        add("--loss", choices=["softmax", "nce"], default="softmax", help="loss: InfoNCE, or NCE of MoCo-v1")
        mixture.add_flags(group)
        add("--unmix-prob", type=float, help="Un-Mix: probability of mixup, else CutMix; published 0.5; default: no Un-Mix")
        add("--aug", choices=["v2", "v1"], default="v2", help="augmentation of MoCo-v2 or of MoCo-v1")

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        KeyQueue.check(args, samples)
        mixture.check(args)
        if args.unmix_prob is not None:
            flags.in_range("--unmix-prob", args.unmix_prob, 0, 1)
            mixture.check_group(args, 2, f"--unmix-prob {args.unmix_prob} mixes two")
        if args.local_crops < 0:
            raise ValueError(f"--local-crops {args.local_crops}: must be 0 or more; 4 is the published multi-crop")
        if not args.local_crops and args.local_scale != [0.1, 0.6]:
            raise ValueError("--local-scale: does nothing without --local-crops; leave it out, or pass --local-crops 4")
        v1 = "v1" if args.aug == "v1" else None
        for flag, value in {"--aug": v1, "--im-type": args.im_type, "--unmix-prob": args.unmix_prob}.items():
            if args.local_crops and value is not None:
                raise ValueError(f"{flag} {value}: works with two crops only; leave out --local-crops {args.local_crops}")
        for flag, value in {"--local-crops": args.local_crops or None, "--unmix-prob": args.unmix_prob}.items():
            if args.loss == "nce" and value is not None:
                raise ValueError(f"--loss nce: has one Z, for queries of one kind; leave out {flag} {value}")

    @classmethod
    def probe(cls, arch: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """MoCo-v1 has the probe of the CMC authors' code, on jittered images as in its training; Un-Mix has its own."""
        if trained.get("unmix_prob") is not None:
            return UNMIX_PROBE
        if trained.get("moco_head") == "linear":
            return of_cmc_code(trained) | {"aug": "v1"}
        return cls.PROBE

    @staticmethod
    def views(args: Namespace):
        return KeyQueue.key_views(args, args.local_crops, moco_v1_view if args.aug == "v1" else moco_v2_view)

    def __init__(self, args: Namespace, samples: int):
        super().__init__(args, samples)
        self.local_crops, self.unmix_prob = args.local_crops, args.unmix_prob
        self.mixture = mixture.Mixture(args)
        self.criterion: Any = criterion(args.loss, args.moco_t, samples)
        smallest = args.size // 2 if args.local_crops else args.size
        backbones.feature_shape(backbones.build_trunk(args), args.arch, args.size, smallest)  # refuses a bad arch
        self.encoder_q, self.encoder_k = (self.encoder(args) for _ in range(2))
        key_copy(self.encoder_q, self.encoder_k)
        self.add_queue(args.moco_dim, args.moco_k)

    @staticmethod
    def encoder(args: Namespace) -> nn.Module:
        """A timm model with MoCo-v2's head as classifier, Linear - ReLU - Linear (2003.04297, table 1), or MoCo-v1's Linear.

        The last BatchNorm gamma of each residual branch starts at 0; with the linear head and in Un-Mix at 1, as published.
        """
        zero = args.moco_head == "mlp" and args.unmix_prob is None
        model = backbones.build(args.arch, args.output_stride, zero, num_classes=args.moco_dim)
        if args.moco_head == "mlp":
            name = backbones.classifier_name(model)
            last: Any = model.get_submodule(name)
            model.set_submodule(name, nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last))
        return model

    def pairs(self):
        return [(self.encoder_q, self.encoder_k)]

    def chance(self, batch_size: int) -> float:
        terms = 2 if self.local_crops or self.unmix_prob is not None else 1
        return terms * self.criterion.chance(1 + self.queue.shape[1])

    @torch.no_grad()
    def targets(self, batch: Batch, step: Step) -> Targets:
        """group_size: images in a BatchNorm group; share: of the image itself in its Un-Mix view."""
        n = len(batch)
        group_size = n // self.bn_splits
        x_q, x_k = self.mixture(batch.views[:2], step.rng)  # n x 3 x H x W each
        k = dist.own(self.keys(self.encoder_k, x_k, step), n)  # n x C
        if not self.criterion.ready:  # the first step of NCE
            with statistics_kept(self.encoder_q):
                self.criterion.start(self.scores(self.embed(self.encoder_q, x_q, group_size), k))
        mixed, share = x_q[:0], 1.0  # without Un-Mix
        if self.unmix_prob is not None:
            mixed, share = mixture.un_mix(x_q, self.unmix_prob, self.bn_splits, step.rng)  # n x 3 x H x W
        return Targets({"group_size": group_size, "share": share}, query=x_q, keys=k, mixed=mixed)

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also the mixed queries."""
        mixed = [("query, mixed", targets.query)] if self.mixture.type else []
        mixed += [(f"Un-Mix, {targets.share:.2f} of the image itself", targets.mixed)] if self.unmix_prob is not None else []
        return [*super().pictures(batch, targets), *((title, as_uint8(x[:SHOWN])) for title, x in mixed)]

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Column 0 is the positive, the others are the queue. q, k: n x C. -> n x (1 + K)."""
        return torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], dim=1)

    def contrast(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, top-1 in %) of n x C queries and keys."""
        return self.criterion(self.scores(q, k))

    def forward(self, batch: Batch, targets: Targets, step: Step) -> tuple[torch.Tensor, Stats]:
        k, group_size = targets.keys, targets.group_size
        q = self.embed(self.encoder_q, targets.query, group_size)
        loss, top1 = self.contrast(q, k)
        stats = {"top1": top1}
        if step.watched:
            stats |= self.health(q, k, step)
        if self.unmix_prob is not None:
            q_mix, share = self.embed(self.encoder_q, targets.mixed, group_size), targets.share
            itself, other = (self.contrast(q, k)[0] for q in (q_mix, mixture.reversed_groups(q_mix, len(k) // group_size)))
            loss_mix = share * itself + (1 - share) * other
            stats |= {"loss_plain": loss.detach(), "loss_mix": loss_mix.detach()}
            loss = loss + loss_mix
        if self.local_crops:
            crops = batch.views[2].flatten(0, 1)  # n V x 3 x h x w
            q_local = self.embed(self.encoder_q, crops, group_size * self.local_crops)
            loss_local, top1_local = self.contrast(q_local, k.repeat_interleave(self.local_crops, 0))
            stats |= {"loss_global": loss.detach(), "loss_local": loss_local.detach(), "top1_local": top1_local}
            loss = loss + loss_local
        return loss, stats

    def commit(self, step: Step) -> None:
        super().commit(step)
        self.criterion.commit()
