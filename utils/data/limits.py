"""Compare the needs of loader workers with the limits of this machine: shared memory and open files."""

import os
import resource

from utils.data.photometric import COLUMNS
from utils.data.views import ViewSpec

SHARED_MEMORY = "/dev/shm"
PREFETCH = 2  # chunks that a worker makes ahead; torch's default
BATCHES = PREFETCH + 1  # batches in shared memory: the prefetched ones, and the one that is being joined
SPARE, SHARDS = 64, 128  # open files that the process may need for other things; shards that a worker keeps open
MORE_MEMORY = "start the container with --shm-size 8g (docker) or more, or pass --workers 0"


def check_workers(specs: list[ViewSpec], images: int, workers: int) -> None:
    """Raise ValueError if the workers of all processes on this machine need more than it has.

    images: number of images of one process in a batch. Shared memory holds whole batches, so only --workers 0 needs less of it.
    """
    if not workers:
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    image = sum(spec.count * (3 * spec.size**2 + 4 * len(COLUMNS)) for spec in specs)
    need, free = processes * BATCHES * images * image, _free(SHARED_MEMORY)
    if free is not None and need > free:
        raise ValueError(f"--workers {workers}: needs {need / 1e6:.0f} MB of {SHARED_MEMORY}, which has {free / 1e6:.0f} MB "
                         f"free; {MORE_MEMORY}")  # fmt: skip
    open_shards(specs, workers)


def open_shards(specs: list[ViewSpec], workers: int) -> int:
    """The number of shards that a worker may keep open. Increases this process's soft limit of open files if needed.

    A chunk has a file for each of its tensors, in the worker and in the training process. Raises ValueError.
    """
    opened = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**30 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    each = 4 + BATCHES * (2 * len(specs) + 2)  # for each worker: pipes, and its tensors
    need = opened + SPARE + workers * each
    if workers and hard <= need:
        fit = max(0, (hard - opened - SPARE - 1) // each)
        raise ValueError(f"--workers {workers}: needs more than {need} open files, the limit is {hard}; pass --workers {fit}, "
                         f"or raise it with ulimit -n {need + SHARDS}")  # fmt: skip
    if soft < need + SHARDS:
        soft = min(hard, need + SHARDS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(SHARDS, soft - need))


def _free(folder):
    if not os.path.isdir(folder):
        return None
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
