"""Every end of a run ends all its processes within seconds, with a defined exit code and one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import kill
import pytest
from runs import EVALUATIONS, TWO, Run, latest_is, metrics, pretrain, steps
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import main_pretrain
from methods import METHODS
from utils.run import agent, flags, log, signals

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
RAISING = """
import torch
from methods import METHODS
from utils.run import dist
forward = METHODS["moco"].forward
def failing(self, batch, targets, step):
    if step.number == 2 and dist.rank() == dist.world() - 1:
        raise {error}
    return forward(self, batch, targets, step)
METHODS["moco"].forward = failing
"""
MEMORY = "--batch-size 8: out of memory; pass --batch-size 4 or fewer --workers"
SLICES = "--batch-size 8: out of memory; pass --accumulate auto, --batch-size 4 or fewer --workers"


def gone(pids, seconds=20):
    """Wait until these processes have ended."""
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


@pytest.mark.parametrize("processes, error, code, line", [
    (1, "KeyError('a fault')", 1, "KeyError: 'a fault'"),
    (1, "torch.OutOfMemoryError('CUDA out of memory.')", 2, MEMORY),
    (1, "RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")", 2, MEMORY),
    (1, "MemoryError()", 2, SLICES),
    (1, "OSError(5, 'Input/output error', 'metrics.jsonl')", 2, "Input/output error: 'metrics.jsonl'"),
    (1, "ValueError('Expected more than 1 value per channel when training')", 2, "--batch-size 8: too few images"),
    (1, "KeyboardInterrupt()", 1, "KeyboardInterrupt"),
    (1, "SystemExit(3)", 3, ""),
    (2, "KeyError('a fault')", 1, "KeyError: 'a fault'"),
    (2, "MemoryError()", 2, MEMORY),
])  # fmt: skip
def test_main_pretrain__any_error_ends_workers_and_peers(images, tmp_path, processes, error, code, line):
    groups = "2" if line == SLICES else "1"
    command = pretrain(images, tmp_path / "run", "--epochs", "99", "--workers", "2", "--bn-splits", groups)
    with Run(tmp_path, command, TWO if processes == 2 else (), before=RAISING.format(error=error)) as run:
        run.until(lambda: steps(tmp_path / "run"))
        pids = run.pids()
        assert len(pids) >= 3
        assert run.end(30) == code, run.said()
        gone(pids)
    assert line in run.said() and ("Traceback" in run.said()) == (code == 1)
    assert run.said().count("main_pretrain.py: error") <= processes


def test_signals__a_worker_that_ignores_sigterm_does_not_keep_the_interpreter(tmp_path):
    """In a new interpreter, without our loop: benchmarks and other scripts."""
    program = """
import sys, time, torch
from utils.run.signals import leave_to_parent
class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield 1
batches = iter(torch.utils.data.DataLoader(Endless(), num_workers=2, worker_init_fn=leave_to_parent))
next(batches)
raise KeyError("a fault")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'a fault'\n")


# ---------------------------------------------------------------- torchrun's agent


def test_agent__killed_its_processes_save_and_end(images, tmp_path):
    with Run(tmp_path, pretrain(images, tmp_path / "run", "--epochs", "999", "--workers", "1"), TWO) as run:
        run.until(lambda: len(steps(tmp_path / "run")) >= 3 and len(run.pids()) == 5)
        pids = run.pids()
        os.kill(run.process.pid, signal.SIGKILL)
        gone(pids, 30)
    assert run.said().count("Stopped by SIGTERM, and saved.") == 1 and latest_is(tmp_path / "run", steps(tmp_path / "run")[-1])


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGHUP", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_agent__passes_a_signal_on_and_ends_as_its_processes_do(images, tmp_path, name, code):
    """Also with restarts: a run that was asked to stop is not started again."""
    command = pretrain(images, tmp_path / "run", "--epochs", "999")
    with Run(tmp_path, command, [*TWO, "--max-restarts", "1"]) as run:
        run.until(lambda: len(steps(tmp_path / "run")) >= 3)
        os.kill(run.process.pid, getattr(signal, name))
        assert run.end(30) == code, run.said()
    assert run.said().count(f"Stopped by {name}, and saved.") == 1 and "Traceback" not in run.said()
    assert latest_is(tmp_path / "run", steps(tmp_path / "run")[-1])


