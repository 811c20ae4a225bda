"""Our checkpoints in the layouts of the released code, whose linear probes load them (docs/methods.md)."""

import re
from typing import Any

# method -> (key of the weights, pattern of the names that belong there, changes of a name)
LAYOUTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "cmc": (
        "model",
        r"module\.encoder\.(l_to_ab|ab_to_l)\.",
        {r"^module\.encoder\.": "encoder.module.", r"\.fc8\.": ".fc8.0."},
    ),
    "insdis": ("model", r"module\.encoder\.", {r"^module\.encoder\.": "encoder.module."}),
    "w2ssl": ("state_dict", "", {r"^module\.fc_loc\.": "module.base_encoder.fc_loc."}),
}
SAME = ("state_dict", "", dict[str, str]())  # MoCo and MosRep: their names are the released ones


def released(saved: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of ours -> that of a released one, without optimizer."""
    container, pattern, changes = LAYOUTS.get(saved["method"], SAME)
    state = {name: value for name, value in saved["state_dict"].items() if re.match(pattern, name)}
    if not state:
        raise ValueError(f"--to released: the released code of {saved['method']} has other branches; pass --to safetensors")
    for old, new in changes.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return {"epoch": saved["epoch"], "arch": saved["arch"], container: state}
