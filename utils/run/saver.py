"""Writing checkpoints in the background of training: whole or not at all, the newest few kept."""

import threading
import time
from pathlib import Path

import torch

from utils.run import checkpoint, mirror
from utils.run.files import atomic, second_name
from utils.run.log import say


class Saver:
    """Writes the checkpoints of a run, on the first process, one at a time.

    keep: number of newest checkpoints that stay, besides those of every `keep_epochs`-th epoch (0: none). minutes: one is due
    after so many minutes (0: never). If a save fails, for example on a full disk, earlier ones stay and the run continues.
    """

    thread: threading.Thread | None = None
    failure = ""

    def __init__(self, folder: Path, keep: int, minutes: float, keep_epochs: int = 0):
        self.folder, self.keep, self.minutes, self.keep_epochs = Path(folder), keep, minutes, keep_epochs
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether --save-minutes have passed, and no checkpoint is being written."""
        passed = self.minutes and time.monotonic() - self.last >= 60 * self.minutes
        return bool(passed) and not (self.thread and self.thread.is_alive())

    def save(self, content: dict) -> None:
        """Copy `content`, which holds `epoch` and `step`, to the CPU's memory, and write it in the background."""
        self.wait()
        content = _copied(content)
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self._write, args=(content,), name="saver")
        self.thread.start()

    def wait(self) -> str:
        """Wait until nothing is being written; return the error of the last save in one line, empty if there was none."""
        if self.thread:
            self.thread.join()
        return self.failure

    def _write(self, content):
        path = self.folder / checkpoint.name_of(content["epoch"], content["step"])
        try:
            write(path, content)
            self._tidy()
            self.failure = ""
            mirror.push(self.keep, self.keep_epochs)
        except (OSError, RuntimeError) as error:
            # torch's own error about a full disk hides the system's error, which gives the reason
            self.failure = str(error.__context__ if isinstance(error.__context__, OSError) else error).splitlines()[0]
            say(f"warning: {path} could not be written ({self.failure}); training continues, the next save tries again")

    def _tidy(self):
        """Delete old checkpoints: all except the newest `keep` and those of every `keep_epochs`-th epoch."""
        for path in checkpoint.surplus(checkpoint.saved_in(self.folder), self.keep, self.keep_epochs):
            path.unlink()


def write(path: Path, content: dict) -> None:
    """Write a checkpoint, and make `checkpoint_latest` another name of it."""
    with atomic(path) as file:
        torch.save(content, file)
    second_name(path, checkpoint.LATEST)


def _copied(x):
    """A copy with all tensors on the CPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return type(x)(map(_copied, x)) if isinstance(x, list | tuple) else x
