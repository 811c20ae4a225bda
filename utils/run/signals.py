"""Signals that ask a run to stop: it saves first."""

import os
import signal
import time

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TOGETHER = 5.0  # seconds in which torchrun's agent passes on a signal that a scheduler has sent to all processes already


class Signals:
    """Remembers the first of SIGTERM, SIGUSR1 and SIGINT; the next ends the process at once. A context, in the main thread."""

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
    """For a loader's worker: a signal to the whole group, such as Ctrl-C, is the training process's to answer."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def stopped(number: int) -> str:
    """What a run says last that a signal has ended."""
    return f"Stopped by {signal.Signals(number).name}, and saved. The same command goes on from here."


def exit_code(number: int) -> int:
    """Of a run that has stopped and saved: 0 if a scheduler asked, which will start it again; as the shell's for Ctrl-C."""
    return 128 + number if number == signal.SIGINT else 0
