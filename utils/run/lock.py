"""One run at a time in a folder: a lock that a killed process does not keep, on network file systems too."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from utils.run.log import say

NAME = ".lock"
BEAT, SILENCE = 5.0, 30.0  # seconds between two signs of life of a holder; seconds without one, after which it counts as dead
ENDING = 5.0  # seconds that a killed process may take to free its lock
_held: list[tuple[Path, IO[str], threading.Event]] = []


def take(folder: Path) -> None:
    """Lock a folder until `released` or this process ends. Raises ValueError that names the process that has the lock.

    The system frees the lock when its process ends in any way, or opens and closes the file again. So no other code may read
    the file. Some file servers have no locks, or one for each machine. There a live holder shows itself by the time of the
    file, which it changes.
    """
    file, locked = _open(folder)
    record, own = _record(file), {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
    if record and not (locked and record["boot"] == own["boot"]):
        say(f"{folder / NAME} is of {_named(record)}; checking for {SILENCE:.0f} s whether it still runs")
        if _beats(file):
            _refuse(folder, file)
    file.truncate(0)
    file.write(json.dumps(own))
    file.flush()
    stop = threading.Event()
    threading.Thread(target=_beat, args=(file, stop), daemon=True).start()
    _held.append((folder / NAME, file, stop))


def check(folder: Path) -> None:
    """Raise ValueError if the file system shows that another process has the lock. Changes nothing."""
    if (folder / NAME).exists():
        _open(folder)[0].close()


@contextmanager
def released() -> Iterator[None]:
    """A decorator of `main`: frees its locks at its end."""
    try:
        yield
    finally:
        while _held:
            path, file, stop = _held.pop()
            stop.set()
            with suppress(OSError):  # a server that is away
                path.unlink(missing_ok=True)
                file.close()


def _open(folder: Path) -> tuple[IO[str], bool]:
    """The file, and whether its lock is ours: False if the file system has no locks. Raises ValueError if another has it.

    A process that was killed may need some seconds to end, and to free its lock.
    """
    end = time.monotonic() + ENDING
    while True:
        file, locked = open(folder / NAME, "a+"), True  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locked = False
            if error.errno in (errno.EACCES, errno.EAGAIN):
                if time.monotonic() > end:
                    _refuse(folder, file)
                file.close()
                time.sleep(0.1)
                continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / NAME)):
                return file, locked
        file.close()  # its holder has ended and removed it meanwhile


def _record(file):
    """The process that wrote the file: host, pid and boot; empty if there is none."""
    file.seek(0)
    try:
        return {name: json.loads(text)[name] for name in ("host", "pid", "boot")} if (text := file.read()) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _named(record):
    return f"process {record['pid']} on {record['host']}" if record else "another process"


def _refuse(folder, file):
    named = _named(_record(file))
    file.close()
    raise ValueError(f"--output-dir {folder}: {named} is running in it; wait for it or stop it, or pass another folder")


def _boot():
    """The id of this machine's current boot, the same in all its containers."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _beat(file, stop):
    while not stop.wait(BEAT):
        with suppress(OSError, ValueError):  # a server that is away; a file that was closed just now
            os.utime(file.fileno())


def _beats(file):
    """Whether the time of the file changes within SILENCE seconds. It is compared with itself: clocks of machines differ."""
    first, end = os.fstat(file.fileno()).st_mtime_ns, time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(1, SILENCE))
        if os.fstat(file.fileno()).st_mtime_ns != first:
            return True
    return False
