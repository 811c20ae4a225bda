"""Predict the cost of a step on many devices, in one process: bytes from other devices, and memory.

    python -m benchmarks.scale                                       8, 64 and 512 devices, 32 images each
    python -m benchmarks.scale --methods moco --processes 16         one method, 16 devices

The step of main_pretrain.py runs in bf16 with fake tensors: shapes without content. The process is the first of a fake
process group. `plain` is the form of benchmarks/plain.py. tests/test_scale.py compares the bytes with real processes.
"""

import itertools
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

sys.path.insert(0, str(Path(__file__).parent.parent))  # python benchmarks/scale.py works like python -m benchmarks.scale

from benchmarks import step
from benchmarks.plain import PLAIN, train_step
from benchmarks.tracer import Tracer
from methods import METHODS
from utils.learning.method import Step
from utils.run import dist
from utils.run.engine import Votes
from utils.run.flags import Parser, one_line_errors, positive


def get_args(argv=None):
    parser = Parser(prog="benchmarks.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64, 512], help="numbers of processes, one per device")
    step.add_sizes(parser, batch_size=32, samples=1281167)
    return parser.parse_args(argv)


def simulate(args, plain: bool = False) -> dict[int, dict[str, dict[str, float]]]:
    """number of processes -> case -> its `trace`, with fake tensors. Call in a new process."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  registers collectives for fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    results = {}
    for processes in args.processes:
        td.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        with FakeTensorMode(allow_non_fake_inputs=True):
            results[processes] = {case: trace(args, case, plain, fake=True) for case in args.methods}
        dist.teardown()
    return results


def trace(args, case: str, plain: bool = False, fake: bool = False) -> dict[str, float]:
    """collective -> bytes that reach this process in a step; `memory` -> the most bytes that its tensors hold at a time."""
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # fake tensors are not channels-last
    flags = step.flags_of(args, case, "fp32" if plain else "bf16", args.batch_size * dist.world())
    device = torch.device("cpu")
    with Tracer() as tracer:
        method = (PLAIN if plain else METHODS)[flags.method](flags, args.samples).train()
        model: Any = dist.data_parallel(method, device, **({"init_sync": False} if fake else {}))  # a sync reads contents
        if fake:
            model.register_comm_hook(None, all_reduced)
        votes = Unread(device, False) if fake else None
        train = train_step(method, model, flags) if plain else step.train_step(method, model, flags, votes)
        batch = step.random_batch(method.views(flags), args.batch_size, device)
        with model.no_sync():  # momentum exists from the second step on, and DDP has not yet rebuilt its buckets
            train(batch, Step(0, 10, 0))
        tracer.start()
        train(batch, Step(1, 10, 0))
    return {**tracer.received, "memory": tracer.peak}


class Unread(Votes):
    """Votes without reading their outcome on the host, because fake tensors have no values."""

    def _outcome(self, inputs, ballot, event=None):
        return [0, 0]


def all_reduced(_, bucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce of a bucket of gradients, for collectives without a result."""
    td.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.scale"):
        positive(step.SIZES, args)
        if min(args.processes) < 2:
            raise ValueError(f"--processes {min(args.processes)}: one process has no traffic; pass 2 or more")
        with ProcessPoolExecutor(2, step.processes(), max_tasks_per_child=1) as pool:
            plain, default = pool.map(simulate, [args, args], [True, False])
    results: dict = {n: {case: {} for case in args.methods} for n in args.processes}
    print(f"{args.arch}, {args.size} pixels, {args.batch_size} images per process, queue {args.moco_k}; "
          f"torch {torch.__version__}\nMB that reach a process in a step, and MB that its tensors hold at most")  # fmt: skip
    columns = ("all_to_all", "all_gather", "all_reduce", "memory")
    print(f"{'processes':>9}  {'':24}" + "".join(f"{name:>12}" for name in columns))
    for n, case, (form, found) in itertools.product(args.processes, args.methods, {"plain": plain, "default": default}.items()):
        results[n][case][form] = found[n][case]
        cells = (f"{found[n][case].get(name, 0) / 1e6:12.2f}" for name in columns)
        print(f"{n:9}  {f'{case} {form}':24}" + "".join(cells))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
