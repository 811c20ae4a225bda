"""What fits: memory and time of a training step on this device, for --accumulate auto and --dry-run."""

import copy
import gc
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.data.batch import Batch
from utils.data.views import ViewSpec
from utils.learning import optim
from utils.learning.accumulate import accumulate
from utils.learning.method import Method, Step
from utils.run import checkpoint, cpu, dist
from utils.run.flags import Flags, typed
from utils.run.log import say

SHARE = {"cuda": 0.9, "cpu": 0.8}  # of the free memory, for a step; the rest is for batches that the loader prepares
FEW = 4, 8  # images in a BatchNorm group of the steps that a CPU measures
PIXELS = 16 * 224**2  # pixels of a local batch, up to which a CPU measures the step itself
ASIDE = ("method", "bn_splits", "lanes", "seed", "amp")  # flags with which the published recipe stays itself
Build = Callable[[Namespace], Method]


class Fit(NamedTuple):
    """A step of `slices`: the bytes that it needs with its weights, those that there are, for each process; seconds."""

    slices: int
    need: float
    room: float
    seconds: float

    @property
    def fits(self) -> bool:
        return self.need <= self.room


def choose(
    build: Build, args: Namespace, specs: list[ViewSpec], groups: int, device: torch.device, resumed: Path | None
) -> Fit | None:
    """Replace --accumulate auto: by the number of the run that is resumed, else by the fewest slices that fit.

    Returns what was measured, at least with --dry-run. Raises ValueError if nothing fits. The arguments are those of `fit`.
    resumed: the checkpoint that the run starts from.
    """
    auto = args.accumulate == "auto"
    if auto and resumed:
        kept = dist.first_process_does(lambda: checkpoint.flag_of(resumed, "accumulate"))
        if isinstance(kept, int) and kept > 0 and groups % kept == 0:
            args.accumulate = kept
            say(f"--accumulate {kept}, as in {resumed.name}")
    if args.accumulate != "auto" and args.dry_run is None:
        return None
    found = fit(build, args, specs, groups, device)
    if args.accumulate == "auto":
        if not found.fits and args.dry_run is None:
            raise ValueError(f"--accumulate auto: {memory(found)}; pass a multiple of --bn-splits {groups}")
        args.accumulate = found.slices
        say(f"--accumulate {found.slices} (auto): {memory(found)}")
    return found


def fit(build: Build, args: Namespace, specs: list[ViewSpec], groups: int, device: torch.device) -> Fit:
    """Measure steps on random images. With --accumulate auto: the fewest slices that fit, or the most if none does.

    build: makes the method for flags. groups: of BatchNorm in a process's batch. All processes call it; they choose together.
    """
    choices = [m for m in range(1, groups + 1) if groups % m == 0] if args.accumulate == "auto" else [args.accumulate]
    if device.type == "cpu":
        return _on_cpu(build, args, specs, groups, choices)
    known: dict[int, Fit] = {}
    low, high = 0, len(choices) - 1
    while low < high:  # the first that fits, if any, is in choices[low : high + 1]
        middle = (low + high) // 2
        known[middle] = _on_device(build, args, specs, choices[middle], device)
        low, high = (low, middle) if known[middle].fits else (middle + 1, high)
    return known.get(low) or _on_device(build, args, specs, choices[low], device)


