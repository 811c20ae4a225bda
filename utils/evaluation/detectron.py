"""ResNets in the names of detectron2: its file for a detector, and its features with and without detectron2."""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# timm's names -> detectron2's. A BatchNorm is the `norm` of its convolution
NAMES: tuple[tuple[str, Any], ...] = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
NAME = r"(stem|res\d\.\d+)\.(conv\d|shortcut)(\.norm)?\.(weight|bias|running_mean|running_var)"


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a timm ResNet in detectron2's names. Raises ValueError for another trunk."""
    found = {}
    for name, value in state.items():
        new = name
        for old, replacement in NAMES:
            new = re.sub(old, replacement, new)
        if not new.endswith("num_batches_tracked"):
            found[new] = value
    if other := [name for name in found if not re.fullmatch(NAME, name)]:
        raise ValueError(f"--to detectron2: its ResNets have no weight like {other[0]}; pass a run of resnet50")
    return found


def packed(state: dict[str, torch.Tensor], author: str) -> bytes:
    """A .pkl of detectron2's model zoo. Its arrays are pickled by parts that every version of NumPy reads."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    pickler.dispatch_table = {np.ndarray: lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))}
    arrays = {name: value.contiguous().numpy() for name, value in renamed(state).items()}
    pickler.dump({"model": arrays, "__author__": author, "matching_heuristics": True})
    return file.getvalue()


def loaded(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """(function from normalized images to pooled features, how to load them). It is detectron2's if that is installed."""
    how = f"MODEL.WEIGHTS {path.name}"
    try:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.backbone import build_resnet_backbone
    except ImportError:
        model = {name: torch.from_numpy(array) for name, array in pickle.loads(path.read_bytes())["model"].items()}
        return lambda x: features(model, x), how + " (detectron2 is not installed: compared by its names)"
    model, cfg = pickle.loads(path.read_bytes())["model"], get_cfg()
    blocks = sum(name.endswith("conv1.weight") for name in model) - 1
    per_block = 3 if "res2.0.conv3.weight" in model else 2
    cfg.MODEL.RESNETS.update(DEPTH=blocks * per_block + 2, STRIDE_IN_1X1=False, NORM="BN", OUT_FEATURES=["res5"])
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = len(model["res2.0.conv1.weight"]) * (4 if per_block == 3 else 1)
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(backbone).load(str(path))
    return lambda x: backbone(x)["res5"].mean((2, 3)), how


def features(model: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W -> n x C: a ResNet of detectron2 with STRIDE_IN_1X1 False, from its weights by name."""

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = model[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        mean, variance, scale, shift = (model[f"{name}.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, scale, shift)

    x = F.max_pool2d(conv("stem.conv1", x, 2).relu(), 3, 2, 1)
    for stage, number in sorted({(int(m[1]), int(m[2])) for m in (re.match(r"res(\d)\.(\d+)", name) for name in model) if m}):
        block, stride = f"res{stage}.{number}", 2 if stage > 2 and number == 0 else 1
        skip = conv(f"{block}.shortcut", x, stride) if f"{block}.shortcut.weight" in model else x
        if f"{block}.conv3.weight" in model:
            y = conv(f"{block}.conv2", conv(f"{block}.conv1", x).relu(), stride)
            y = conv(f"{block}.conv3", y.relu())
        else:
            y = conv(f"{block}.conv2", conv(f"{block}.conv1", x, stride).relu())
        x = (y + skip).relu()
    return x.mean((2, 3))
