"""Time and memory that the order of the samples takes in the loader's workers, for data sets of up to 400 M images.

    python -m benchmarks.plan                               1.28, 14, 100 and 400 M images, 8 processes x 16 workers
    python -m benchmarks.plan --images 100e6 --per-shard 1000 --places remote      other shards

The shards do not exist, and no image is read. One process of the 8 is started with its workers, in the middle of the batch.
"""

import argparse
import gc
import json
import platform
import re
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import step
from utils.data.index import Index, Shard
from utils.data.loader import Chunk, Chunks
from utils.data.shards import BatchPlan, Steps, epoch_blocks, lanes_of, steps_per_epoch
from utils.run.flags import Parser, one_line_errors, positive

PLACES = {"local": "/nowhere", "remote": "https://nowhere"}
MIB = 2**20


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.plan", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--images", nargs="+", type=float, default=[1281167, 14e6, 100e6, 400e6], help="sizes of data sets")
    add("--per-shard", type=int, default=10000, help="images of a shard")
    add("--batch-size", type=int, default=4096, help="images of all processes in a step")
    add("--processes", type=int, default=8, help="training processes of a node")
    add("--workers", type=int, default=16, help="loader processes of each")
    add("--places", nargs="+", choices=PLACES, default=["local"], help="where the shards are")
    return parser.parse_args(argv)


class NoImages(Chunks):
    """Chunks without images. They report the time and memory that a worker needs for its first step."""

    def chunk(self, reader, epoch: int, planned: np.ndarray) -> Chunk:
        used = {"cpu_s": str(time.process_time()), "memory": str(private_memory())}
        return Chunk([], [], torch.empty(0), torch.empty(0), [used])


def private_memory() -> int:
    """The most memory that this process has had for itself alone, in bytes: pages that it wrote, no libraries."""
    found = {name: int(kb) for path in ("smaps_rollup", "status") for name, kb in
             re.findall(r"(\w+):\s*(\d+) kB", Path(f"/proc/self/{path}").read_text())}  # fmt: skip
    return 1024 * (found["Private_Dirty"] + found["VmHWM"] - found["VmRSS"])


def measure(args: argparse.Namespace, images: int, place: str, last: bool) -> tuple[float, int, int]:
    """CPU seconds of a worker until its first step, memory of the process, memory of a worker. last: resume there.

    Two workers stand for all those that read local shards. Each shares fewer pages than one of many, so the sum is a bound.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    names = (f"train-{number:06d}.tar" for number in range(-(-images // args.per_shard)))
    index = Index(tuple(Shard(f"{PLACES[place]}/{n}", n, args.per_shard, 10**9, f"{hash(n):064x}") for n in names), None)
    lanes, each = lanes_of(None, args.batch_size), args.batch_size // args.processes
    rank = args.processes // 2
    first = steps_per_epoch(index.total, args.batch_size) - 1 if last else 0
    blocks = partial(epoch_blocks, index, args.batch_size, 0, 0, lanes, range(rank * each, (rank + 1) * each), first)
    of_place = np.arange(rank * each, (rank + 1) * each) // (args.batch_size // lanes)
    plan = BatchPlan(partial(iter, [(0, Steps(blocks))]), True, of_place)
    before = private_memory()
    workers = args.workers if place == "remote" else min(2, args.workers)
    chunks = DataLoader(
        NoImages(index, [], plan, 0, False),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1,
        multiprocessing_context="fork",
    )
    gc.freeze()  # as load_batches does
    used = [chunk.bad[0] for chunk in islice(chunks, workers)]
    return max(float(u["cpu_s"]) for u in used), before, max(int(u["memory"]) for u in used)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    with one_line_errors("benchmarks.plan"):
        positive(["--per-shard", "--processes", "--workers"], args)
        results = {}
        with ProcessPoolExecutor(1, step.processes(), max_tasks_per_child=1) as pool:
            run = lambda *case: pool.submit(measure, args, *case).result()  # noqa: E731
            small = {place: run(args.batch_size, place, False) for place in args.places}  # what any data set takes
            for images in map(int, args.images):
                for place in args.places:
                    start, *memory = run(images, place, False)
                    last = run(images, place, True)[0] if place == "local" else start  # where all is computed at the start
                    process, worker = (max(0, found - none) for found, none in zip(memory, small[place][1:], strict=True))
                    results[f"{images} {place}"] = {
                        "first_step_s": start, "last_step_s": last, "process_mib": process / MIB, "worker_mib": worker / MIB,
                        "node_mib": args.processes * (process + args.workers * worker) / MIB,
                    }  # fmt: skip
    print(f"{args.per_shard} images a shard, batch {args.batch_size}, {args.processes} processes x {args.workers} workers; "
          f"torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    print("CPU s of a worker to the first step of an epoch, or resumed at the last; MiB beside those of a small data set")
    print(f"{'images':>14} {'shards':8}{'first step':>12}{'last step':>12}{'process':>10}{'worker':>10}{'node':>10}")
    for name, found in results.items():
        seconds, memory = list(found.values())[:2], list(found.values())[2:]
        size, place = name.split()
        print(f"{size:>14} {place:8}" + "".join(f"{s:12.2f}" for s in seconds) + "".join(f"{m:10.1f}" for m in memory))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
