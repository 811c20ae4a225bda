"""Measures of a training step's embeddings, queue, bank and weights. They need no labels and no evaluation.

A method computes them in `forward` if `step.watched`: a few steps of an epoch, so that they cost next to nothing. Their meaning
and their references are in docs/health.md.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

WATCH = 100  # least number of steps between two watched steps; with it all of them together stay below 1 % of the time
ROWS = 256  # embeddings of a process that are compared
PARTS = 8  # of the queue: its oldest and its newest part are compared


def watched(step_in_epoch: int, steps: int, print_freq: int) -> bool:
    """Whether health is measured in this step of an epoch: at a log line, WATCH steps or more after the one before."""
    every = print_freq * math.ceil(WATCH / print_freq)
    return (step_in_epoch + 1) % every == 0 or step_in_epoch + 1 == steps


@torch.no_grad()
def of_pairs(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Spread of the embeddings, alignment with their positives, uniformity. q, k: n x C, float32, of length 1.

    spread: standard deviation, mean over the C (arXiv 2011.10566, section 4.1). alignment: mean |q - k|^2. uniformity:
    log of the mean exp(-2 |q_i - q_j|^2), i != j (both 2005.10242, section 4.1).
    """
    q, k = q[:ROWS], k[:ROWS]
    found = {"health_alignment": (q - k).square().sum(1).mean()}
    if (n := len(q)) > 1:
        squares = (2 - 2 * q @ q.T).clamp(min=0).fill_diagonal_(math.inf)  # |q_i - q_j|^2
        found["health_spread"] = q.var(0).clamp(min=0).sqrt().mean()
        found["health_uniformity"] = (-2 * squares).logsumexp((0, 1)) - math.log(n * (n - 1))
    return found


@torch.no_grad()
def of_queue(q: Tensor, queue: Tensor, pointer: Tensor, temperature: float, age: int) -> dict[str, Tensor]:
    """Age of the oldest key in steps; shares of the softmax over the queue that its oldest and its newest part have.

    q: n x C; queue: C x K; pointer: 1, the oldest column; age: in steps.
    """
    length = queue.shape[1]
    mass = (q[:ROWS] @ queue / temperature).softmax(1).mean(0)  # K
    mass = mass[(pointer + torch.arange(length, device=mass.device)) % length]  # the oldest key first
    part = max(1, length // PARTS)
    return {"health_key_age": q.new_tensor(float(age)), "health_mass_oldest": mass[:part].sum(),
            "health_mass_newest": mass[-part:].sum()}  # fmt: skip


@torch.no_grad()
def of_bank(memory: Tensor) -> dict[str, Tensor]:
    """Share of the rows that were never written. A written row has length 1, a row of the start has not. memory: N x C."""
    rows = memory[:: max(1, len(memory) // 2**16)]
    return {"health_unwritten": ((rows.norm(dim=1) - 1).abs() > 1e-5).float().mean()}


@torch.no_grad()
def flat(views: Tensor) -> Tensor:
    """Share of the images whose view is one colour, or nearly. views: n x [count x] channels x H x W, uint8 or normalized."""
    x = views[:64].flatten(-2)
    near = 2.0 if not x.is_floating_point() else 0.02
    return (x.float().std(-1).amax(-1) < near).float().mean()


@torch.no_grad()
def weight_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all parameters that are trained."""
    return torch.nn.utils.get_total_norm([p for p in parameters if p.requires_grad])
