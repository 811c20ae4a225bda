"""Memory banks: a feature for every image of the data set (arXiv 1805.01978, section 3.2)."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from utils import dist

ROWS_AT_ONCE = 2**17  # of the bank, that are copied at a time: 64 MB with 128 numbers each


def draw_rows(rng: np.random.Generator, samples: int, batch: int, negatives: int) -> np.ndarray:
    """For each image of the global batch the rows of its negatives, uniform with replacement: batch x negatives."""
    return rng.integers(samples, size=(batch, negatives), dtype=np.int32 if samples < 2**31 else np.int64)


class Scores(torch.autograd.Function):
    """features n x C, bank N x C, rows n x M -> n x M: each feature times its rows of the bank.

    The rows, M of C numbers for every image, are copied out of the bank a few images at a time, here and again in backward.
    The bank has no gradient and must not change before backward.
    """

    @staticmethod
    def forward(ctx, features, bank, rows):
        ctx.save_for_backward(rows)
        ctx.bank, ctx.dtype = bank, features.dtype
        return torch.cat([torch.einsum("nc,nmc->nm", f, bank[r]) for f, r in parts(features, rows)])

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        gradients = [torch.einsum("nm,nmc->nc", g, ctx.bank[r]) for g, r in parts(gradient, rows)]
        return torch.cat(gradients).to(ctx.dtype), None, None


def parts(x, rows):
    images = max(1, ROWS_AT_ONCE // rows.shape[1])
    return zip(x.split(images), rows.split(images), strict=True)


class Bank(nn.Module):
    """Row i is the average of image i's features, normalised. Equal on all processes."""

    def __init__(self, samples: int, dim: int):
        super().__init__()
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("memory", torch.empty(samples, dim).uniform_(-bound, bound))

    def forward(self, features: torch.Tensor, index: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Scores of n features with the rows of their own images, column 0, and with K others: n x (1 + K)."""
        return Scores.apply(features, self.memory, torch.cat([index.unsqueeze(1), negatives], 1))

    @torch.no_grad()
    def update(self, features: torch.Tensor, index: torch.Tensor, momentum: float) -> None:
        """row = normalise(momentum row + (1 - momentum) feature), for the images of all processes.

        An image that is there twice, in the place of one that cannot be read, counts the last time, on every process.
        """
        features, index = dist.gather(features.detach()), dist.gather(index)
        place = torch.arange(len(index), device=index.device)
        last = ((index.unsqueeze(1) == index) * place).amax(1)
        rows = self.memory[index] * momentum + features[last] * (1 - momentum)
        self.memory[index] = normalize(rows, dim=1)
