"""Predict the cost of a step on many devices, in one process: bytes from other devices, memory, images/s.

    python -m benchmarks.scale                                                   1 to 512 devices, 32 images each
    python -m benchmarks.scale --processes 1 --batch-size 256                    one device with the whole recipe
    python -m benchmarks.scale --methods moco --processes 16 --devices A100-80GB

The step of main_pretrain.py runs in bf16 with fake tensors: shapes without content. The process is the first of a fake
process group. `plain` is the form of benchmarks/plain.py, and `slices` the default form with --bn-splits M --accumulate M.
benchmarks/devices.py has the devices, and the assumptions of images/s. tests/test_scale.py compares the bytes with those of
real processes.
"""

import itertools
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

sys.path.insert(0, str(Path(__file__).parent.parent))  # python benchmarks/scale.py works like python -m benchmarks.scale

from benchmarks import step
from benchmarks.devices import COMPUTE, DEVICES, LAUNCH, STREAM, seconds
from benchmarks.plain import PLAIN, train_step
from benchmarks.tracer import Tracer
from methods import METHODS
from utils.evaluation.fit import random_batch
from utils.learning.method import Step
from utils.run import dist
from utils.run.engine import Votes
from utils.run.flags import Parser, one_line_errors, positive

FORMS = ("plain", "default", "slices")


def get_args(argv=None):
    parser = Parser(prog="benchmarks.scale", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--processes", nargs="+", type=int, default=[1, 8, 64, 512], help="numbers of processes, one per device")
    add("--accumulate", type=int, default=8, help="slices of the form `slices`, which has as many BatchNorm groups")
    add("--devices", nargs="+", choices=DEVICES, default=["H100", "RTX4090"], help="devices of the estimate of images/s")
    step.add_sizes(parser, batch_size=32, samples=1281167)
    return parser.parse_args(argv)


def simulate(args, form: str = "default") -> dict[int, dict[str, dict[str, float]]]:
    """number of processes -> case -> its `trace`, with fake tensors. Call in a new process. form: of FORMS."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  registers collectives for fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    results = {}
    for processes in args.processes:
        td.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        with FakeTensorMode(allow_non_fake_inputs=True):
            results[processes] = {case: trace(args, case, form, fake=True) for case in args.methods if possible(form, case)}
        dist.teardown()
    return results


def possible(form: str, case: str) -> bool:
    """Whether this case has the form: W2SSL's batch has no slices."""
    return form != "slices" or case != "w2ssl"


def trace(args, case: str, form: str = "default", fake: bool = False) -> dict[str, float]:
    """collective -> bytes that reach this process in a step; `memory` -> the most bytes that its tensors hold at a time.

    With fake tensors and except for `plain`, which is fp32, also device -> seconds of the step, estimated, for args.devices.
    """
    plain = form == "plain"
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # fake tensors are not channels-last
    flags = step.flags_of(args, case, "fp32" if plain else "bf16", args.batch_size * dist.world())
    if form == "slices":
        flags.bn_splits = flags.accumulate = args.accumulate
    device = torch.device("cpu")
    with Tracer() as tracer:
        method = (PLAIN if plain else METHODS)[flags.method](flags, args.samples).train()
        model: Any = dist.data_parallel(method, device, **({"init_sync": False} if fake else {}))  # a sync reads contents
        if fake and dist.world() > 1:
            model.register_comm_hook(None, all_reduced)
        votes = Unread(device, False) if fake else None
        train = train_step(method, model, flags) if plain else step.train_step(method, model, flags, votes)
        batch = random_batch(method.views(flags), args.batch_size, device)
        with model.no_sync() if dist.world() > 1 else nullcontext():  # DDP has not yet rebuilt its buckets
            train(batch, Step(0, 10, 0))  # momentum exists from the second step on
        tracer.start()
        train(batch, Step(1, 10, 0))
    traffic = sum(tracer.received.values())
    estimates = {
        name: seconds(DEVICES[name], tracer.work, traffic, dist.world()) for name in args.devices if fake and not plain
    }
    return {**tracer.received, "memory": tracer.peak, **estimates}


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
        positive([*step.SIZES, "--processes", "--accumulate"], args)
        if args.batch_size % args.accumulate:
            raise ValueError(f"--accumulate {args.accumulate}: must divide --batch-size {args.batch_size}")
        with ProcessPoolExecutor(2, step.processes(), max_tasks_per_child=1) as pool:
            found = dict(zip(FORMS, pool.map(simulate, [args] * len(FORMS), FORMS), strict=True))
    results: dict = {n: {case: {} for case in args.methods} for n in args.processes}
    print(f"{args.arch}, {args.size} pixels, {args.batch_size} images per process, queue {args.moco_k}; "
          f"torch {torch.__version__}\nMB that reach a process in a step, MB that its tensors hold at most, "
          "and images/s of all devices, estimated")  # fmt: skip
    columns = ("all_to_all", "all_gather", "all_reduce", "memory")
    print(f"{'processes':>9}  {'':24}" + "".join(f"{name:>12}" for name in (*columns, *args.devices)))
    for n, case, form in itertools.product(args.processes, args.methods, FORMS):
        if possible(form, case):
            costs = results[n][case][form] = found[form][n][case]
            cells = [f"{costs.get(name, 0) / 1e6:12.2f}" for name in columns]
            for name in args.devices if form != "plain" else ():
                costs[name] = n * args.batch_size / costs[name]
                fits = costs["memory"] < DEVICES[name].memory
                cells.append(f"{costs[name]:12.0f}" if fits else f"{'too small':>12}")
            print(f"{n:9}  {f'{case} {form}':24}" + "".join(cells))
    print(f"Assumed: convolutions reach {COMPUTE:.0%} of the FLOP/s, other operations {STREAM:.0%} of the memory's bytes/s; an "
          f"operation takes the host {1e6 * LAUNCH:.0f} us; traffic overlaps with nothing; the data is in time.")  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
