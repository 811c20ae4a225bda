"""Runs on shards with faults, and with workers that die: what a user sees, and what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY, spawn
from shards_helpers import one_color, write_shards

import main_lincls
import main_pretrain
from utils import checkpoint, dist
from utils.bad_samples import BadSamples
from utils.flags import RunError

ROOT = Path(__file__).parent.parent
FLAGS = ["--method", "moco", *TINY, "--device", "cpu", "--amp", "fp32"]


def image_or_not(bad):
    return lambda number: b"no image" if number in bad else one_color(number % 200, (40, 40))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrain(shards, out, *flags):
    main_pretrain.main([*FLAGS, "--shards", str(shards), "--output-dir", str(out), *map(str, flags)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_main_pretrain__one_unusable_image_of_many(tmp_path, capsys, workers):
    write_shards(tmp_path / "x", (80, 80), image_or_not({100}))
    pretrain(tmp_path / "x", tmp_path / "run", "--epochs", 2, "--print-freq", 10, "--workers", workers)
    record = {
        "shard": str(tmp_path / "x" / "001.tar"),
        "key": "00100",
        "error": "UnidentifiedImageError: cannot identify image file",
    }
    assert lines_of(tmp_path / "run" / "bad_samples.jsonl") == [record]  # once, though each of two epochs meets it
    counts = [line["bad"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert len(counts) == 4 and counts == sorted(counts) and counts[1:] == [1, 1, 1]
    assert "unusable images 1" in capsys.readouterr().out and (tmp_path / "run" / checkpoint.LATEST).exists()


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
    assert f"--shards {index.shards[1].path}: its sha256 is not" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rate, workers", [([], None), (["0.001"], 1), (["1e9"], 10_000)])
def test_main_pretrain__dry_run_measures_and_writes_nothing(images, tmp_path, capsys, rate, workers):
    pretrain(images / "train", tmp_path / "run", "--dry-run", *rate)
    out = capsys.readouterr().out
    found = re.search(r"needs (\S+) ms of a core .* trains (\S+) images/s needs --workers (\d+)", out)
    needed = int(found[3])
    assert float(found[1]) > 0 and (rate or found[2] == "1000") and "5 steps an epoch" in out
    assert needed == 1 if workers == 1 else needed > (workers or 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value, message", [("-1", "--max-bad -1.0: must lie in"), ("0.7", "--max-bad 0.7: must lie in")])
def test_main_pretrain__max_bad_is_a_share(images, tmp_path, capsys, value, message):
    with pytest.raises(SystemExit, match="2"):
        pretrain(images / "train", tmp_path / "run", "--max-bad", value)
    assert message in capsys.readouterr().err


def test_main_lincls__unusable_validation_images_are_left_out_and_told(tmp_path):
    write_shards(tmp_path / "train", (16,), image_or_not(()))
    write_shards(tmp_path / "val", (12,), image_or_not({3}))
    flags = [
        "--method",
        "moco",
        "--pretrained",
        "random",
        "-a",
        "tiny_resnet",
        "--size",
        "32",
        "--batch-size",
        "8",
        "--epochs",
        "1",
    ]
    paths = [
        "--train-shards",
        str(tmp_path / "train"),
        "--val-shards",
        str(tmp_path / "val"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    main_lincls.main([*flags, *paths, "--device", "cpu", "--workers", "0", "--max-bad", "0.1"])
    last = json.loads((tmp_path / "out" / "result.json").read_text())["last"]
    assert last["unusable"] == 1 and last["top1"] * 11 / 100 == pytest.approx(round(last["top1"] * 11 / 100))
    assert [line["key"] for line in lines_of(tmp_path / "out" / "bad_samples.jsonl")] == ["00003"]


# a worker that dies


def children(pid):
    """The processes that a process has started."""
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_main_pretrain__a_killed_worker_ends_the_run_and_is_named(tmp_path):
    write_shards(tmp_path / "x", (80,), image_or_not(()))
    command = [sys.executable, "main_pretrain.py", *FLAGS, "--arch", "resnet18", "--shards", tmp_path / "x", "--output-dir",
               tmp_path / "run", "--workers", "2", "--epochs", "1000", "--print-freq", "1"]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not (metrics.exists() and metrics.read_text()):
                assert run.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            worker = children(run.pid)[-1]
            os.kill(worker, signal.SIGKILL)
            error = run.communicate(timeout=60)[1]
        finally:
            run.kill()
    assert run.returncode == 2 and "Traceback" not in error
    assert re.search(rf"^main_pretrain.py: error: DataLoader worker .*{worker}.*kill.*--workers$", error, re.MULTILINE), error


# the list of unusable samples


def record(key, shard="a.tar"):
    return {"shard": shard, "key": key, "error": "why"}


def test_bad_samples__each_once_over_runs_and_half_a_line_is_none(tmp_path):
    bad = BadSamples(tmp_path, 100, 0.05)
    assert [bad.add([]), bad.add([record("x"), record("x")]), bad.add([record("x"), record("x", "b.tar")])] == [0, 1, 2]
    with open(tmp_path / "bad_samples.jsonl", "a") as file:
        file.write('{"shard": "a.tar", "ke')  # of a run that was killed
    again = BadSamples(tmp_path, 100, 0.05)
    assert again.add([record("x"), record("y")]) == 3
    assert [line["key"] for line in lines_of(tmp_path / "bad_samples.jsonl")] == ["x", "x", "y"]
    assert BadSamples(tmp_path, 100, 0.05).add([]) == 3
    assert BadSamples(tmp_path / "nothing", 100, 0.05).add([]) == 0 and not (tmp_path / "nothing").exists()


def two_processes(folder):
    bad = BadSamples(folder, 10, 0.3)
    first = bad.add([record("x"), record(f"of {dist.rank()}")])
    try:
        bad.add([record("too many")] if dist.rank() else [])
    except RunError as error:
        return first, str(error)


def test_bad_samples__processes_agree(tmp_path):
    (count, error), other = spawn(two_processes, tmp_path)
    assert count == 3 and (count, error) == other and "--max-bad 0.3: 4 of 10 images" in error
    assert sorted(line["key"] for line in lines_of(tmp_path / "bad_samples.jsonl")) == ["of 0", "of 1", "too many", "x"]
