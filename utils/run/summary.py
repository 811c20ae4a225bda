"""A run's numbers beside their references, in words: the health of an epoch, and the sentence at the end."""

import math
from pathlib import Path
from typing import Any

from utils.run.files import read_lines


def references(facts: dict[str, Any]) -> dict[str, float]:
    """Name of a logged number -> its reference line: the value by chance, of even features, or the largest one.

    facts: of Method.facts, with `chance`, the loss of guessing.
    """
    found = {"loss": facts["chance"], "location": 50.0, "health_alignment": 2.0, "health_mass_oldest": 1 / 8,
             "health_mass_newest": 1 / 8, "health_unwritten": 0.0}  # fmt: skip
    if "candidates" in facts:
        found["top1"] = 100 * facts.get("positives", 1) / facts["candidates"]
    if "dim" in facts:
        found |= {"health_spread": facts["dim"] ** -0.5, "health_uniformity": even_uniformity(facts["dim"])}
    if "queue_steps" in facts:
        found["health_key_age"] = facts["queue_steps"]
    return found


def even_uniformity(dim: int) -> float:
    """The uniformity of features that fill the sphere evenly: -4 + ln E exp(4 cos), a series (0F1) in the dimension."""
    term = total = 1.0
    for i in range(60):
        term *= 4 / ((i + 1) * (dim / 2 + i))
        total += term
    return math.log(total) - 4


def health_of(line: dict[str, Any], known: dict[str, float]) -> str:
    """The measures of a watched step, each with its reference, in the order of the log line."""
    known = known | {"health_rankme": line.get("health_full_rankme", math.nan)}
    words = []
    for name, value in line.items():
        unimportant = name == "health_full_rankme" or (name.startswith("health_flat_") and not value)
        if name.startswith("health_") and not unimportant:
            beside = f" ({known[name]:.3g})" if name in known else ""
            words.append(f"{name.removeprefix('health_')} {value:.3g}{beside}")
    return "  ".join(words)


def closing(folder: Path, chance: float) -> str:
    """One sentence about a whole run: its last loss beside chance and the first, its last measurement beside the first."""
    lines = read_lines(folder / "metrics.jsonl")
    losses, measured = ([line for line in lines if line.get(name) is not None] for name in ("loss", "eval_rankme"))
    if not losses:
        return ""
    first, last = losses[0], losses[-1]
    words = [f"loss {last['loss']:.3f} (chance {chance:.3f}, first {first['loss']:.3f})"]
    if "top1" in last:
        words.append(f"top1 {last['top1']:.1f} % (first {first['top1']:.1f} %)")
    for name in ("eval_knn1", "eval_knn20", "eval_rankme"):
        values = [(line["epoch"], line[name]) for line in measured if name in line]
        if values:
            unit, (epoch, start) = " %" if "knn" in name else "", values[0]
            words.append(f"held-out {name[5:]} {values[-1][1]:.1f}{unit} ({start:.1f}{unit} after epoch {epoch})")
    return f"{last['epoch'] + 1} epochs: {', '.join(words)}"
