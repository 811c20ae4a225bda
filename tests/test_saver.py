"""Checkpoints in the background of training: whole or not at all, the newest kept, the newest whole one resumed."""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import forkserver

from utils.run import checkpoint, files, lock, resume, saver
from utils.run.saver import Saver, write

LATEST = checkpoint.LATEST


def content(epoch, step=0, value=0.0):
    return {"epoch": epoch, "step": step, "state_dict": {"w": torch.full((1000,), value)}}


def value(path):
    return torch.load(path, weights_only=True)["state_dict"]["w"][0].item()


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture(autouse=True)
def unlocked():
    with lock.released():
        yield


@pytest.fixture
def gate(monkeypatch):
    """Holds every write of a checkpoint until it is set."""
    gate, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (gate.wait(20), real(*args)))
    yield gate
    gate.set()


def test_save__writes_what_was_there_when_it_was_asked(tmp_path, gate):
    """It returns at once; what training changes afterwards is not in the file."""
    keeper, state = Saver(tmp_path, 3, 0), content(1, 2, 5.0)
    state["nested"] = [{"m": torch.ones(3)}, (torch.zeros(2), "x")]
    keeper.save(state)
    assert not list(tmp_path.glob("checkpoint*"))
    state["state_dict"]["w"].fill_(9)
    state["nested"][0]["m"].zero_()
    state["epoch"] = 8
    gate.set()
    assert keeper.wait() == ""
    saved = torch.load(tmp_path / LATEST, weights_only=True)
    assert (saved["epoch"], saved["step"], value(tmp_path / LATEST)) == (1, 2, 5.0)
    assert saved["nested"][0]["m"].tolist() == [1, 1, 1] and saved["nested"][1][1] == "x"
    assert names(tmp_path) == ["checkpoint_0001_000002.pth.tar", LATEST]


def test_save__at_most_one_is_in_flight(tmp_path, gate):
    keeper, order = Saver(tmp_path, 3, 0), []
    keeper.save(content(0, 1))
    second = threading.Thread(target=lambda: (keeper.save(content(0, 2)), order.append("second")))
    second.start()
    time.sleep(0.1)
    assert not order and not list(tmp_path.glob("checkpoint_*"))
    gate.set()
    second.join()
    keeper.wait()
    assert torch.load(tmp_path / LATEST, weights_only=True)["step"] == 2


