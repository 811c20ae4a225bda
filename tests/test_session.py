"""The classes of two splits: names, numbers of foreign shards, and when they fit."""

import pytest

from utils.data.index import Index
from utils.evaluation.session import check_classes

NAMES = tuple("abcdefghijkl")
NUMBERS = tuple(map(str, range(12)))


def split(classes):
    return Index((), classes)


@pytest.mark.parametrize("train, val", [(NAMES, NAMES), (NUMBERS, NUMBERS), (NUMBERS, NUMBERS[:9]), (NAMES, NAMES[:3])])
def test_check_classes__equal_ones_are_accepted_in_silence(train, val, capsys):
    check_classes(("--train-shards", "t", split(train)), ("--val-shards", "v", split(val)))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "train, val, number", [(NAMES, NUMBERS, "--val"), (NAMES, NUMBERS[:9], "--val"), (NUMBERS, NAMES, "--train")]
)
def test_check_classes__numbers_beside_names_are_accepted_with_a_warning(train, val, number, capsys):
    """A split that lacks images of the last classes knows fewer."""
    check_classes(("--train-shards", "t", split(train)), ("--val-shards", "v", split(val)))
    (line,) = capsys.readouterr().out.splitlines()
    count = len(val if number == "--val" else train)
    assert line.startswith(f"warning: {number}-shards: its {count} classes are known as numbers only; label 0 counts as a of ")
    assert line.endswith("label 11 as l")


@pytest.mark.parametrize("train, val", [(NAMES, NAMES[1:]), (NAMES[:9], NUMBERS), (NUMBERS[:9], NAMES), (NUMBERS, NAMES[:9]),
                                        (NUMBERS[:9], NUMBERS), (NAMES, ("a", "c"))])  # fmt: skip
def test_check_classes__others_are_refused(train, val):
    with pytest.raises(ValueError, match="^--val-shards v: its classes are not those of --train-shards t"):
        check_classes(("--train-shards", "t", split(train)), ("--val-shards", "v", split(val)))
