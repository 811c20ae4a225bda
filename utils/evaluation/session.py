"""Parts of the entry points of evaluations: start, folder, classes, trunk, signals, end."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.data.index import Index, load_index_together
from utils.evaluation import pixels
from utils.evaluation.frozen import Frozen, Methods, Source, build_trunk, read_source
from utils.learning import amp
from utils.run import checkpoint, dist, flags, resume, signals, weights
from utils.run.log import say
from utils.run.text import brief, shown

NO_FILE = ("random", pixels.NAME)  # values of --pretrained that name no checkpoint
Shards = tuple[str, str, Index]  # a flag, its value, and the index of these shards


def start(prog: str, methods: Methods, argv: list[str] | None,
          get_args: Callable[[list[str] | None, Source], flags.Flags]) -> tuple[flags.Flags, Source, torch.device]:  # fmt: skip
    """Join the processes, read the weights, then parse the flags: some defaults are those of the weights."""
    first = flags.Parser(prog=prog, add_help=False)
    flags.add_evaluation_flags(first, None, "")
    known = first.parse_known_args(argv)[0]
    device = dist.setup(known.device, known.dist_timeout)
    source = read_source(prog, methods, argv)
    args = get_args(argv, source)
    args.amp = amp.resolve(args.amp, device)
    return args, source, device


def load_splits(args: Namespace, images: str | None = None) -> tuple[Index, Index]:
    """The indexes of --train-shards and --val-shards, on every process. images: the list of --images."""
    opened = flags.shard_flags(args)
    train = load_index_together(args.train_shards, "--train-shards", images=images, **opened)
    return train, load_index_together(args.val_shards, "--val-shards", **opened)


def open_trunk(args: Namespace, methods: Methods, source: Source, device: torch.device) -> tuple[Frozen, dict[str, Any]]:
    """The frozen trunk with the one layer --layer, and the hashes of its file and weights. Makes the folder of results."""
    torch.manual_seed(args.seed)
    frozen = build_trunk(args, methods[args.method], source)
    (args.layer,) = frozen.choose(None if args.layer is None else [args.layer], args.arch)
    frozen.widths(args.size)  # refuses a size that does not fit
    hashes = {"checkpoint_sha256": source.sha256, "trunk_sha256": checkpoint.weights_hash(frozen.trunk)}
    dist.first_process_does(lambda: resume.open_folder(args.output_dir))
    return frozen.to(device).to(memory_format=torch.channels_last), hashes


def default_folder(pretrained: str, name: str) -> str:
    """The folder of results: `name` in the run's folder, or name-FILE beside a FILE that is not of a run.

    Of weights that are elsewhere: `name` in output/NAME.
    """
    run = Path(pretrained)
    if weights.is_elsewhere(pretrained):
        return str(Path("output", weights.label(pretrained), name))
    if pretrained in NO_FILE or run.is_dir():
        return str((Path("output") / pretrained if pretrained in NO_FILE else run) / name)
    return str(run.parent / (name if run.name.startswith("checkpoint_") else f"{name}-{run.name.partition('.')[0]}"))


def check_classes(train: Shards, *others: Shards) -> None:
    """Raise ValueError unless all these shards are labelled, with the classes of the first.

    Of foreign shards only numbers are known, up to their largest label. Beside class names they give a warning.
    """
    for flag, shards, index in (train, *others):
        if not index.labelled:
            why = f"of its images {index.unlabelled}" if index.unlabelled else "these images have none"
            raise ValueError(f"{flag} {shown(shards)}: an evaluation needs labels and {why}; pass labelled shards")
    for other in others:
        _check_pair(train, other)


def _check_pair(train, other):
    (flag, shards, index), (other_flag, other_shards, other_index) = train, other
    classes, others = index.classes, other_index.classes
    if classes[: len(others)] == others:
        return
    train_numbered, other_numbered = (names == tuple(map(str, range(len(names)))) for names in (classes, others))
    fits = len(others) == len(classes) if train_numbered else len(others) <= len(classes)
    if train_numbered == other_numbered or not fits:
        raise ValueError(f"{other_flag} {shown(other_shards)}: its classes are not those of {flag} {shown(shards)}")
    number, name = (flag, other_flag) if train_numbered else (other_flag, flag)
    numbered, named = (classes, others) if train_numbered else (others, classes)
    say(f"warning: {number}: its {len(numbered)} classes are known as numbers only; label 0 counts as {brief(named[0])} of "
        f"{name}, label {len(named) - 1} as {brief(named[-1])}")  # fmt: skip


class Stop(signals.Signals):
    """A context around an evaluation that saves nothing before its end: a call raises Stopped after a signal to any process."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __call__(self) -> None:
        """All processes call it together."""
        if number := int(dist.largest(torch.tensor(self.received, device=self.device)).item()):
            raise signals.Stopped(number)


def end(stopped: signals.Stopped) -> NoReturn:
    """End an evaluation that a signal has stopped."""
    say(signals.not_saved(stopped.number, "the end"))
    dist.teardown()
    sys.exit(signals.exit_code(stopped.number))
