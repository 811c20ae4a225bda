"""Losses of similarity scores whose right candidate is known: softmax, or noise-contrastive estimation."""

import math

import torch
from torch import nn

from utils import dist
from utils.contrast import info_nce


class Softmax(nn.Module):
    """InfoNCE. The other criteria have its interface."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, scores, target=None, reduction="mean") -> tuple[torch.Tensor, torch.Tensor]:
        """scores: n x M; target: n, the column of the right candidate, by default 0. -> (loss, top-1 accuracy in %)."""
        if target is None:
            target = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return info_nce(scores, target, self.temperature, reduction)

    def chance(self, candidates: int) -> float:
        """The loss of guessing among so many candidates."""
        return math.log(candidates)

    def commit(self) -> None:
        """After the optimizer's update."""


class Nce(Softmax):
    """Noise-contrastive estimation (arXiv 1805.01978, section 3.2; 1906.05849, equation 8) over `samples` images.

    With P = exp(score / T) / Z and the K wrong candidates of an image as uniform noise, its loss is
    -log(P+ / (P+ + K/n)) - sum of log((K/n) / (P- + K/n)). Z is n times the mean exp(score / T) of the first step, over all
    processes, and stays.
    """

    def __init__(self, temperature: float, samples: int):
        super().__init__(temperature)
        self.samples = samples
        self.register_buffer("z", torch.zeros(()))  # not known yet

    def forward(self, scores):  # n x (1 + K), column 0 is right
        unnormalised = (scores / self.temperature).exp()
        estimate = dist.total(unnormalised.detach().mean()) / dist.world() * self.samples
        self.new_z = torch.where(self.z > 0, self.z, estimate)
        p, noise = unnormalised / self.new_z, (scores.shape[1] - 1) / self.samples
        right, wrong = p[:, 0], p[:, 1:]
        loss = (right + noise).log() - right.log() + (wrong / noise).log1p().sum(1)
        top1 = (scores.detach().argmax(1) == 0).float().mean() * 100
        return loss.mean(), top1

    def chance(self, candidates: int) -> float:
        """Where every candidate has P = 1 / n."""
        noise = candidates - 1
        return math.log(1 + noise) + noise * math.log1p(1 / noise)

    @torch.no_grad()
    def commit(self) -> None:
        self.z.copy_(self.new_z)


def criterion(loss: str, temperature: float, samples: int) -> Softmax:
    """The criterion that --loss names."""
    return Nce(temperature, samples) if loss == "nce" else Softmax(temperature)
