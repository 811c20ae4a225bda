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
    """BatchNorm of the batches from all processes, on the CPU. It has the state and the timm activation of `norm`."""

    def __init__(self, norm: Any):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            setattr(self, name, value)
        self.drop, self.act = (norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else (nn.Identity(), nn.Identity())

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions works."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # n x C x ..., the same n on each process
        y = x
        if self.training:
            y = dist.gather_with_gradient(x.float().flatten(1)).view(-1, *x.shape[1:])
        y = super().forward(y)
        return self.act(self.drop((dist.own(y, len(x)) if self.training else y).to(x.dtype)))
