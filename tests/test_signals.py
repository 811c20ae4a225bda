"""Signals to any process: all processes save and stop at the same step, and the run resumes without a difference."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import spawn, tiny
from runs import FLAGS, TRAINED, TWO, Run, ended, evaluation, metrics, pretrain, same, steps, without_clock

import main_pretrain
from methods import METHODS
from utils.learning.method import Step
from utils.run import checkpoint, dist, engine
from utils.run.signals import TOGETHER, Signals, exit_code

NAMED = {"SIGTERM": 0, "SIGUSR1": 0, "SIGINT": 130, "SIGHUP": 0}  # and the exit code of a run that has saved
WHOLE = [(epoch, step) for epoch in range(2) for step in range(5)]


def train(images, out, method, *flags):
    argv = [*tiny(method), *FLAGS, "--shards", f"{images}/train", "--epochs", "2", "--output-dir", out, *flags]
    return ended(["pretrain", *argv])


def interrupted(images, out, method, name, number, rank=0):
    """A run in which the process `rank` gets a signal in step `number`."""
    commit = METHODS[method].commit

    def and_signal(self, step: Step):
        commit(self, step)
        if step.number == number and dist.rank() == rank:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS[method], "commit", and_signal)
        return train(images, out, method)


def latest(folder):
    return torch.load(folder / checkpoint.LATEST, weights_only=True)


def state(folder):
    return {name: latest(folder)[name] for name in ("epoch", "step", "state_dict", "optimizer")}


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """Folders of uninterrupted runs, by method and number of processes."""
    runs = {}

    def run(method, processes=1):
        if (method, processes) not in runs:
            folder = runs[method, processes] = tmp_path_factory.mktemp("unbroken")
            code = [train(images, folder, method)] if processes == 1 else spawn(train, images, folder, method)
            assert not any(code)
        return runs[method, processes]

    return run


@pytest.mark.parametrize("method, name", [*((m, "SIGTERM") for m in METHODS), ("moco", "SIGUSR1"), ("moco", "SIGINT")])
def test_main_pretrain__a_signal_saves_and_the_run_resumes(images, tmp_path, unbroken, method, name):
    handlers = [signal.getsignal(number) for number in (15, 10, 2)]
    assert interrupted(images, tmp_path, method, name, 6) == NAMED[name]
    # received after step 6, known to all processes in the vote of step 7
    assert (latest(tmp_path)["epoch"], latest(tmp_path)["step"]) == (1, 3) and steps(tmp_path)[-1] == (1, 2)
    assert [signal.getsignal(number) for number in (15, 10, 2)] == handlers
    assert train(images, tmp_path, method, "--resume", "auto") == 0
    assert steps(tmp_path) == WHOLE and same(state(tmp_path), state(unbroken(method)))
    assert without_clock(metrics(tmp_path)) == without_clock(metrics(unbroken(method)))


# test_preemption.py has runs of two processes of every method
@pytest.mark.parametrize("method, rank", [("moco", 0), ("moco", 1), ("insdis", 1)])
def test_main_pretrain__a_signal_to_one_process_stops_all_at_the_same_step(images, tmp_path, unbroken, method, rank):
    assert spawn(interrupted, images, tmp_path, method, "SIGUSR1", 1, rank) == [0, 0]
    assert (latest(tmp_path)["epoch"], latest(tmp_path)["step"]) == (0, 3) and steps(tmp_path)[-1] == (0, 2)
    assert spawn(train, images, tmp_path, method, "--resume", "auto") == [0, 0]
    assert steps(tmp_path) == WHOLE and same(state(tmp_path), state(unbroken(method, 2)))


@pytest.mark.parametrize("number", [3, 4, 8, 9])
def test_main_pretrain__a_signal_at_the_end_of_an_epoch_or_of_the_run(images, tmp_path, unbroken, number):
    """In the last step but one, and in the last one, which no other follows."""
    assert interrupted(images, tmp_path, "moco", "SIGTERM", number) == 0
    assert steps(tmp_path)[-1] == divmod(min(number + 1, 9), 5)
    assert train(images, tmp_path, "moco", "--resume", "auto") == 0
    assert steps(tmp_path) == WHOLE and same(state(tmp_path)["state_dict"], state(unbroken("moco"))["state_dict"])


# ---------------------------------------------------------------- evaluations


def evaluated(name, images, out, *flags):
    return ended(evaluation(name, images, out, *flags))


def evaluation_interrupted(name, images, out, where, number, rank=0):
    """The call `number` of the engine's function `where` comes with a signal to one process."""
    real, calls = getattr(engine.Engine, where), []

    def and_signal(self, *args):
        calls.append(None)
        if len(calls) == number and dist.rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, where, and_signal)
        return evaluated(name, images, out)


def result(folder):
    return {name: value for name, value in json.loads((folder / "result.json").read_text()).items() if name != "protocol"}


