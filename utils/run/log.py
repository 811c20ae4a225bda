"""The output of a run: console, progress bar, metrics.jsonl, TensorBoard, config.json."""

import math
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.run import cpu, dist
from utils.run.files import Lines, atomic, encoded, read_lines, write_json
from utils.run.text import brief, shown, shown_flags
from utils.run.warned import GIVEN

PACKAGES = ("torch", "torchvision", "timm", "webdataset", "numpy", "pillow")


def say(*words) -> None:
    """Print on the first process only, without breaking its progress bar."""
    if dist.rank() == 0:
        text = " ".join(str(w) for w in words)
        if text.startswith("warning: "):
            GIVEN.append(text.removeprefix("warning: "))
        from tqdm import tqdm  # here, as TensorBoard below: torch.hub imports this module and has neither

        try:
            tqdm.write(text)
            sys.stdout.flush()  # Python writes to a file in large pieces otherwise
        except OSError:  # the terminal was closed, or the reader of the pipe has ended: training continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def harmless(name: str):
    """Around the writing of a file that people only look at: an error becomes a warning, and the run continues."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"warning: {name} is not written ({brief(shown(reason), 200)}); the run continues")


def write_config(folder: Path, args, start: tuple[int, int] = (0, 0), **facts) -> None:
    """config.json: flags, versions, commit, and facts such as the hash of the data. starts.jsonl: the same for each start.

    start: (epoch, step). A start with nothing left to train does not change config.json.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    config = {"flags": shown_flags(vars(args)), "versions": versions, "commit": _commit(), "processes": dist.world(),
              "hardware": cpu.hardware(), **facts}  # fmt: skip
    when = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "epoch": start[0], "step": start[1]}
    Lines(folder / "starts.jsonl").put(when | config)
    if not (folder / "config.json").exists() or start[0] < args.epochs:
        write_json(folder / "config.json", config)


def _commit():
    """The commit of this checkout; None in a copy of it, also inside another repository, and without git."""
    here = Path(__file__).resolve().parents[2]

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True).stdout.strip()

    try:
        return git("describe", "--always", "--dirty") or None if git("rev-parse", "--show-toplevel") == str(here) else None
    except OSError:
        return None


