"""Copies of files at a URL of fsspec or in another folder: written and read whole or not at all."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from utils.run import dist
from utils.run.files import atomic
from utils.run.text import brief, shown

BLOCK = 1 << 22  # bytes of a read


class Refused(ValueError):
    """Why a target cannot be used, in one line."""


class Copies:
    """target: a folder, s3://..., hf://... or another URL of fsspec. flag: the start of messages.

    Besides Refused, methods raise the errors of fsspec's file systems, which have no common class.
    """

    def __init__(self, target: str, flag: str):
        self.target, self.flag = target, flag
        self.files: Any = None  # fsspec's file system

    def connect(self, beside: Path) -> None:
        """Find the file system. beside: a folder that the target must not be."""
        from fsspec.core import url_to_fs  # torch needs fsspec; s3:// and others need one more package

        try:
            self.files, self.root = url_to_fs(self.target, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise Refused(f"{self.flag}: {reason(error)}") from None
        self.local = "file" in self.files.protocol
        if self.local and not Path(self.root).parent.is_dir():
            raise Refused(f"{self.flag}: {Path(self.root).parent} is no folder; make it, or mount its disk")
        if self.local and Path(self.root).resolve() == beside.resolve():
            raise Refused(f"{self.flag}: is --output-dir itself; pass another folder")

    def names(self) -> list[str]:
        """The names of all files; empty if there are none."""
        self.files.invalidate_cache()
        try:
            return [entry.rstrip("/").rpartition("/")[2] for entry in self.files.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        try:
            return self.files.cat_file(self._at(name))
        except FileNotFoundError:
            return None

    def get(self, path: Path, sha256: str | None = None) -> bool:
        """Copy the file of this name here. Returns whether it exists there and, if its sha256 is given, has this one."""
        digest = hashlib.sha256()
        try:
            with self.files.open(self._at(path.name), "rb") as source, atomic(path) as file:
                while data := source.read(BLOCK):
                    file.write(data)
                    digest.update(data)
                    dist.alive()
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise FileNotFoundError
        except FileNotFoundError:
            return False
        return True

    def put(self, path: Path) -> None:
        """Copy a file there. An object store shows it when it is complete; in a folder it has another name until then."""
        if not self.local:
            return self.files.put_file(str(path), self._at(path.name))
        self.files.makedirs(self.root, exist_ok=True)
        self.files.put_file(str(path), self._at(f".{path.name}.tmp"))
        self.files.mv(self._at(f".{path.name}.tmp"), self._at(path.name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file there."""
        self.files.pipe_file(self._at(name), content)

    def delete(self, name: str) -> None:
        """Delete a file there, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._at(name))

    def _at(self, name):
        return f"{self.root.rstrip('/')}/{name}"


def reason(error: Exception) -> str:
    """An error in one line, without passwords."""
    return brief(shown(" ".join(f"{type(error).__name__}: {error}".split())), 200)
