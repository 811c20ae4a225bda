"""Gradient accumulation: one update from several slices of a batch, of which only one at a time needs memory."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.learning.contrast import statistics_kept
from utils.learning.method import Batch, Stats, Step


def accumulate(
    model: nn.Module, batch: Batch, targets: Any, step: Step, slices: int, backward: Callable[[torch.Tensor], None]
) -> tuple[torch.Tensor, Stats]:
    """Forward and `backward` of each slice. The gradients add up to those of the mean loss, as of `slices` processes.

    model: a Method, or DDP around one, whose processes exchange gradients in the last slice only. BatchNorm's running
    statistics follow the first slice. Returns the mean loss, without gradient, and the mean statistics.
    """
    if slices == 1:
        loss, stats = model(batch, targets, step)
        backward(loss)
        return loss.detach(), stats
    size, found = len(batch) // slices, []
    for i in range(slices):
        part = slice(i * size, (i + 1) * size)
        with ExitStack() as around:
            if i > 0:
                around.enter_context(statistics_kept(model))
            if i + 1 < slices and isinstance(model, DistributedDataParallel):
                around.enter_context(model.no_sync())
            loss, stats = model(batch.part(part), targets.part(part), step)
            backward(loss / slices)
        found.append({"loss": loss.detach()} | stats)
        del loss  # and its graph, before that of the next slice
    means = {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}
    return means.pop("loss"), means