class Log:
    """Means over the steps between two log lines. Lives on every process, writes on the first.

    start: (epoch, step) at which the run starts or resumes; later lines are removed, so that metrics.jsonl has each step once.
    steps: of an epoch. batch: images in a global batch. bad: the run's BadSamples. chance: the loss of guessing, printed
    after the loss. epochs: of the whole run, for the time that is left; 0 prints none. verdicts: judge the lines. tracker: gets
    the numbers and pictures of TensorBoard too.
    """

    def __init__(self, folder: Path, start: tuple[int, int], steps: int, print_freq: int, batch: int, bad: Any, chance=0.0,
                 epochs: int = 0, verdicts: Any = None, tracker: Any = None):  # fmt: skip
        self.steps, self.print_freq, self.batch, self.bad, self.chance = steps, print_freq, batch, bad, chance
        self.epochs, self.verdicts, self.tracker, self.done, self.began = epochs, verdicts, tracker, 0, time.perf_counter()
        self.lines = self.writer = None
        self.number = start[0] * steps + start[1]  # steps over all epochs so far
        if dist.rank() == 0:
            path = folder / "metrics.jsonl"
            kept = [entry for entry in read_lines(path) if _place(entry) < start]
            with atomic(path) as file:
                file.write(encoded(kept))
            self.lines = Lines(path)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=start[0] * steps + start[1] + 1)
        self._reset()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self._curves(lambda writer: writer.close())
        if self.tracker:
            self.tracker.close(failed=error is not None)

    def _reset(self):
        self.sums, self.counts, self.count, self.met = {}, {}, 0, []
        self.waited, self.since = 0.0, time.perf_counter()

    def epoch(self, epoch: int, first_step: int = 0):
        """The steps of an epoch, from `first_step` on, under a progress bar on a terminal."""
        from tqdm import tqdm

        self.at = epoch
        self._reset()
        hide = None if dist.rank() == 0 else True  # None: hidden where stderr is no terminal
        steps = range(first_step, self.steps)
        return tqdm(steps, desc=f"epoch {epoch}", initial=first_step, total=self.steps, leave=False, disable=hide)

    @contextmanager
    def waiting(self):
        """A context around waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, step: int, loss: torch.Tensor, stats: dict[str, torch.Tensor], lr: float, bad: list[dict]) -> None:
        """Add a step to the means, without waiting for the device; write them every `print_freq` steps and after the epoch.

        stats: a name may be missing in some steps; its mean is that of the others.
        bad: new unusable samples of this process. Raises RunError if there are too many on all processes.
        """
        self.met += bad
        values = {"loss": loss.detach(), **stats}
        if known := [name for name in values if name in self.sums]:  # one launch for all of them
            torch._foreach_add_([self.sums[name] for name in known], [values[name] for name in known])
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.count += 1
        self.now = step, lr
        if (step + 1) % self.print_freq == 0 or step + 1 == self.steps:
            self._write()

    def flush(self) -> None:
        """Write the means so far to the disk: a checkpoint that is saved now resumes after them."""
        if self.count:
            self._write()
        if self.lines:
            self.lines.sync()

    def scalars(self, epoch: int, values: dict[str, float]) -> None:
        """Write values of a whole epoch, such as a validation's."""
        if self.lines:
            self._put({"epoch": epoch, **values}, (epoch + 1) * self.steps)

    def picture(self, path: Path) -> None:
        """Show a PNG in TensorBoard and in the tracker, at the step of the last line."""
        from PIL import Image

        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        self._curves(lambda writer: writer.add_image(path.stem, pixels, self.number, dataformats="HWC"))
        if self.tracker:
            self.tracker.picture(path, self.number)

    def _write(self):
        step, lr = self.now
        sums = torch.stack(list(self.sums.values())).float()
        totals = dist.total(sums).tolist()
        means = {name: x / (self.counts[name] * dist.world()) for name, x in zip(self.sums, totals, strict=True)}
        if "skipped" in means:
            means["skipped"] = round(means["skipped"] * self.count)
        unusable = self.bad.add(self.met)
        seconds = time.perf_counter() - self.since
        rate, share, count = self.count * self.batch / seconds, self.waited / seconds, self.count
        waits = self._waits(sums.new_tensor([share])) if dist.world() > 1 else {}
        self._reset()
        if not self.lines:
            return
        self.done += count
        line = {"epoch": self.at, "step": step, "steps": count, **means, "lr": lr, "images_per_s": rate, "data_wait": share,
                **waits, "bad": unusable, "peak_gb": peak_memory() / 1e9}  # fmt: skip
        self._put(line, self.at * self.steps + step + 1)
        chance = f" (chance {self.chance:.3f})" if self.chance else ""
        shown = [name for name in means if name not in ("loss", "skipped") and not name.startswith("health_")]
        rest = "  ".join(f"{name} {means[name]:.3f}" for name in shown)
        rest += "".join(f"  {what} {n}" for what, n in (("unusable images", unusable), ("skipped", means.get("skipped"))) if n)
        left = self._left(step, seconds / count)
        say(f"epoch {self.at} [{step + 1}/{self.steps}]  loss {means['loss']:.4f}{chance}  {rest}  lr {lr:.4g}  "
            f"{rate:.0f} images/s  data wait {share:.0%}  {line['peak_gb']:.2g} GB{left}")  # fmt: skip
        if self.verdicts:
            self.verdicts.see(line)

    @staticmethod
    def _waits(own):
        """The process that waits longest for its data: its number, its share of the time, and the median of the others'."""
        most, *others = sorted(((share, rank) for rank, share in enumerate(dist.gather(own).tolist())), reverse=True)
        return {"data_wait_process": most[1], "data_wait_most": most[0], "data_wait_others": others[len(others) // 2][0]}

    def _left(self, step, of_step):
        """The time to the end of the epoch, at the speed of these steps, and of the run, at that since its start."""
        if not self.epochs:
            return ""
        whole = (time.perf_counter() - self.began) / self.done * ((self.epochs - self.at) * self.steps - step - 1)
        return f"  left: epoch {clock(of_step * (self.steps - step - 1))}, run {clock(whole)}"

    def _put(self, entry, number):
        """Write a line of metrics.jsonl; its numbers also go to TensorBoard and the tracker. number: steps over all epochs."""
        assert self.lines
        self.number = number
        self.lines.put(entry)
        numbers = {name: value for name, value in entry.items() if name not in ("epoch", "step", "steps")}
        self._curves(lambda writer: [writer.add_scalar(name, value, number) for name, value in numbers.items()])
        if self.tracker:
            self.tracker.numbers(numbers, number)

    def _curves(self, work):
        if self.writer:
            try:
                work(self.writer)
            except OSError as error:  # a full disk
                say(f"warning: TensorBoard's file cannot be written ({error}); its curves end here, metrics.jsonl continues")
                self.writer = None


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))


def peak_memory() -> int:
    """Bytes of the device, if it counts them, or of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else cpu.peak_memory()


def _place(entry):
    """(epoch, step) of a line of metrics.jsonl; the line of a whole epoch comes after all its steps."""
    return entry.get("epoch", math.inf), entry.get("step", math.inf)
