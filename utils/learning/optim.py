"""Learning rates and optimizers."""

import math
from collections.abc import Sequence

import torch


def scaled_lr(lr: float, batch: int) -> float:
    """The linear rule: `lr` is for a global batch of 256. It is applied here and nowhere else."""
    return lr * batch / 256


def cosine(lr: float, progress: float) -> float:
    """Half a cosine from `lr` at progress 0 to 0 at progress 1."""
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at(lr: float, epoch: float, epochs: int, warmup=0.0, every_step=False, drops: Sequence[int] = (), gamma=0.1) -> float:
    """The learning rate after `epoch` of `epochs` epochs; a fraction stands for steps of an epoch.

    During the first `warmup` epochs it rises linearly from 0, step by step. With `drops` it is then multiplied by `gamma` after
    each of these epochs. Without `drops` it follows half a cosine to 0, step by step or, as in MoCo, epoch by epoch.
    """
    if epoch < warmup:
        return lr * epoch / warmup
    if drops:
        return lr * gamma ** sum(epoch >= drop for drop in drops)
    return cosine(lr, ((epoch if every_step else max(math.floor(epoch), warmup)) - warmup) / (epochs - warmup))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Sgd(torch.optim.SGD):
    """torch's fused SGD, whose momentum starts at 0: equal to torch's without dampening, also if the first update is skipped.

    torch's own gets its memory in the first step, without values. If the device skips that update (utils/run/engine.py, or the
    scaler of fp16), the memory stays as it is, and the next update would read it.
    """

    def __init__(self, groups, lr: float, **settings):
        super().__init__(groups, lr, fused=True, **settings)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if p.grad is not None and "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        return super().step(closure)


class Lars(Sgd):
    """SGD with layer-wise adaptive rates (arXiv 1708.03888, eq. 6), without clipping.

    The rate of a tensor is multiplied by trust |w| / |g + weight_decay w|, the norm of the sum. A tensor or a sum of zeros, and
    a group with `trust` 0, keep the plain rate. Sgd makes the update: the device can skip it, and the host does not wait.
    """

    def __init__(self, groups, lr: float, momentum: float, trust: float):
        super().__init__(groups, lr, momentum=momentum)
        for group in self.param_groups:
            group.setdefault("trust", trust)

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):  # turn the gradients into those of plain SGD
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            if decay:
                torch._foreach_add_(gradients, parameters, alpha=decay)
                group["weight_decay"] = 0  # for this step
            if group["trust"]:
                w, g = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(gradients))
                rate = torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1)
                torch._foreach_mul_(gradients, list(rate.unbind()))
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss


def sgd(parameters, lr: float, momentum: float, weight_decay: float, trust=0.0, exclude=False) -> torch.optim.Optimizer:
    """Fused SGD with momentum. `trust` > 0: layer-wise adaptive rates, see Lars.

    exclude: with `trust`, biases and the gains of normalization layers have neither decay nor adaptive rates.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not trust:
        return Sgd(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    layers = [p for p in parameters if p.ndim > 1 or not exclude]
    others = [p for p in parameters if p.ndim <= 1 and exclude]
    groups = [{"params": layers, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0, "trust": 0.0}]
    return Lars([group for group in groups if group["params"]], lr, momentum, trust)
