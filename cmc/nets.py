"""CMC's networks: one for each view, side by side (docs/methods.md, "CMC")."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

CHANNELS = (48, 128, 192, 192, 128)  # of the half AlexNet
STRIDES = (8, 16, 32)  # of a ResNet: the pixels of a view for one of its last map
RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3)),
           "resnet101": (Bottleneck, (3, 4, 23, 3))}  # fmt: skip
WIDTHS = {"v1": 0.5, "v2": 1, "v3": 2}
ARCHS = ("alexnet", *(name + version for name in RESNETS for version in WIDTHS))
# layer -> map that its probe gets. AlexNet: about 9,000 numbers; ResNet: the pooled features
POOLS = {1: nn.AdaptiveMaxPool2d(10), 2: nn.AdaptiveMaxPool2d(6), 3: nn.AdaptiveMaxPool2d(5), 4: nn.AdaptiveMaxPool2d(5),
         5: nn.Identity(), 6: nn.Identity()}  # fmt: skip


class AlexNet(nn.Module):
    """Half of an AlexNet with BatchNorm, for views of 224 pixels."""

    layers = (1, 2, 3, 4, 5)

    def __init__(self, in_channels: int, dim: int = 0):
        super().__init__()
        kernels = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # side, stride, padding
        before = (in_channels, *CHANNELS)
        for i, (a, b, (side, stride, padding)) in enumerate(zip(before, CHANNELS, kernels, strict=False), 1):
            block = [nn.Conv2d(a, b, side, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
            self.add_module(f"conv_block_{i}", nn.Sequential(*block, *([nn.MaxPool2d(3, 2)] if i in (1, 2, 5) else [])))
        if dim:
            widths = 128 * 36, 2048
            self.fc6, self.fc7 = (nn.Sequential(nn.Linear(n, 2048), nn.BatchNorm1d(2048), nn.ReLU(True)) for n in widths)
            self.fc8 = nn.Linear(2048, dim)

    def maps(self, x, layers=(5,)) -> dict[int, torch.Tensor]:
        """The outputs of these convolutional layers, after their pooling. Later layers are not computed."""
        found = {}
        for layer in range(1, max(layers) + 1):
            found[layer] = x = self.get_submodule(f"conv_block_{layer}")(x)
        return {layer: found[layer] for layer in layers}

    def last_map(self, x) -> torch.Tensor:
        return self.maps(x)[5]

    def forward(self, x):  # n x in_channels x 224 x 224 -> n x dim
        return self.fc8(self.fc7(self.fc6(self.maps(x)[5].flatten(1))))


class HalfResNet(ResNet):
    """timm's ResNet with other widths. Its stem has 64 channels for any width."""

    layers = (6,)

    def __init__(self, in_channels: int, dim: int, block, depths, width: float, output_stride: int):
        channels = tuple(int(c * width) for c in (64, 128, 256, 512))
        super().__init__(
            block, depths, num_classes=dim, in_chans=in_channels, channels=channels, output_stride=output_stride,
            zero_init_last=False,
        )  # fmt: skip

    def maps(self, x, layers=(6,)) -> dict[int, torch.Tensor]:
        """The pooled features."""
        return {6: self.global_pool(self.forward_features(x))}

    def last_map(self, x) -> torch.Tensor:
        return self.forward_features(x)


def half(arch: str, in_channels: int, dim: int = 0, output_stride: int = 0) -> AlexNet | HalfResNet:
    """One branch; with dim 0 without its head. output_stride: one of STRIDES for a ResNet; 0 is its own, 32."""
    if arch == "alexnet":
        return AlexNet(in_channels, dim)
    block, depths = RESNETS[arch[:-2]]
    return HalfResNet(in_channels, dim, block, depths, WIDTHS[arch[-2:]], output_stride or 32)


class Branches(nn.Module):
    """A branch for each view. channels: name of a branch -> channels of its view. The others are those of `half`."""

    def __init__(self, arch: str, channels: Mapping[str, int], dim: int = 0, output_stride: int = 0):
        super().__init__()
        for name, in_channels in channels.items():
            self.add_module(name, half(arch, in_channels, dim, output_stride))
        self.layers: tuple[int, ...] = (AlexNet if arch == "alexnet" else HalfResNet).layers  # that can be probed

    def last_maps(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last feature maps of all branches, joined: n x C x h x w."""
        branches: Any = self.children()
        return torch.cat([branch.last_map(x).float() for branch, x in zip(branches, views, strict=True)], 1)

    def features(self, views: Sequence[torch.Tensor], layers) -> dict[int, torch.Tensor]:
        """layer -> n x C for a linear probe: the maps of all branches, pooled to about 9,000 numbers for two, flattened."""
        branches: Any = self.children()
        maps = [branch.maps(x, layers) for branch, x in zip(branches, views, strict=True)]
        joined = {layer: torch.cat([found[layer].float() for found in maps], 1) for layer in layers}
        return {layer: POOLS[layer](x).flatten(1) for layer, x in joined.items()}
