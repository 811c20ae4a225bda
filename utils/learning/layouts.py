"""Checkpoint layouts, ours and published: recognize the method of the weights, and find the trunk among them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

# prefixes of the trunk in published checkpoints (docs/methods.md); the first that occurs decides
PREFIXES = ("module.encoder_q.", "encoder_q.", "module.base_encoder.", "module.momentum_encoder.", "module.encoder.",
            "encoder.module.", "module.", "")  # fmt: skip
# (method, whether only this method has such names, pattern of "CONTAINER NAME" of a weight); the first that occurs decides
RULES = (
    ("cmc", True, r"\b(l_to_ab|ab_to_l)\."),
    ("mosrep", True, r"\bprojector_q\."),
    ("moco", True, r"\bencoder_q\."),
    ("w2ssl", True, r"\bbase_encoder\.fc_crop\."),
    ("w2ssl", False, r"\b(base|momentum)_encoder\."),  # also MoCo-v3: its probe is that of W2SSL
    ("insdis", False, r"^model (encoder\.)?module\.(conv1|bn1|layer\d)\b"),  # also MoCo-v1 by the authors of CMC
)


def container_of(saved: Mapping[str, Any]) -> str:
    """The key of a checkpoint that holds the weights; empty if the checkpoint is itself a state dict."""
    return next((name for name in ("state_dict", "model") if name in saved), "")


def weights_of(saved: dict, source: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself if it is one. Raises ValueError for anything else."""
    state = saved.get(container_of(saved), saved)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: holds no weights by name; pass a checkpoint of a model")
    return state


def recognize(saved: Mapping[str, Any], state: Iterable[str]) -> tuple[str | None, bool]:
    """The method of a checkpoint, by its key `method` or by its weights' names; and whether no other method can read it."""
    if "method" in saved:
        return saved["method"], True
    names = [f"{container_of(saved)} {name}" for name in state]
    found = ((method, sure) for method, sure, rule in RULES if any(re.search(rule, name) for name in names))
    return next(found, (None, False))


def trunk_state(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's part of a state dict, with the names of the timm or torchvision model. Its head is still included."""
    prefix = next(p for p in PREFIXES if any(name.startswith(p) for name in state_dict) or not p)
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_trunk(trunk: nn.Module, state: Mapping[str, Any], classifier: str, source: str, names: Iterable[str] = ()) -> None:
    """Load a trunk. `state` must hold exactly its weights; only weights of the classifier are left out.

    names: all names of the checkpoint, for the message. Raises ValueError with the number of wrong keys and five of them.
    """
    wanted = trunk.state_dict()
    old = {name: value for name, value in wanted.items() if name.endswith(".num_batches_tracked")}  # absent before torch 0.4.1
    state = old | {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    faults = {
        "missing": [name for name in wanted if name not in state],
        "left over": [name for name in state if name not in wanted],
        "of another shape": [n for n in wanted if n in state and wanted[n].shape != getattr(state[n], "shape", None)],
    }
    faults = {fault: keys for fault, keys in faults.items() if keys}
    if not faults:
        trunk.load_state_dict(state)
        return
    room, parts = 5, []
    for i, (fault, keys) in enumerate(faults.items(), 1):
        shown = [key if len(key) <= 36 else f"...{key[-33:]}" for key in keys[: room if i == len(faults) else 2]]
        parts.append(f"{len(keys)} {fault}: {', '.join(shown)}")
        room -= len(shown)
    prefixes = Counter(_prefix(name, wanted) for name in names or state).most_common(3)
    listed = ", ".join(f"{prefix[:24] or 'none'} ({count})" for prefix, count in prefixes) or "no names"
    raise ValueError(f"{source}: does not fit the trunk ({'; '.join(parts)}); prefixes found: {listed}; pass the --arch of its "
                     "training, and its --method if needed")  # fmt: skip


def _prefix(name: str, wanted: Mapping[str, Any]) -> str:
    """The part of a name before the name of one of the trunk's weights; if there is none, its first two components."""
    parts = name.split(".")
    ends = (i for i in range(len(parts)) if ".".join(parts[i:]) in wanted)
    return "".join(f"{part}." for part in parts[: next(ends, min(2, len(parts) - 1))])