def test_agent__a_process_that_is_killed_is_named_in_one_line(images, tmp_path):
    with Run(tmp_path, pretrain(images, tmp_path / "run", "--epochs", "999"), TWO) as run:
        run.until(lambda: len(steps(tmp_path / "run")) >= 3)
        pids = run.pids()
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.end(60) == 137  # torchrun kills a process that does not end in 30 s
        gone(pids)
    assert "\nerror: process 1 was ended by SIGKILL; run the command again\n" in run.said() and "Traceback" not in run.said()


@pytest.mark.parametrize("codes, code, line", [
    ({0: -6, 1: -15}, 134, "process 0 was ended by SIGABRT, as NCCL does when another process is lost or takes longer than"),
    ({0: -6, 1: -9, 2: 2}, 137, "process 1 was ended by SIGKILL; run"),
    ({0: -6, 1: 2, 2: -15}, 2, ""),
    ({0: 1, 1: -11}, 139, "process 1 was ended by SIGSEGV; run"),
])  # fmt: skip
def test_agent__names_the_process_that_the_others_lost(monkeypatch, capsys, codes, code, line):
    """With NCCL, torch's watchdog aborts the processes that wait for a lost one; they cannot print a line of their own."""

    def lose(argv):
        raise ChildFailedError("x", {rank: mock.Mock(exitcode=found, timestamp=0) for rank, found in codes.items()})

    monkeypatch.setattr("torch.distributed.run.main", lose)
    monkeypatch.setattr(agent, "listen", lambda handler: None)
    monkeypatch.setenv(signals.AGENT, "0")
    with pytest.raises(SystemExit) as stop:
        agent.main([])
    assert stop.value.code == code
    assert line in (err := capsys.readouterr().err) and err.count("error: ") == bool(line)


@pytest.mark.parametrize("flag, message", [("--moco-kk=1", "no such flag"), ("--moco-k=33", "must be a multiple")])
def test_agent__a_flag_error_is_printed_once(images, tmp_path, flag, message):
    with Run(tmp_path, pretrain(images, tmp_path / "run", flag), TWO) as run:
        assert run.end(60) == 2
    assert run.said().count("error") == run.said().count(message) == 1 and "Traceback" not in run.said(), run.said()


# ---------------------------------------------------------------- start-up


def listening(pid):
    """Whether a process has its own handler of SIGUSR1."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1


@pytest.mark.parametrize("program, agent, name, code", [
    *(("pretrain", agent, *of) for agent in (False, True)
      for of in (("SIGTERM", 0), ("SIGHUP", 0), ("SIGUSR1", 0), ("SIGINT", 130))),
    *((program, False, "SIGTERM", 0) for program in EVALUATIONS),
])  # fmt: skip
def test_commands__a_signal_during_the_imports(program, agent, name, code):
    """The processes of torchrun that start later end at once."""
    launch = ["-m", "utils.run.agent", *TWO] if agent else []
    command = [sys.executable, *launch, f"main_{program}.py", "--no-such-flag"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored if nohup started the tests
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        while not listening(process.pid):
            time.sleep(0.005)
        process.send_signal(getattr(signal, name))
        out, error = process.communicate(timeout=60)
    assert process.returncode == code and error == "", error
    assert out == f"{signals.not_saved(getattr(signal, name))}\n"


SLOW_START = """
import time
from utils.run import resume
opened = resume.open_run
resume.open_run = lambda *args: (print("starting", flush=True), time.sleep(1), opened(*args))[2]
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_main_pretrain__a_signal_during_the_start_of_two_processes(images, tmp_path, name, code):
    """To one process: SIGUSR1 waits for the first step, where all learn of it. To the agent: all end."""
    with Run(tmp_path, pretrain(images, tmp_path / "run", "--epochs", "99"), TWO, before=SLOW_START) as run:
        run.until(lambda: "starting" in run.said())
        os.kill(run.workers()[1] if name == "SIGUSR1" else run.process.pid, getattr(signal, name))
        assert run.end(30) == code, run.said()
    assert run.said().count(f"Stopped by {name}") == 1 and "Traceback" not in run.said()
    assert len(steps(tmp_path / "run")) == (name == "SIGUSR1")


