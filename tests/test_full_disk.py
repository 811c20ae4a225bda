"""Runs with an output folder on a file system of a few megabytes that becomes full."""

import os
import signal
import subprocess

import pytest
import torch
from helpers import SMALL, tiny
from runs import EVALUATIONS, FLAGS, ended, evaluation, metrics, steps

from methods import METHODS
from utils.learning.method import Step
from utils.run import lock, saver
from utils.run.checkpoint import saved_in

# TensorBoard's own thread ends with a traceback when the disk is full; the log then continues without it
pytestmark = pytest.mark.filterwarnings("ignore:Exception in thread Thread-:pytest.PytestUnhandledThreadExceptionWarning")
SAVING = [*FLAGS, "--epochs", "3", "--save-steps", "2"]


@pytest.fixture
def disk(tmp_path):
    """A folder on a tmpfs of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def train(images, out, method, *flags):
    """-> the exit code."""
    return ended(["pretrain", *tiny(method), *SAVING, "--shards", f"{images}/train", "--output-dir", out, *flags])


def checkpoints(out):
    return {path.name: torch.load(path, weights_only=True) for path in out.glob("checkpoint*")}


def test_main_pretrain__a_full_disk_stops_no_run(images, disk, capsys):
    """With --keep 99 the disk fills up: training continues, whole checkpoints load, and the last line names the failure."""
    assert train(images, disk, "moco", "--keep", "99", "--save-steps", "1") == 2
    captured = capsys.readouterr()
    warnings = [line for line in captured.out.splitlines() if "could not be written" in line]
    assert warnings and all("No space left on device" in line for line in warnings)
    assert f"main_pretrain.py: error: --output-dir {disk}: the last checkpoint could not be written" in captured.err
    there = checkpoints(disk)
    assert 2 <= len(there) < 16 and not list(disk.glob(".*"))
    place = max((saved["epoch"], saved["step"]) for saved in there.values())
    assert (there["checkpoint_latest.pth.tar"]["epoch"], there["checkpoint_latest.pth.tar"]["step"]) == place
    seen = steps(disk)  # as far as there was room, without gaps
    assert seen == [(epoch, step) for epoch in range(3) for step in range(5)][: len(seen)] and max(seen) >= place

    for path in saved_in(disk)[2:]:  # as the message asks
        path.unlink()
    whole = disk.parent / "whole"
    assert train(images, whole, "moco") == train(images, disk, "moco", "--resume", "auto") == 0
    assert steps(disk) == steps(whole) == [(epoch, step) for epoch in range(3) for step in range(5)]
    a, b = (torch.load(folder / "checkpoint_latest.pth.tar", weights_only=True)["state_dict"] for folder in (disk, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__a_disk_that_is_full_for_a_while(images, disk, capsys, monkeypatch, method):
    """The saves of that time are missing, the next one is there, and no line of metrics.jsonl is lost."""
    filler, commit = disk / "filler", METHODS[method].commit
    if method == "cmc" or method not in SMALL:  # their networks may be larger than the disk
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)

    def fill_and_clear(self, step: Step):
        commit(self, step)
        if step.number == 3:
            with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step.number == 11:
            filler.unlink()

    monkeypatch.setattr(METHODS[method], "commit", fill_and_clear)
    assert train(images, disk, method) == 0
    out = capsys.readouterr().out
    assert "checkpoint_0001.pth.tar could not be written" in out
    assert steps(disk) == [(epoch, step) for epoch in range(3) for step in range(5)] and len(metrics(disk)) == 15
    there = checkpoints(disk)
    assert len(there) == 4 and "checkpoint_0001.pth.tar" not in there  # the newest three, and their second name
    assert there["checkpoint_0002.pth.tar"]["epoch"] == there["checkpoint_latest.pth.tar"]["epoch"] == 3


def test_main_pretrain__stopped_while_the_disk_is_full_is_an_error(images, disk, monkeypatch, capsys):
    """A signal's save that fails must not look like one that was completed: the scheduler would count on it."""
    monkeypatch.setattr(saver, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    commit = METHODS["moco"].commit

    def asked(self, step: Step):
        commit(self, step)
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(METHODS["moco"], "commit", asked)
    assert train(images, disk, "moco") == 2
    printed = capsys.readouterr()
    assert f"error: --output-dir {disk}: the last checkpoint could not be written" in printed.err
    assert "and start again: there is none before" in printed.err and "and saved" not in printed.out
    assert len(steps(disk)) == 3


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations__a_full_disk_is_one_line(images, disk, capsys, monkeypatch, name):
    """It is full once the folder is locked. The same command is complete when there is room again."""
    filler, take = disk / "filler", lock.take

    def take_and_fill(folder):
        take(folder)
        with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    command = evaluation(name, images, disk / "out")
    with monkeypatch.context() as patch:
        patch.setattr(lock, "take", take_and_fill)
        assert ended(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"main_{name}.py: error: ") and "No space left on device" in lines[0]
    assert not list(disk.rglob("result.json"))
    filler.unlink()
    assert ended(command) == 0 and list(disk.rglob("result.json"))
