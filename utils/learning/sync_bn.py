"""BatchNorm over the global batch of all processes."""

from typing import Any

import torch
import torch.distributed as td
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from utils.run import dist


def synchronized(module: nn.Module) -> nn.Module:
    """The module with each BatchNorm replaced by one with statistics over the batches of all processes.

    Parameters, buffers and their names stay. One process needs no change. CUDA takes torch's SyncBatchNorm, which has no
    kernels for the CPU.
    """
    if dist.world() == 1:
        return module
    if td.get_backend() == "nccl":
        return convert_sync_batchnorm(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return GlobalBatchNorm(module)
    for name, child in module.named_children():
        module.add_module(name, synchronized(child))
    return module


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all processes on the CPU. It takes over the parameters and buffers of `norm`, and timm's activation."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def __init__(self, norm: Any):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            setattr(self, name, value)
        self.drop, self.act = (norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else (nn.Identity(), nn.Identity())

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions works."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # n x C x ..., the same n on each process
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        shape, over = (1, -1, *[1] * (x.ndim - 2)), [0, *range(2, x.ndim)]
        mean = _mean(x.float().mean(over))
        centred = x.float() - mean.view(shape)
        variance = _mean(centred.square().mean(over))
        count = dist.world() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(y.to(x.dtype)))


def _mean(x):
    """Mean over processes, with gradient."""
    return dist.total_with_gradient(x) / dist.world()
