"""What the files of a run's folder say: its state, curves, results, speed and data."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from utils.run import curves

STATE, WARNINGS, VERDICTS = "state.json", "warnings.jsonl", "verdicts.jsonl"
RESULTS = ("top1", "top5", "mean", "accuracy")  # starts of the accuracies in a result.json


class Run:
    """The files of a run's folder."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.state = folder, _read(folder / "config.json"), _read(folder / STATE)
        self.flags: dict[str, Any] = self.config.get("flags", {})
        self.entries, self.starts = (curves.read_lines(folder / name) for name in ("metrics.jsonl", "starts.jsonl"))
        self.verdicts, warnings = (curves.read_lines(folder / name) for name in (VERDICTS, WARNINGS))
        judged = {verdict.get("text") for verdict in self.verdicts}
        self.warnings = [entry for entry in warnings if entry.get("text") not in judged]
        steps = [entry for entry in self.entries if "step" in entry]
        batch, samples = self.flags.get("batch_size"), self.config.get("samples")
        self.steps = samples // batch if batch and samples else max([e["step"] + 1 for e in steps], default=1)
        self.at = max([e["epoch"] + (e["step"] + 1) / self.steps for e in steps], default=0.0)  # epochs done
        self.charts = curves.charts(self.entries, self.steps, self.config.get("references", {}))
        self.epochs: float = self.flags.get("epochs") or self.at

    def facts(self) -> dict[str, Any]:
        """Label -> text: the state, how far, and time left."""
        state = self.state.get("state") or ("finished" if self.at >= self.epochs else "unknown")
        found = {"state": state, "epochs": f"{self.at:.4g} of {self.epochs:g}"}
        if self.state and state == "running":
            found["state"] = f"running on {self.state['time']} (if that is long ago, it was killed)"
            if left := self.left():
                found["time left"] = left
        return found

    def left(self) -> str | None:
        """The time to the end at the speed since the last start; None before it is known."""
        if not self.starts:
            return None
        start, now = self.starts[-1], datetime.fromisoformat(self.state["time"])
        done = self.at - start["epoch"] - start["step"] / self.steps
        if done <= 0:
            return None
        minutes = (now - datetime.fromisoformat(start["time"])).total_seconds() * (self.epochs - self.at) / done / 60
        return f"about {minutes:.0f} min" if minutes < 120 else f"about {minutes / 60:.1f} h"

    def results(self) -> dict[str, float]:
        """`folder entry` -> value, of the result.json files below the run, and the last values of each epoch's measurement."""
        found: dict[str, float] = {}
        for path in sorted([*self.folder.glob("*/result.json"), *self.folder.glob("*/*/result.json")]):
            where = path.parent.relative_to(self.folder).as_posix()
            found |= {f"{where}: {name}": value for name, value in _accuracies(_read(path))}
        for entry in (e for e in self.entries if "step" not in e):
            found |= {f"last epoch: {name}": value for name, value in entry.items() if isinstance(value, float | int)}
        return {name: value for name, value in found.items() if name != "last epoch: epoch"}

    def speed(self) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {name: config.get(name) for name in ("device", "processes")} | config.get("hardware", {})
        for name, text in (("images_per_s", "{:.0f} images/s"), ("data_wait", "{:.0%} of the time")):
            values = [entry[name] for entry in self.entries if name in entry]
            if values:
                found[curves.LAST[name].lower()] = f"{text.format(np.median(values))} (median)"
        return found

    def data(self) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {"shards": self.flags.get("shards")}
        found |= {label: config.get(name) for label, name in (("images", "samples"), ("hash of the data", "index"))}
        return found | {"commit": config.get("commit"), **config.get("versions", {}), "init": config.get("init")}


def _read(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _accuracies(found, start=""):
    """(name, value) of the accuracies in a result.json."""
    for name, value in found.items():
        if isinstance(value, dict) and name not in ("protocol", "identity"):
            yield from _accuracies(value, f"{start}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name.startswith(RESULTS):
            yield f"{start}{name}", value
