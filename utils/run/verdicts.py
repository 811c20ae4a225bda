"""Verdicts: what the logged numbers of a run mean, in words, each said once. docs/health.md explains the numbers."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils.run.files import Lines, atomic, encoded, read_lines
from utils.run.log import say
from utils.run.summary import health_of, references

LEAST_SECONDS = 5.0  # of training that a verdict about speed needs
LEAST_STEPS = 20  # that one about the loss needs
SLOW_LINES = 3  # measurements in succession that show the same process as the slowest


class Numbers(dict):
    """Facts, the last log line, and `derived`. An unknown number is not a number: every comparison with it is False."""

    def __missing__(self, name):
        return math.nan


class Verdict(NamedTuple):
    name: str
    condition: Callable[[Numbers], bool]
    text: str  # the names of numbers in braces
    kind: str = "warning"


def collapsed(n: Numbers) -> bool:
    """Embeddings that hardly differ are usual at the start of a training; a trunk with one direction is not."""
    return n["spread_share"] < 0.01 and n["health_rankme"] < 2


TABLE = (
    Verdict("queue_exceeds_data", lambda n: n["queue"] > n["images"],
        "--moco-k {queue} is larger than the data set ({images} images): the negatives of an image include its own older keys"),
    Verdict("negatives_exceed_data", lambda n: n["negatives"] > n["images"],
        "--nce-k {negatives} is larger than the data set ({images} images), so rows repeat; pass {fewer_negatives}"),
    Verdict("queue_never_full", lambda n: n["queue_steps"] > n["all_steps"],
        "--moco-k {queue}: the queue is full after {queue_steps} steps, and the run has {all_steps}: "
        "to the end it holds random directions"),
    Verdict("stale_keys", lambda n: n["replaced"] > 0.9,
        "--moco-m {momentum:g}: the keys are stale. The oldest are {queue_steps} steps old, and {replaced:.0%} of the key "
        "encoder's weights were replaced since; pass a value nearer to 1, such as {fresh_momentum:.4g}, or a smaller --moco-k"),
    Verdict("keys_stay_random", lambda n: n["kept"] > 0.5,
        "--moco-m {momentum:g}: after all {all_steps} steps, {kept:.0%} of the key encoder's weights are still those of "
        "its start; train longer or pass a smaller value"),
    Verdict("temperature_too_high", lambda n: n["floor_share"] > 0.75,
        "{temperature_flag} {temperature:g}: similarities from -1 to 1 make hardly a difference. A perfect network would still "
        "have {floor_share:.0%} of the loss of guessing; published are 0.07 to 0.3"),
    Verdict("no_crop", lambda n: n["smallest_crop"] > 0.8,
        "--crop-min {smallest_crop:g}: each view shows nearly the whole image, so the views of an image differ in colour "
        "alone; published are 0.08 to 0.2"),
    Verdict("flat_view", lambda n: n["flat"] > 0.9,
        "the view `{flat_view}` is one colour for {flat:.0%} of the images: nothing can be learned from it; check the data, "
        "--space and the colours of the view"),
    Verdict("collapse", collapsed,
        "the features collapse, so all images look alike to the network: the standard deviation of the embeddings is "
        "{health_spread:.2g}, {spread_share:.1%} of 1/sqrt(C) = {full_spread:.2g}, and RankMe of the trunk is "
        "{health_rankme:.1f}; pass a lower --lr, and check --weight-decay"),
    Verdict("bn_leak", lambda n: n["groups"] == 1 and n["top1"] > 50
            and n["steps_before"] >= max(LEAST_STEPS, n["queue_steps"]),
        "top-1 is {top1:.0f} % after {steps_seen} steps, and query and key see the same BatchNorm statistics, which may tell "
        "the positive: a leak (arXiv 1911.05722, section 3.3); compare with --bn-splits 8 or several processes"),
    Verdict("loss_rises", lambda n: n["queue"] > 0 and n["epoch"] < 5 and n["loss"] > 1.01 * n["first_loss"]
            and n["steps_seen"] >= LEAST_STEPS and not collapsed(n),
        "the loss rises, from {first_loss:.2f} to {loss:.2f}: by itself no failure, and top-1 may fall with it. Negatives are "
        "easy to tell at first: random directions, in the first {queue_steps} steps, and then keys of an encoder that changes "
        "fast. They become harder. Look at spread, RankMe and kNN instead", "note"),
    Verdict("stale_rows", lambda n: n["negatives"] > 0 and n["epoch"] >= 2 and n["loss"] > 1.25 * n["chance"],
        "after two epochs the loss, {loss:.2f}, is far above that of guessing, {chance:.2f}: the encoder changes so fast that "
        "a row of the bank is far from the new features of its image; pass --fill-banks, or a lower --lr"),
    Verdict("skipped_updates", lambda n: n["steps_seen"] >= LEAST_STEPS and n["skipped_share"] > 0.1,
        "{skipped_share:.0%} of the updates were skipped, because fp16 overflowed; pass --amp bf16 or a lower --lr"),
    Verdict("loader_limits", lambda n: n["workers"] > 0 and n["wait"] > 0.3,
        "data wait {wait:.0%}: {workers_needed:.0f} workers would do, here are {workers} (and {cores} CPU cores)"),
    Verdict("no_workers", lambda n: n["workers"] == 0 and n["wait"] > 0.3,
        "data wait {wait:.0%}: --workers 0 loads and trains in turns; {workers_needed:.0f} workers would do "
        "(here are {cores} CPU cores)"),
    Verdict("slow_loader", lambda n: n["late_lines"] >= SLOW_LINES and n["data_wait_most"] > n["data_wait_others"] + 0.2,
        "process {data_wait_process} waits {data_wait_most:.0%} of the time for its data, the others {data_wait_others:.0%}, "
        "and these wait for it; look at the disk, the network and other jobs of its machine"),
    Verdict("slow_process", lambda n: n["slow_lines"] >= SLOW_LINES and n["health_slowness"] > 1.5,
        "process {health_slowest:.0f} is slow: it needs {health_slowness:.1f} times as long as the others for the same work, "
        "and they wait for it; look for another job, heat or a smaller device on its machine"),
)  # fmt: skip


class Verdicts:
    """Judges a run's numbers at its start and at each log line. Lives on the first process.

    folder: of the run, whose verdicts.jsonl it writes; None: writes nothing. start: (epoch, step), as for Log. facts: numbers
    that are known before the first step.
    """

    def __init__(self, folder: Path | None, start: tuple[int, int], facts: dict[str, Any]):
        self.facts, self.references = {"cores": os.cpu_count()} | facts, references(facts)
        self.past: list[dict[str, Any]] = []
        self.said: set[str] = set()
        self.lines = None
        if folder:
            path = folder / "verdicts.jsonl"
            kept = [entry for entry in read_lines(path) if (entry.get("epoch", 0), entry.get("step", 0)) < start]
            self.said = {str(entry.get("name")) for entry in kept}
            with atomic(path) as file:
                file.write(encoded(kept))
            self.lines = Lines(path)
        self.judge({"epoch": start[0], "step": start[1]})

    def see(self, line: dict[str, Any]) -> None:
        """Judge the numbers of a line of metrics.jsonl. At the end of an epoch, print its health."""
        self.past.append(line)
        if line["step"] + 1 == self.facts["epoch_steps"]:
            say(f"epoch {line['epoch']}: {health_of(line, self.references)}")
        self.judge(line)

    def judge(self, line: dict[str, Any]) -> None:
        numbers = Numbers(self.facts | line)
        numbers |= derived(numbers, self.past)
        for verdict in TABLE:
            if verdict.name not in self.said and verdict.condition(numbers):
                self.said.add(verdict.name)
                text = verdict.text.format_map(numbers)
                say(f"{verdict.kind}: {text}")
                if self.lines:
                    place = {"epoch": line["epoch"], "step": line["step"]}
                    self.lines.put(place | {"name": verdict.name, "kind": verdict.kind, "text": text})


def derived(n: Numbers, past: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers that follow from facts and from the log lines since the start of this process."""
    return of_facts(n) | (of_lines(n, past) if past else {})