def on(processes, function, *args):
    """The exit codes of a function on so many processes."""
    return [function(*args)] if processes == 1 else spawn(function, *args)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Folders of uninterrupted evaluations, by name and number of processes."""

    @functools.cache
    def run(name, processes):
        folder = tmp_path_factory.mktemp("whole")
        assert not any(on(processes, evaluated, name, images, folder))
        return folder

    return run


@pytest.mark.parametrize("processes, where, number, place", [
    (1, "done", 2, (0, 3)), (1, "asked_to_stop", 2, (0, 5)), (1, "asked_to_stop", 3, (1, 5)),
    (2, "done", 2, (0, 3)), (2, "asked_to_stop", 2, (0, 5)),
])  # fmt: skip
@pytest.mark.parametrize("name", TRAINED)
def test_evaluations__a_signal_saves_and_the_run_resumes(images, tmp_path, whole, name, processes, where, number, place):
    """In training, and in an evaluation, which is done again from its start."""
    out, unbroken = tmp_path / "out", whole(name, processes)
    assert not any(on(processes, evaluation_interrupted, name, images, out, where, number, processes - 1))
    assert (latest(out)["epoch"], latest(out)["step"]) == place and not (out / "result.json").exists()
    assert not any(on(processes, evaluated, name, images, out, "--resume", "auto"))
    ours, theirs = latest(out), latest(unbroken)
    assert all(same(ours[part], theirs[part]) for part in ("state_dict", "optimizer", "best", "last", "epoch", "step"))
    assert result(out) == result(unbroken) and without_clock(metrics(out)) == without_clock(metrics(unbroken))


SLOW = """
import time
from utils.evaluation import features, knn, logistic
real = {step}
{step} = lambda *args, **options: (print("there", flush=True), time.sleep(0.3), real(*args, **options))[2]
"""


@pytest.mark.parametrize("command, signal_name, processes, step", [
    ("knn", "SIGTERM", 1, "features.evaluation_plan"), ("knn", "SIGUSR1", 2, "features.evaluation_plan"),
    ("knn", "SIGINT", 1, "knn._keys"), ("knn", "SIGTERM", 2, "knn._keys"),
    ("transfer", "SIGTERM", 1, "logistic.Problem.fit"), ("transfer", "SIGUSR1", 2, "logistic.Problem.fit"),
])  # fmt: skip
def test_evaluations__end_in_time_after_a_signal(images, tmp_path, command, signal_name, processes, step):
    """While they compute features, and later; one process of two gets the signal."""
    flags = ["--batch-size", "2", *(["--memory", "0.01"] if command == "knn" else [])]
    words = evaluation(command, images, tmp_path / "out", *flags)
    with Run(tmp_path, words, TWO if processes == 2 else (), before=SLOW.format(step=step)) as run:
        run.until(lambda: "there" in run.said())
        os.kill(run.pids()[-1], getattr(signal, signal_name))
        assert run.end(20) == NAMED[signal_name], run.said()
    last = [line for line in run.said().splitlines() if line != "there"][-1]
    assert last == f"Stopped by {signal_name} before the end. The same command starts again.", run.said()
    assert "Traceback" not in run.said() and not list((tmp_path / "out").rglob("result.json"))
    assert not (tmp_path / "out/.lock").exists()


# ---------------------------------------------------------------- real processes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_main_pretrain__a_signal_to_the_whole_group(images, tmp_path, name):
    """As a terminal's Ctrl-C, or a scheduler's end: loader workers leave the answer to their training process."""
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, "--epochs", "999", "--workers", "2")) as run:
        run.until(lambda: len(steps(out)) >= 3 and len(run.pids()) >= 3)
        os.killpg(run.process.pid, getattr(signal, name))
        assert run.end(30) == NAMED[name]
    assert f"\nStopped by {name}, and saved. The same command resumes from here.\n" in run.said()
    logged = steps(out)
    assert latest(out)["epoch"] * 5 + latest(out)["step"] == len(logged) and "Traceback" not in run.said()


def test_main_pretrain__a_signal_to_one_worker_under_torchrun(images, tmp_path):
    """torchrun sees processes that have ended well: 0."""
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, "--epochs", "999"), TWO) as run:
        run.until(lambda: len(steps(out)) >= 3)
        os.kill(run.workers()[1], signal.SIGUSR1)
        assert run.end(30) == 0, run.said()
    assert run.said().count("Stopped by SIGUSR1, and saved.") == 1
    assert latest(out)["epoch"] * 5 + latest(out)["step"] == len(steps(out))


def test_main_pretrain__torchrun_passes_sigterm_on(images, tmp_path):
    """A scheduler may send it to all processes, of which torchrun's agent is one: it comes to the others twice."""
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, "--epochs", "999"), TWO) as run:
        run.until(lambda: len(steps(out)) >= 3)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.end(40) == 0, run.said()
    assert latest(out)["epoch"] * 5 + latest(out)["step"] == len(steps(out))
    assert "main_pretrain.py: error" not in run.said()


WAITING = """
import os, signal, sys, time
from utils.run.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.05)
    print("heard", signals.received, flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("torchrun, name", [(False, "SIGTERM"), (False, "SIGUSR1"), (False, "SIGINT"), (True, "SIGTERM")])
def test_signals__the_second_ends_the_process_at_once(torchrun, name):
    """Under torchrun, only if it comes later than the agent's copy of the first."""
    number, environment = getattr(signal, name), os.environ | {"PYTHONPATH": str(Path(main_pretrain.__file__).parent)}
    environment |= {"TORCHELASTIC_RUN_ID": "1"} if torchrun else {}
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"heard {int(number)}\n" and process.poll() is None
        if torchrun:
            process.send_signal(number)
            time.sleep(0.3)
            assert process.poll() is None
            time.sleep(TOGETHER)
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(5) == -number


def test_signals__handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_exit_code__is_in_the_readme():
    readme = (Path(main_pretrain.__file__).parent / "README.md").read_text()
    assert {name: exit_code(getattr(signal, name)) for name in NAMED} == NAMED
    assert all(re.search(rf"\b{name}\b", readme) for name in NAMED) and "130" in readme
