"""What a run tells: console, progress bar, metrics.jsonl, TensorBoard, config.json."""

import json
import math
import platform
import subprocess
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import dist
from utils.bad_samples import BadSamples
from utils.flags import RunError

PACKAGES = ("torch", "torchvision", "timm", "webdataset", "numpy", "pillow")


def say(*words) -> None:
    """Print on the first process only, without tearing its progress bar."""
    if dist.rank() == 0:
        tqdm.write(" ".join(str(w) for w in words))


def write_config(folder: Path, args, **facts) -> None:
    """config.json: every flag, the versions, the commit, and what else tells this run from another."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    commit = git.stdout.strip() or None
    config = {"flags": vars(args), "versions": versions, "commit": commit, "processes": dist.world(), **facts}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


class Log:
    """Counts what happens between two log lines. Lives on every process, writes on the first.

    bad: where unusable samples are put down. chance: the loss of guessing, printed beside the loss. batch: images in a global
    batch.
    """

    def __init__(self, folder: Path, steps: int, print_freq: int, batch: int, bad: BadSamples, chance: float | None = None):
        self.steps, self.print_freq, self.batch, self.bad, self.chance = steps, print_freq, batch, bad, chance
        self.writer = self.file = None
        if dist.rank() == 0:
            self.writer = SummaryWriter(folder)
            self.file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115 - closed with the log
        self._reset()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()
            self.writer.close()

    def _reset(self):
        self.sums, self.count, self.met, self.waited, self.since = {}, 0, [], 0.0, time.perf_counter()

    def epoch(self, epoch: int, first_step: int = 0):
        """The steps of an epoch, from `first_step` on, under a progress bar on a terminal."""
        self.at = epoch
        self._reset()
        hide = None if dist.rank() == 0 else True  # None: hidden where stderr is no terminal
        steps = range(first_step, self.steps)
        return tqdm(steps, desc=f"epoch {epoch}", initial=first_step, total=self.steps, leave=False, disable=hide)

    @contextmanager
    def waiting(self):
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self, step: int, loss: torch.Tensor, stats: dict[str, torch.Tensor], lr: float, bad: list[dict]) -> None:
        """Add up a step without waiting for the device; every `print_freq` steps and at the epoch's end, write the means.

        bad: the unusable samples that this process has met. Raises RunError if there are too many in all.
        """
        self.met += bad
        for name, value in {"loss": loss.detach(), **stats}.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        if (step + 1) % self.print_freq == 0 or step + 1 == self.steps:
            self._write(step, lr)
            self._reset()

    def scalars(self, epoch: int, values: dict[str, float]) -> None:
        """Write what is known once an epoch."""
        if self.file:
            self.file.write(json.dumps({"epoch": epoch, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.writer.add_scalar(name, value, (epoch + 1) * self.steps)

    def _write(self, step, lr):
        means = dist.total(torch.stack(list(self.sums.values())).float()) / (self.count * dist.world())
        means = dict(zip(self.sums, means.tolist(), strict=True))
        unusable = self.bad.add(self.met)
        if not math.isfinite(means["loss"]):
            raise RunError(f"the loss is {means['loss']} in epoch {self.at} by step {step}; try a lower --lr or --amp fp32")
        if not self.file:
            return
        seconds = time.perf_counter() - self.since
        rate, share = self.count * self.batch / seconds, self.waited / seconds
        entry = {"epoch": self.at, "step": step, **means, "lr": lr, "images_per_s": rate, "data_wait": share, "bad": unusable}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in entry.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, self.at * self.steps + step + 1)
        chance = f" (chance {self.chance:.3f})" if self.chance else ""
        rest = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "loss")
        rest += f"  unusable images {unusable}" if unusable else ""
        say(f"epoch {self.at} [{step + 1}/{self.steps}]  loss {means['loss']:.4f}{chance}  {rest}  lr {lr:.4g}  "
            f"{rate:.0f} images/s  data wait {share:.0%}")  # fmt: skip
