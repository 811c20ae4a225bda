"""Command lines: flat argparse, strict flags, bad input as one clear line."""

import argparse
import contextlib
import math
import os
import sys

from torch.distributed import DistError

from utils.learning.amp import DTYPES
from utils.run import dist


class RunError(Exception):
    """Why a run cannot go on, in one line that needs no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in the help, `-` and `_` alike inside a flag name, errors in one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = [_dashes(a) for a in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _dashes(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


@contextlib.contextmanager
def one_line_errors(prog: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError, RunError)):
    """Turn these exceptions into one line on stderr and exit code 2, on whichever process it happens; default: bad input."""
    try:
        yield
    except kinds as error:
        process = f"[process {os.environ['RANK']}] " if "RANK" in os.environ else ""
        message = " ".join(str(error).split())
        print(f"{process}{prog}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextlib.contextmanager
def one_line_ends(prog: str):
    """Around what runs for long: one line and exit code 2 for a known reason why it cannot go on; a traceback for others."""
    with one_line_errors(prog, (RunError,)):
        try:
            yield
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):
                raise RunError(f"{error} Too little memory is a common reason: try fewer --workers") from None
            if isinstance(error, DistError) or "gloo" in str(error):
                reason = str(error).splitlines()[0]
                raise RunError(f"another process was lost, or took longer than --dist-timeout: {reason}") from None
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise RunError(f"--compile: {str(error).splitlines()[0]}; leave it out, or mend what it needs") from None
            raise


def positive(flag_names: list[str], args: argparse.Namespace) -> None:
    """Raise ValueError for the first of these flags whose value is not above zero."""
    for name in flag_names:
        value = getattr(args, name.removeprefix("--").replace("-", "_"))
        if not value > 0:  # nan too
            raise ValueError(f"{name} {value}: must be above 0")


def in_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{flag} {value}: must lie in [{low}, {high}]")


def add_run_flags(parser: Parser, output_dir: str | None, output_help: str) -> None:
    """The flags of how and where a run goes, the same for every entry point."""
    add = parser.add_argument
    add("--output-dir", default=output_dir, metavar="DIR", help=output_help)
    add("--resume", metavar="auto|PATH", help="continue a run: the newest checkpoint of --output-dir, if any, or this one")
    add("--seed", type=int, default=0, help="decides weights, order and views")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="where to compute")
    add("--amp", default="auto", choices=["auto", *DTYPES], help="dtype of the encoders; losses are always fp32")
    add("--workers", type=int, default=default_workers(), help="loader processes for each process; changes no result")
    add("--print-freq", type=int, default=50, help="steps between two log lines")
    add("--photometric", default="auto", choices=["auto", "device", "worker"],
        help="where colours and blur are made; auto: on an accelerator, else in the workers; changes no result")  # fmt: skip
    add("--save-steps", type=int, default=0, help="steps between two checkpoints, beside that of every epoch; 0 for none")
    add("--save-minutes", type=float, default=15.0, help="minutes without a checkpoint after which one is due; 0 for never")
    add("--keep", type=int, default=3, help="newest checkpoints that stay; older ones are deleted")
    add("--dist-timeout", type=float, default=dist.TIMEOUT, help="seconds that a process waits for another before all fail")
    add("--max-bad", type=float, default=0.01, help="share of the images that may be unusable before the run stops")
    add_shard_flags(parser)


def add_shard_flags(parser: Parser) -> None:
    """How shards are opened, the same for everything that reads them."""
    add = parser.add_argument
    add("--cache-dir", metavar="DIR", help="keep a copy here of each remote shard that is read")
    add("--allow-pipe", action="store_true", help="allow shards that a shell command gives, pipe:COMMAND")
    add("--verify-shards", action="store_true", help="compare the sha256 of every local shard with its index first")


def add_lr_steps(parser: Parser) -> None:
    """Steps of the learning rate, in training and probe."""
    add = parser.add_argument
    add("--lr-steps", type=int, nargs="*", default=[], metavar="EPOCH",
        help="epochs after which the learning rate is multiplied by --lr-gamma; none: it follows a cosine")  # fmt: skip
    add("--lr-gamma", type=float, default=0.1, help="factor of --lr-steps")


def check_lr_steps(args: argparse.Namespace) -> None:
    in_range("--lr-gamma", args.lr_gamma, 0, 1)
    steps = " ".join(map(str, args.lr_steps))
    if args.lr_steps != sorted(set(args.lr_steps)) or (args.lr_steps and args.lr_steps[0] < 1):
        raise ValueError(f"--lr-steps {steps}: must be epochs above 0 in rising order, such as 120 160 200")
    if args.lr_steps and args.lr_steps[-1] >= args.epochs and dist.rank() == 0:
        print(f"warning: --lr-steps {steps}: not all of them lie before --epochs {args.epochs}; scale them", flush=True)


def shard_flags(args: argparse.Namespace) -> dict:
    """What add_shard_flags has added."""
    return {"cache_dir": args.cache_dir, "allow_pipe": args.allow_pipe, "verify_shards": args.verify_shards}


def check_batch(args: argparse.Namespace, samples: int, bn_splits: int = 1) -> None:
    """A global batch must divide evenly over processes and BatchNorm groups, and not exceed the data set."""
    groups = dist.world() * bn_splits
    if args.batch_size % groups:
        over = f"{dist.world()} processes" + (f" x {bn_splits} BatchNorm groups" if bn_splits > 1 else "")
        raise ValueError(f"--batch-size {args.batch_size}: must divide evenly over {over}; "
                         f"{max(1, args.batch_size // groups) * groups} would do")  # fmt: skip
    if args.batch_size > samples:
        raise ValueError(f"--batch-size {args.batch_size}: larger than the data set of {samples} images; pass at most that")


def check_run_flags(args: argparse.Namespace) -> None:
    """The checks that go with add_run_flags, and with --momentum and --weight-decay of every optimizer."""
    positive(["--print-freq", "--keep", "--dist-timeout"], args)
    for flag in ("--workers", "--seed", "--weight-decay", "--save-steps", "--save-minutes"):
        in_range(flag, getattr(args, flag[2:].replace("-", "_")), 0, math.inf)
    in_range("--momentum", args.momentum, 0, 1)
    in_range("--max-bad", args.max_bad, 0, 0.5)


def meaning(args: argparse.Namespace) -> dict:
    """The flags that decide what is computed, without those of where and how it runs."""
    place = {"output_dir", "resume", "device", "workers", "print_freq", "save_freq", "photometric", "max_bad",
             "save_steps", "save_minutes", "keep", "dist_timeout", "compile", "replay",
             "cache_dir", "allow_pipe", "verify_shards", "dry_run"}  # fmt: skip
    inputs = {"shards", "samples", "train_shards", "val_shards", "pretrained"}  # compared by what they hold, not by their paths
    return {name: value for name, value in vars(args).items() if name not in place | inputs}


def typed(name: str, value) -> str:
    """A flag with its value, as a command line has it."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else " ".join(map(str, [flag, *(value if isinstance(value, list) else [value])]))


def default_workers() -> int:
    """The CPU cores there are for each process of this machine, up to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
