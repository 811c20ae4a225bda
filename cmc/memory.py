"""Memory banks: a feature for every image of the data set (arXiv 1805.01978, section 3.2)."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from utils.run import streams

MEMORY = 160 * 2**20  # bytes of rows that a GPU copies at a time: of 19 images, with 16,384 negatives of 128 dimensions

THREAD = ThreadPoolExecutor(1)


def draw_rows(seed: int, number: int, places: range, samples: int, negatives: int) -> np.ndarray:
    """The bank rows of the negatives of the images at these places of a step's global batch: uniform with replacement, len x K.

    Each place has its own random stream, so a process draws for its own images only, and the rows do not depend on other draws.
    """
    rows = np.empty((len(places), negatives), np.int32 if samples < 2**31 else np.int64)
    for row, place in zip(rows, places, strict=True):
        row[:] = streams.bank_rows(seed, number, place).integers(samples, size=negatives, dtype=rows.dtype)
    return rows


class DrawnAhead:
    """`draw_rows`, which draws the rows of the next step in a thread, during this step.

    The rows are a function of the arguments alone. In a step that was not expected, they are drawn at once.
    """

    next: tuple[tuple, Future] | None = None  # the arguments of the next step, and its rows

    def __call__(self, seed: int, number: int, *others) -> np.ndarray:
        now, following = (seed, number, *others), (seed, number + 1, *others)
        rows = self.next[1].result() if self.next and self.next[0] == now else draw_rows(*now)
        self.next = following, THREAD.submit(draw_rows, *following)
        return rows


def copied(bank: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some images, and their rows of the bank: m x M x C, valid until the next ones. bank: N x C, rows: n x M."""
    m = images_at_a_time(bank, rows)
    buffer = bank.new_empty(min(m, len(rows)) * rows.shape[1], bank.shape[1])
    for part in (slice(first, first + m) for first in range(0, len(rows), m)):
        numbers = rows[part].flatten()
        yield part, torch.index_select(bank, 0, numbers, out=buffer[: len(numbers)]).unflatten(0, (-1, rows.shape[1]))


def images_at_a_time(bank: torch.Tensor, rows: torch.Tensor) -> int:
    """On a GPU as many as fit into MEMORY, for few launches. On a CPU one, whose rows stay in the cache."""
    return 1 if bank.device.type == "cpu" else max(1, MEMORY // (rows.shape[1] * bank.shape[1] * bank.itemsize))


class Scores(torch.autograd.Function):
    """features n x C, bank N x C without gradient, rows n x M -> n x M: each feature times its rows of the bank.

    The rows take C times the memory of the scores. They are copied for some images at a time, into one buffer.
    """

    @staticmethod
    def forward(ctx, features, bank, rows):
        ctx.save_for_backward(bank, rows)
        scores = features.new_empty(rows.shape)
        for part, candidates in copied(bank, rows):  # m x M x C
            torch.bmm(candidates, features[part].unsqueeze(2), out=scores[part].unsqueeze(2))
        return scores

    @staticmethod
    def backward(ctx, gradient):
        bank, rows = ctx.saved_tensors
        sums = gradient.new_empty(len(rows), bank.shape[1])
        for part, candidates in copied(bank, rows):
            torch.bmm(gradient[part].unsqueeze(1), candidates, out=sums[part].unsqueeze(1))
        return sums, None, None


class Bank(nn.Module):
    """Row i is the moving average of image i's features, of length 1. Equal on all processes."""

    memory: torch.Tensor  # samples x C

    def __init__(self, samples: int, dim: int):
        super().__init__()
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("memory", torch.empty(samples, dim).uniform_(-bound, bound))

    @torch.no_grad()
    def update(self, features: torch.Tensor, sample_ids: torch.Tensor, momentum: float) -> None:
        """row = normalize(momentum row + (1 - momentum) feature), for the images of all processes.

        features: N x C; sample_ids: N. If a feature is not finite, its row stays: on CUDA the failure is known later, and
        --replay needs the old row.
        """
        old = self.memory[sample_ids]
        new = nn.functional.normalize(old * momentum + features * (1 - momentum), dim=1)
        self.memory[sample_ids] = torch.where(new.isfinite().all(1, keepdim=True), new, old)


def last_places(sample_ids: torch.Tensor, samples: int) -> torch.Tensor:
    """For each entry of the global batch, the last place that holds the same image: N.

    An image that replaces an unusable one can come twice. Its row must not depend on which entry is written first.
    """
    places = torch.arange(len(sample_ids), device=sample_ids.device, dtype=torch.float32)  # Apple GPUs may lack it for integers
    return places.new_zeros(samples).scatter_reduce_(0, sample_ids, places, "amax")[sample_ids].long()
