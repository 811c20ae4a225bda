"""Time that the measures of health add to training (docs/health.md).

    python -m benchmarks.health                                  every method: ResNet-50, 224 pixels, batch 8
    python -m benchmarks.health --methods moco --batch-size 32   on a GPU, if there is one

Steps with and without the measures take turns in one process; the table shows medians. `share` is the added time of a watched
step, divided by the time of the steps to the next one.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # python benchmarks/health.py works like python -m benchmarks.health

import main_pretrain
from benchmarks.step import SIZES, add_sizes, flags_of, random_batch, train_step
from methods import METHODS
from utils.evaluation.frozen import Live
from utils.evaluation.watch import Watch
from utils.learning import amp
from utils.learning.health import WATCH
from utils.learning.method import Step
from utils.run import dist
from utils.run.flags import Parser, one_line_errors, positive


def get_args(argv=None):
    parser = Parser(prog="benchmarks.health", description=__doc__.split("\n\n")[0])
    add_sizes(parser, batch_size=8, samples=100_000)
    parser.add_argument("--rounds", type=int, default=5, help="measured pairs of steps, after one of warm-up")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="device of the step")
    return parser.parse_args(argv)


def measure(args, case: str) -> dict[str, float]:
    device = dist.setup(args.device)
    flags = flags_of(args, case, amp.resolve("auto", device), args.batch_size)
    method = main_pretrain.build(flags, args.samples, device)
    method.train()
    train, watch = train_step(method, method, flags), Watch(Live(flags, METHODS[flags.method], device))
    batch, times = random_batch(method.views(flags), args.batch_size, device), {False: list[float](), True: list[float]()}
    for number in range(2 * args.rounds + 2):
        watched, start = number % 2 == 1, time.perf_counter()
        train(batch, Step(number, 1000, 0, watched))
        if watched:
            watch(method, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[watched].append(1e3 * (time.perf_counter() - start))
    step, watched_step = (statistics.median(found[1:]) for found in times.values())
    ratio = watched_step / step
    return {"step_ms": step, "watched_ms": watched_step, "ratio": ratio, "share": (ratio - 1) / WATCH}


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.health"):
        positive(["--rounds", *SIZES], args)
        results = {case: measure(args, case) for case in args.methods}
    print(f"{args.arch}, {args.size} pixels, batch {args.batch_size}, {args.rounds} rounds, torch {torch.__version__}, "
          f"one step of {WATCH} is watched")  # fmt: skip
    print(f"{'':16}{'step ms':>12}{'watched ms':>12}{'ratio':>12}{'share':>12}")
    for case, found in results.items():
        print(f"{case:16}{found['step_ms']:12.0f}{found['watched_ms']:12.0f}{found['ratio']:12.2f}{found['share']:12.2%}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
