"""Methods with a key encoder and a queue of keys (MoCo, arXiv 1911.05722): the base of MoCo and MosRep."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.data.views import ViewSpec, moco_v2_view
from utils.learning import backbones, health
from utils.learning.contrast import ema_, enqueue_, shuffled_keys
from utils.learning.method import Method, Stats, Step
from utils.run import dist, flags
from utils.run.warned import warn


class KeyQueue(Method):
    """Query networks, their moving averages as key networks, and a queue of the newest keys.

    A subclass builds its networks, calls `add_queue`, and names its (query, key) modules in `pairs`.
    """

    # the linear probe of MosRep's table; the released script scaled its lr twice; 0.2 scaled once gives the same 3.2
    PROBE = {"epochs": 90, "batch_size": 4096, "lr": 0.2, "trust": 0.001}

    average = staticmethod(ema_)
    queue: torch.Tensor  # C x K
    queue_ptr: torch.Tensor  # 1, the oldest column

    @staticmethod
    def add_flags(group) -> None:
        backbones.add_flags(group, default=0)
        add = group.add_argument
        add("--bn-splits", type=int, default=1, help="BatchNorm groups of a process's batch; each has its own statistics")
        add("--size", type=int, default=224, help="side of a global view in pixels; local crops have half of it")
        add("--crop-min", type=float, default=0.2, help="smallest area of a global crop, as a share of the image")
        add("--local-scale", type=float, nargs=2, default=[0.1, 0.6], metavar=("MIN", "MAX"),
            help="smallest and largest area of a local crop, as shares of the image")  # fmt: skip
        add("--moco-dim", type=int, default=128, help="dimensions of an embedding")
        add("--moco-k", type=int, default=65536, help="keys in the queue; a multiple of the batch size")
        add("--moco-m", type=float, default=0.999, help="momentum of the key encoder's moving average")
        add("--moco-t", type=float, default=0.2, help="temperature of the logits")

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        flags.positive(["--size", "--moco-dim", "--moco-k", "--moco-t"], args)
        flags.in_range("--moco-m", args.moco_m, 0, 1)
        flags.in_range("--crop-min", args.crop_min, 1e-8, 1)
        low, high = args.local_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"--local-scale {low} {high}: must be 0 < MIN <= MAX <= 1, such as 0.1 0.6")
        if args.moco_k % args.batch_size:
            down = args.moco_k // args.batch_size * args.batch_size
            fits = f"{down} or {down + args.batch_size}" if down else f"{args.batch_size}"
            raise ValueError(f"--moco-k {args.moco_k}: must be a multiple of --batch-size {args.batch_size}; pass {fits}")
        if dist.world() * args.bn_splits == 1:
            warn("--bn-splits 1 in one process: query and key see the same BatchNorm statistics, from which networks tell the "
                 f"positive; pass --bn-splits {math.gcd(8, args.batch_size)}")  # fmt: skip

    @staticmethod
    def key_views(args: Namespace, local_crops: int, view: Callable[..., ViewSpec] = moco_v2_view) -> list[ViewSpec]:
        """One view for the query, one for the key, and the local crops."""
        whole = [view(name, args.size, (args.crop_min, 1.0)) for name in ("query", "key")]
        local = moco_v2_view("local", args.size // 2, tuple(args.local_scale), local_crops)
        return [*whole, local] if local_crops else whole

    @staticmethod
    def bn_groups(args: Namespace) -> int:
        return args.bn_splits

    def __init__(self, args: Namespace, samples: int):
        super().__init__(args, samples)
        self.bn_splits, self.momentum, self.temperature = args.bn_splits, args.moco_m, args.moco_t

    def add_queue(self, dim: int, length: int) -> None:
        """Register the queue, which starts with random directions. Call it last: the networks draw their weights first."""
        self.register_buffer("queue", nn.functional.normalize(torch.randn(dim, length), dim=0))  # C x K
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(query module, key module) of each moving average."""
        raise NotImplementedError

    def encoders(self) -> list[nn.Module]:
        return [module for pair in self.pairs() for module in pair]

    def keys(self, network: nn.Module, x_k: torch.Tensor, step: Step) -> torch.Tensor:
        """The keys of the global batch, N x C, in its order; `commit` puts them into the queue. x_k: n x 3 x H x W."""
        group_size = len(x_k) // self.bn_splits
        self.new_keys = shuffled_keys(lambda x: self.embed(network, x, group_size), x_k, step.rng)
        return self.new_keys

    def facts(self, batch_size: int) -> dict[str, Any]:
        """queue: keys; queue_steps: that fill it; groups: of BatchNorm in the global batch."""
        dim, length = self.queue.shape
        return {"dim": dim, "candidates": 1 + length, "temperature": self.temperature, "temperature_flag": "--moco-t",
                "queue": length, "queue_steps": length // batch_size, "momentum": self.momentum,
                "groups": dist.world() * self.bn_splits}  # fmt: skip

    def health(self, q: torch.Tensor, k: torch.Tensor, step: Step) -> Stats:
        """Of embeddings and their keys, n x C each, and of the queue."""
        age = min(step.number, self.queue.shape[1] // len(self.new_keys))
        return health.of_pairs(q, k) | health.of_queue(q, self.queue, self.queue_ptr, self.temperature, age)

    def commit(self, step: Step) -> None:
        """Update the moving averages from the query side, and put the step's keys into the queue."""
        self.average(self.pairs(), self.momentum)
        enqueue_(self.queue, self.queue_ptr, self.new_keys)
