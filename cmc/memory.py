"""Memory banks: a feature for every image of the data set (arXiv 1805.01978, section 3.2)."""

import math

import numpy as np
import torch
from torch import nn

from utils.run import streams


def draw_rows(seed: int, number: int, places: range, samples: int, negatives: int) -> np.ndarray:
    """The bank rows of the negatives of the images at these places of a step's global batch: uniform with replacement, len x K.

    Each place has its own random stream, so a process draws for its own images only, and the rows do not depend on other draws.
    """
    rows = np.empty((len(places), negatives), np.int32 if samples < 2**31 else np.int64)
    for row, place in zip(rows, places, strict=True):
        row[:] = streams.bank_rows(seed, number, place).integers(samples, size=negatives, dtype=rows.dtype)
    return rows


class Scores(torch.autograd.Function):
    """features n x C, bank N x C without gradient, rows n x M -> n x M: each feature times its rows of the bank.

    The rows take C times the memory of the scores. They are copied for one image at a time, into one buffer.
    """

    @staticmethod
    def forward(ctx, features, bank, rows):
        ctx.save_for_backward(bank, rows)
        scores, copied = features.new_empty(rows.shape), bank.new_empty(rows.shape[1], bank.shape[1])
        for score, f, r in zip(scores, features, rows, strict=True):
            torch.mv(torch.index_select(bank, 0, r, out=copied), f, out=score)
        return scores

    @staticmethod
    def backward(ctx, gradient):
        bank, rows = ctx.saved_tensors
        sums, copied = gradient.new_empty(len(rows), bank.shape[1]), bank.new_empty(rows.shape[1], bank.shape[1])
        for total, g, r in zip(sums, gradient, rows, strict=True):
            torch.mv(torch.index_select(bank, 0, r, out=copied).T, g, out=total)
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
    places = torch.arange(len(sample_ids), device=sample_ids.device)
    return places.new_zeros(samples).scatter_reduce_(0, sample_ids, places, "amax")[sample_ids]