def test_signals__nohup_stays(images, tmp_path):
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with Run(tmp_path, pretrain(images, tmp_path / "run", "--epochs", "999", "--workers", "1"), before=ignoring) as run:
        run.until(lambda: len(steps(tmp_path / "run")) >= 2)
        os.killpg(run.process.pid, signal.SIGHUP)
        before = len(steps(tmp_path / "run"))
        run.until(lambda: len(steps(tmp_path / "run")) >= before + 5)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.end(30) == 0


# ---------------------------------------------------------------- the surroundings


def test_say__a_closed_terminal_ends_no_run(images, tmp_path):
    """Nobody reads the output: the run saves all the same."""
    closed = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    with Run(tmp_path, pretrain(images, tmp_path / "run", "--epochs", "2", "--bn-splits", "2"), before=closed) as run:
        assert run.end() == 0, run.said()
    assert len(steps(tmp_path / "run")) == 10 and len(metrics(tmp_path / "run")) == 10


def git(folder, *words):
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    return subprocess.run(["git", *who, "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_commit__is_of_this_checkout_alone(tmp_path, monkeypatch):
    """None without git, and in a copy of the code that lies in another repository."""
    project = tmp_path / "repository" / "project"
    file = project / "utils/run/log.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(log, "__file__", str(file))
    commit = log._commit.__wrapped__  # without the cache of conftest.py
    assert commit() is None
    for folder, found in ((tmp_path / "repository", False), (project, True)):
        git(folder, "init", "-q")
        git(folder, "commit", "-q", "--allow-empty", "-m", "x")
        assert commit() == (git(folder, "rev-parse", "--short", "HEAD") if found else None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None


def check(images, *words, method="moco"):
    main_pretrain.check(main_pretrain.get_args(["--method", method, "--shards", f"{images}/train", *words]), 99999)


@pytest.mark.parametrize("method, words, printed", [
    ("moco", [], True), ("mosrep", [], True), ("moco", ["--bn-splits", "8"], False), ("insdis", [], False),
])  # fmt: skip
def test_check__one_process_without_bn_splits_is_said(images, capsys, method, words, printed):
    check(images, *words, method=method)
    line = "--bn-splits 1 in one process: query and key see the same BatchNorm statistics"
    assert (line in capsys.readouterr().out) == printed and (not printed or METHODS[method].bn_groups)


@pytest.mark.parametrize("cores, words, printed", [(0, [], True), (0, ["--workers", "1"], False), (2, [], False)])
def test_check__no_worker_by_default_is_said(images, capsys, monkeypatch, cores, words, printed):
    monkeypatch.setattr(flags, "default_workers", lambda: cores)
    check(images, *words)
    assert ("--workers 0, because each process has less than a CPU core" in capsys.readouterr().out) == printed


def test_stop__has_the_signals_of_schedulers_and_terminals():
    assert {number.name for number in signals.STOP} == {"SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"}


def test_kill__a_run_that_is_killed_anywhere_is_the_unbroken_run(tmp_path):
    """The short form of tests/kill.py."""
    assert kill.trial(tmp_path, kills=2, seed=4).total() == 2