def test_due__after_so_many_minutes_and_not_while_one_is_written(tmp_path, monkeypatch, gate):
    now = [1000.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    keeper, never = Saver(tmp_path, 3, 15), Saver(tmp_path, 3, 0)
    due = []
    for minutes in (0, 14.9, 0.2):
        now[0] += 60 * minutes
        due.append(keeper.due())
    keeper.save(content(0, 1))
    now[0] += 60 * 99
    assert due == [False, False, True] and not keeper.due() and not never.due()
    gate.set()
    keeper.wait()
    assert keeper.due()


@pytest.mark.parametrize(
    "keep, every, left",
    [
        (3, 0, ["0002", "0002_000002", "0003_000002"]),
        (1, 2, ["0001", "0003_000002"]),
        (2, 1, ["0000", "0001", "0002", "0002_000002", "0003_000002"]),
    ],
)
def test_tidy__keeps_the_newest_and_those_of_every_so_many_epochs(tmp_path, keep, every, left):
    keeper = Saver(tmp_path, keep, 0, every)
    for epoch in range(3):
        keeper.save(content(epoch, 2))
        keeper.save(content(epoch + 1))
    keeper.save(content(3, 2))
    keeper.wait()
    assert names(tmp_path) == [*(f"checkpoint_{name}.pth.tar" for name in left), LATEST]
    assert torch.load(tmp_path / LATEST, weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("when", ["torch.save", "os.fsync", "os.replace"])
def test_save__that_fails_leaves_the_earlier_ones_and_says_so(tmp_path, monkeypatch, capsys, when):
    keeper = Saver(tmp_path, 3, 0)
    keeper.save(content(0, 1, 1.0))
    keeper.wait()

    def full(first, *rest):
        if when == "torch.save":
            rest[0].write(b"half")
        raise OSError(28, "No space left on device")

    module, name = when.split(".")
    with monkeypatch.context() as patch:
        patch.setattr({"torch": torch, "os": os}[module], name, full)
        keeper.save(content(0, 2, 2.0))
        assert keeper.wait() == "[Errno 28] No space left on device"
    assert names(tmp_path) == ["checkpoint_0000_000001.pth.tar", LATEST] and value(tmp_path / LATEST) == 1
    out = capsys.readouterr().out
    assert f"warning: {tmp_path}/checkpoint_0000_000002.pth.tar could not be written ([Errno 28] No space left" in out
    keeper.save(content(0, 3, 3.0))
    assert keeper.wait() == "" and value(tmp_path / LATEST) == 3


def write_until_killed(folder, module, name, after):
    """A save in the middle of which, in that function, the process is killed."""
    module = sys.modules[module]
    real = getattr(module, name)

    def die(*args):
        if after:
            real(*args)
        elif hasattr(args[-1], "write"):
            args[-1].write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, die)
    write(folder / "checkpoint_0000_000002.pth.tar", content(0, 2, 2.0))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("module, name", [(torch, "save"), (os, "fsync"), (os, "replace"), (os, "link")])
def test_write__killed_at_any_point_leaves_a_whole_newest(tmp_path, module, name, after):
    """Either file is whole, --resume auto finds one of them, and removes what was under way."""
    write(tmp_path / "checkpoint_0000_000001.pth.tar", content(0, 1, 1.0))
    process = forkserver().Process(target=write_until_killed, args=(tmp_path, module.__name__, name, after))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with lock.released():
        newest = resume.open_run(tmp_path, "auto")
    replaced = name == "link" or (name == "replace" and after)
    assert value(newest) == (2 if replaced else 1) and value(tmp_path / LATEST) == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_second_name__is_a_link_or_a_copy(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    for step in (1, 2):
        write(tmp_path / checkpoint.name_of(0, step), content(0, step, float(step)))
    newest = tmp_path / checkpoint.name_of(0, 2)
    assert newest.samefile(tmp_path / LATEST) == links and newest.read_bytes() == (tmp_path / LATEST).read_bytes()
    assert len(names(tmp_path)) == 3


# ---------------------------------------------------------------- which one --resume auto takes


def three(folder):
    """Three checkpoints, and the name of the newest."""
    folder.mkdir(exist_ok=True)
    for step in (1, 2, 3):
        write(folder / checkpoint.name_of(0, step), content(0, step, float(step)))
    return [folder / checkpoint.name_of(0, step) for step in (1, 2, 3)]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Change one byte of a tensor; the size and the directory of the file stay right."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_open_run__falls_back_to_the_one_before_and_names_both(tmp_path, capsys, damage):
    first, second, third = three(tmp_path)
    damage(third)  # LATEST is the same file
    assert resume.open_run(tmp_path, "auto") == second
    line, *more = capsys.readouterr().out.splitlines()
    assert not more and str(third.parent) in line and "is corrupt" in line and f"using {second}" in line
    damage(second)
    assert resume.open_run(tmp_path, "auto") == first
    assert capsys.readouterr().out.count("warning: ") == 2
    damage(first)
    with pytest.raises(ValueError, match="there is no other checkpoint in") as error:
        resume.open_run(tmp_path, "auto")
    assert str(first) in str(error.value)


def test_open_run__a_copy_named_latest_may_be_the_good_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    third = three(tmp_path)[-1]
    cut(third)
    for when in (1, None):  # the time of a file decides nothing
        os.utime(tmp_path / LATEST, when and (when, when))
        assert value(resume.open_run(tmp_path, "auto")) == 3


def test_newest__is_by_the_content_and_not_by_the_time_or_the_name(tmp_path):
    first, second, third = three(tmp_path)
    os.utime(third, (1, 1))  # LATEST is the same file
    assert checkpoint.newest(tmp_path, "x").path == third
    second.rename(tmp_path / "checkpoint_0099.pth.tar")
    assert checkpoint.newest(tmp_path, "x").path == third
    os.utime(first, (1e10, 1e10))
    first.rename(tmp_path / LATEST)
    assert checkpoint.newest(tmp_path, "x").path == third
    third.unlink()
    assert value(checkpoint.newest(tmp_path, "x").path) == 2
    assert checkpoint.newest(tmp_path / "nowhere", "x") is None


def starts(folder):
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("saves", [False, True])
def test_begin__an_older_one_of_the_same_folder_is_recorded_and_stays_the_newest(tmp_path, capsys, saves):
    """The checkpoints of the abandoned try are later: they must not be resumed, and not replace those of the second try."""
    first = three(tmp_path)[0]
    assert resume.open_run(tmp_path, str(first)) == first
    resume.begin(tmp_path, argparse.Namespace(epochs=9), first, (0, 1), index="ab")
    if saves:  # the second try
        keeper = Saver(tmp_path, 1, 0)
        keeper.save(content(0, 2, 7.0))
        keeper.wait()
    assert value(resume.open_run(tmp_path, "auto")) == (7 if saves else 1) == value(tmp_path / LATEST)
    abandoned = [f"abandoned_checkpoint_0000_00000{step}.pth.tar" for step in (2, 3)]
    left = f"checkpoint_0000_00000{2 if saves else 1}.pth.tar"
    assert [name for name in names(tmp_path) if "checkpoint" in name] == [*abandoned, left, LATEST]
    assert f"renamed to {abandoned[1]}" in capsys.readouterr().out
    (start,) = starts(tmp_path)
    assert (start["resumed"], start["epoch"], start["step"], start["index"]) == (str(first), 0, 1, "ab")


def test_open_run__a_copied_folder_resumes_from_the_newest(tmp_path):
    """A copy gives each file the time at which it was copied, here the oldest last."""
    paths = three(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for number, path in enumerate(reversed((*paths, tmp_path / "a" / LATEST))):
        shutil.copyfile(path, tmp_path / "b" / path.name)
        os.utime(tmp_path / "b" / path.name, (number, number))
    assert value(resume.open_run(tmp_path / "b", "auto")) == 3


def test_save__a_clock_set_back_deletes_no_new_checkpoint(tmp_path):
    keeper = Saver(tmp_path, 2, 0)
    for step in range(1, 6):
        keeper.save(content(0, step, float(step)))
        keeper.wait()
        for path in tmp_path.glob("checkpoint_0*"):
            os.utime(path, (1e9 - step, 1e9 - step))  # the newer, the older
    assert names(tmp_path) == ["checkpoint_0000_000004.pth.tar", "checkpoint_0000_000005.pth.tar", LATEST]
    assert value(tmp_path / LATEST) == 5
