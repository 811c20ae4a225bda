"""--mirror: the files of a run, copied to another place after each save. A run on an empty machine resumes from there.

A checkpoint counts there if a file with its sha256 lies beside it. This file is written last, and deleted first.
"""

import contextlib
import hashlib
import json
import math
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.run import checkpoint
from utils.run.copies import Copies, Refused, reason
from utils.run.files import write_json
from utils.run.log import say
from utils.run.text import shown

MARK, BESIDE = "mirror.json", ".sha256"
FILES = ("*.jsonl", "*.json", "*.html", "*.png", "events.out.tfevents.*")  # besides checkpoints
LAST, PATIENCE, TRIES = 600.0, 5.0, 3  # the end of a run: seconds for its last copy, seconds until it says so, tries
SLOW = 1800.0  # seconds of one copy, after which a warning names it
_mirror: "Mirror | None" = None


def attach(folder: Path, target: str, resume: str | None, dry: bool = False) -> None:
    """Copy this run to `target` from now on. Call once, on the first process, when its folder is locked.

    If the target has a later checkpoint than the folder, the run's files are copied here first. dry: only check. Raises
    ValueError for a target that cannot be used. If it cannot be reached, a run with checkpoints here continues with a warning.
    """
    global _mirror
    mirror, used = Mirror(folder, target), bool(checkpoint.saved_in(folder))
    try:
        mirror.claim(resume == "auto", dry)
        if resume == "auto" and not dry:
            mirror.fetch()
    except Refused:
        raise
    except Exception as error:  # of any of fsspec's file systems, which have no common class
        if not used:
            raise Refused(f"{mirror.flag}: cannot be used ({reason(error)}), and may hold this run; fix it, or leave out "
                          "--mirror to start a new run") from None  # fmt: skip
        mirror.warn(error)
    if not dry:
        _mirror = mirror


def push(keep: int, keep_epochs: int) -> None:
    """Copy what is new, in the background. Old checkpoints are deleted there as by a Saver here. Nothing without a mirror."""
    if _mirror:
        _mirror.keep = keep, keep_epochs
        _mirror.push()


@contextlib.contextmanager
def copied_at_the_end() -> Iterator[None]:
    """Around a run: waits for the last copy, however the run ends, at most LAST seconds."""
    global _mirror
    try:
        yield
    finally:
        mirror, _mirror = _mirror, None
        if mirror:
            mirror.finish()


