"""Writing checkpoints beside training: whole or not at all, in the background, the newest few kept."""

import threading
import time
from pathlib import Path

import torch

from utils.run import checkpoint
from utils.run.files import atomic, second_name
from utils.run.log import say


class Saver:
    """Writes the checkpoints of a run, on the first process, one at a time.

    keep: how many of the newest stay, beside those of every `keep_epochs`-th epoch (0: none). minutes: after how many without a
    checkpoint one is due (0: never). A save that fails, on a full disk say, leaves the earlier ones and the run alone.
    """

    def __init__(self, folder: Path, keep: int, minutes: float, keep_epochs: int = 0):
        self.folder, self.keep, self.minutes, self.keep_epochs = Path(folder), keep, minutes, keep_epochs
        self.thread, self.failure, self.last = None, None, time.monotonic()

    def due(self) -> bool:
        """Whether time has come for a checkpoint, and none is still being written."""
        idle = self.thread is None or not self.thread.is_alive()
        return bool(self.minutes) and idle and time.monotonic() - self.last >= 60 * self.minutes

    def save(self, content: dict) -> None:
        """Copy `content`, which holds `epoch` and `step`, to the CPU's memory and return; it is written meanwhile."""
        self.wait()
        content = _copied(content)
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self._write, args=(content,), name="saver")
        self.thread.start()

    def wait(self) -> Exception | None:
        """Until nothing is being written; why the last save failed, or None."""
        if self.thread:
            self.thread.join()
        return self.failure

    def reason(self) -> str:
        """Of the last failure, in one line."""
        return str(self.failure).splitlines()[0]

    def _write(self, content):
        path = self.folder / checkpoint.name_of(content["epoch"], content["step"])
        try:
            write(path, content)
            self._tidy(path)
            self.failure = None
        except (OSError, RuntimeError) as error:
            # torch's own error about a file that takes no more hides the system's, which says why
            self.failure = error.__context__ if isinstance(error.__context__, OSError) else error
            say(f"warning: {path} could not be written ({self.reason()}); training goes on, the next save tries again")

    def _tidy(self, written):
        """Delete passing checkpoints but the newest. A later one than `written` is of a try that this run does not continue."""
        saved = checkpoint.saved_in(self.folder)
        for path in saved[: saved.index(written)]:
            path.rename(path.with_name(f"abandoned_{path.name}"))
            say(f"warning: {path} is later than the checkpoint that was resumed; renamed to abandoned_{path.name}")
        places = ((path, checkpoint.place_of(path)) for path in saved[saved.index(written) :])
        passing = [path for path, (epoch, step) in places if step or not self.keep_epochs or epoch % self.keep_epochs]
        for path in passing[self.keep :]:
            path.unlink()


def write(path: Path, content: dict) -> None:
    """Write a checkpoint, and make `checkpoint_latest` another name of it."""
    with atomic(path) as file:
        torch.save(content, file)
    second_name(path, checkpoint.LATEST)


def _copied(x):
    """The same, with copies of all tensors in the memory of the CPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return type(x)(map(_copied, x)) if isinstance(x, list | tuple) else x
