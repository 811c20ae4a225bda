"""A trunk for other libraries: for each target the files that it reads, and the trunk as it loads from them."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import _hub as timm_hub
from torch import nn

from utils.evaluation import detectron
from utils.learning.backbones import Network, classifier_name

Loaded = tuple[Callable[[torch.Tensor], torch.Tensor], str]  # a model, and how it was loaded


@dataclass(frozen=True)
class Export:
    """A trunk or a branch of it to export, with a classifier if there is one."""

    network: Network
    size: int  # side of an image in pixels
    resize: int  # shorter side of an image before the crop
    head: nn.Linear | None  # of a linear probe
    card: str  # README.md
    facts: dict[str, str]  # method, arch, sha256

    @property
    def classes(self) -> int:
        return self.head.out_features if self.head else 0

    def built(self, **options: Any) -> Any:
        """The model in timm, without the weights of this export."""
        return timm.create_model(self.network.arch, num_classes=self.classes, **self.network.options, **options)

    def state(self) -> dict[str, torch.Tensor]:
        """The weights in timm's names."""
        state = {name: value.detach().contiguous() for name, value in self.network.model.state_dict().items()}
        if self.head:
            name = classifier_name(self.built())
            state |= {f"{name}.weight": self.head.weight.detach(), f"{name}.bias": self.head.bias.detach()}
        return state

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        """n x 3 x H x W uint8 -> n x C features or, with a classifier, logits."""
        features = self.network.model(self.network.inputs(images))
        return self.head(features) if self.head else features


def pickled(content: dict) -> bytes:
    """A file of torch.save."""
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def safetensors() -> Any:
    """The package safetensors.torch. Raises ValueError if it is missing."""
    try:
        import safetensors.torch as module
    except ImportError:
        raise ValueError("--to safetensors, huggingface: need the package safetensors; pip install safetensors") from None
    return module


def timm_files(export: Export) -> dict[str, bytes]:
    return {"": pickled(export.state())}


def timm_model(export: Export, path: Path) -> Loaded:
    options = "".join(f"{name}={value}, " for name, value in export.network.options.items())
    how = f'timm.create_model("{export.network.arch}", num_classes={export.classes}, {options}checkpoint_path="{path.name}")'
    return export.built(checkpoint_path=str(path)).eval(), how


def safetensors_files(export: Export) -> dict[str, bytes]:
    return {"": safetensors().save(export.state(), export.facts)}


def safetensors_model(export: Export, path: Path) -> Loaded:
    _, how = timm_model(export, path)
    model = export.built().eval()
    model.load_state_dict(safetensors().load_file(str(path)))
    return model, f'safetensors.torch.load_file("{path.name}"), or {how}'


def huggingface_files(export: Export) -> dict[str, bytes]:
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True), and for the Hugging Face Hub."""
    weights = safetensors().save(export.state(), {"format": "pt"} | export.facts)
    if not hasattr(timm_hub, "load_model_config_from_path"):
        raise ValueError(f"--to huggingface: timm {timm.__version__} loads no folder; pip install --upgrade timm")
    network, model = export.network, export.built()
    kept = ("first_conv", "classifier", "fixed_input_size")
    preprocessing = {
        "input_size": [len(network.mean), export.size, export.size], "crop_pct": round(export.size / export.resize, 4),
        "crop_mode": "center", "interpolation": "bilinear", "mean": list(network.mean), "std": list(network.std),
        "num_classes": export.classes,
    }  # fmt: skip
    config = {
        "architecture": network.arch, "num_classes": export.classes, "num_features": model.num_features,
        "global_pool": "avg", "model_args": network.options,
        "pretrained_cfg": {name: model.default_cfg[name] for name in kept if name in model.default_cfg} | preprocessing,
    }  # fmt: skip
    return {
        "config.json": json.dumps(config, indent=1).encode(),
        "model.safetensors": weights,
        "README.md": export.card.encode(),
    }


def huggingface_model(export: Export, path: Path) -> Loaded:
    how = f'timm.create_model("local-dir:{path.name}", pretrained=True)'
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval(), how


def torchvision_parts(export: Export) -> tuple[Any, str]:
    """(torchvision's model of the same name, name of its last layer). Raises ValueError if there is none."""
    network, other = export.network, "pass --to timm, which has it"
    if network.arch not in torchvision.models.list_models():
        raise ValueError(f"--to torchvision: torchvision has no {network.arch}; {other}")
    if network.options:
        options = ", ".join(f"{name} {value}" for name, value in network.options.items())
        raise ValueError(f"--to torchvision: its {network.arch} cannot have {options}; {other}")
    model: Any = torchvision.models.get_model(network.arch, weights=None)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.set_submodule(last, export.head or nn.Identity())
    return model.eval(), last


def torchvision_files(export: Export) -> dict[str, bytes]:
    """The weights in torchvision's names. Where they differ from timm's, both networks must have them in the same order."""
    model, last = torchvision_parts(export)
    trunk = {name: value.detach().contiguous() for name, value in export.network.model.state_dict().items()}
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{last}.")}
    if trunk.keys() != wanted.keys():
        if [value.numel() for value in trunk.values()] != [value.numel() for value in wanted.values()]:
            raise ValueError(f"--to torchvision: its {export.network.arch} is another network than timm's; pass --to timm")
        pairs = zip(wanted.items(), trunk.values(), strict=True)
        trunk = {name: value.reshape(shape.shape) for (name, shape), value in pairs}
    head = {name: value for name, value in model.state_dict().items() if name.startswith(f"{last}.")}
    return {"": pickled(trunk | head)}


def torchvision_model(export: Export, path: Path) -> Loaded:
    model, last = torchvision_parts(export)
    model.load_state_dict(torch.load(path, weights_only=True))
    new = f"model = torchvision.models.{export.network.arch}({f'num_classes={export.classes}' if export.head else ''})"
    cut = "" if export.head else f'model.set_submodule("{last}", torch.nn.Identity()); '
    return model, f'{new}; {cut}model.load_state_dict(torch.load("{path.name}"))'


def detectron2_files(export: Export) -> dict[str, bytes]:
    if export.head:
        raise ValueError("--to detectron2: a detector has no such classifier; leave out --classifier")
    if export.network.options:
        raise ValueError(f"--to detectron2: takes no trunk with {', '.join(export.network.options)}; pass --to timm")
    return {"": detectron.packed(export.network.model.state_dict(), "export.py")}


def detectron2_model(export: Export, path: Path) -> Loaded:
    return detectron.loaded(path)


# target -> (end of the file's name, its files by name, the trunk that the library loads from them)
TARGETS: dict[str, tuple[str, Callable[[Export], dict[str, bytes]], Callable[[Export, Path], Loaded]]] = {
    "torchvision": (".pth", torchvision_files, torchvision_model),
    "timm": (".pth", timm_files, timm_model),
    "safetensors": (".safetensors", safetensors_files, safetensors_model),
    "huggingface": ("", huggingface_files, huggingface_model),
    "detectron2": (".pkl", detectron2_files, detectron2_model),
}
