"""Runs that are killed, at any moment and in any way, and started again."""

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import in_two
from runs import AT_ONCE, TRAINED, TWO, Run, ended, evaluation, metrics, pretrain, same, steps, without_clock

from methods import METHODS
from utils.run import checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
methods = pytest.mark.parametrize("method", METHODS)
SAVING = ["--save-steps", "2", "--epochs", "3"]
MORE = {"insdis": ["--fill-banks"]}  # flags of a method
# every save takes a while, so that one can be met; each process writes down the samples of each of its steps
SLOW = """
import time, torch
real = torch.save
def save(content, file):
    real(content, file)
    time.sleep(0.3)
torch.save = save
"""
RECORDING = """
from methods import METHODS
from utils.run import dist
def recording(forward):
    def recorded(self, batch, targets, step):
        with open(f"{folder}/samples-{{dist.rank()}}", "a") as file:
            file.write(f"{{step.number}} {{' '.join(map(str, batch.sample_ids.tolist()))}}\\n")
        return forward(self, batch, targets, step)
    return recorded
for method in METHODS.values():
    method.forward = recording(method.forward)
"""


def saving_run(images, out, method, *flags):
    return pretrain(images, out, *SAVING, *MORE.get(method, ()), *flags, method=method)


def state(folder):
    saved = torch.load(folder / checkpoint.LATEST, weights_only=True)
    return {name: saved[name] for name in ("epoch", "step", "state_dict", "optimizer", "scaler")}


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """Folders of runs of two processes without interruption."""
    runs = {}

    def run(method):
        if method not in runs:
            folder = runs[method] = tmp_path_factory.mktemp(method)
            before = RECORDING.format(folder=folder)
            with Run(folder, saving_run(images, folder / "run", method), TWO, before=before) as whole:
                assert whole.end() == 0, whole.said()
        return runs[method]

    return run


def killed(images, tmp_path, method, moment):
    """A run with all processes killed at once: after a number of steps, in a save, or in the pass before the first epoch."""
    out = tmp_path / "run"
    before, saving = len(steps(out)), lambda: list(out.glob(".checkpoint_*.tmp"))
    with Run(tmp_path, saving_run(images, out, method), TWO, before=SLOW) as run:
        if moment == "pass":
            run.until(lambda: "Pass before the first epoch" in run.said())
        elif moment == "save":
            run.until(lambda: len(steps(out)) > before and saving())
        else:
            run.until(lambda: len(steps(out)) >= min(13, before + moment))
        run.kill()
        assert moment != "save" or saving()


@methods
def test_main_pretrain__killed_it_is_the_unbroken_run(images, tmp_path, unbroken, method):
    """With SIGKILL, all its processes: in a save; some also at two random steps, or in the pass before."""
    out, rng = tmp_path / "run", random.Random(method)
    moments = {"mosrep": (rng.randrange(1, 4), "save", rng.randrange(1, 4)), "insdis": ("pass", "save")}
    for moment in moments.get(method, ("save",)):
        killed(images, tmp_path, method, moment)
    with Run(tmp_path, saving_run(images, out, method), TWO) as run:
        assert run.end() == 0, run.said()
    whole = unbroken(method) / "run"
    assert same(state(out), state(whole))
    assert steps(out) == [(epoch, step) for epoch in range(3) for step in range(5)]
    assert without_clock(metrics(out)) == without_clock(metrics(whole))
    assert not list(out.glob(".*.tmp"))


