"""Real command lines of main_pretrain.py and main_lincls.py, in processes that tests may kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers import tiny

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
FLAGS = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "1"]
TORCHRUN = ["-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
# tiny trunks exist in tests only; `before` may change what runs
SCRIPT = """
import sys
import helpers, main_lincls, main_pretrain
{before}
{{"pretrain": main_pretrain, "lincls": main_lincls}}[sys.argv.pop(1)].main()
"""


class Run:
    """A command under way, and its output."""

    def __init__(self, folder, command, launch=(), prefix=(), before="", **environment):
        script = folder / "script.py"
        script.write_text(SCRIPT.format(before=before))
        self.out = folder / f"output-{time.monotonic_ns()}"
        with open(self.out, "w") as out:
            whole = [*prefix, sys.executable, *launch, script, *command]
            self.process = subprocess.Popen(
                [str(part) for part in whole],
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def said(self):
        return self.out.read_text()

    def pids(self):
        """Of the command and all that it has started, the command first."""
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
        self.process.wait()

    def until(self, condition, timeout=90):
        """Wait for it, while the command runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"it ended: {self.said()}"
            assert time.monotonic() < end, f"nothing in {timeout} s: {self.said()}"
            time.sleep(0.005)
        return self

    def end(self, timeout=90):
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done in {timeout} s: {self.said()}") from None


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
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "data_wait")} for line in lines]


def same(a, b):
    """Equal to the last bit, however nested."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
