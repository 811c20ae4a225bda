"""Trunks: any timm model that gives a feature map."""

import difflib
from dataclasses import dataclass

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """What a trunk makes of a view: channels x height x width at a stride of so many pixels."""

    channels: int
    height: int
    width: int
    stride: int


def add_flags(group, default: int | None = None) -> None:
    """Of methods whose trunk is timm's. default None: in a probe, what the checkpoint says."""
    group.add_argument(
        "--output-stride",
        type=int,
        default=default,
        metavar="PIXELS",
        help=f"dilate the trunk's last stages to this stride; 0 keeps its own{'' if default == 0 else '; default: as trained'}",
    )


def build(arch: str, output_stride: int = 0, **kwargs) -> nn.Module:
    """A timm model with random weights. output_stride 0 keeps the architecture's own; 8 or 16 dilates instead of striding.

    Keywords go to timm: num_classes=0, global_pool="" gives the bare feature map, num_classes=0 the pooled features.
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


def build_trunk(args) -> nn.Module:
    """The bare trunk of --arch and --output-stride: N x 3 x H x W -> N x C x h x w."""
    return build(args.arch, args.output_stride, num_classes=0, global_pool="")


def classifier_name(model: nn.Module) -> str:
    """Where a timm model keeps its classifier: fc for ResNets, head.fc for ConvNeXt ..."""
    return model.default_cfg["classifier"]


@torch.no_grad()
def try_size(model: nn.Module, arch: str, size: int) -> nn.Module:
    """The model in eval mode, having seen one `size` x `size` view. Raises ValueError where it takes other sizes only."""
    _features(model.eval(), arch, size)
    return model


def _features(model, arch, size):
    try:
        return model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--size {size}: {arch} does not take it ({str(error).partition(chr(10))[0]})") from None


@torch.no_grad()
def feature_shape(trunk: nn.Module, arch: str, size: int, smallest: int) -> Shape:
    """The feature map of a `size` x `size` view, `smallest` being the side of the smallest view. `trunk`: of build_trunk."""
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
    return Shape(*features.shape[1:], stride)