@methods
def test_main_pretrain__continues_with_another_number_of_processes(images, tmp_path, unbroken, method):
    """From two processes to one: the same global batches from the same step on, and the same losses except rounding."""
    whole, folder = unbroken(method), tmp_path
    inside = sorted((whole / "run").glob("checkpoint_0002_*"))[0]
    first = 10 + int(re.search(r"_(\d+)\.", inside.name)[1])
    argv = saving_run(images, folder / "run", method, "--resume", inside, *in_two(method))
    with Run(folder, argv, before=RECORDING.format(folder=folder)) as run:
        assert run.end() == 0, run.said()

    def batches(folder, processes):
        parts = [(folder / f"samples-{rank}").read_text().splitlines() for rank in range(processes)]
        split = [[line.split() for line in part] for part in parts]
        return {int(lines[0][0]): [sample for line in lines for sample in line[1:]] for lines in zip(*split, strict=True)}

    wanted, got = batches(whole, 2), batches(folder, 1)
    assert list(got) == list(range(first, 15)) and all(got[number] == wanted[number] for number in got)
    old, new = metrics(whole / "run")[first:], metrics(folder / "run")
    assert [line["loss"] for line in new] == pytest.approx([line["loss"] for line in old], rel=1e-3)
    assert new[0]["loss"] == pytest.approx(old[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_evaluations__killed_they_are_the_unbroken_run(images, tmp_path, name):
    """With SIGKILL, both processes, once in each epoch."""
    command = evaluation(name, images, tmp_path / "out", "--save-steps", "2", "--resume", "auto")
    for at in (4, 8):
        with Run(tmp_path, command, TWO) as run:
            run.until(lambda at=at: len(steps(tmp_path / "out")) >= at)
            run.kill()
    for folder in ("out", "whole"):
        with Run(tmp_path, [*command, "--output-dir", tmp_path / folder], TWO) as run:
            assert run.end() == 0, run.said()
    ours, theirs = (torch.load(tmp_path / folder / checkpoint.LATEST, weights_only=True) for folder in ("out", "whole"))
    assert all(same(ours[part], theirs[part]) for part in ("state_dict", "optimizer", "best", "last", "epoch", "step"))
    assert without_clock(metrics(tmp_path / "out")) == without_clock(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("name", AT_ONCE)
def test_evaluations__killed_they_start_again(images, tmp_path, name):
    """With SIGKILL, both processes, inside the write of the features."""
    before = """
import time, safetensors.torch
real = safetensors.torch.save_file
safetensors.torch.save_file = lambda *args: (print("there", flush=True), real(*args), time.sleep(9))
"""
    command = evaluation(name, images, tmp_path / "out", "--features", tmp_path / "f.safetensors")
    with Run(tmp_path, command, TWO, before=before) as run:
        run.until(lambda: "there" in run.said())
        run.kill()
    assert not (tmp_path / "f.safetensors").exists()
    with Run(tmp_path, command, TWO) as run:
        assert run.end() == 0, run.said()
    assert ended(evaluation(name, images, tmp_path / "whole")) == 0
    results = [json.loads(next((tmp_path / folder).rglob("result.json")).read_text()) for folder in ("out", "whole")]
    assert results[0].pop("protocol") and results[1].pop("protocol") and results[0] == results[1]


def test_main_pretrain__torchrun_starts_all_again_when_one_is_killed(images, tmp_path, unbroken):
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, *SAVING), [*TWO, "--max-restarts", "1"], before=SLOW) as run:
        run.until(lambda: len(steps(out)) >= 4)
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.end() == 0, run.said()
        assert run.said().count("5 steps per epoch") == 2
    assert same(state(out), state(unbroken("moco") / "run"))
    assert without_clock(metrics(out)) == without_clock(metrics(unbroken("moco") / "run"))


def test_main_pretrain__two_nodes_start_again_when_one_loses_a_process(images, tmp_path, unbroken):
    """Two of torchrun's agents on this machine, as utils/run/env.sh starts them on two."""
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["--nnodes", 2, "--nproc_per_node", 1, "--max_restarts", 1, "--master_addr", "127.0.0.1"]
    torchrun += ["--master_port", port, "--node_rank"]
    command = pretrain(images, out, *SAVING)
    with Run(tmp_path, command, [*torchrun, 0], before=SLOW) as one, Run(tmp_path, command, [*torchrun, 1]) as two:
        one.until(lambda: len(steps(out)) >= 4)
        os.kill(two.workers()[0], signal.SIGKILL)
        assert one.end() == two.end() == 0, one.said() + two.said()
        assert one.said().count("5 steps per epoch") == 2
    assert same(state(out), state(unbroken("moco") / "run"))


def test_main_pretrain__a_lost_process_ends_the_others(images, tmp_path):
    """It is there, but does not answer."""
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, "--epochs", "99", "--dist-timeout", "8"), TWO) as run:
        run.until(lambda: len(steps(out)) >= 3)
        lost, start = run.workers()[1], time.monotonic()
        os.kill(lost, signal.SIGSTOP)
        run.until(lambda: "--dist-timeout" in run.said(), timeout=45)
        os.kill(lost, signal.SIGKILL)
        assert run.end(timeout=45) != 0 and time.monotonic() - start > 7
    lines = [line for line in run.said().splitlines() if "main_pretrain.py: error" in line]
    assert len(lines) == 1 and "another process was lost, or took longer than --dist-timeout: " in lines[0]
