"""Parts of entry points that measure and do not train: folder, labels, signals, end."""

import sys
from pathlib import Path
from typing import NoReturn

import torch

from utils.data.index import Index
from utils.evaluation import pixels
from utils.run import dist, signals, weights
from utils.run.log import say
from utils.run.text import brief, shown

NO_FILE = ("random", pixels.NAME)  # values of --pretrained that name no checkpoint


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


def check_labels(flag: str, shards: str, index: Index) -> None:
    """Raise ValueError unless all images are labelled."""
    if not index.labelled:
        why = f"of its images {index.unlabelled}" if index.unlabelled else "these images have none"
        raise ValueError(f"{flag} {shown(shards)}: an evaluation needs labels and {why}; pass labelled shards")


def check_classes(train_shards: str, val_shards: str, train: Index, val: Index) -> None:
    """Raise ValueError unless both splits are labelled, with the same classes.

    Of foreign shards only numbers are known, up to their largest label. Beside class names they give a warning.
    """
    check_labels("--train-shards", train_shards, train)
    check_labels("--val-shards", val_shards, val)
    check_same_classes(("--train-shards", train_shards, train), ("--val-shards", val_shards, val))


def check_same_classes(train: tuple[str, str, Index], val: tuple[str, str, Index]) -> None:
    """Raise ValueError unless two labelled splits, (flag, shards, index) each, have the same classes; see `check_classes`."""
    (flag, shards, index), (val_flag, val_shards, val_index) = train, val
    classes, val_classes = index.classes or (), val_index.classes or ()
    if classes[: len(val_classes)] == val_classes:
        return
    train_numbered, val_numbered = (names == tuple(map(str, range(len(names)))) for names in (classes, val_classes))
    fits = len(val_classes) == len(classes) if train_numbered else len(val_classes) <= len(classes)
    if train_numbered == val_numbered or not fits:
        raise ValueError(f"{val_flag} {shown(val_shards)}: its classes are not those of {flag} {shown(shards)}")
    number, name = (flag, val_flag) if train_numbered else (val_flag, flag)
    named = val_classes if train_numbered else classes
    say(f"warning: {number}: its {len(classes if train_numbered else val_classes)} classes are known as numbers only; label 0 "
        f"counts as {brief(named[0])} of {name}, label {len(named) - 1} as {brief(named[-1])}")  # fmt: skip


class Stop(signals.Signals):
    """A context around an evaluation that saves nothing on its way: a call raises Stopped after a signal to any process."""

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
