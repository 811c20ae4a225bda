"""Command lines: flat argparse, strict flags, bad input reported in one line."""

import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch.distributed import DistError

from utils.run import dist, signals
from utils.run.old_flags import OLD
from utils.run.warned import warn

MAX_PIXELS = 89_478_485  # of an image: Pillow's limit
TRACKERS = ("wandb", "trackio", "mlflow")  # of tracker.py; packages of the same names
AMP = ("auto", "bf16", "fp16", "fp32")  # of utils/learning/amp.py, which this room may not import


class RunError(Exception):
    """The reason why a run must stop, in one line that needs no traceback."""


class Flags(argparse.Namespace):
    """The flags of a command. `outside`: names of those that are not part of a run's identity.

    `defaults`: of the others, those that have another value.
    """

    __slots__ = ("defaults", "outside")  # so that `vars` gives the flags alone


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in the help, `-` and `_` alike inside a flag name, errors in one line.

    elsewhere: flag -> the command or method that has it, or None; called for an unknown flag.
    """

    def __init__(self, elsewhere: Callable[[str], str | None] = lambda flag: None, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)
        self.elsewhere, self.groups = elsewhere, dict[str, Any]()
        self.outside: set[str] = set()

    def group(self, title: str, identity: bool = True) -> "Group":
        """The group of the help with this title. identity: default for the flags that are added to the returned object."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return Group(self, self.groups[title], identity)

    def parse_known_args(self, args=None, namespace=None):
        args = _dashed(args)
        typed: dict[str, argparse.Action] = {}  # two flags may set one value: two forms of one flag
        for name in (arg.partition("=")[0] for arg in args):
            action = self._option_string_actions.get(name)
            if action and typed.setdefault(action.dest, action) is not action:
                self.error(f"{typed[action.dest].option_strings[0]} and {name}: are two forms of one flag; leave one out")
        flags, unknown = super().parse_known_args(args, Flags() if namespace is None else namespace)
        flags.outside = frozenset(self.outside)
        defaults = {name: self.get_default(name) for name in vars(flags) if name not in self.outside}
        flags.defaults = {name: value for name, value in defaults.items() if value != vars(flags)[name]}
        return flags, unknown

    def parse_args(self, args=None, namespace=None):
        names = [arg.partition("=")[0] for arg in _dashed(args)]
        if old := {name: OLD[name] for name in names if name in OLD and name not in self._option_string_actions}:
            said = "; ".join(f"{name} is {ours}" for name, ours in old.items())
            self.error(f"flags of other code: {said} (docs/migration.md)")
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((a for a in unknown if a.startswith("-")), unknown[0]).partition("=")[0]
            other, near = self.elsewhere(name), difflib.get_close_matches(name, self._option_string_actions, 1, 0.7)
            hint = f"{other} has it" if other else f"did you mean {near[0]}?" if near else "--help lists the flags"
            self.error(f"{name}: no such flag{' here' if other else ''}; {hint}")
        return flags

    def error(self, message):
        if "expected one argument" in message:  # argparse does not say which values there are
            action = self._option_string_actions.get(message.split()[1].split("/")[-1].rstrip(":"))
            message += f": {', '.join(map(str, action.choices))}" if action and action.choices else ""
        fail(self.prog, message)


def _dashed(args):
    """The words of a command line, with `-` for `_` in the names of flags."""
    args = sys.argv[1:] if args is None else args
    return [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), arg) for arg in args]


class Group:
    """A titled part of a parser's help. A flag with `identity` belongs to a run's identity: another value is another run."""

    def __init__(self, parser: Parser, arguments, identity: bool):
        self.parser, self.arguments, self.identity = parser, arguments, identity

    def add_argument(self, *names: str, identity: bool | None = None, **options) -> None:
        action = self.arguments.add_argument(*names, **options)
        if not (self.identity if identity is None else identity):
            self.parser.outside.add(action.dest)

    def set_defaults(self, **values) -> None:
        self.parser.set_defaults(**values)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def fail(prog: str, message: str) -> NoReturn:
    """One line on stderr and exit code 2.

    torchrun ends all processes soon after one of them. Those after the first wait, so that an error of all is printed once.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank and signals.under_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(6 if os.environ["LOCAL_RANK"] != "0" else 3)
    process = f"[process {rank}] " if "RANK" in os.environ else ""
    print(f"{process}{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors(prog: str, kinds: tuple[type[Exception], ...] = (ValueError, OSError, RunError), batch: int | None = None,
                    smaller: str | None = None):  # fmt: skip
    """Turn these exceptions, and others with a known reason, into `fail`.

    batch: the --batch-size that may be too large. smaller: flags with which a step of it takes less memory.
    """
    try:
        yield
    except Exception as error:
        if reason := _reason(error, batch, smaller) or (isinstance(error, kinds) and (str(error) or type(error).__name__)):
            fail(prog, reason)
        raise


@contextlib.contextmanager
def one_line_ends(prog: str, batch: int | None = None, smaller: str | None = None):
    """Around training: the same for RunError and for errors with a known reason. The loader's workers end too."""
    try:
        with one_line_errors(prog, (RunError,), batch, smaller):
            yield
    finally:
        signals.end_workers()


