"""Signals that ask a run to save and stop. Imports nothing slow, because entry points call `start` before anything else."""

import atexit
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
TOGETHER = 5.0  # seconds; torchrun's agent sends a scheduler's signal once more to processes that have it already
ASKED = "PRETRAIN_STOP"  # environment: the signal that torchrun's agent got before this process started
AGENT = "PRETRAIN_AGENT"  # environment: the process id of torchrun's agent, which may have died already
early: list[int] = []  # SIGUSR1 before the first step


def start() -> None:
    """Listen for signals, and end with torchrun's agent. For the first line of an entry point.

    Until the first step a signal ends the process at once. But SIGUSR1 may come to one process of many: it waits for
    the first step, where all processes learn of it.
    """
    if ASKED in os.environ:
        _end(int(os.environ[ASKED]))
    atexit.register(signal.alarm, 30)  # the end of the interpreter may wait for a device or another process, but not forever
    listen(signal.SIG_DFL if under_torchrun() else _end)  # the default ends it even while it waits for others
    if under_torchrun():
        signal.signal(signal.SIGUSR1, lambda number, frame: early.append(number))
        end_with_parent(int(os.environ.get(AGENT, os.getppid())), signal.SIGTERM)


def listen(handler: Callable | signal.Handlers) -> dict:
    """Handle the signals of STOP. nohup's SIGHUP stays ignored. Returns the handlers before."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {n: signal.signal(n, handler) for n in STOP if not (ignored and n == signal.SIGHUP)}


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _end(number, frame=None):
    if os.environ.get("RANK", "0") == "0":
        print(not_saved(number), flush=True)
    os._exit(exit_code(number))


class Signals:
    """A context in the main thread: remembers the first signal of STOP; the next one ends the process."""

    def __init__(self):
        self.received, self.when, self.before = 0, 0.0, {}

    def __enter__(self):
        self.before = listen(self._handle)
        if early:
            self._handle(early.pop(), None)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self.when = number, now
        elif now - self.when > TOGETHER or not under_torchrun():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Stopped(Exception):
    """A signal has stopped an evaluation; raised on all processes."""

    def __init__(self, number: int):
        super().__init__(not_saved(number, "the end"))
        self.number = number


def leave_to_parent(*_) -> None:
    """In a loader's worker: ignore signals to the whole group, such as Ctrl-C, which the training process handles."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        end_with_parent(parent.pid, signal.SIGKILL)


def end_with_parent(parent: int | None, number: int) -> None:
    """Send this process the signal when its parent has died, and SIGKILL a minute later."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), number)
        time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register  # after multiprocessing's own function, so that it runs first: that one sends SIGTERM and waits
def end_workers() -> None:
    """Kill the loader's workers, which ignore SIGTERM."""
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, watch)


def stopped(number: int, resume: str | None) -> str:
    """The last line of a run that a signal has stopped. resume: the value of --resume."""
    how = "The same command" if resume == "auto" else "--resume auto"
    return f"Stopped by {signal.Signals(number).name}, and saved. {how} resumes from here."


def not_saved(number: int, before: str = "the first step") -> str:
    """The last line of a run that a signal has stopped before it has saved anything."""
    return f"Stopped by {signal.Signals(number).name} before {before}. The same command starts again."


def exit_code(number: int) -> int:
    """The exit code of a run that has saved: 128 + 2, as the shell's, after Ctrl-C; 0 after a scheduler's signal.

    Under torchrun always 0: torchrun restarts processes that end with another code.
    """
    return 128 + number if number == signal.SIGINT and not under_torchrun() else 0
