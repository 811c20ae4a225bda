"""Weights under torchvision's own names, for networks that timm has under other names, such as ConvNeXt and EfficientNet."""

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import nn

NAMES = {"mobilenetv2_100": "mobilenet_v2"}  # timm's name -> torchvision's, where they differ


@torch.no_grad()
def converted(state: Mapping[str, Any], trunk: nn.Module, arch: str) -> Mapping[str, Any]:
    """The weights under timm's names, if both libraries have this network; otherwise `state` itself.

    The weights are matched in their order. The proof is that both networks then give equal features of random images.
    trunk: timm's, with pooled features; it gets the weights. Raises ValueError if the features differ.
    """
    name = NAMES.get(arch, arch)
    if "features.0.0.weight" not in state or name not in torchvision.models.list_models():
        return state
    model: Any = torchvision.models.get_model(name, weights=None)
    last = list(model.state_dict())[-1].rpartition(".")[0]
    model.set_submodule(last, nn.Identity())
    own = {n: value for n, value in state.items() if not n.startswith(f"{last}.")}
    theirs, ours = model.state_dict(), trunk.state_dict()
    counts = {n: value for n, value in theirs.items() if n.endswith(".num_batches_tracked")}  # may be absent
    if {**counts, **own}.keys() != theirs.keys() or [v.numel() for v in theirs.values()] != [v.numel() for v in ours.values()]:
        return state
    model.load_state_dict({**counts, **own})
    new = {n: value.reshape(ours[n].shape) for n, value in zip(ours, model.state_dict().values(), strict=True)}
    trunk.load_state_dict(new)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    wanted, found = model.eval()(x), trunk.eval()(x)
    if not (wanted - found).abs().max() <= 1e-4 * wanted.abs().max():  # nan too
        raise ValueError(f"--arch {arch}: torchvision's {name} is another network than timm's, with equal shapes; export the "
                         "weights of timm's")  # fmt: skip
    return new