def _reason(error: Exception, batch: int | None, smaller: str | None) -> str | None:
    """The known reason of an error that is not ours."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line or "_ALLOC_FAILED" in line:
        if not batch:
            return f"out of memory; lower --batch-size or --workers ({line})"
        fixes = f"{smaller}, " if smaller else ""
        return f"--batch-size {batch}: out of memory; pass {fixes}--batch-size {batch // 2 or 1} or fewer --workers ({line})"
    if line.startswith("Expected more than 1 value per channel"):
        return f"--batch-size {batch}: too few images for BatchNorm in a process or group; pass twice as many ({line})"
    if isinstance(error, OSError) and error.errno:
        return str(error)
    if not isinstance(error, RuntimeError):
        return None
    if line.startswith("DataLoader worker"):
        return f"{error} Too little memory is a common reason: try fewer --workers"
    if isinstance(error, DistError) or "gloo" in str(error):
        return f"another process was lost, or took longer than --dist-timeout: {line}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: {line}; fix the compiler, or run without --compile"
    return None


def positive(flag_names: list[str], args: argparse.Namespace) -> None:
    """Raise ValueError for the first of these flags with a value of 0 or less, or a list of values with one."""
    for name in flag_names:
        found = getattr(args, name.removeprefix("--").replace("-", "_"))
        for value in found if isinstance(found, list) else [found]:
            if not value > 0:  # nan too
                raise ValueError(f"{name} {value}: must be above 0")


def in_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{flag} {value}: must lie in [{low}, {high}]")


def add_run_flags(parser: Parser, output_dir: str | None, output_help: str) -> None:
    """Add the flags of every entry point that trains: those of an evaluation, and those of its saves."""
    add_evaluation_flags(parser, output_dir, output_help)
    add = parser.group("run", identity=False).add_argument
    add("--resume", metavar="auto|PATH", help="resume a run: auto takes the newest checkpoint of --output-dir, if any")
    add("--print-freq", type=int, default=50, help="steps between two log lines")
    add("--tracker", choices=TRACKERS, help="also send numbers and pictures to this tracker; install its package first")
    add("--save-steps", type=int, default=0, help="save every N steps, in addition to every epoch; 0: never")
    add("--save-minutes", type=float, default=15.0, help="save N minutes after the last save; 0: never")
    add("--keep", type=int, default=3, help="number of newest checkpoints to keep; older ones are deleted")
    add("--dry-run", nargs="?", type=float, const=1000.0, metavar="RATE",
        help="check all flags, print the --workers for a device that trains RATE (1000) images/s, then stop")  # fmt: skip


def add_evaluation_flags(parser: Parser, output_dir: str | None, output_help: str) -> None:
    """Add the flags of every entry point that reads images, in the groups "data" and "run"."""
    add = parser.group("data", identity=False).add_argument
    add("--workers", type=int, default=default_workers(), help="loader workers of each process; changes no result")
    add("--photometric", default="auto", choices=["auto", "device", "worker"],
        help="where to compute colours and blur; auto: on an accelerator, else in the workers; "
             "equal bytes on a CPU, other rounding on a GPU")  # fmt: skip
    add("--max-bad", type=float, default=0.01, help="stop the run if a larger share of the images is unusable")
    add_shard_flags(parser)
    add = parser.group("run", identity=False).add_argument
    add("--output-dir", default=output_dir, metavar="DIR", help=output_help)
    add("--seed", type=int, default=0, identity=True, help="seed of the weights, the order and the views")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="device to compute on")
    add("--amp", default="auto", choices=AMP, identity=True, help="dtype of the encoders; losses are always fp32")
    add("--dist-timeout", type=float, default=dist.TIMEOUT, help="seconds that a process waits for another; then all end")


def add_shard_flags(parser: Parser) -> None:
    """Add the flags of every command that reads shards."""
    add = parser.group("data", identity=False).add_argument
    add("--cache-dir", metavar="DIR", help="folder for copies of remote shards, and for the index of a read-only folder")
    add("--allow-pipe", action="store_true", help="allow pipe:COMMAND as shards, which runs this shell command")
    add("--verify-shards", action="store_true", help="compare the sha256 of every local shard with its index first")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="pixels of an image; a larger one counts as unusable")


def add_lr_steps(group: Group) -> None:
    """Steps of the learning rate, in training and probe."""
    group.add_argument("--lr-steps", type=int, nargs="*", default=[], metavar="EPOCH",
        help="multiply the learning rate by --lr-gamma after these epochs; default: cosine")  # fmt: skip
    group.add_argument("--lr-gamma", type=float, default=0.1, help="factor of the learning rate at each of --lr-steps")


def check_lr_steps(args: argparse.Namespace) -> None:
    in_range("--lr-gamma", args.lr_gamma, 0, 1)
    steps = " ".join(map(str, args.lr_steps))
    if args.lr_steps != sorted(set(args.lr_steps)) or (args.lr_steps and args.lr_steps[0] < 1):
        raise ValueError(f"--lr-steps {steps}: must be epochs above 0 in rising order, such as 120 160 200")
    if args.lr_steps and args.lr_steps[-1] >= args.epochs and dist.rank() == 0:
        warn(f"--lr-steps {steps}: not all of them lie before --epochs {args.epochs}; scale them")


def shard_flags(args: argparse.Namespace) -> dict:
    """The values of the flags of add_shard_flags. Raises ValueError."""
    positive(["--max-pixels"], args)
    names = "cache_dir", "allow_pipe", "verify_shards", "max_pixels"
    return {name: getattr(args, name) for name in names}


def check_batch(args: argparse.Namespace, samples: int, bn_groups: int = 1) -> None:
    """A global batch must divide evenly over processes and BatchNorm groups, and not exceed the data set."""
    groups = dist.world() * bn_groups
    if args.batch_size % groups:
        over = f"{dist.world()} processes" + (f" x {bn_groups} BatchNorm groups" if bn_groups > 1 else "")
        raise ValueError(f"--batch-size {args.batch_size}: must divide evenly over {over}; pass "
                         f"{max(1, args.batch_size // groups) * groups}")  # fmt: skip
    if args.batch_size > samples:
        raise ValueError(f"--batch-size {args.batch_size}: larger than the data set of {samples} images; pass {samples}")


def check_run_flags(args: argparse.Namespace) -> None:
    """Check the values of add_run_flags, --momentum and --weight-decay. Raises ValueError."""
    check_evaluation_flags(args)
    positive(["--print-freq", "--keep"], args)
    for flag in ("--weight-decay", "--save-steps", "--save-minutes"):
        in_range(flag, getattr(args, flag[2:].replace("-", "_")), 0, math.inf)
    in_range("--momentum", args.momentum, 0, 1)
    if args.tracker and not ((found := find_spec(args.tracker)) and found.origin):  # a folder of the name has no origin
        raise ValueError(f"--tracker {args.tracker}: its package is missing; pip install {args.tracker}, or leave the flag out")
    if args.dry_run is not None:
        in_range("--dry-run", args.dry_run, 1e-3, 1e9)


def check_evaluation_flags(args: argparse.Namespace) -> None:
    """Check the values of add_evaluation_flags. Raises ValueError."""
    positive(["--dist-timeout"], args)
    for flag in ("--workers", "--seed"):
        in_range(flag, getattr(args, flag[2:]), 0, math.inf)
    in_range("--max-bad", args.max_bad, 0, 0.5)
    if args.workers == default_workers() == 0 and dist.rank() == 0:
        warn("--workers 0, because each process has less than a CPU core: it makes its views between the steps; "
             "--workers 1 makes them at the same time")  # fmt: skip


def meaning(args: Flags) -> dict:
    """The flags of a run's identity: they decide the result. Inputs, such as shards, are compared by content instead."""
    return {name: value for name, value in vars(args).items() if name not in args.outside}


def typed(name: str, value) -> str:
    """A flag with its value, as on a command line."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else " ".join(map(str, [flag, *(value if isinstance(value, list) else [value])]))


def default_workers() -> int:
    """The CPU cores of this machine for each of its processes, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
