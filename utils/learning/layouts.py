"""Where the checkpoints of the field keep the trunk, and how a trunk is loaded from one."""

import torch
from torch import nn

# where published checkpoints keep the trunk (METHODS.md, last table); the first prefix that occurs decides
PREFIXES = (
    "module.encoder_q.", "encoder_q.", "module.base_encoder.", "module.momentum_encoder.", "module.encoder.", "encoder.module.",
    "module.", "",
)  # fmt: skip


def trunk_state(state_dict: dict) -> dict[str, torch.Tensor]:
    """The encoder's part of a state dict, with the names of the timm or torchvision model, its head still on it."""
    prefix = next(p for p in PREFIXES if any(name.startswith(p) for name in state_dict) or not p)
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def weights_of(saved: dict, source: str) -> dict:
    """The state dict in a checkpoint, or the checkpoint itself if it is one. Raises ValueError for anything else."""
    state = saved.get("state_dict", saved.get("model", saved))
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: holds no weights by name; pass a checkpoint of a model")
    return state


def load_trunk(trunk: nn.Module, state: dict, classifier: str, source: str) -> None:
    """Load a trunk whose weights `state` must cover exactly; only what belongs to the classifier is left out.

    Raises ValueError that lists the keys which are missing, left over or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    wanted = trunk.state_dict()
    faults = {
        "missing": wanted.keys() - state.keys(),
        "not in the trunk": state.keys() - wanted.keys(),
        "of another shape": [n for n in wanted.keys() & state.keys() if wanted[n].shape != getattr(state[n], "shape", None)],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(sorted(keys))}" for what, keys in faults.items() if keys)
        raise ValueError(f"{source}: does not cover the trunk exactly ({listed}); pass the --arch it was trained with")
    trunk.load_state_dict(state)
