"""What a process takes of the CPU and of memory."""

import ctypes
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what it is given back: fresh pages for each image cost as much as decoding it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)  # as much as it takes


def cpu_ms(work: Callable[[np.ndarray], object], samples: np.ndarray) -> float:
    """CPU time per image that work(samples) takes, in ms."""
    start = time.process_time()
    work(samples)
    return 1e3 * (time.process_time() - start) / len(samples)


def peak_memory() -> int:
    """The most bytes that this process has held."""
    if sys.platform == "linux":  # where getrusage's number may be the parent's, which a process that it starts takes over
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
