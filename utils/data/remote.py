"""Remote files, which webdataset opens: https://, s3://, gs://, pipe: and others."""

import contextlib
import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, BinaryIO, TypeVar

from webdataset.gopen import Pipe, gopen, gopen_curl, gopen_schemes

from utils.run.flags import RunError
from utils.run.text import brief, shown

TRIES, WAIT = 5, 1.0  # tries in all; seconds before the first retry, doubled for each later one
PATIENCE = 3.0  # seconds of waiting before the first message
STALL, PROGRESS = 60.0, 1 << 16  # a stream is broken if it gives fewer bytes than PROGRESS in STALL seconds of waiting
BLOCK = 1 << 18  # bytes of a read
MOST = 1 << 28  # bytes of a file of unknown size
NEVER = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # errors that no retry changes
T = TypeVar("T")


def _command(command: str | list[str], **options: Any) -> Pipe:
    """The output of a command. The command has its own process group, so that all its processes can be ended."""
    return Pipe(command, mode="rb", bufsize=0, process_group=0, **options)


def _open_command(url: str, mode: str = "rb", bufsize: int = 0) -> Pipe:
    return _command(url.removeprefix("pipe:"), shell=True, ignore_status=[141])


def _open_curl(url: str, mode: str = "rb", bufsize: int = 0) -> Pipe:
    # webdataset's own command retries for a minute without a message, and hides the status. The lowest speed ends curl if the
    # process that reads from it was killed
    limits = ["--connect-timeout", "20", "--speed-limit", "1", "--speed-time", "120"]
    return _command(["curl", *limits, "--fail", "--silent", "--show-error", "--location", url],
                    ignore_status=[141, 23], stderr=subprocess.PIPE)  # fmt: skip


def _open_s3(url: str, mode: str = "rb", bufsize: int = 0) -> Pipe:
    return _command(["aws", "s3", "cp", "--quiet", url, "-"])


gopen_schemes.setdefault("s3", _open_s3)  # webdataset has none
gopen_schemes["pipe"] = _open_command
gopen_schemes.update({scheme: _open_curl for scheme, opener in gopen_schemes.items() if opener is gopen_curl})


def is_remote(spec: str) -> bool:
    """Whether only webdataset can open it: a URL or a command."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]+://", spec) is not None


def place(spec: str, name: str) -> str:
    """The URL or command of file `name` beside spec. spec: a folder, its index.json, or a URL or command that names a tar."""
    if tar := _named(spec):
        return spec[: tar.start()] + name + spec[tar.end() :]
    return re.sub(r"/(index\.json)?$", "", spec) + "/" + name


def tar_name(spec: str) -> str | None:
    """The tar, or brace pattern of tars, that a URL or command names; None if it names none."""
    return tar[0] if (tar := _named(spec)) else None


def _named(spec):
    return re.search(r"[^\s/'\"=]+\.tar(?![^\s/'\"?&])", spec)


def check_openable(spec: str, flag: str, allow_pipe: bool) -> None:
    """Raise ValueError for an unknown scheme, and for a command without --allow-pipe or without a tar."""
    scheme = spec.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(k for k in gopen_schemes if k[0] != "_")
        raise ValueError(f"{flag} {shown(spec)}: unknown scheme {scheme}:; use one of {known}")
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{flag} {shown(spec)}: is a shell command; pass --allow-pipe to run it")
    if scheme == "pipe" and not _named(spec):
        raise ValueError(
            f"{flag} {shown(spec)}: names no tar; pass a command such as pipe:ssh host cat /data/train-{{000000..000009}}.tar"
        )


class RemoteError(Exception):
    """A remote file could not be opened or read. final: whether no retry can change that."""

    def __init__(self, text: str, final: bool = False):
        super().__init__(text)
        self.final = final


def retried(work: Callable[[], T], where: str, errors: tuple[type[Exception], ...]) -> T:
    """work(), called up to TRIES times while it raises one of these errors. The last error is raised.

    The wait before a retry doubles each time; after PATIENCE seconds in all, it prints a line. where: a path or URL.
    """
    start = time.monotonic()
    for n in range(1, TRIES):
        try:
            return work()
        except errors as error:
            if isinstance(error, OSError):
                check_descriptors(error)
            if isinstance(error, NEVER) or getattr(error, "final", False):
                raise
            pause = WAIT * 2 ** (n - 1)
            if time.monotonic() - start + pause >= PATIENCE:
                _say(f"waiting for {shown(where)} ({brief(str(error))}), try {n + 1} of {TRIES}")
            time.sleep(pause)
    return work()


def _say(line):
    print(line, file=sys.stderr, flush=True)  # not tqdm: a worker may have inherited its lock in the locked state


def check_descriptors(error: OSError) -> None:
    """Raise RunError if this process has too few file descriptors: then no shard is bad."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise RunError("too many open files; raise the limit with ulimit -n 4096, or pass fewer --lanes or --workers") from None


