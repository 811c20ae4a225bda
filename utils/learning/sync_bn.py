"""BatchNorm over the global batch of all processes."""

import torch
import torch.distributed as td
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from utils.run import dist


def synchronized(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm in it turned into one whose statistics are those of all processes' batches.

    Weights and their names stay. On one process it is left as it is. On CUDA it is torch's, which has no kernels for the CPU.
    """
    if dist.world() == 1:
        return module
    if td.get_backend() == "nccl":
        return convert_sync_batchnorm(module)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (_OnTheCPU, kind), {})
    return module


class _OnTheCPU:
    def forward(self, x):  # n x C x ..., equally many on each process
        if not self.training:
            return super().forward(x)
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
        y = y.to(x.dtype)
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y


def _mean(x):
    """Over processes, with gradient."""
    return dist.total_with_gradient(x) / dist.world()
