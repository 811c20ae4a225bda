"""The contract of a method: everything that entry points, engine, probe, benchmarks and tests ask of one.

A training step calls, in this order,

    targets = method.targets(batch, step)               # no gradient: keys, negatives, mixtures, montages
    loss, stats = method(batch, targets, step)          # under DDP; or once for each slice of the batch
    ...                                                 # backward and the optimizer's update
    method.commit(step)                                 # queue, bank, moving average

Until `commit` a step changes nothing but BatchNorm's statistics, so a step that fails can be computed again.
"""

from abc import ABC, abstractmethod
from argparse import Namespace
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from utils.data.batch import Batch
from utils.data.views import ViewSpec
from utils.learning import backbones, layouts
from utils.run import dist, streams

Stats = dict[str, torch.Tensor]


@dataclass
class Step:
    """The position of a step in the whole training. `rng` is equal on all processes."""

    number: int  # counted over all epochs, from 0
    total: int  # steps of the whole training
    seed: int
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = streams.step_draws(self.seed, self.number)

    def seed_torch(self) -> None:
        """Make what a trunk draws itself, such as stochastic depth, a function of seed, step and process."""
        torch.manual_seed(streams.trunk_seed(self.seed, self.number, dist.rank()))


@dataclass
class Targets:
    """What `forward` compares the queries of n images with.

    Each field has a row for each image (a tensor, an array, or a tuple of them), except the fields that SHARED names.
    """

    SHARED: ClassVar[tuple[str, ...]] = ()

    def part(self, images: slice) -> Self:
        """The targets of some of the images."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.SHARED}
        return replace(self, **{name: _rows(value, images) for name, value in own.items()})


def _rows(value: Any, images: slice) -> Any:
    return tuple(x[images] for x in value) if isinstance(value, tuple) else value[images]


class Method(nn.Module, ABC):
    """A self-supervised method. A subclass is one package and one line in methods.py; CONTRIBUTING.md shows one."""

    ARCH = "resnet50"  # trunk of an evaluation when neither flag nor checkpoint names one
    PROBE: ClassVar[dict[str, Any]] = {}  # the published linear probe: defaults of flags of main_lincls.py
    IDENTITY: ClassVar[tuple[str, ...]] = ()  # flags without which a checkpoint means something else
    PER_IMAGE = False  # whether its state belongs to the images of one data set, in their order

    @staticmethod
    @abstractmethod
    def add_flags(group) -> None:
        """Add the method's own flags, and set its defaults of general ones."""

    @staticmethod
    @abstractmethod
    def check(args: Namespace, samples: int) -> None:
        """Raise ValueError for flags that cannot work with a data set of so many samples."""

    @staticmethod
    @abstractmethod
    def views(args: Namespace) -> list[ViewSpec]:
        """The views that the loader cuts from each image, in the order of `Batch.views`."""

    @staticmethod
    def bn_groups(args: Namespace) -> int:
        """Groups of a process's batch that BatchNorm treats as separate processes."""
        return 1

    @abstractmethod
    def __init__(self, args: Namespace, samples: int):
        super().__init__()

    @abstractmethod
    def targets(self, batch: Batch, step: Step) -> Any:
        """What the queries are compared with, for the whole local batch, without gradient. Uses up `step.rng`."""

    @abstractmethod
    def forward(self, batch: Batch, targets: Any, step: Step) -> tuple[torch.Tensor, Stats]:
        """The mean loss over the images of `batch`, and statistics without gradient (scalars).

        batch, targets: the local batch, or the same slice of both. A slice holds whole BatchNorm groups.
        """

    @abstractmethod
    def commit(self, step: Step) -> None:
        """After the optimizer's update: what the step leaves in queue, bank and moving average."""

    @abstractmethod
    def encoders(self) -> list[nn.Module]:
        """The modules that --compile compiles."""

    @abstractmethod
    def chance(self, batch_size: int) -> float:
        """The loss of guessing, summed over the terms of the loss, for a global batch of this size."""

    @staticmethod
    def trunk(state_dict: dict[str, torch.Tensor], args: Namespace) -> dict[str, torch.Tensor]:
        """The trunk's part of a checkpoint's state dict, under the names of the trunk that `frozen` builds."""
        return layouts.trunk_state(state_dict)

    @staticmethod
    def frozen(args: Namespace) -> backbones.Probed:
        """The trunk of evaluations, with random weights. Raises ValueError for an --arch or --size that cannot work."""
        return backbones.probed(args)

    @staticmethod
    def add_probe_flags(group) -> None:
        """Add the flags that `frozen` needs; None stands for the checkpoint's value."""
        backbones.add_flags(group)

    @classmethod
    def probe(cls, arch: str) -> dict[str, Any]:
        """PROBE, with what depends on the trunk's architecture."""
        return cls.PROBE
