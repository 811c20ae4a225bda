"""Checkpoint layouts, ours and published: recognize the source of weights, and find the trunk among them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import nn

# keys of a checkpoint that hold the weights, the best first; dots separate the keys of nested dictionaries
CONTAINERS = ("state_dict", "model", "teacher", "student", "classy_state_dict.base_model.model.trunk")
# derived from the architecture, or for masked training only: not part of a trunk that lacks them
DERIVED = re.compile(r"(^|\.)(relative_position_index|attn_mask|mask_token)$")


@dataclass(frozen=True)
class Layout:
    """How a source names the weights of its trunk."""

    title: str
    mark: str  # pattern of "CONTAINER NAME" of a weight
    trunk: str = ""  # pattern of the beginning of the trunk's names, after `module.`
    heads: str = "(?!)"  # pattern of the beginning of names below it that belong to heads
    method: str | None = None  # the method here that has these weights, or the same protocol
    only: bool = False  # whether no other method can have such names
    renamed: tuple[tuple[str, str], ...] = ()  # patterns in the trunk's names, and their replacements
    attention: int = 0  # heads of each attention layer, where timm's model of equal shapes may have another number


# numbered children of torchvision's ResNet
NUMBERED = (("^0[.]", "conv1."), ("^1[.]", "bn1."), *((f"^{i + 3}[.]", f"layer{i}.") for i in range(1, 5)))
CHUNKED = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # DINOv2 puts its blocks in chunks, and keeps their numbers

# the first row with a mark that occurs is the layout of a file (docs/methods.md, "Checkpoint layouts")
LAYOUTS = (
    Layout("CMC", r"\b(l_to_ab|ab_to_l|view_[\w-]+\.conv(1|_block_1))\.", r"(encoder\.)?", method="cmc", only=True),
    Layout("MosRep", r"\bprojector_q\.", r"encoder_q\.", method="mosrep", only=True),
    Layout("MoCo-v1", r"\bencoder_q\.(fc|head|classifier)\.weight$", r"encoder_q\.", method="moco", only=True),
    Layout("MoCo-v2", r"\bencoder_q\.", r"encoder_q\.", method="moco", only=True),
    Layout("W2SSL", r"\bbase_encoder\.fc_crop\.", r"base_encoder\.", "fc", method="w2ssl", only=True),
    # MoCo-v3 has the probe of W2SSL
    Layout("MoCo-v3", r"\bbase_encoder\.", r"base_encoder\.", "(fc|head)[.]", method="w2ssl", attention=12),
    Layout("VISSL", r"\b_feature_blocks\.", r"(.*\.)?_feature_blocks\."),
    Layout("lightly", r"\bbackbone\.[4-7]\.\d", r"(model\.)?backbone\.", renamed=NUMBERED),
    Layout("DINOv2", r"\b(dino_head|ibot_head)\.", r"backbone\.", renamed=CHUNKED),
    Layout("DINO", r"^(teacher|student) (module\.)?backbone\.", r"backbone\."),
    Layout("Barlow Twins", r"^model (module\.)?backbone\.", r"backbone\."),
    Layout("solo-learn or mmpretrain", r"\bbackbone\.", r"(model\.)?backbone\."),
    Layout("SwAV", r"\b(projection_head|prototypes)\.", heads="projection_head|prototypes"),
    Layout(
        "InsDis or MoCo-v1, CMC's authors",
        r"^model (encoder\.(module\.)?|module\.)(conv1|bn1|layer\d)\b",
        r"(encoder\.)?",
        method="insdis",
    ),  # fmt: skip
    Layout(
        "SimSiam, BYOL or older solo-learn",
        r"\bencoder\.(module\.)?(conv1|conv_stem|stem|patch_embed|features)\b",
        r"encoder\.",
    ),
    Layout("MoCo-v3", r"\bmomentum_encoder\.", r"momentum_encoder\.", "(fc|head)[.]", method="w2ssl", attention=12),
    Layout("torchvision or timm", ""),
)


def container_of(saved: Mapping[str, Any]) -> str:
    """The key of a checkpoint that holds the weights, of CONTAINERS; empty if the checkpoint is itself a state dict."""
    return next((name for name in CONTAINERS if name.split(".")[0] in saved), "")


def weights_of(saved: dict, source: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself if it is one, without the names' parts of torch.compile.

    Raises ValueError for anything else.
    """
    state: Any = saved
    for key in filter(None, container_of(saved).split(".")):
        state = state.get(key) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: holds no weights by name; pass a checkpoint of a model")
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def layout_of(names: Iterable[str], container: str = "") -> Layout:
    """The layout of a file, by the names of its weights and the key that holds them."""
    marked = [f"{container} {name}" for name in names]
    return next((row for row in LAYOUTS if any(re.search(row.mark, name) for name in marked)), LAYOUTS[-1])


def recognize(saved: Mapping[str, Any], state: Iterable[str]) -> tuple[str | None, bool]:
    """The method of a checkpoint, by its key `method` or by its weights' names; and whether no other method can read it."""
    if "method" in saved:
        return saved["method"], True
    layout = layout_of(state, container_of(saved))
    return layout.method, layout.only


