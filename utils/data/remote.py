"""Files that lie elsewhere, opened by webdataset: https://, s3://, gs://, pipe: and what else it knows."""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen, gopen_schemes

from utils.run.flags import RunError

TRIES, WAIT = 5, 1.0  # of what fails; seconds before the second one, doubled for each that follows
BLOCK = 1 << 18  # bytes that are read at a time


def _open_s3(url, mode="rb", bufsize=8192):
    return Pipe(["aws", "s3", "cp", "--quiet", url, "-"], mode=mode, bufsize=bufsize)


gopen_schemes.setdefault("s3", _open_s3)  # webdataset has none


def is_remote(spec: str) -> bool:
    """Whether it names something that only webdataset can open."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]+://", spec) is not None


def place(spec: str, name: str) -> str:
    """Where the file `name` lies that belongs to spec: a folder, its index.json, or a URL or command that names a tar."""
    if tar := _named(spec):
        return spec[: tar.start()] + name + spec[tar.end() :]
    return re.sub(r"/(index\.json)?$", "", spec) + "/" + name


def tar_name(spec: str) -> str | None:
    """The tar, or brace pattern of tars, that a URL or command names."""
    return tar[0] if (tar := _named(spec)) else None


def _named(spec):
    return re.search(r"[^\s/'\"=]+\.tar(?![^\s/'\"?&])", spec)


def check_openable(spec: str, flag: str, allow_pipe: bool) -> None:
    """Raise ValueError for a scheme without opener, or a command that --allow-pipe does not allow."""
    scheme = spec.partition(":")[0]
    if scheme not in gopen_schemes:
        raise ValueError(
            f"{flag} {spec}: nothing opens {scheme}:; one of {', '.join(k for k in gopen_schemes if k[0] != '_')} would do"
        )
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{flag} {spec}: is a shell command; pass --allow-pipe to have it run")
    if scheme == "pipe" and not _named(spec):
        raise ValueError(f"{flag} {spec}: names no tar; write such as pipe:ssh host cat /data/train-{{000000..000009}}.tar")


def attempts() -> Iterator[bool]:
    """Whether there is another try after this one, TRIES times, with longer and longer waits between."""
    for n in range(TRIES):
        if n:
            time.sleep(WAIT * 2 ** (n - 1))
        yield n < TRIES - 1


class RemoteError(Exception):
    """What lies elsewhere could not be opened or read."""


def other_shard(url: str) -> RunError:
    return RunError(f"{url} is not what its index says (size or sha256 differ); copy it there again, or index it again")


class Source:
    """A URL as a stream of bytes, counted and hashed. Raises RemoteError."""

    def __init__(self, url: str):
        self.size, self.hash = 0, hashlib.sha256()
        try:
            self.stream = gopen(url)
        except (OSError, ValueError) as error:
            raise RemoteError(f"{url}: {error}") from None

    def read(self, size: int) -> bytes:
        try:
            data = self.stream.read(size)
        except OSError as error:
            raise RemoteError(str(error)) from None
        self.size += len(data)
        self.hash.update(data)
        return data

    def finish(self) -> None:
        """Close it behind its last byte, which is when a command says whether it has succeeded."""
        try:
            self.stream.close()
        except OSError as error:
            raise RemoteError(str(error)) from None

    def close(self) -> None:
        """Close it anywhere."""
        with contextlib.suppress(OSError):  # a command that is cut off complains of it
            self.stream.close()


def copy(url: str, file: BinaryIO, expected: tuple[int, str] | None = None) -> None:
    """Write what a URL holds, of the expected size in bytes and sha256. Raises RemoteError or RunError after TRIES tries."""
    for again in attempts():
        file.seek(0)
        file.truncate()
        try:
            with contextlib.closing(Source(url)) as source:
                while data := source.read(BLOCK):
                    file.write(data)
                source.finish()
            if expected in (None, (source.size, source.hash.hexdigest())):
                return
            if source.size < expected[0]:
                raise RemoteError(f"{url}: ends after {source.size} of {expected[0]} bytes")
            if not again:
                raise other_shard(url)
        except RemoteError:
            if not again:
                raise