def of_facts(n: Numbers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "queue" in n:
        steps = n["queue_steps"]
        found |= {"replaced": 1 - n["momentum"] ** steps, "kept": n["momentum"] ** n["all_steps"],
                  "fresh_momentum": 0.75 ** (1 / max(1, steps))}  # fmt: skip
    if "negatives" in n:
        found["fewer_negatives"] = max(1, n["images"] // 4)
    if "candidates" in n:
        positives = n.get("positives", 1)
        worst = (n["candidates"] - positives) * math.exp(-2 / n["temperature"])  # the sum over negatives at -1, positive at 1
        found["floor_share"] = math.log(positives + worst) / math.log(n["candidates"]) if n["candidates"] > 1 else math.nan
    if "dim" in n:
        found["full_spread"] = n["dim"] ** -0.5
    return found


def of_lines(n: Numbers, past: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"steps_seen": sum(line["steps"] for line in past), "first_loss": past[0]["loss"]}
    found["steps_before"] = found["steps_seen"] - past[-1]["steps"]  # before the last line
    found["skipped_share"] = sum(line.get("skipped", 0) for line in past) / found["steps_seen"]
    if "health_spread" in n and "dim" in n:
        found["spread_share"] = n["health_spread"] * n["dim"] ** 0.5
    flat = {name: value for name, value in n.items() if name.startswith("health_flat_")}
    if flat:
        worst = max(flat, key=flat.__getitem__)
        found |= {"flat": flat[worst], "flat_view": worst.removeprefix("health_flat_")}
    timed = [(line["steps"] * n["batch"] / line["images_per_s"], line["data_wait"]) for line in past[1:]]  # first: warm-up
    if (seconds := sum(time for time, _ in timed)) >= LEAST_SECONDS:
        wait = min(0.99, sum(time * share for time, share in timed) / seconds)
        needed = n["workers"] / (1 - wait) if n["workers"] else wait / (1 - wait)
        found |= {"wait": wait, "workers_needed": math.ceil(needed)}
    for name, process in (("slow_lines", "health_slowest"), ("late_lines", "data_wait_process")):
        last = [line[process] for line in past[1:] if process in line][-SLOW_LINES:]
        found[name] = len(last) if len(set(last)) == 1 else 0  # lines in succession that name the same process
    return found
