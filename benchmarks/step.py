"""Time and memory of a training step, compared with the plain form of benchmarks/plain.py; time of the health measures.

    python -m benchmarks.step                                    every method: ResNet-50, 224 pixels, batch 8
    python -m benchmarks.step --methods moco --batch-size 32     on a GPU, if there is one
    python -m benchmarks.step --shards DIR --workers 8           with the whole loop: also reading and colours

`default` is the step of main_pretrain.py. `loop` is the mean step of LOOP steps with batches of the loader; the host waits for
the device after the last of them only. `watched` is the same step with the measures of health (docs/health.md), which one
step of 100 has; `health` is the time that they add to training. Each form runs in its own process, and the forms take turns;
the table shows medians. Memory is the peak of the process without Python and its libraries, or the device's own count.
"""

import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # python benchmarks/step.py works like python -m benchmarks.step

import main_pretrain
from benchmarks import plain
from methods import METHODS
from mosrep.builder import Projector
from utils.data.batch import Batch
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.shards import training_plan
from utils.evaluation.fit import random_batch
from utils.evaluation.frozen import Live
from utils.evaluation.watch import Watch
from utils.learning import amp, optim
from utils.learning.accumulate import accumulate
from utils.learning.health import WATCH
from utils.learning.method import Step
from utils.run import dist
from utils.run.cpu import keep_freed_memory, peak_memory
from utils.run.engine import Engine, StepInputs
from utils.run.flags import Parser, default_workers, one_line_errors, positive

CASES = {  # the method and its flags
    "mosrep": "mosrep --arch {arch} --moco-k {moco_k} --shift-range {shift}",
    "moco": "moco --arch {arch} --moco-k {moco_k}",
    "moco-multicrop": "moco --arch {arch} --moco-k {moco_k} --local-crops 4",
    "w2ssl": "w2ssl --arch {arch}",
    "cmc": "cmc --arch {arch}v1 --nce-k {nce_k}",
    "insdis": "insdis --arch {arch} --nce-k {nce_k}",
}
FORMS = ("plain", "default", "watched")
LOOP = 10  # steps
SIZES = ["--size", "--batch-size", "--moco-k", "--nce-k", "--samples"]


def get_args(argv=None):
    parser = Parser(prog="benchmarks.step", description=__doc__.split("\n\n")[0])
    add_sizes(parser, batch_size=8, samples=100_000)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="measured steps of each form, after two warm-up steps")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="device of the step")
    add("--amp", default="auto", choices=["auto", *amp.DTYPES], help="dtype of the default form's encoders")
    add("--compile", action="store_true", help="compile the default form's encoders")
    add("--shards", metavar="DIR", help="measure the whole loop too, with these shards")
    add("--workers", type=int, default=default_workers(), help="loader workers of the whole loop")
    add("--photometric", default="auto", choices=["auto", "device", "worker"], help="where the whole loop computes colours")
    return parser.parse_args(argv)


def add_sizes(parser, batch_size: int, samples: int) -> None:
    """Add the flags of this benchmark and of scale.py: methods and sizes."""
    add = parser.add_argument
    add("--methods", nargs="+", choices=CASES, default=list(CASES), help="methods to measure")
    add("-a", "--arch", default="resnet50", help="trunk: a timm model")
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--batch-size", type=int, default=batch_size, help="images of one process in a step")
    add("--moco-k", type=int, default=65536, help="keys in the queue")
    add("--nce-k", type=int, default=16384, help="number of negatives: random rows of a memory bank")
    add("--samples", type=int, default=samples, help="rows of a memory bank; ImageNet has 1281167 images")


