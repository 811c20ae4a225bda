"""torchrun for the launchers: passes signals on, waits until the processes have saved, and ends as they do, in one line.

It takes torchrun's flags: python -m utils.run.agent --standalone --nproc_per_node 8 main_pretrain.py ...
"""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.run.signals import AGENT, ASKED, TOGETHER, exit_code, listen, not_saved

asked = math.inf  # the time of the first signal


def main(argv: list[str] | None = None) -> None:
    listen(_pass_on)
    os.environ[AGENT] = str(os.getpid())
    from torch.distributed import run  # slow
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say the same in one line
    with ThreadPoolExecutor(1) as other_thread:  # in the main one torchrun would have its own handlers of signals
        failure, code = other_thread.submit(run.main, argv).exception(), 0
    if isinstance(failure, ChildFailedError):
        codes = {rank: lost.exitcode for rank, lost in failure.failures.items()}
        # A killed process comes first, because the others fail without it. Last come those that end because of another one:
        # NCCL's watchdog aborts a process that waits in vain, and torchrun sends SIGTERM
        last = [-signal.SIGABRT, -signal.SIGTERM]
        rank, code = min(codes.items(), key=lambda item: (last.index(item[1]) + 1 if item[1] in last else 0, item[1]))
        code = code if code > 0 else 128 - code
    elif failure:
        raise failure
    number = int(os.environ.get(ASKED, 0))
    if number and code in (0, 128 + number):
        if code:
            print(not_saved(number))
        code = exit_code(number)
    elif code > 128:
        ended, why = signal.Signals(code - 128), ""
        if ended == signal.SIGABRT:
            why = ", as NCCL does when another process is lost or takes longer than --dist-timeout"
        print(f"error: process {rank} was ended by {ended.name}{why}; run the command again", file=sys.stderr)
    sys.exit(code)


def _pass_on(number, frame):
    global asked
    now = time.monotonic()
    if now - asked > TOGETHER:  # the second signal
        number = signal.SIGKILL
    else:
        os.environ[ASKED] = str(int(number))  # for processes that torchrun starts from now on
    asked = min(asked, now)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(path.parent.name), number)


if __name__ == "__main__":
    main()
