"""Measure the speed of the loader on this machine."""

import itertools
import math
import statistics
import time
from argparse import Namespace

import numpy as np
import torch

from utils.data.index import Index
from utils.data.loader import Chunks, load_batches
from utils.data.reader import Reader
from utils.data.shards import training_plan
from utils.data.views import ViewSpec
from utils.run.cpu import cpu_ms, keep_freed_memory
from utils.run.log import say


def worker_ms(index: Index, specs: list[ViewSpec], seed: int, images: int = 256, rounds: int = 5) -> float:
    """CPU time of a worker per image, in ms: median of some rounds, after one warm-up round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chunks, reader = Chunks(index, specs, training_plan(index, 1, seed, range(1)), seed, False), Reader(index)
    keep_freed_memory()
    epoch = itertools.count()  # new views in each round

    def work(sample_ids):
        reader.expect(sample_ids)
        chunks.chunk(reader, next(epoch), sample_ids)

    try:
        times = [cpu_ms(work, np.arange(min(images, index.total))) for _ in range(rounds + 1)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:])


def say_workers(args: Namespace, index: Index, specs: list[ViewSpec], steps: int, measured: float = 0.0) -> None:
    """--dry-run: print images/s of a worker for these shards and views on this machine (as benchmarks/input_pipeline.py).

    measured: images/s that a process trains, if it was measured.
    """
    ms, rate = worker_ms(index, specs, args.seed), args.dry_run
    say(f"dry run: all flags work; {index.total} images, {steps} steps per epoch")
    say(f"a worker needs {ms:.2f} ms of a core for an image and feeds {1e3 / ms:.0f} images/s; a process that trains "
        f"{rate:.0f} images/s needs --workers {math.ceil(rate * ms / 1e3)} (now: {args.workers})")  # fmt: skip
    if measured:
        say(f"this device trains {measured:.0f} images/s: --workers {math.ceil(measured * ms / 1e3)}")


def images_per_second(index: Index, specs: list[ViewSpec], workers: int, batch: int = 64) -> float:
    """Finished images on the CPU, from this number of worker processes."""
    plan = training_plan(index, min(batch, index.total), 0, range(1 + 4096 // index.total))
    batches = load_batches(index, specs, plan, 0, workers, torch.device("cpu"))
    for _ in range(2 * workers):
        next(batches)  # batches that the workers have prepared before the measurement
    start = time.perf_counter()
    images = sum(len(batch.sample_ids) for batch in itertools.islice(batches, 16))
    return images / (time.perf_counter() - start)