def _on_device(build, args, specs, slices, device) -> Fit:
    """Steps of the whole batch on an accelerator."""
    gc.collect()
    need = room = seconds = 0.0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        room = SHARE["cuda"] * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    trial = None
    try:
        trial = Trial(build, args, specs, args.batch_size // dist.world(), device)
        for number in range(3):  # the first one chooses algorithms
            start = time.perf_counter()
            trial.step(number, slices)
            seconds = time.perf_counter() - start
        if device.type == "cuda":
            need = torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        need = float("inf")
    del trial
    need, seconds, least = dist.largest(torch.tensor([need, seconds, -room], device=device)).tolist()
    return Fit(slices, need, -least, seconds)


def _on_cpu(build, args, specs, groups, choices) -> Fit:
    """A CPU has no error that says that memory is short. So the memory of many pixels is extrapolated from steps of few images:

    need = base + u n + v n / slices, for n images of a process.
    """
    n, most = args.batch_size // dist.world(), min(groups, 2)
    if n * specs[0].size ** 2 <= PIXELS or n // groups < FEW[1]:
        for m in choices:
            if (found := _agreed(m, *_measured(build, args, specs, n, m))).fits:
                break
        return found
    few, (small, large) = copy.copy(args), (most * size for size in FEW)
    if "bn_splits" in few:
        few.bn_splits = most
    first, more, whole = (_measured(build, few, specs, *case) for case in ((small, most), (large, most), (large, 1)))
    v = max(0.0, whole[0] - more[0]) / (large - large / most) if most > 1 else 0.0
    per = max(0.0, more[0] - first[0]) / (large - small) - v / most  # u
    for m in choices:
        need = more[0] + per * (n - large) + v * (n / m - large / most)
        if (found := _agreed(m, need, more[1] * n / large)).fits:
            break
    return found


def _agreed(slices, need, seconds) -> Fit:
    """The worst of all processes."""
    room = SHARE["cpu"] * cpu.free_memory() / cpu.processes_here()
    need, seconds, least = dist.largest(torch.tensor([need, seconds, -room], dtype=torch.float64)).tolist()
    return Fit(slices, need, -least, seconds)


def _measured(build, args, specs, size, slices) -> tuple[float, float]:
    """Bytes and seconds of a step with `size` images of this process."""
    args = copy.copy(args)
    args.batch_size = size * dist.world()
    before = cpu.reset_peak_memory()
    trial = Trial(build, args, specs, size, torch.device("cpu"))
    trial.step(0, slices)
    start = time.perf_counter()
    trial.step(0, slices)
    return max(0.0, cpu.peak_memory() - before), time.perf_counter() - start


class Trial:
    """A method that trains on a batch of random images, and is thrown away."""

    def __init__(self, build: Build, args: Namespace, specs: list[ViewSpec], n: int, device: torch.device):
        self.method, self.seed = build(args).train(), args.seed
        self.optimizer = optim.sgd(self.method.parameters(), 0.0, args.momentum, args.weight_decay, args.trust, exclude=True)
        self.batch = random_batch(specs, n, device)

    def step(self, number: int, slices: int) -> None:
        """A step. If one process is short of memory, it raises OutOfMemoryError on all, before they exchange their keys."""
        step, short = Step(number, 1000, self.seed), False
        step.seed_torch()
        targets = self.method.targets(self.batch, step)
        try:
            loss, _ = accumulate(self.method, self.batch, targets, step, slices, lambda loss: loss.backward())
            self.optimizer.step()
            loss.item()  # waits for the device
        except torch.OutOfMemoryError:
            short = True
        if dist.largest(torch.tensor(float(short), device=self.batch.views[0].device)):
            raise torch.OutOfMemoryError
        self.optimizer.zero_grad()
        self.method.commit(step)


def random_batch(specs: list[ViewSpec], n: int, device: torch.device) -> Batch:
    """n images of this process: random pixels, not mirrored."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(n, *([s.count] if s.count > 1 else []), 3, s.size, s.size) for s in specs]
    views = [torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8).to(device) for shape in shapes]
    ids = torch.arange(dist.rank() * n, (dist.rank() + 1) * n, device=device)
    return Batch(views, [torch.zeros(n, s.count, dtype=torch.bool) for s in specs], ids, torch.full_like(ids, -1), [])


def said(found: Fit, args: Flags, device: torch.device, known: dict[str, Any]) -> list[str]:
    """--dry-run: what a run will take on this device, in lines. known: of main_pretrain.numbers_of."""
    rate = args.batch_size / found.seconds
    lines = [f"a step on {dist.world()} x {device.type} takes {1e3 * found.seconds:.0f} ms, that is {rate:.0f} images/s: "
             f"{args.epochs} epochs in {known['all_steps'] * found.seconds / 3600:.1f} hours",
             f"--accumulate {found.slices}: {memory(found)}"]  # fmt: skip
    if not found.fits:
        lines[-1] += "; too much: pass --accumulate auto, with more --bn-splits if it has no larger divisor"
    other = {name: value for name, value in args.defaults.items() if name not in ASIDE}
    differs = ", ".join(f"{typed(name, getattr(args, name))} ({value})" for name, value in other.items())
    lines.append(f"recipe: {f'differs from the published one in {differs}' if other else 'the published one'} of {args.method}")
    if "queue" in known:
        lines.append(f"queue: {known['queue']} keys of {known['images']} images ({known['queue'] / known['images']:.1%}), each "
                     f"for {known['queue_steps']} steps")  # fmt: skip
    if "groups" in known:
        lines.append(f"BatchNorm: groups of {args.batch_size / known['groups']:.0f} images; published are 32 (8 x 32, MoCo-v1 "
                     "4 x 32)")  # fmt: skip
    return lines


def memory(found: Fit) -> str:
    """What a step needs and what there is, in words."""
    need = "more" if found.need == float("inf") else f"{found.need / 1e9:.2f} GB"
    return f"a step in {found.slices} slices needs {need} of {found.room / 1e9:.2f} GB for a process"
