"""Losses of similarity scores with the right candidate in column 0: softmax, or noise-contrastive estimation."""

import math

import torch
from torch import nn

from utils.learning.contrast import info_nce
from utils.run import dist


class Softmax(nn.Module):
    """InfoNCE: cross-entropy among all candidates."""

    ready = True  # unlike Nce, it needs no look at the first scores

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """scores: n x (1 + K). -> (mean loss, top-1 accuracy in %)."""
        return info_nce(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device), self.temperature)

    def chance(self, candidates: int) -> float:
        """The loss of guessing among this number of candidates."""
        return math.log(candidates)

    def commit(self) -> None:
        """Softmax has no state to update."""


class Nce(nn.Module):
    """Noise-contrastive estimation (arXiv 1805.01978, section 3.2; 1906.05849, equation 8) over n = `samples` images.

    With P = exp(score / T) / Z and the K wrong candidates of an image as uniform noise, the loss is
    -log(P+ / (P+ + K/n)) - sum of log((K/n) / (P- + K/n)). Z is n times the mean exp(score / T) of the first step, over all
    processes, and then constant. The computation uses logarithms, so a small temperature cannot overflow float32.
    """

    log_z: torch.Tensor
    new_log_z: torch.Tensor

    def __init__(self, temperature: float, samples: int):
        super().__init__()
        self.temperature, self.samples = temperature, samples
        self.register_buffer("log_z", torch.tensor(math.inf))  # unknown until the first step
        self.ready = False  # the host's copy of isfinite(log_z)
        self.register_load_state_dict_post_hook(Nce._look)

    @torch.no_grad()
    def start(self, scores: torch.Tensor) -> None:
        """Compute the Z of the first step, before its first `forward`. scores: n x (1 + K), of all images of this process."""
        logits = scores / self.temperature
        here = logits.logsumexp((0, 1)) - math.log(logits.numel())
        means = dist.gather(here.view(1))  # of every process
        self.new_log_z = means.logsumexp(0) - math.log(len(means)) + math.log(self.samples)

    def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """scores: n x (1 + K). -> (mean loss, top-1 accuracy in %)."""
        log_p = scores / self.temperature - (self.log_z if self.ready else self.new_log_z)
        log_noise = math.log((scores.shape[1] - 1) / self.samples)
        right, wrong = log_p[:, 0], log_p[:, 1:]
        loss = nn.functional.softplus(log_noise - right) + nn.functional.softplus(wrong - log_noise).sum(1)
        top1 = (scores.detach().argmax(1) == 0).float().mean() * 100
        return loss.mean(), top1

    def _look(self, _):
        self.ready = bool(self.log_z.isfinite())

    def chance(self, candidates: int) -> float:
        """The loss if every candidate has P = 1 / n."""
        noise = candidates - 1
        return math.log(1 + noise) + noise * math.log1p(1 / noise)

    @torch.no_grad()
    def commit(self) -> None:
        """Keep Z, after the optimizer's update."""
        if not self.ready:
            self.log_z.copy_(self.new_log_z)
            self.ready = True


def criterion(loss: str, temperature: float, samples: int) -> Softmax | Nce:
    """The criterion that --loss names."""
    return Nce(temperature, samples) if loss == "nce" else Softmax(temperature)
