"""The curves of a run, from its metrics.jsonl: few enough points for a page, and the picture curves.png."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.run.files import atomic

MOST = 100_000  # lines of steps that are read
COLUMNS = 800  # points of a curve; more are joined to their mean, least and largest value
TITLES = {  # start of a name in metrics.jsonl -> title of its chart, in the order of the page
    "loss": "Loss",
    "top1": "Top-1 of the training's own task, %",
    "location": "Sides of crops that are found, %",
    "eval_knn": "kNN on held-out images, %",
    "val_top1": "Top-1 of the validation, %",
    "val_top5": "Top-5 of the validation, %",
    "eval_spread": "Spread of held-out features",
    "eval_rankme": "RankMe of held-out features",
    "health_top1": "Top-1 by the place of a tile, %",
    "health_spread": "Spread of the embeddings",
    "health_alignment": "Alignment: squared distance to the positive",
    "health_uniformity": "Uniformity of the embeddings",
    "health_rankme": "RankMe of the trunk's features",
    "health_mass": "Share of the softmax on a part of the queue",
    "health_key_age": "Age of the oldest key, steps",
    "health_unwritten": "Share of the bank that was never written",
    "health_flat": "Share of views of one colour",
    "grad_norm": "Norm of the gradient",
    "health_weight_norm": "Norm of the weights",
}
LAST = {"lr": "Learning rate", "images_per_s": "Images per second", "data_wait": "Share of the time that waits for data",
        "peak_gb": "Peak memory, GB", "bad": "Unusable images", "skipped": "Skipped updates"}  # fmt: skip
COUNTS = ("bad", "skipped")  # no chart while they are 0
FULL = "full_"  # a name with this part is a reference: eval_full_spread belongs to eval_spread
PLACES = ("epoch", "step", "steps")  # entries of a line that are no values


@dataclass
class Chart:
    """Curves with one pair of axes. series: name -> places in epochs and values. references: label -> value."""

    title: str
    series: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole entries of a file of JSON lines, which another process may be writing.

    Of more than MOST lines of steps about MOST are taken, at equal distances.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    if (skip := len(lines) // MOST) > 1:
        lines = [line for i, line in enumerate(lines) if i % skip == 0 or b'"step"' not in line]
    try:
        return json.loads(b"[" + b",".join(lines) + b"]")  # a quarter of the time of one by one
    except ValueError:
        return [entry for line in lines if isinstance(entry := _parsed(line), dict)]


def _parsed(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def charts(entries: list[dict[str, Any]], steps: int, references: dict[str, float]) -> list[Chart]:
    """The charts of a run. steps: of an epoch. references: name -> the value by chance, or of even features."""
    found: dict[str, Chart] = {}
    for name in _in_order({name for entry in entries for name in entry if name not in PLACES}):
        lines = [entry for entry in entries if isinstance(entry.get(name), int | float)]
        x = np.array([e["epoch"] + ((e["step"] + 1) / steps if "step" in e else 1) for e in lines])
        y = np.array([float(e[name]) for e in lines])
        usable = np.isfinite(y)
        if not usable.any() or (name in COUNTS and not y.any()):
            continue
        order = np.argsort(x[usable], kind="stable")
        start = _start(name)
        chart = found.setdefault(start, Chart((TITLES | LAST).get(start, start.replace("_", " "))))
        chart.series[name] = x[usable][order], y[usable][order]
        chart.references |= labelled([references.get(name)])
    return list(found.values())


def labelled(references: Iterable[float | None]) -> dict[str, float]:
    """Label -> value of reference lines. Equal ones are one line; None is none."""
    return {f"reference {value:.4g}": float(value) for value in references if value is not None}


def _start(name):
    """The key of a name's chart."""
    name = name.replace(FULL, "")
    return next((start for start in TITLES if name.startswith(start)), name)


def _in_order(names: Iterable[str]) -> list[str]:
    places = {name: i for i, name in enumerate([*TITLES, "", *LAST])}
    return sorted(names, key=lambda name: (places.get(_start(name), places[""]), name))


def thinned(chart: Chart, columns: int = COLUMNS) -> tuple[list[float], dict[str, list[list[float | None]]]]:
    """Common places of at most `columns` points, and for each curve its mean, least and largest value there, or None."""
    places = np.unique(np.concatenate([x for x, _ in chart.series.values()]))
    edges = places
    if len(places) > columns:
        edges = np.linspace(places[0], places[-1], columns, endpoint=False)
        column = np.searchsorted(edges, places, "right") - 1
        filled, first = np.unique(column, return_index=True)
        edges, places = edges[filled], np.add.reduceat(places, first) / np.diff([*first, len(places)])
    found = {}
    for name, (x, y) in chart.series.items():
        column, first = np.unique(np.searchsorted(edges, x, "right") - 1, return_index=True)
        means = np.add.reduceat(y, first) / np.diff([*first, len(y)])
        values = means, np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)
        rows: list[list[float | None]] = []
        for value in values:
            row: list[float | None] = [None] * len(places)
            for i, number in zip(column.tolist(), value.tolist(), strict=True):
                row[i] = rounded(number)
            rows.append(row)
        found[name] = rows
    return [rounded(x, 7) for x in places.tolist()], found


def rounded(value: float, digits: int = 5) -> float:
    """With so many significant digits."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else 0.0


def write_picture(path: Path, found: list[Chart]) -> None:
    """All charts as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    if not found:
        raise ValueError("there are no curves yet")
    wide = min(3, len(found))
    high = math.ceil(len(found) / wide)
    figure = Figure((5 * wide, 3 * high))
    figure.subplots_adjust(0.4 / wide / 2 + 0.02, 0.15 / high, 1 - 0.1 / wide, 1 - 0.1 / high, hspace=0.4, wspace=0.2)
    for place, chart in enumerate(found, 1):
        axes = figure.add_subplot(high, wide, place)
        x, curves = thinned(chart)
        for name, rows in curves.items():
            mean, low, high_ = (np.array(row, float) for row in rows)
            there = np.isfinite(mean)
            at = np.array(x)[there]
            (line,) = axes.plot(at, mean[there], label=name, linestyle="--" if FULL in name else "-", linewidth=1.2)
            axes.fill_between(at, low[there], high_[there], color=line.get_color(), alpha=0.2, linewidth=0)
        for label, value in chart.references.items():
            axes.axhline(value, color="grey", linestyle=":", label=label)
        axes.set_title(chart.title, fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        if len(curves) + len(chart.references) > 1:
            axes.legend(fontsize=7)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)
