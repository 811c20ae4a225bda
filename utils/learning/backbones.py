"""Trunks: any timm model that gives a feature map."""

import difflib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from utils.data.photometric import MEAN, STD, normalized

POOLED = 6  # the layer number of a trunk's pooled features, because AlexNet has layers 1 to 5


@dataclass(frozen=True)
class Probed:
    """A trunk as evaluations see it."""

    trunk: nn.Module
    layers: tuple[int, ...]  # numbers of the layers that can be probed
    classifier: str  # name of the submodule that is not part of the trunk; weights below it are left out
    features: Callable[[torch.Tensor, Sequence[int]], dict[int, torch.Tensor]]  # (n x 3 x H x W, layers) -> layer -> n x C
    maps: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # n x 3 x H x W -> n x C x h x w, the last feature map


@dataclass(frozen=True)
class Network:
    """A trunk, or a branch of it, as a timm model without classifier: the network of an export."""

    model: nn.Module  # `inputs` -> n x C
    arch: str  # its name in timm
    options: dict[str, Any] = field(default_factory=dict)  # other keywords of timm.create_model
    inputs: Callable[[torch.Tensor], torch.Tensor] = normalized  # n x 3 x H x W uint8 -> the input of `model`
    pixels: str = "RGB in [0, 1]"  # the input before `mean` and `std`
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def add_flags(group, default: int | None = None) -> None:
    """Flags of a timm trunk. default None: an evaluation takes the checkpoint's value."""
    trained = "; default: as trained" if default is None else ""
    group.add_argument("--output-stride", type=int, default=default, metavar="PIXELS",
        help=f"output stride of the trunk: its last stages are dilated; 0: no dilation{trained}")  # fmt: skip


def dilation(output_stride: int) -> dict[str, Any]:
    """The keyword of timm for --output-stride; none for 0, the architecture's own."""
    return {"output_stride": output_stride} if output_stride else {}


@register_model
def vit_small_mocov3(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-S of MoCo-v3 (arXiv 2104.02057): 12 heads of 32 channels. timm's vit_small_patch16_224 has 6 of 64."""
    return timm.create_model("vit_small_patch16_224", pretrained, **(kwargs | {"num_heads": 12}))


def build(arch: str, output_stride: int = 0, zero_init_last: bool = True, **kwargs) -> nn.Module:
    """A timm model with random weights. output_stride 0 keeps the architecture's own; 8 or 16 dilates instead of striding.

    zero_init_last: of a ResNet, whether the last BatchNorm gamma of each residual branch starts at 0, or else at 1
    (docs/methods.md, "Initialization"); it changes no other weight. Other architectures start as in timm.
    Keywords go to timm: num_classes=0, global_pool="" for the bare feature map, num_classes=0 for pooled features.
    """
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise ValueError(f"--arch {arch}: timm has no such model; try {' or '.join(near) or 'resnet50'}")
    try:
        model = timm.create_model(arch, pretrained=False, **kwargs, **dilation(output_stride))
    except (TypeError, AssertionError, NotImplementedError, ValueError) as error:
        flags = f"--arch {arch} --output-stride {output_stride}"
        raise ValueError(f"{flags}: not available ({error}); pass --output-stride 0") from error
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last: Any = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            nn.init.constant_(last.weight, 0 if zero_init_last else 1)
    return model


def build_trunk(args: Namespace, zero_init_last: bool = True) -> nn.Module:
    """The bare trunk of --arch and --output-stride: N x 3 x H x W -> N x C x h x w. zero_init_last: see `build`."""
    return build(args.arch, args.output_stride, zero_init_last, num_classes=0, global_pool="")


def classifier_name(model: Any) -> str:
    """The name of a timm model's classifier: fc for ResNets, head.fc for ConvNeXt ..."""
    return model.default_cfg["classifier"]


@torch.no_grad()
def output_of(model: nn.Module, arch: str, size: int) -> torch.Tensor:
    """The output for one view, in eval mode. Raises ValueError if the model does not take `size` x `size` pixels."""
    mode = model.training
    try:
        return model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--size {size}: {arch} does not take it ({str(error).partition(chr(10))[0]})") from None
    finally:
        model.train(mode)


def feature_shape(trunk: Any, arch: str, size: int, smallest: int) -> tuple[int, int]:
    """(channels, stride in pixels) of the feature map of a `size` x `size` view. smallest: side of the smallest view.

    Raises ValueError for a trunk without a feature map, or a view smaller than its stride.
    """
    stride = trunk.feature_info[-1]["reduction"]
    if smallest < stride:
        raise ValueError(f"--size {size}: makes views of {smallest} pixels, and {arch} has a stride of {stride}; "
                         f"pass {-(-size * stride // smallest)}")  # fmt: skip
    shape = tuple(output_of(trunk, arch, size).shape)
    if len(shape) != 4 or abs(shape[2] - size / stride) >= 1:
        raise ValueError(f"--arch {arch}: gives {shape}, no N x C x H x W feature map; try resnet50 or convnext_tiny")
    return shape[1], stride


def probed(args: Namespace) -> Probed:
    """The pooled features of --arch."""
    trunk = build(args.arch, args.output_stride, num_classes=0).eval()
    output_of(trunk, args.arch, args.size)  # refuses a size that does not fit
    whole: Any = trunk
    return Probed(
        trunk, (POOLED,), classifier_name(trunk),
        features=lambda x, _: {POOLED: trunk(normalized(x))}, maps=lambda x: whole.forward_features(normalized(x)),
    )  # fmt: skip
