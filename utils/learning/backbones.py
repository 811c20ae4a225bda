"""Trunks: any timm model that gives a feature map."""

import difflib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from utils.data.photometric import normalized

POOLED = 6  # the layer number of a trunk's pooled features, because AlexNet has layers 1 to 5


@dataclass(frozen=True)
class Probed:
    """A trunk as evaluations see it."""

    trunk: nn.Module
    layers: tuple[int, ...]  # numbers of the layers that can be probed
    classifier: str  # name of the submodule that is not part of the trunk; weights below it are left out
    features: Callable[[torch.Tensor, Sequence[int]], dict[int, torch.Tensor]]  # (n x 3 x H x W, layers) -> layer -> n x C


@dataclass(frozen=True)
class Shape:
    """The feature map of a view: channels x height x width; stride: pixels a cell."""

    channels: int
    height: int
    width: int
    stride: int


def add_flags(group, default: int | None = None) -> None:
    """Flags of a timm trunk. default None: an evaluation takes the checkpoint's value."""
    group.add_argument(
        "--output-stride",
        type=int,
        default=default,
        metavar="PIXELS",
        help=f"dilate the trunk's last stages to this stride; 0 keeps its own{'' if default == 0 else '; default: as trained'}",
    )


def build(arch: str, output_stride: int = 0, **kwargs) -> nn.Module:
    """A timm model with random weights. output_stride 0 keeps the architecture's own; 8 or 16 dilates instead of striding.

    Keywords go to timm: num_classes=0, global_pool="" for the bare feature map, num_classes=0 for pooled features.
    """
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise ValueError(f"--arch {arch}: timm has no such model; try {' or '.join(near) or 'resnet50'}")
    if output_stride:
        kwargs["output_stride"] = output_stride
    try:
        return timm.create_model(arch, pretrained=False, **kwargs)
    except (TypeError, AssertionError, NotImplementedError, ValueError) as error:
        given = f"--arch {arch} --output-stride {output_stride}"
        raise ValueError(f"{given}: not available ({error}); pass --output-stride 0") from error


def build_trunk(args: Namespace) -> nn.Module:
    """The bare trunk of --arch and --output-stride: N x 3 x H x W -> N x C x h x w."""
    return build(args.arch, args.output_stride, num_classes=0, global_pool="")


def classifier_name(model: Any) -> str:
    """The name of a timm model's classifier: fc for ResNets, head.fc for ConvNeXt ..."""
    return model.default_cfg["classifier"]


@torch.no_grad()
def try_size(model: nn.Module, arch: str, size: int) -> nn.Module:
    """The model in eval mode, tried on one view. Raises ValueError if it does not take `size` x `size` pixels."""
    _features(model.eval(), arch, size)
    return model


def _features(model, arch, size):
    try:
        return model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--size {size}: {arch} does not take it ({str(error).partition(chr(10))[0]})") from None


@torch.no_grad()
def feature_shape(trunk: Any, arch: str, size: int, smallest: int) -> Shape:
    """The feature map of a `size` x `size` view. smallest: side of the smallest view; trunk: from build_trunk.

    Raises ValueError for a trunk without a feature map, or a view smaller than its stride.
    """
    stride = trunk.feature_info[-1]["reduction"]
    if smallest < stride:
        raise ValueError(f"--size {size}: makes views of {smallest} pixels, and {arch} has a stride of {stride}; "
                         f"{-(-size * stride // smallest)} would do")  # fmt: skip
    mode = trunk.training
    features = _features(trunk.eval(), arch, size)
    trunk.train(mode)
    if features.ndim != 4 or abs(features.shape[2] - size / stride) >= 1:
        shape = tuple(features.shape)
        raise ValueError(f"--arch {arch}: gives {shape}, no N x C x H x W feature map; try resnet50 or convnext_tiny")
    channels, height, width = features.shape[1:]
    return Shape(channels, height, width, stride)


def probed(args: Namespace) -> Probed:
    """The pooled features of --arch."""
    trunk = try_size(build(args.arch, args.output_stride, num_classes=0), args.arch, args.size)
    return Probed(trunk, (POOLED,), classifier_name(trunk), lambda x, _: {POOLED: trunk(normalized(x))})
