"""Runs on shards with faults, and with workers that die: their messages, and the files they leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import spawn, tiny
from runs import TWO, Run, children, metrics
from shards_helpers import one_color, write_shards

import main_lincls
import main_pretrain
from methods import METHODS
from utils.run import checkpoint

ROOT = Path(__file__).parent.parent
COMMON = ["--device", "cpu", "--amp", "fp32"]
FLAGS = [*tiny("moco"), *COMMON]


def image_or_not(bad):
    return lambda number: b"no image" if number in bad else one_color(number % 200, (40, 40))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrain(shards, out, *flags, method="moco"):
    main_pretrain.main([*tiny(method), *COMMON, "--shards", str(shards), "--output-dir", str(out), *map(str, flags)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method, workers", [*((method, 0) for method in METHODS), ("moco", 2)])
def test_main_pretrain__one_unusable_image_of_many(tmp_path, capsys, method, workers):
    write_shards(tmp_path / "x", (80, 80), image_or_not({100}))
    pretrain(tmp_path / "x", tmp_path / "run", "--epochs", 2, "--print-freq", 10, "--workers", workers, method=method)
    record = {
        "shard": str(tmp_path / "x" / "001.tar"),
        "key": "00100",
        "error": "UnidentifiedImageError: cannot identify image file",
    }
    assert lines_of(tmp_path / "run" / "bad_samples.jsonl") == [record]  # once, though each of two epochs meets it
    counts = [line["bad"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert len(counts) == 4 and counts == sorted(counts) and counts[1:] == [1, 1, 1]
    assert "unusable images 1" in capsys.readouterr().out and (tmp_path / "run" / checkpoint.LATEST).exists()


def test_main_pretrain__one_unusable_image_on_two_processes(tmp_path):
    """The processes count together, and the first alone writes."""
    write_shards(tmp_path / "x", (80, 80), image_or_not({3, 100}))
    flags = ["--epochs", 1, "--print-freq", 20, "--workers", 0, "--max-bad", 0.05]
    spawn(pretrain, tmp_path / "x", tmp_path / "run", *flags)
    assert sorted(line["key"] for line in lines_of(tmp_path / "run" / "bad_samples.jsonl")) == ["00003", "00100"]
    assert [line["bad"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [2]


def too_many(tmp_path, capsys, *flags):
    """The line that a run ends with, and its folder."""
    write_shards(tmp_path / "x", (20, 20), image_or_not({3, 33}))
    with pytest.raises(SystemExit, match="2"):
        pretrain(tmp_path / "x", tmp_path / "run", "--epochs", 2, "--print-freq", 1, "--max-bad", 0.04, *flags)
    return capsys.readouterr().err.splitlines()[-1], tmp_path / "run"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_main_pretrain__more_unusable_images_than_allowed(tmp_path, capsys, workers):
    line, folder = too_many(tmp_path, capsys, "--workers", workers)
    assert line.startswith("main_pretrain.py: error: --max-bad 0.04: 2 of 40 images cannot be used, see ")
    assert f"see {folder / 'bad_samples.jsonl'};" in line and not list(folder.glob("checkpoint*"))
    assert {record["key"] for record in lines_of(folder / "bad_samples.jsonl")} == {"00003", "00033"}


def test_main_pretrain__continues_when_more_are_allowed(tmp_path, capsys):
    """The first fix that the line suggests; earlier samples are not counted twice."""
    folder = too_many(tmp_path, capsys, "--workers", 0)[1]
    pretrain(tmp_path / "x", folder, "--resume", "auto", "--epochs", 2, "--workers", 0, "--max-bad", 0.05)
    assert lines_of(folder / "metrics.jsonl")[-1]["bad"] == 2 and len(lines_of(folder / "bad_samples.jsonl")) == 2


def test_main_pretrain__continues_when_the_shards_are_repaired(tmp_path, capsys):
    """The other fix that the line suggests."""
    folder = too_many(tmp_path, capsys, "--workers", 0)[1]
    for path in (tmp_path / "x").iterdir():
        path.unlink()
    write_shards(tmp_path / "x", (20, 20), image_or_not(()))
    pretrain(tmp_path / "x", folder, "--resume", "auto", "--epochs", 1, "--workers", 0, "--max-bad", 0.04)


def test_main_pretrain__verify_shards_finds_a_changed_byte(tmp_path, capsys):
    index = write_shards(tmp_path / "x", (10, 10))
    flags = ["--verify-shards", "--epochs", 1, "--workers", 0]
    pretrain(tmp_path / "x", tmp_path / "run", *flags)
    with open(index.shards[1].path, "r+b") as file:
        file.seek(600)
        byte = file.read(1)
        file.seek(600)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SystemExit, match="2"):
        pretrain(tmp_path / "x", tmp_path / "other", *flags)
    assert f"--shards {index.shards[1].path}: its sha256 differs" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rate, workers", [([], None), (["0.001"], 1), (["1e9"], 10_000)])
def test_main_pretrain__dry_run_measures_and_writes_nothing(images, tmp_path, capsys, rate, workers):
    pretrain(images / "train", tmp_path / "run", "--dry-run", *rate)
    out = capsys.readouterr().out
    found = re.search(r"needs (\S+) ms of a core .* trains (\S+) images/s needs --workers (\d+) \(now: ", out)
    needed = int(found[3])
    assert float(found[1]) > 0 and (rate or found[2] == "1000") and "5 steps per epoch" in out
    assert needed == 1 if workers == 1 else needed > (workers or 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--moco-k", "33"], "--moco-k 33: "), (["--shards", "/nowhere"], "--shards /nowhere: "),
    (["--batch-size", "64", "--moco-k", "64"], "--batch-size 64: larger than"),
    (["--arch", "no_such_net"], "--arch no_such_net"),
])  # fmt: skip
def test_main_pretrain__dry_run_checks_what_a_run_does(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        pretrain(images / "train", tmp_path / "run", "--dry-run", *flags)
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "--workers" not in printed.out


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_main_pretrain__dry_run_refuses_a_rate_that_is_none(images, tmp_path, capsys, rate):
    with pytest.raises(SystemExit, match="2"):
        pretrain(images / "train", tmp_path / "run", f"--dry-run={rate}")
    assert "--dry-run" in capsys.readouterr().err


def test_main_pretrain__dry_run_leaves_a_run_as_it_is(images, tmp_path):
    """It only checks that the run can be resumed."""
    pretrain(images / "train", tmp_path, "--epochs", 1, "--workers", 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    pretrain(images / "train", tmp_path, "--dry-run", "--resume", "auto")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("value, message", [("-1", "--max-bad -1.0: must lie in"), ("0.7", "--max-bad 0.7: must lie in")])
def test_main_pretrain__max_bad_is_a_share(images, tmp_path, capsys, value, message):
    with pytest.raises(SystemExit, match="2"):
        pretrain(images / "train", tmp_path / "run", "--max-bad", value)
    assert message in capsys.readouterr().err


def test_main_lincls__unusable_validation_images_are_left_out_and_counted(tmp_path):
    write_shards(tmp_path / "train", (16,), image_or_not(()))
    write_shards(tmp_path / "val", (12,), image_or_not({3}))
    flags = ["--method", "moco", "--pretrained", "random", "-a", "tiny_resnet", "--size", "32", "--batch-size", "8"]
    paths = ["--train-shards", tmp_path / "train", "--val-shards", tmp_path / "val", "--output-dir", tmp_path / "out"]
    more = ["--device", "cpu", "--workers", "0", "--max-bad", "0.1", "--epochs", "1"]
    main_lincls.main([*map(str, [*flags, *paths, *more])])
    last = json.loads((tmp_path / "out" / "result.json").read_text())["last"]
    assert last["unusable"] == 1 and last["top1"] * 11 / 100 == pytest.approx(round(last["top1"] * 11 / 100))
    assert [line["key"] for line in lines_of(tmp_path / "out" / "bad_samples.jsonl")] == ["00003"]


# on a real command line


def launched(shards, out, *flags, launch=("-W", "error")):
    """A run as a user starts it, in new interpreters. -> (exit code, stdout, stderr)."""
    command = [sys.executable, *launch, "main_pretrain.py", *FLAGS, "--arch", "resnet18", "--size", "32", "--shards", shards,
               "--output-dir", out, *flags]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=150)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_main_pretrain__a_command_replaces_an_unusable_image(tmp_path):
    """The run reports it and ends with 0. Two epochs count the image once."""
    write_shards(tmp_path / "x", (20, 20), image_or_not({30}))
    flags = ["--epochs", "2", "--workers", "1", "--max-bad", "0.03"]
    code, out, error = launched(tmp_path / "x", tmp_path / "run", *flags)
    assert code == 0 and error == "" and "unusable images 1" in out and "Results: " in out
    assert [line["key"] for line in lines_of(tmp_path / "run" / "bad_samples.jsonl")] == ["00030"]
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["bad"] == 1


def test_main_pretrain__a_command_on_two_processes_stops_at_max_bad(tmp_path):
    """Each process says it in one line that names the flag and the file, and torchrun fails."""
    write_shards(tmp_path / "x", (40, 40), image_or_not({7, 50, 61}))
    flags = ["--epochs", "9", "--workers", "1", "--print-freq", "1", "--max-bad", "0.03"]  # two of them
    code, _, error = launched(tmp_path / "x", tmp_path / "run", *flags, launch=["-m", "torch.distributed.run", *TWO])
    assert code == 1 and not list((tmp_path / "run").glob("checkpoint*"))
    lines = [line for line in error.splitlines() if "main_pretrain.py: error: " in line]
    assert lines and len(lines) == len(set(lines)) <= 2
    for line in lines:
        assert re.match(r"\[process [01]\] main_pretrain.py: error: --max-bad 0.03: 3 of 80 images cannot be used", line)
        assert str(tmp_path / "run" / "bad_samples.jsonl") in line
    keys = [line["key"] for line in lines_of(tmp_path / "run" / "bad_samples.jsonl")]
    assert sorted(keys) == ["00007", "00050", "00061"]


# a worker that dies


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_main_pretrain__a_killed_worker_ends_the_run_and_is_named(tmp_path, processes):
    """Within seconds, and takes the other process and all workers with it."""
    slow = [one_color(number, (2500, 2500)) for number in range(4)]  # so that a batch is waited for when the worker dies
    write_shards(tmp_path / "x", (80,), lambda number: slow[number % 4])
    flags = ["--workers", "2", "--epochs", "1000", "--print-freq", "1"]
    out, process = tmp_path / "run", "" if processes == 1 else r"\[process 1\] "
    command = ["pretrain", *FLAGS, "--shards", tmp_path / "x", "--output-dir", out, *flags]
    with Run(tmp_path, command, TWO if processes == 2 else ()) as run:
        run.until(lambda: metrics(out))
        trainers = run.workers() if processes == 2 else [run.process.pid]
        workers = [worker for trainer in trainers for worker in children().get(trainer, [])]
        assert len(trainers) == processes and len(workers) == 2 * processes
        os.kill(workers[-1], signal.SIGKILL)
        assert run.end(30) == 2
        line = rf"^{process}main_pretrain.py: error: DataLoader worker .*{workers[-1]}.* (killed|exited) .*--workers$"
        assert len(re.findall(line, run.said(), re.MULTILINE)) == 1, run.said()
        assert processes == 2 or "Traceback" not in run.said()
        gone = time.monotonic() + 20
        while alive := [pid for pid in (*trainers, *workers) if Path(f"/proc/{pid}/exe").exists()]:
            assert time.monotonic() < gone, alive
            time.sleep(0.1)


BREAKING = """
import functools, multiprocessing, os, pathlib, signal, threading, torch
rebuild, metrics = torch.multiprocessing.reductions.rebuild_storage_fd, pathlib.Path({metrics!r})

@functools.wraps(rebuild)
def breaking(*args):
    if not metrics.exists() or not metrics.read_text():
        return rebuild(*args)
    worker = multiprocessing.active_children()[0].pid
    print("worker", worker, flush=True)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    raise ConnectionResetError(104, "Connection reset by peer")

torch.multiprocessing.reductions.rebuild_storage_fd = breaking
"""


def test_main_pretrain__a_worker_that_is_killed_while_it_hands_over_a_batch(images, tmp_path):
    """The kernel closes its connections first, and reports its death a moment later."""
    flags = ["--shards", images / "train", "--output-dir", tmp_path, "--workers", 1, "--epochs", 9, "--print-freq", 1]
    with Run(tmp_path, ["pretrain", *FLAGS, *flags], before=BREAKING.format(metrics=str(tmp_path / "metrics.jsonl"))) as run:
        assert run.end() == 2
    worker = re.search(r"^worker (\d+)$", run.said(), re.MULTILINE)[1]
    line = f"^main_pretrain.py: error: DataLoader worker .*{worker}.*--workers$"
    assert re.search(line, run.said(), re.MULTILINE) and "Traceback" not in run.said(), run.said()
