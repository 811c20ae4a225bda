"""Learning rates and optimizers."""

import math

import torch
from timm.optim import Lars


def scaled_lr(lr: float, batch: int) -> float:
    """The linear rule: `lr` is for a global batch of 256. Applied here, once."""
    return lr * batch / 256


def cosine(lr: float, progress: float) -> float:
    """Half a cosine from `lr` at progress 0 to 0 at progress 1."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def sgd(parameters, lr: float, momentum: float, weight_decay: float, trust: float = 0.0) -> torch.optim.Optimizer:
    """Fused SGD with momentum; with `trust` > 0 each layer's rate is also multiplied by trust |w| / |g| (LARC, no clipping)."""
    parameters = [p for p in parameters if p.requires_grad]
    if trust:
        return Lars(parameters, lr, momentum=momentum, weight_decay=weight_decay, trust_coeff=trust, always_adapt=True)
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
