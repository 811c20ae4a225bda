"""Time and memory of a step in slices (--accumulate), compared with the whole batch and the same BatchNorm groups.

    python -m benchmarks.accumulate                              MosRep, ResNet-50, 224 pixels, batch 64, 8 slices
    python -m benchmarks.accumulate --batch-size 256             on a GPU, if there is one

Each form runs in its own process, and the forms take turns; the table shows medians. Memory is the peak of the process without
Python and its libraries, or the device's own count.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # python benchmarks/accumulate.py works too

import main_pretrain
from benchmarks import step
from utils.evaluation.fit import random_batch
from utils.learning import amp
from utils.learning.method import Step
from utils.run import dist
from utils.run.cpu import keep_freed_memory, peak_memory
from utils.run.flags import Parser, one_line_errors, positive


def get_args(argv=None):
    parser = Parser(prog="benchmarks.accumulate", description=__doc__.split("\n\n")[0])
    step.add_sizes(parser, batch_size=64, samples=100_000)
    add = parser.add_argument
    add("--accumulate", type=int, default=8, help="slices, and BatchNorm groups of both forms")
    add("--rounds", type=int, default=5, help="measured steps of each form, after a warm-up step")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="device of the step")
    add("--amp", default="auto", choices=["auto", *amp.DTYPES], help="dtype of the encoders")
    parser.set_defaults(methods=["mosrep"])
    return parser.parse_args(argv)


def form(pipe, args, case, slices):
    """The process of a form: a step for each message True, then its peak memory in bytes."""
    before, device = peak_memory(), dist.setup(args.device)
    flags = step.flags_of(args, case, amp.resolve(args.amp, device), args.batch_size)
    flags.bn_splits, flags.accumulate = args.accumulate, slices
    method = main_pretrain.build(flags, args.samples, device).train()
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    train, batch = step.train_step(method, method, flags), random_batch(method.views(flags), args.batch_size, device)
    number = 0
    while pipe.recv():
        start = time.perf_counter()
        train(batch, Step(number, 1000, 0))
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(1e3 * (time.perf_counter() - start))
        number += 1
    pipe.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory() - before)


def measure(args, case) -> dict[str, float]:
    """ms and MB of both forms, and their ratios."""
    pipes = [step.started(form, args, case, slices) for slices in (1, args.accumulate)]
    try:
        times = [[step.ask(pipe, True) for pipe in pipes] for _ in range(args.rounds + 1)][1:]
        whole_mb, slices_mb = (step.ask(pipe, False) / 1e6 for pipe in pipes)
    except EOFError:
        raise ValueError(f"--methods {case}: its process ended, see above") from None
    whole_ms, slices_ms = (statistics.median(found) for found in zip(*times, strict=True))
    return {"whole_ms": whole_ms, "slices_ms": slices_ms, "ratio": slices_ms / whole_ms, "whole_mb": whole_mb,
            "slices_mb": slices_mb, "memory_ratio": slices_mb / whole_mb}  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.accumulate"):
        positive(["--rounds", "--accumulate", *step.SIZES], args)
        if args.batch_size % args.accumulate or "w2ssl" in args.methods:
            raise ValueError(
                f"--accumulate {args.accumulate}: must divide --batch-size {args.batch_size}, and w2ssl has no slices"
            )
        results = {case: measure(args, case) for case in args.methods}
    print(f"{args.arch}, {args.size} pixels, batch {args.batch_size}, {args.accumulate} slices and BatchNorm groups, "
          f"{args.rounds} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':16}" + "".join(f"{name:>12}" for name in ("whole ms", "slices ms", "ratio", "whole MB", "slices MB", "ratio")))
    for case, result in results.items():
        print(f"{case:16}" + "".join(f"{x:12{'.2f' if 'ratio' in name else '.0f'}}" for name, x in result.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