def form(pipe, args, case, name):
    """The process of a form: build the method, report it, then train for each number that arrives: LOOP steps, or one."""
    before, is_plain, watched = peak_memory(), name == "plain", name == "watched"
    device = dist.setup(args.device)
    flags = flags_of(args, case, "fp32" if is_plain else amp.resolve(args.amp, device), args.batch_size)
    flags.compile = args.compile and not is_plain
    if is_plain:
        torch.manual_seed(flags.seed)
        method = plain.PLAIN[flags.method](flags, args.samples).to(device)
    else:
        method = main_pretrain.build(flags, args.samples, device)
        if device.type == "cpu":
            keep_freed_memory()  # as a run does
    method.train()
    train = (plain.train_step if is_plain else train_step)(method, method, flags)
    watch = Watch(Live(flags, METHODS[flags.method], device)) if watched else None
    steps, specs = LOOP if name == "loop" else 1, method.views(flags)
    batches = loaded(args, specs, device) if name == "loop" else repeat(random_batch(specs, args.batch_size, device))
    pixels = count_pixels(method)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        if number == 1:
            pixels[:] = 0, 0  # the first step of NCE has forwards of its own
        start = time.perf_counter()
        for i in range(steps):
            batch = next(batches)
            train(batch, Step(steps * number + i, 1000, 0, watched))
        if watch:
            watch(method, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(1e3 * (time.perf_counter() - start) / steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory() - before
    pipe.send((peak / 1e6, pixels[0] / (args.batch_size * args.size**2 * pixels[1])))


def flags_of(args, case, amp_name, batch_size):
    """The flags of a case, parsed by main_pretrain.py."""
    own = CASES[case].format(**vars(args), shift=args.size * 48 // 224)
    general = f"--shards none --size {args.size} --batch-size {batch_size} --amp {amp_name}"
    return main_pretrain.get_args(f"{general} --method {own}".split())


def loaded(args, specs, device) -> Iterator[Batch]:
    """The batches of a run with --shards."""
    index = load_index(args.shards)
    plan = training_plan(index, args.batch_size, 0, range(10**6))
    return load_batches(index, specs, plan, 0, args.workers, device, args.photometric)


def count_pixels(method):
    """[pixels that the trunks have seen, steps]. A forward of one whole view counts size x size pixels."""
    seen = [0, 0]

    def add(module, inputs):
        seen[0] += inputs[0].shape[0] * inputs[0].shape[2] * inputs[0].shape[3]

    for module in method.encoders():
        if not isinstance(module, Projector):
            module.register_forward_pre_hook(add)
    method.register_forward_pre_hook(lambda *_: seen.__setitem__(1, seen[1] + 1))
    return seen


def train_step(method, model, args, votes=None, backward=None):
    """A function of (batch, step) that trains the model for one step, like main_pretrain.py. It returns loss and stats.

    votes, backward: replace the engine's.
    """
    optimizer = optim.sgd(model.parameters(), 0.01, args.momentum, args.weight_decay, args.trust, exclude=True)
    unused: Any = None  # no log and no checkpoint
    engine = Engine(args, 1, optimizer, amp.scaler(args.amp), unused, next(model.parameters()).device, unused)
    engine.votes = votes or engine.votes

    def train(batch, step):
        targets = method.targets(batch, step)
        loss, stats = accumulate(model, batch, targets, step, args.accumulate, backward or engine.backward)
        stats |= engine.update(loss, StepInputs(0, step.number))
        method.commit(step)
        return loss, stats

    return train


def processes():
    """The context that starts each form's process: new interpreters, because a fork inherits its parent's memory."""
    return multiprocessing.get_context("spawn")


def started(form, *args, daemon=True):
    """A pipe to a new process that calls form(pipe, *args)."""
    context = processes()
    here, there = context.Pipe()
    context.Process(target=form, args=(there, *args), daemon=daemon).start()
    there.close()
    return here


def ask(pipe, message):
    pipe.send(message)
    return pipe.recv()


def measure(args, case) -> dict[str, float]:
    names = (*FORMS, "loop") if args.shards else FORMS
    pipes = [started(form, args, case, name, daemon=name != "loop") for name in names]  # the loop has workers
    try:
        for pipe in pipes:
            pipe.recv()
        times = [[ask(pipe, number) for pipe in pipes] for number in range(args.rounds + 2)]
        (plain_mb, _), (default_mb, forwards), *_ = (ask(pipe, None) for pipe in pipes)
    except EOFError:
        raise ValueError(f"--methods {case}: its process ended, see above") from None
    finally:
        for pipe in pipes:
            pipe.close()  # the others end
    plain_ms, default_ms, watched_ms, *loop_ms = (statistics.median(found) for found in zip(*times[2:], strict=True))
    return {
        "plain_ms": plain_ms, "default_ms": default_ms, "ratio": default_ms / plain_ms, "plain_mb": plain_mb,
        "default_mb": default_mb, "memory_ratio": default_mb / plain_mb, "forwards_per_image": forwards,
        "watched_ms": watched_ms, "health_share": (watched_ms / default_ms - 1) / WATCH,
    } | ({"loop_ms": loop_ms[0]} if loop_ms else {})  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.step"):
        positive(["--rounds", *SIZES], args)
        if args.shards and not args.batch_size <= (images := load_index(args.shards).total) <= args.samples:
            flag = "--samples" if images > args.samples else "--batch-size"
            raise ValueError(f"--shards {args.shards}: has {images} images, not between --batch-size {args.batch_size} and "
                             f"--samples {args.samples}; pass {flag} {images}")  # fmt: skip
        results = {case: measure(args, case) for case in args.methods}
    print(f"{args.arch}, {args.size} pixels, batch {args.batch_size}, queue {args.moco_k}, {args.rounds} rounds, "
          f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")  # fmt: skip
    columns = ["plain ms", "default ms", "ratio", "plain MB", "default MB", "ratio", "forwards", "watched ms", "health"]
    columns += ["loop ms"] if args.shards else []
    print(f"{'':16}" + "".join(f"{name:>12}" for name in columns))
    for case, result in results.items():
        styles = {"ms": ".0f", "mb": ".0f", "share": ".2%"}
        print(f"{case:16}" + "".join(f"{x:12{styles.get(name.rpartition('_')[2], '.2f')}}" for name, x in result.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
