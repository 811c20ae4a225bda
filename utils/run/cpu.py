"""CPU time and memory of a process."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep memory that is freed: fresh pages for each image cost as much as decoding it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)  # the most it accepts


def cpu_ms(work: Callable[[np.ndarray], object], samples: np.ndarray) -> float:
    """CPU time of work(samples) in ms per image."""
    start = time.process_time()
    work(samples)
    return 1e3 * (time.process_time() - start) / len(samples)


def hardware() -> dict[str, str | int]:
    """The processor and the device of this process, as reports name them."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    found: dict[str, str | int] = {"processor": names[0] if names else platform.processor() or platform.machine()}
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def free_memory() -> float:
    """Bytes that this machine, or its container, has left. Infinite if the system does not say."""
    limits = [float("inf")]
    if (path := Path("/proc/meminfo")).exists():
        limits.append(1024 * int(re.findall(r"MemAvailable:\s*(\d+) kB", path.read_text())[0]))
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        most, used = (Path("/sys/fs/cgroup", name) for name in names)
        if most.exists() and used.exists() and (text := most.read_text().strip()) != "max":
            limits.append(int(text) - int(used.read_text()))
    return max(0.0, min(limits))


def processes_here() -> int:
    """The processes of torchrun on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def reset_peak_memory() -> int:
    """Start the peak of this process's memory anew, where the system can. Returns its memory now, in bytes."""
    gc.collect()
    if sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # memory that was freed, but kept
            libc.malloc_trim(0)
        with contextlib.suppress(OSError):  # a kernel without it
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    return peak_memory()


def peak_memory() -> int:
    """The peak memory of this process, in bytes."""
    if sys.platform == "linux":  # getrusage may count the peak of the parent too
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
