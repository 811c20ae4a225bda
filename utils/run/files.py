"""Files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when it is complete and on disk; otherwise nothing is left of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def second_name(path: Path, name: str) -> None:
    """Let `name`, in the same folder, become one more name of a file; a copy of it where the file system has no hard links."""
    other = path.with_name(name)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:
        with atomic(other) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
    else:
        os.replace(temporary, other)
        _sync(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, which may not exist. A run that was killed may have left half a line, which is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return whole.splitlines(keepends=True)


def write_json(path: Path, content: dict) -> None:
    """A JSON file, whole or not at all."""
    with atomic(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


class Lines:
    """A file of JSON lines that grows. What a full disk does not take is kept, and comes before the next line."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.warned = Path(path), b"", False

    def put(self, *entries: dict) -> None:
        """Write what has waited, then these."""
        self.waiting += b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                tqdm.write(f"warning: {self.path} cannot be written ({error.strerror}); its lines wait, training goes on")
            self.warned = True

    def sync(self) -> None:
        """Bring the lines to the disk itself."""
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())


def _sync(folder):
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
