"""Signals that ask a run to save and stop."""

import os
import signal
import time

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TOGETHER = 5.0  # seconds; torchrun's agent sends a scheduler's signal once more to processes that have it already


class Signals:
    """A context in the main thread: remembers the first of SIGTERM, SIGUSR1 and SIGINT; the next one ends the process."""

    def __init__(self):
        self.received, self.when, self.before = 0, 0.0, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self._handle) for number in STOP}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self.when = number, now
        elif now - self.when > TOGETHER or "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def leave_to_parent(*_) -> None:
    """In a loader's worker: ignore signals to the whole group, such as Ctrl-C; the training process handles them."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def stopped(number: int) -> str:
    """The last line of a run that a signal has stopped."""
    return f"Stopped by {signal.Signals(number).name}, and saved. The same command resumes from here."


def exit_code(number: int) -> int:
    """The exit code of a run that has saved: 128 + 2, as the shell's, after Ctrl-C; 0 after a scheduler's signal."""
    return 128 + number if number == signal.SIGINT else 0
