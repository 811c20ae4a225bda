"""The model card of an export: method, data, recipe, measured results, how to load it."""

import json
from pathlib import Path
from typing import Any

from utils.evaluation.frozen import Source
from utils.learning.backbones import Network
from utils.run import checkpoint
from utils.run.flags import typed
from utils.run.text import shown, shown_flags

# flags that are no part of a recipe or protocol
OUTSIDE = {"shards", "workers", "output_dir", "resume", "device", "print_freq", "save_steps", "save_minutes", "save_freq",
           "keep", "dry_run", "dist_timeout", "cache_dir", "allow_pipe", "verify_shards", "replay", "compile", "photometric",
           "max_bad", "max_pixels", "train_shards", "val_shards", "pretrained", "accumulate", "eval_shards", "eval_every",
           "eval_images", "eval_neighbours", "mirror", "tracker"}  # fmt: skip
CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
license: {license}
tags: [timm, self-supervised, {method}]
---

# {arch}, trained by {method}

A trunk that was trained without labels.

{facts}

## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:USER/NAME"
```

Input: {pixels}, minus the mean {mean}, divided by {std}. The shorter side of an image is resized to {resize} pixels (bilinear,
antialias). Then the central {size} x {size} pixels are cut.

## Measured results

{results}
"""


def results(run: Path, sha256: str) -> list[tuple[str, dict[str, float], str]]:
    """(evaluation, its numbers, its protocol) of each result*.json of a run that measured this checkpoint."""
    found = []
    for path in sorted([*run.glob("*/result*.json"), *run.glob("*/*/result*.json")]):  # linear/, transfer/CIFAR10/
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("checkpoint_sha256") == sha256:
            protocol = content.pop("protocol", {})
            found.append((str(path.relative_to(run).parent), dict(_numbers(content)), shown(_typed(protocol))))
    return found


def _typed(flags: dict[str, Any]) -> str:
    given = {name: value for name, value in flags.items() if name not in OUTSIDE and value not in (None, False, [])}
    return " ".join(typed(name, value) for name, value in given.items())


def _numbers(content: Any, name: str = ""):
    """("last top1", 72.3) ... of nested dictionaries."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{name} {key}".strip())
    elif isinstance(content, int | float):
        yield name, content


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def card(source: Source, network: Network, size: int, resize: int, license_name: str) -> str:
    """README.md of a Hugging Face folder. resize: shorter side of an image before the crop of `size`."""
    assert source.path and source.sha256
    saved = checkpoint.read(source.path, source.flag)  # perhaps not of this code
    run, flags = source.path.parent, shown_flags(saved.get("flags", {}))
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    recipe = _typed(flags)
    options = "".join(f", {name} {value}" for name, value in network.options.items())
    facts = {
        "method": source.method, "trunk": f"{network.arch} of timm{options}", "data": flags.get("shards"),
        "hash of the data": saved.get("index"), "images": config.get("samples"), "epochs": saved.get("epoch"),
        "recipe": recipe and f"`python main_pretrain.py {recipe}`", "commit": config.get("commit"),
        "checkpoint, sha256": source.sha256, "licence": license_name,
    }  # fmt: skip
    measured = [[where, ", ".join(f"{name} {value:g}" for name, value in numbers.items()), f"`{protocol}`"]
                for where, numbers, protocol in results(run, source.sha256)]  # fmt: skip
    numbers = {"size": size, "resize": resize, "mean": network.mean, "std": network.std, "pixels": network.pixels}
    return CARD.format(
        license=license_name, method=source.method, arch=network.arch, **numbers,
        facts=table(["", ""], [[name, value or "not recorded"] for name, value in facts.items()]),
        results=table(["evaluation", "result", "protocol"], measured) if measured else "None in the folder of the run.",
    )  # fmt: skip