def other_shard(url: str) -> RunError:
    """The error for a remote shard that has changed."""
    return RunError(f"{shown(url)} differs from its index in size or sha256; copy it there again, or index it again")


class Source:
    """A URL as a stream of bytes, with their number and sha256. Raises RemoteError."""

    def __init__(self, url: str):
        self.url, self.size, self.hash = url, 0, hashlib.sha256()
        self.waited, self.since, self.silent = 0.0, 0, True  # seconds of waiting, since this byte; no message yet
        try:
            self.stream = gopen(url)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                check_descriptors(error)
            raise RemoteError(shown(str(error))) from None

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end."""
        try:
            data = self._output(size) if isinstance(self.stream, Pipe) else self.stream.read(size)
        except OSError as error:
            raise RemoteError(shown(str(error))) from None
        self.size += len(data)
        self.hash.update(data)
        return data

    def _output(self, size):
        """The next bytes of a command. Only this waiting counts: a reader may leave a stream alone for minutes."""
        if self.size - self.since >= PROGRESS:
            self.waited, self.since = 0.0, self.size
        ready = None
        while not ready:
            start = time.monotonic()
            ready = wait([self.stream.stream], min(PATIENCE, STALL))
            self.waited += time.monotonic() - start
            if self.waited >= STALL:
                raise RemoteError(f"gives no data, or almost none, for {self.waited:.0f} seconds")
            if not ready and self.silent:
                self.silent = False
                _say(f"waiting for {shown(self.url)} (no data for {PATIENCE:.0f} seconds)")
        if data := os.read(self.stream.stream.fileno(), size):
            return data
        try:
            status = self.stream.proc.wait(STALL)
        except subprocess.TimeoutExpired:
            raise RemoteError("the command does not end") from None
        if status not in self.stream.ignore_status:
            raise self._failed(status)
        return data

    def _failed(self, status):
        """The error of a command with this exit status. HTTP 4xx is final, except 408 and 429."""
        errors = self.stream.proc.stderr  # None unless it is curl
        said = errors.read(4096).decode(errors="replace").strip() if errors else ""
        if http := re.search(r"returned error: (\d{3})", said):
            return RemoteError(f"HTTP status {http[1]}", http[1][0] == "4" and http[1] not in ("408", "429"))
        return RemoteError(f"exit {status}{': ' * bool(said)}{brief(shown(said))}")

    def close(self) -> None:
        """Close the stream. A running command is ended, because it may wait for its server forever."""
        if isinstance(self.stream, Pipe):
            if self.stream.proc.returncode is None:
                with contextlib.suppress(OSError):  # some commands of webdataset have no group
                    os.killpg(self.stream.proc.pid, signal.SIGKILL)
                self.stream.proc.kill()
            if self.stream.proc.stderr:
                self.stream.proc.stderr.close()
            self.stream.timeout = 5.0
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # a command that is stopped early fails
            self.stream.close()


def copy(url: str, file: BinaryIO, expected: tuple[int, str] | None = None) -> None:
    """Write the content of a URL to a file. expected: its size in bytes and sha256.

    Raises RemoteError if it cannot be read in TRIES tries, and RunError if the content differs.
    """
    retried(lambda: _copy(url, file, expected), url, (RemoteError, RunError))


def _copy(url, file, expected):
    file.seek(0)
    file.truncate()
    most = expected[0] if expected else MOST
    with contextlib.closing(Source(url)) as source:
        while source.size <= most and (data := source.read(BLOCK)):
            file.write(data)
    if expected is None and source.size > most:
        raise RemoteError(f"has more than {most} bytes", final=True)
    if expected and source.size < expected[0]:
        raise RemoteError(f"ends after {source.size} of {expected[0]} bytes")
    if expected and expected != (source.size, source.hash.hexdigest()):
        raise other_shard(url)
