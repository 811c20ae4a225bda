"""Real command lines of the entry points, by themselves or under torchrun, in processes that tests may kill.

They are forked from a process that has imported torch and timm, because that takes a new interpreter five seconds. Each has its
own session, signals and exit code; torchrun's agent starts its processes in the same way. They do not test the end of an
interpreter and, under torchrun, separate descriptors. test_faults.py starts new interpreters for these.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from helpers import default_start_method, forkserver, tiny
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

import main_finetune
import main_knn
import main_lincls
import main_pretrain
import main_transfer
from utils.evaluation import pictures
from utils.run import agent, log, signals

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "1"]
TWO = ["--standalone", "--nproc_per_node", "2", "--monitor_interval", "0.02"]  # torchrun's flags
SCRIPT = "script"  # stands where torchrun takes a file
MODULES = {module.PROG[5:-3]: module for module in (main_pretrain, main_lincls, main_finetune, main_knn, main_transfer)}
EVALUATIONS = [name for name in MODULES if name != "pretrain"]
TRAINED = {  # evaluations that train and resume, and their flags
    "lincls": ["--lr", "3.2", "--trust", "0", "--epochs", "2", "--print-freq", "1"],
    "finetune": ["--lr", "0.8", "--lr-head", "4", "--lr-steps", "--epochs", "2", "--print-freq", "1"],
}
AT_ONCE = [name for name in EVALUATIONS if name not in TRAINED]  # those that start again instead


class Run:
    """A command under way, and its output.

    launch: torchrun's flags, none without it. before: code that each training process runs first. host: the network namespace.
    """

    def __init__(self, folder, command, launch=(), before="", host=None, **environment):
        self.out = folder / f"output-{time.monotonic_ns()}"
        self.out.touch()
        words = [[str(word) for word in part] for part in (launch, command)]
        self.process = forkserver().Process(target=_command, args=(self.out, *words, before, host, environment))
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def said(self):
        return self.out.read_text()

    def pids(self):
        """Process ids of the command and of all processes that it has started, the command first."""
        found, parents = [self.process.pid], children()
        for pid in found:
            found += parents.get(pid, [])
        return found

    def workers(self):
        """The training processes under torchrun."""
        return children().get(self.process.pid, [])

    def kill(self):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join()

    def until(self, condition, timeout=90):
        """Wait for it, while the command runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.exitcode is None, f"it ended: {self.said()}"
            assert time.monotonic() < end, f"nothing in {timeout} s: {self.said()}"
            time.sleep(0.005)
        return self

    def end(self, timeout=90):
        """The exit code of the command."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"not done in {timeout} s: {self.said()}"
        return self.process.exitcode


def _command(out, launch, command, before, host, environment):
    """Run a command line in a new process, as a shell does."""
    default_start_method()
    os.environ |= environment
    os.chdir(ROOT)
    with open(out, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if host:
        with open(f"/run/netns/{host}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
    if launch:
        Forked.before = before
        subprocess_handler.Popen = Forked
        dynamic_rendezvous._delay = lambda seconds: time.sleep(0.01)  # up to 1 s, to spare the store of many nodes
        as_script(agent.main, [*launch, SCRIPT, *command])
    else:
        as_script(_train, command, before)


def _train(command, before):
    signals.start()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    pictures.write_curves = pictures.write_own_pca = os.fsync = log._commit = lambda *_: None  # as conftest.py
    exec(before, {"main_pretrain": main_pretrain})
    MODULES[command[0]].main(command[1:])


def as_script(main, *args):
    """Run a function as an interpreter runs a script, which ends with an exit code."""
    code = 0
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun's agent has handlers of its own
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(*args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class Forked(subprocess.Popen):
    """A training process of torchrun's agent, forked instead of a new interpreter."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
        self.pid, self._child_created = os.fork(), True
        if self.pid == 0:
            os.environ |= env
            atexit._clear()
            as_script(_train, args[args.index(SCRIPT) + 1 :], self.before)


def children():
    """pid -> the processes that it has started."""
    tree = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            pid, parent = path.parent.name, path.read_text().rpartition(")")[2].split()[1]
            tree.setdefault(int(parent), []).append(int(pid))
    return tree


def pretrain(images, out, *flags, method="moco"):
    return ["pretrain", *tiny(method), *FLAGS, "--shards", f"{images}/train", "--output-dir", out, "--resume", "auto", *flags]


def evaluation(name, images, out, *flags):
    """The command of an evaluation, on features of a tiny trunk with random weights."""
    trunk = ["--pretrained", "random", "--method", "moco", "--arch", "tiny_resnet", "--size", "32", "--batch-size", "8"]
    data = {"transfer": ["--sets", images]}.get(name, ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val"])
    return [name, *trunk, *FLAGS[:6], *TRAINED.get(name, ()), *data, "--output-dir", out, *flags]


def ended(command):
    """Run a command in this process. -> its exit code."""
    try:
        MODULES[command[0]].main([str(word) for word in command[1:]])
    except SystemExit as stop:
        return stop.code
    return 0


def metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        if path.exists()
        else []
    )


def steps(folder):
    return [(line["epoch"], line["step"]) for line in metrics(folder) if "step" in line]


def without_clock(lines):
    clock = ("images_per_s", "data_wait", "peak_gb", "health_slow")
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def same(a, b):
    """Whether nested values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def latest_is(folder, place):
    """Whether the newest checkpoint was written after this (epoch, step)."""
    saved = torch.load(Path(folder) / "checkpoint_latest.pth.tar", weights_only=True)
    return (saved["epoch"], saved["step"]) in ((place[0], place[1] + 1), (place[0] + 1, 0))
