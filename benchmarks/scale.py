"""What a step costs on many devices, predicted in one process: bytes from other devices, and memory.

    python -m benchmarks.scale                                       8, 64 and 512 devices, 32 images each
    python -m benchmarks.scale --methods moco --processes 16         another number

The step is that of main_pretrain.py with bf16, computed with tensors that have shapes and no content, as the first of so many
processes whose collectives reach nobody. `plain` is benchmarks/step.py's straightforward form. tests/test_scale.py holds the
bytes against those of real processes.
"""

import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.distributed as td

from benchmarks import step
from benchmarks.tracer import Tracer
from methods import METHODS
from utils.learning.contrast import Step
from utils.run import dist
from utils.run.engine import Votes
from utils.run.flags import Parser, one_line_errors, positive


def get_args(argv=None):
    parser = Parser(prog="benchmarks.scale", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=step.CASES, default=list(step.CASES), help="what to trace")
    add("--processes", nargs="+", type=int, default=[8, 64, 512], help="numbers of devices, each with a process")
    add("-a", "--arch", default="resnet50", help="trunk: a timm model")
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--batch-size", type=int, default=32, help="images of one process in a step")
    add("--moco-k", type=int, default=65536, help="keys in the queue")
    add("--nce-k", type=int, default=16384, help="rows of a memory bank that an image is contrasted with")
    add("--samples", type=int, default=1281167, help="rows of a memory bank")
    return parser.parse_args(argv)


def simulate(args, plain: bool = False) -> dict[int, dict[str, dict[str, int]]]:
    """number of processes -> case -> its `trace`, as the first of so many, with fake tensors. Call in a process of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  what collectives do to fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.DistributedDataParallel = partial(dist.DistributedDataParallel, init_sync=False)  # which would read contents
    Votes._outcome = lambda *_: [0, 0]  # and so would the host
    if plain:
        step.straightforward()
    results = {}
    for processes in args.processes:
        td.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        with FakeTensorMode(allow_non_fake_inputs=True):
            results[processes] = {case: trace(args, case, plain, fake=True) for case in args.methods}
        dist.teardown()
    return results


def trace(args, case: str, plain: bool = False, fake: bool = False) -> dict[str, float]:
    """collective -> bytes that reach this process in a step, and `memory`, the bytes that its tensors hold at most."""
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # fake tensors are not channels-last
    flags = step.flags_of(args, case, "fp32" if plain else "bf16", args.batch_size * dist.world())
    device = torch.device("cpu")
    with Tracer() as tracer:
        method = METHODS[flags.method](flags).train()
        model = dist.data_parallel(method, device)
        if fake:
            model.register_comm_hook(None, all_reduced)
        compute = (step.plain_step if plain else step.default_step)(model, flags, device)
        views = step.random_views(METHODS[flags.method].views(flags), args.batch_size, device)
        with model.no_sync():  # momentum is there from the second step on, and DDP has not yet sorted its buckets again
            compute(views, Step.at(0, 10, 0))
        tracer.start()
        compute(views, Step.at(1, 10, 0))
    return {**tracer.received, "memory": tracer.peak}


def all_reduced(_, bucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a bucket of gradients by itself, where a collective has no result."""
    td.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.scale"):
        positive(["--size", "--batch-size", "--moco-k", "--nce-k", "--samples"], args)
        if min(args.processes) < 2:
            raise ValueError(f"--processes {min(args.processes)}: one process has nobody to talk to; pass 2 or more")
        with ProcessPoolExecutor(2, step.processes(), max_tasks_per_child=1) as pool:
            plain, default = pool.map(simulate, [args, args], [True, False])
        results = {
            n: {case: {"plain": plain[n][case], "default": default[n][case]} for case in args.methods} for n in args.processes
        }
    print(
        f"{args.arch}, {args.size} pixels, {args.batch_size} images a process, queue {args.moco_k}; torch {torch.__version__}"
    )
    print("MB that reach a process in a step, and MB that its tensors hold at most")
    columns = ("all_to_all", "all_gather", "all_reduce", "memory")
    print(f"{'processes':>9}  {'':24}" + "".join(f"{name:>12}" for name in columns))
    for n, cases in results.items():
        for case, forms in cases.items():
            for form, found in forms.items():
                print(f"{n:9}  {f'{case} {form}':24}" + "".join(f"{found.get(name, 0) / 1e6:12.2f}" for name in columns))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