class Mirror:
    """The mirror of a run's folder. Its thread copies."""

    def __init__(self, folder: Path, target: str):
        self.folder, self.flag = folder, f"--mirror {shown(target)}"
        self.copies = Copies(target, self.flag)
        self.claimed, self.given = False, set[str]()  # the place is of this run; kinds of failures that were told
        self.keep: tuple[int, int] | None = None
        self.sent: dict[str, tuple[int, int]] = {}  # name -> size and time of the file that lies there
        self.changed = threading.Condition()
        self.asked = self.done = 0  # numbers of copies
        self.failed, self.began = "", 0.0
        self.thread: threading.Thread | None = None

    def claim(self, adopt: bool, dry: bool = False) -> None:
        """Make this place the one of this run, by the same random id here and there. Raises Refused if another run has it.

        adopt: a folder without checkpoints takes the id that is there.
        """
        self.copies.connect(self.folder)
        here, there = _id(_read(self.folder / MARK)), _id(self.copies.read(MARK))
        if there and there != here:
            if checkpoint.saved_in(self.folder):
                raise Refused(f"{self.flag}: holds another run than {self.folder}; pass another place")
            if not adopt:
                raise Refused(f"{self.flag}: holds a run already; pass --resume auto to resume it, or another place")
        if not dry:
            run = there or here or uuid.uuid4().hex
            if run != here:
                write_json(self.folder / MARK, {"run": run})
            if not there:
                self._put(self.folder / MARK)
        self.claimed = True

    def fetch(self) -> None:
        """Copy the newest whole checkpoint here, if it is later than those here, and the other files. Raises Refused."""
        names = self.copies.names()
        there = [Path(name.removesuffix(BESIDE)) for name in names if name.endswith(BESIDE)]
        there = [path for path in there if checkpoint.place_of(path)[0] < math.inf]
        here = checkpoint.saved_in(self.folder)
        later = [path for path in there if not here or checkpoint.place_of(path) > checkpoint.place_of(here[0])]
        for path in sorted(later, key=checkpoint.place_of, reverse=True):
            say(f"copying {path} from {self.flag}")
            if self.copies.get(self.folder / path.name, (self.copies.read(path.name + BESIDE) or b"").decode()):
                break
            say(f"warning: {path} of {self.flag} is not whole; taking the one before it")
        else:
            if later:
                raise Refused(f"{self.flag}: none of its {len(later)} checkpoints is whole; pass another place")
            return
        for name in names:
            if any(Path(name).match(pattern) for pattern in FILES) and name != MARK:
                self.copies.get(self.folder / name)

    def push(self) -> None:
        with self.changed:
            if self.asked > self.done and time.monotonic() - self.began > SLOW:
                self.warn(TimeoutError(f"a copy takes longer than {SLOW:.0f} s"))
            self.asked += 1
            self.changed.notify_all()
        if not self.thread:  # a daemon: a server that hangs must not keep the process
            self.thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self.thread.start()

    def finish(self) -> None:
        """Copy what is left; give up after LAST seconds."""
        end, told = time.monotonic() + LAST, False
        for left in reversed(range(TRIES)):
            self.push()
            with self.changed:
                while self.done < self.asked and time.monotonic() < end:
                    if not self.changed.wait(min(PATIENCE, max(0, end - time.monotonic()))) and not told:
                        told = True
                        say(f"waiting for the last copy to {self.flag}, at most {LAST:.0f} s")
                if self.done < self.asked:
                    self.failed = f"not done in {LAST:.0f} s"
            if not self.failed or time.monotonic() >= end:
                break
            if left:
                time.sleep(1)
        if self.failed:
            say(f"warning: {self.flag} lacks the last save ({self.failed}); it is in {self.folder}")

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.asked > self.done)
                number, self.began = self.asked, time.monotonic()
            try:
                self._copy()
                self.failed = ""
            except Exception as error:  # as in `attach`; the run continues
                self.failed = reason(error)
                self.warn(error)
            with self.changed:
                self.done = number
                self.changed.notify_all()

    def _copy(self):
        """Copy the files that have changed, then checkpoints, the newest first, and delete those that are not here."""
        if not self.claimed:
            self.claim(adopt=False)
        checkpoints = checkpoint.saved_in(self.folder)  # before the metrics, which must not be older than a checkpoint there
        for path in sorted({path for pattern in FILES for path in self.folder.glob(pattern)}):
            if _state(path) != self.sent.get(path.name):
                self._put(path)
        for path in checkpoints:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: newer ones exist
                if (state := _state(path)) != self.sent.get(path.name):
                    self._put_checkpoint(path)
                    self.sent[path.name] = state
        self._tidy(checkpoint.saved_in(self.folder))

    def _tidy(self, here):
        """Delete old checkpoints there, those that are later than the newest here, and what interrupted copies have left."""
        names = self.copies.names()
        there = [path for path in map(Path, names) if checkpoint.place_of(path)[0] < math.inf]
        gone = {path.name for path in there if here and checkpoint.place_of(path) > checkpoint.place_of(here[0])}
        if self.keep:
            gone |= {path.name for path in checkpoint.surplus([path for path in there if path.name not in gone], *self.keep)}
        for name in sorted(names, reverse=True):  # a sha256 before its checkpoint
            own = name.removesuffix(BESIDE)
            if own in gone or own.startswith(".checkpoint_") or (name != own and own not in names):
                self.copies.delete(name)

    def _put_checkpoint(self, path):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest().encode()
        if self.copies.read(path.name + BESIDE) != found:
            self.copies.delete(path.name + BESIDE)
            self.copies.put(path)
            self.copies.write(path.name + BESIDE, found)

    def _put(self, path):
        state = _state(path)
        self.copies.put(path)
        self.sent[path.name] = state

    def warn(self, error: Exception) -> None:
        """A warning for each kind of failure, once."""
        kind = type(error).__name__ + str(getattr(error, "errno", ""))
        if kind not in self.given:
            self.given.add(kind)
            say(f"warning: {self.flag}: {reason(error)}; training continues, and each save tries again")


def _state(path):
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read(path):
    return path.read_bytes() if path.exists() else None


def _id(content: bytes | None) -> Any:
    """The id of a run in the content of its MARK; None if there is none."""
    try:
        return json.loads(content or b"{}").get("run")
    except (ValueError, AttributeError):
        return None
