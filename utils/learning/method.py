"""The contract of a method: everything that entry points, engine, probe, benchmarks and tests need.

A training step calls, in this order,

    targets = method.targets(batch, step)               # no gradient: keys, negatives, mixtures, montages
    loss, stats = method(batch, targets, step)          # under DDP
    ...                                                 # backward and the optimizer's update
    method.commit(step)                                 # queue, bank, moving average

`targets` and `forward` change only BatchNorm's statistics, so a step that fails can be computed again. Training passes
the whole local batch; `forward` also takes a slice of it, for gradient accumulation. Before its first epoch, a method whose
`prepares` is true gets each batch of a pass over the data set in `prepare`.
"""

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from utils.data.batch import Batch
from utils.data.photometric import normalized
from utils.data.views import ViewSpec
from utils.learning import amp, backbones, layouts
from utils.learning.backbones import Network, Probed
from utils.learning.contrast import in_groups
from utils.learning.drawing import SHOWN, as_uint8
from utils.run import dist, streams

Stats = dict[str, torch.Tensor]


class Step:
    """A step of the whole training of `total` steps, counted from 0 over all epochs. `rng` is equal on all processes.

    watched: whether `forward` adds the measures of health.py to its statistics.
    """

    def __init__(self, number: int, total: int, seed: int, watched: bool = False):
        self.number, self.total, self.seed, self.watched = number, total, seed, watched
        self.rng = streams.step_draws(seed, number)

    def seed_torch(self) -> None:
        """Seed the random layers of a trunk, such as stochastic depth, from seed, step and process."""
        torch.manual_seed(streams.trunk_seed(self.seed, self.number, dist.rank()))


class Targets(SimpleNamespace):
    """`forward` compares the queries of n images with these values. The names become attributes.

    rows: values with a row for each image: a tensor, an array, or a tuple of them. shared: values for all images together.
    """

    def __init__(self, shared: dict[str, Any] | None = None, **rows: Any):
        super().__init__(**rows, **(shared or {}))
        self._shared, self._rows = shared, rows

    def part(self, images: slice) -> "Targets":
        """The targets of some of the images."""
        rows = {name: tuple(x[images] for x in v) if isinstance(v, tuple) else v[images] for name, v in self._rows.items()}
        return Targets(self._shared, **rows)


class Method(nn.Module, ABC):
    """A self-supervised method. A new one is a package and a line in methods.py; CONTRIBUTING.md has an example."""

    ARCH = "resnet50"  # trunk of an evaluation when neither flag nor checkpoint names one
    PROBE: ClassVar[dict[str, Any]] = {}  # the published linear probe: defaults of flags of main_lincls.py
    IDENTITY: ClassVar[tuple[str, ...]] = ()  # flags that decide the meaning of the weights
    prepares = False  # whether a pass over the data set, without updates of weights, precedes the first epoch
    PER_IMAGE = False  # whether its state belongs to the images of one data set, in their order

    @staticmethod
    @abstractmethod
    def add_flags(group) -> None:
        """Add the method's own flags, and set its defaults of general ones."""

    @staticmethod
    @abstractmethod
    def check(args: Namespace, samples: int) -> None:
        """Raise ValueError for flags that cannot work with a data set of this many samples."""

    @staticmethod
    @abstractmethod
    def views(args: Namespace) -> list[ViewSpec]:
        """The views that the loader cuts from each image, in the order of `Batch.views`."""

    @staticmethod
    def bn_groups(args: Namespace) -> int:
        """Number of BatchNorm groups in a process's batch; each has its own statistics."""
        return 1

    @abstractmethod
    def __init__(self, args: Namespace, samples: int):
        super().__init__()
        self.amp, self.view_names = args.amp, [spec.name for spec in self.views(args)]

    def embed(self, network: nn.Module, x: torch.Tensor, group_size: int) -> torch.Tensor:
        """Views, n x channels x H x W, uint8 or normalized -> n x C float32 of length 1. group_size: see in_groups."""
        x = normalized(x.contiguous(memory_format=torch.channels_last))
        with amp.autocast(x.device, self.amp):
            z = in_groups(network, x, group_size)
        return nn.functional.normalize(z.float(), dim=1)

    def prepare(self, batch: Batch, step: Step) -> None:
        """Learn from the local batch what the first epoch needs, such as the rows of a memory bank."""

    @abstractmethod
    def targets(self, batch: Batch, step: Step) -> Any:
        """The targets of the whole local batch, without gradient. Takes all random numbers of `step.rng`."""

    @abstractmethod
    def forward(self, batch: Batch, targets: Any, step: Step) -> tuple[torch.Tensor, Stats]:
        """The mean loss over the images of `batch`, and statistics without gradient (scalars).

        batch, targets: the local batch, or the same slice of both. A slice holds whole BatchNorm groups.
        """

    @abstractmethod
    def commit(self, step: Step) -> None:
        """Update queue, bank and moving average, after the optimizer's update."""

    @abstractmethod
    def encoders(self) -> list[nn.Module]:
        """The modules that --compile compiles."""

    @abstractmethod
    def chance(self, batch_size: int) -> float:
        """The loss of guessing, summed over the terms of the loss, for a global batch of this size."""

    def facts(self, batch_size: int) -> dict[str, Any]:
        """Numbers that are known before the first step, for references and verdicts (utils/run/verdicts.py).

        dim: of the embeddings; candidates, positives: of the loss; temperature, temperature_flag.
        """
        return {}

    def pictures(self, batch: Batch, targets: Any) -> list[tuple[str, torch.Tensor]]:
        """What the networks see of the first images: rows of views.png, each a title and m x 3 x H x W uint8."""
        rows = []
        for name, view in zip(self.view_names, batch.views, strict=True):
            parts = [(name, view)] if view.ndim == 4 else [(f"{name} {i}", x) for i, x in enumerate(view.unbind(1), 1)]
            rows += [(title, as_uint8(x[:SHOWN])) for title, x in parts]
        return rows

    @staticmethod
    def trunk(state_dict: dict[str, torch.Tensor], args: Namespace) -> dict[str, torch.Tensor]:
        """The trunk's part of a checkpoint's state dict, under the names of the trunk that `frozen` builds."""
        return layouts.trunk_state(state_dict)

    @staticmethod
    def frozen(args: Namespace) -> Probed:
        """The trunk of evaluations, with random weights. Raises ValueError for an --arch or --size that cannot work."""
        return backbones.probed(args)

    @staticmethod
    def networks(trunk: nn.Module, args: Namespace) -> dict[str, Network]:
        """Branch -> its network in timm, of the trunk of `frozen`. A trunk of one network has the branch "".

        A trunk that timm does not have is left out.
        """
        return {"": Network(trunk, args.arch, backbones.dilation(args.output_stride))}

    @staticmethod
    def add_probe_flags(group) -> None:
        """Add the flags that `frozen` needs; None stands for the checkpoint's value."""
        backbones.add_flags(group)

    @classmethod
    def probe(cls, arch: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """PROBE, adapted to the trunk's architecture and to the flags of its training; they are empty if unknown."""
        return cls.PROBE
