"""Remote files, which webdataset opens: https://, s3://, gs://, pipe: and others."""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen, gopen_schemes

from utils.run.flags import RunError

TRIES, WAIT = 5, 1.0  # tries in all; seconds before the first retry, doubled for each later one
BLOCK = 1 << 18  # bytes of a read


def _open_s3(url, mode="rb", bufsize=8192):
    return Pipe(["aws", "s3", "cp", "--quiet", url, "-"], mode=mode, bufsize=bufsize)


gopen_schemes.setdefault("s3", _open_s3)  # webdataset has none


def is_remote(spec: str) -> bool:
    """Whether only webdataset can open it: a URL or a command."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]+://", spec) is not None


def place(spec: str, name: str) -> str:
    """The place of the file `name` beside spec, which is a folder, its index.json, or a URL or command that names a tar."""
    if tar := _named(spec):
        return spec[: tar.start()] + name + spec[tar.end() :]
    return re.sub(r"/(index\.json)?$", "", spec) + "/" + name


def tar_name(spec: str) -> str | None:
    """The tar, or brace pattern of tars, that a URL or command names; None if it names none."""
    return tar[0] if (tar := _named(spec)) else None


def _named(spec):
    return re.search(r"[^\s/'\"=]+\.tar(?![^\s/'\"?&])", spec)


def check_openable(spec: str, flag: str, allow_pipe: bool) -> None:
    """Raise ValueError for a scheme that nothing opens, and for a command without --allow-pipe or without a tar."""
    scheme = spec.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(k for k in gopen_schemes if k[0] != "_")
        raise ValueError(f"{flag} {spec}: nothing opens {scheme}:; use one of {known}")
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{flag} {spec}: is a shell command; pass --allow-pipe to run it")
    if scheme == "pipe" and not _named(spec):
        raise ValueError(f"{flag} {spec}: names no tar; a good one is pipe:ssh host cat /data/train-{{000000..000009}}.tar")


def attempts() -> Iterator[bool]:
    """Yields TRIES times whether a retry remains, and waits before each retry, longer every time."""
    for n in range(TRIES):
        if n:
            time.sleep(WAIT * 2 ** (n - 1))
        yield n < TRIES - 1


class RemoteError(Exception):
    """A remote file could not be opened or read."""


def other_shard(url: str) -> RunError:
    """The error for a remote shard that has changed."""
    return RunError(f"{url} differs from its index in size or sha256; copy it there again, or index it again")


class Source:
    """A URL as a stream of bytes, with their number and sha256. Raises RemoteError."""

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
        """Close it after its last byte; only then does a command tell whether it has succeeded."""
        try:
            self.stream.close()
        except OSError as error:
            raise RemoteError(str(error)) from None

    def close(self) -> None:
        """Close it before its end."""
        with contextlib.suppress(OSError):  # a command that is stopped early fails
            self.stream.close()


def copy(url: str, file: BinaryIO, expected: tuple[int, str] | None = None) -> None:
    """Write the content of a URL to a file. expected: its size in bytes and sha256.

    Raises RemoteError if it cannot be read in TRIES tries, and RunError if the content is another.
    """
    for again in attempts():
        file.seek(0)
        file.truncate()
        try:
            with contextlib.closing(Source(url)) as source:
                while data := source.read(BLOCK):
                    file.write(data)
                source.finish()
            if expected is None or expected == (source.size, source.hash.hexdigest()):
                return
            if source.size < expected[0]:
                raise RemoteError(f"{url}: ends after {source.size} of {expected[0]} bytes")
            if not again:
                raise other_shard(url)
        except RemoteError:
            if not again:
                raise
