"""Files that appear whole or not at all, and files of JSON lines."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It gets its name only when it is complete and on disk; otherwise it is removed."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(path: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder of files, or the file of the only name "": it can be checked before it gets its name, which must be free.

    Yields its temporary path, with the same last name. After an error nothing is left.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        temporary = folder / path.name
        if "" not in contents:
            temporary.mkdir()
        for name, content in contents.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        yield temporary
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        _rename(temporary, path)
    finally:
        shutil.rmtree(folder)


def second_name(path: Path, name: str) -> None:
    """Give a file one more name in its folder: a hard link, or a copy if the file system has no links."""
    other, temporary = path.with_name(name), _temporary(path.with_name(name))
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:
        with atomic(other) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
    else:
        _rename(temporary, other)


def read_lines(path: Path) -> list[dict]:
    """The entries of a file of JSON lines, which may not exist.

    A killed run leaves an incomplete last line, and a power failure bytes of 0. They are removed from the file. A corrupt
    whole line is removed with a warning.
    """
    entries, lost = [], 0
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for line in lines:
        try:
            entries.append(dict(json.loads(line.strip(b"\0"))))
        except (ValueError, TypeError):
            lost += 1
    if lost:
        from tqdm import tqdm  # here: torch.hub imports this module without it

        tqdm.write(f"warning: {path}: {lost} lines are corrupt and removed")
    if lost or rest:
        with atomic(path) as file:
            file.write(encoded(entries))
    return entries


def encoded(entries: Iterable[dict]) -> bytes:
    """JSON lines, with `strict`."""
    return b"".join(strict(entry).encode() + b"\n" for entry in entries)


def write_json(path: Path, content: dict) -> None:
    """A JSON file, whole or not at all, with `strict`."""
    with atomic(path) as file:
        file.write(strict(content, indent=1).encode() + b"\n")


def strict(content: Any, indent: int | None = None) -> str:
    """JSON in which a number that is not finite is null: JSON has no NaN and no Infinity."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(x):
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Lines:
    """A growing file of JSON lines. Lines that a full disk refuses are kept, and written before the next line."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.warned = Path(path), b"", False

    def put(self, *entries: dict) -> None:
        """Write the lines that wait, then these."""
        self.waiting += encoded(entries)
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
            self.warned = False
        except OSError as error:
            if not self.warned:
                from tqdm import tqdm

                tqdm.write(f"warning: {self.path} cannot be written ({error.strerror}); its lines wait, training continues")
            self.warned = True

    def sync(self) -> None:
        """Flush the lines to the disk."""
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())


def _temporary(path):
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _rename(temporary, path):
    """Rename a file, and flush its folder to the disk."""
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