def trunk_state(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's part of a state dict, with the names of the timm or torchvision model. A classifier is still included."""
    layout, found = layout_of(state_dict), {}
    for name, value in state_dict.items():
        start = re.match(rf"(module\.)?{layout.trunk}(module\.)?", name)
        if start and not re.match(layout.heads, own := name[start.end() :]):
            for pattern, replacement in layout.renamed:
                own = re.sub(pattern, replacement, own)
            found[own] = value
    return found


# (has conv3, blocks of the four layers, shape of layer1.0.conv2) -> arch: the ResNets of torchvision, which timm has too
RESNETS: dict[tuple, str] = {
    (False, (2, 2, 2, 2), (64, 64)): "resnet18", (False, (3, 4, 6, 3), (64, 64)): "resnet34",
    (True, (3, 4, 6, 3), (64, 64)): "resnet50", (True, (3, 4, 23, 3), (64, 64)): "resnet101",
    (True, (3, 8, 36, 3), (64, 64)): "resnet152", (True, (3, 4, 6, 3), (128, 128)): "wide_resnet50_2",
    (True, (3, 4, 23, 3), (128, 128)): "wide_resnet101_2", (True, (3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
    (True, (3, 4, 23, 3), (256, 8)): "resnext101_32x8d",
}  # fmt: skip
HALVES = {32: "v1", 64: "v2", 128: "v3"}  # channels of layer1.0.conv1 in a branch of CMC -> version
MOCO_V3 = {"vit_small": "vit_small_mocov3", "vit_base": "vit_base_patch16_224"}  # its names -> those here


def arch_of(state_dict: Mapping[str, torch.Tensor], stated: str | None = None) -> str | None:
    """The architecture of a checkpoint's trunk: its name in the file, or that which names and shapes prove, or None.

    stated: its name in the file; MoCo-v3 has its own names of some transformers.
    """
    layout = layout_of(state_dict)
    if stated:
        return MOCO_V3.get(stated, stated) if layout.attention else stated
    trunk = trunk_state(state_dict)
    cmc = layout.title == "CMC"
    if cmc:
        branch = next((found[0] for name in trunk if (found := re.match(r"(l_to_ab|view_[\w-]+)[.]", name))), "l_to_ab.")
        trunk = {name.removeprefix(branch): value for name, value in trunk.items() if name.startswith(branch)}
    if any(name.startswith("conv_block_") for name in trunk):
        return "alexnet"
    if not {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"} <= trunk.keys():
        return None
    blocks = {name.split(".")[0] + "." + name.split(".")[1] for name in trunk if re.match(r"layer[1-4]\.\d+\.", name)}
    depths = tuple(sum(name.startswith(f"layer{i}.") for name in blocks) for i in range(1, 5))
    shapes = {name: tuple(getattr(trunk[name], "shape", ())) for name in ("layer1.0.conv1.weight", "layer1.0.conv2.weight")}
    if cmc:
        like = RESNETS.get(("layer1.0.conv3.weight" in trunk, depths, (64, 64)))
        version = HALVES.get(shapes["layer1.0.conv1.weight"][0]) if shapes["layer1.0.conv1.weight"] else None
        return like + version if like and version else None
    return RESNETS.get(("layer1.0.conv3.weight" in trunk, depths, shapes["layer1.0.conv2.weight"][:2]))


def load_trunk(trunk: nn.Module, state: Mapping[str, Any], classifier: str | tuple[str, ...], source: str,
               names: Iterable[str] = ()) -> None:  # fmt: skip
    """Load a trunk. `state` must hold exactly its weights; only weights of the classifier are left out.

    source: flag and path. names: all names of the checkpoint. Raises ValueError in at most 400 characters: the number of wrong
    keys and five of them, the prefixes in the file, and what to pass; also for weights that fit and mean something else.
    """
    wanted = trunk.state_dict()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    own = {n: v for n, v in state.items() if not n.startswith(heads) and (n in wanted or not DERIVED.search(n))}
    # BatchNorm's counts are absent in files from before torch 0.4.1
    own |= {name: value for name, value in wanted.items() if name.endswith(".num_batches_tracked") and name not in own}
    faults = {
        "missing": [name for name in wanted if name not in own],
        "left over": [name for name in own if name not in wanted],
        "of another shape": [n for n in wanted if n in own and wanted[n].shape != getattr(own[n], "shape", None)],
    }
    faults = {fault: keys for fault, keys in faults.items() if keys}
    layout = layout_of(names)
    if not faults:
        found = {module.num_heads for module in trunk.modules() if isinstance(module, Attention)}
        if layout.attention and found and found != {layout.attention}:
            why = f"the attention layers of {layout.title} have {layout.attention} heads, those of this --arch {max(found)}"
            raise ValueError(_short(source, f"{why}, with equal shapes; pass --arch {MOCO_V3['vit_small']}"))
        trunk.load_state_dict(own)
        return
    room, parts = 5, []
    for i, (fault, keys) in enumerate(faults.items(), 1):
        shown = [key if len(key) <= 36 else f"...{key[-33:]}" for key in keys[: room if i == len(faults) else 2]]
        parts.append(f"{len(keys)} {fault}: {', '.join(shown)}")
        room -= len(shown)
    prefixes = Counter(_prefix(name, wanted) for name in names or own).most_common(3)
    listed = ", ".join(f"{prefix[:24] or 'none'} ({count})" for prefix, count in prefixes) or "no names"
    advice = "pass the --arch of its training, and its --method if needed"
    raise ValueError(_short(source, f"does not fit the trunk ({'; '.join(parts)}); prefixes found: {listed}; {advice}"))


def _short(source, reason, most=400):
    """source: reason, in at most `most` characters: the beginning of a long path is left out."""
    flag, _, path = source.partition(" ")
    room = max(20, most - len(f"{flag} : {reason}"))
    return f"{flag} {path if len(path) <= room else '...' + path[3 - room :]}: {reason}"


def _prefix(name: str, wanted: Mapping[str, Any]) -> str:
    """The part of a name before the name of one of the trunk's weights; if there is none, its first two components."""
    parts = name.split(".")
    ends = (i for i in range(len(parts)) if ".".join(parts[i:]) in wanted)
    return "".join(f"{part}." for part in parts[: next(ends, min(2, len(parts) - 1))])
