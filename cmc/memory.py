"""Memory banks: a feature for every image of the data set (arXiv 1805.01978, section 3.2)."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def draw_rows(seed: int, step: int, places: range, samples: int, negatives: int) -> np.ndarray:
    """The rows of the negatives of the images at these places of a step's global batch: uniform with replacement, len x K.

    A place has random numbers of its own, so that a process draws for its images alone, the same ones whatever their number.
    """
    rows = np.empty((len(places), negatives), np.int32 if samples < 2**31 else np.int64)
    for row, place in zip(rows, places, strict=True):
        bits = np.random.Philox(key=[seed, step], counter=[0, place, 1, 0])  # the 1 keeps it apart from the draws of views
        row[:] = np.random.Generator(bits).integers(samples, size=negatives, dtype=rows.dtype)
    return rows


class Scores(torch.autograd.Function):
    """features n x C, bank N x C without gradient, rows n x M -> n x M: each feature times its rows of the bank.

    The rows, C times the memory of the scores, are copied for one image at a time, into the same place.
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
    """Row i is the average of image i's features, normalised. Equal on all processes."""

    def __init__(self, samples: int, dim: int):
        super().__init__()
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("memory", torch.empty(samples, dim).uniform_(-bound, bound))

    @torch.no_grad()
    def update(self, features: torch.Tensor, index: torch.Tensor, momentum: float) -> None:
        """row = normalise(momentum row + (1 - momentum) feature), for the images of all processes: N x C, N.

        A row stays where its feature is not finite: on CUDA the run learns of it after this, and --replay needs the old one.
        """
        old = self.memory[index]
        new = F.normalize(old * momentum + features * (1 - momentum), dim=1)
        self.memory[index] = torch.where(new.isfinite().all(1, keepdim=True), new, old)


def last_places(index: torch.Tensor, samples: int) -> torch.Tensor:
    """For each entry of the global batch the last place where its image is: N.

    An image is there twice in the place of one that cannot be read; its row must not depend on which is written first.
    """
    places = torch.arange(len(index), device=index.device)
    return places.new_zeros(samples).scatter_reduce_(0, index, places, "amax")[index]
