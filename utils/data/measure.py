"""How fast the loader is on this machine."""

import itertools
import statistics
import time

import numpy as np
import torch

from utils.data.index import Index
from utils.data.loader import Chunks, load_batches
from utils.data.reader import Reader
from utils.data.shards import training_plan
from utils.data.views import ViewSpec
from utils.run.cpu import cpu_ms, keep_freed_memory


def worker_ms(index: Index, specs: list[ViewSpec], seed: int, images: int = 256, rounds: int = 5) -> float:
    """CPU time of a worker for an image, in ms: the median of some rounds, after one that warms up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chunks, reader = Chunks(index, specs, training_plan(index, 1, seed, range(1)), seed, False), Reader(index)
    keep_freed_memory()
    epoch = itertools.count()  # other views each time

    def work(sample_ids):
        reader.expect(sample_ids)
        chunks.chunk(reader, next(epoch), sample_ids)

    try:
        times = [cpu_ms(work, np.arange(min(images, index.total))) for _ in range(rounds + 1)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:])


def images_per_second(index: Index, specs: list[ViewSpec], workers: int, batch: int = 64) -> float:
    """Finished images on the CPU, from this number of worker processes."""
    plan = training_plan(index, min(batch, index.total), 0, range(1 + 4096 // index.total))
    batches = load_batches(index, specs, plan, 0, workers, torch.device("cpu"))
    for _ in range(2 * workers):
        next(batches)  # what the workers have ready when the clock starts
    start = time.perf_counter()
    images = sum(len(batch.sample_ids) for batch in itertools.islice(batches, 16))
    return images / (time.perf_counter() - start)
