"""The example for Slurm, with stand-ins for its commands: two nodes on this machine, asked to stop, requeued, finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples/slurm_pretrain.sbatch"
COMMANDS = {
    "srun": """#!/usr/bin/env bash
        [[ $1 == --cpus-per-task && $2 == 3 && $3 == --kill-on-bad-exit=1 ]] || exit 99
        shift 3
        export SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST="n[0-1]"
        for node in 0 1; do SLURM_NODEID=$node "$@" & done
        code=0; for node in 0 1; do wait -n || { code=$?; kill $(jobs -p); }; done; exit "$code"
    """,
    "scancel": f"""#!{sys.executable}
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import contextlib, os, signal, test_slurm
assert sys.argv[1:] == ["--signal=USR1", os.environ["SLURM_JOB_ID"]]
for pid in test_slurm.processes_of_steps(os.environ["FAKE"]):
    with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGUSR1)
    """,
    "scontrol": """#!/usr/bin/env bash
        if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$FAKE/requeue"; fi
    """,
}


def processes_of_steps(folder, node=""):
    """The processes in Slurm's control group of the job's steps: torchrun starts its processes in sessions of their own.

    node: only those of this node.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"FAKE={folder}".encode() in variables and any(v.startswith(f"SLURM_NODEID={node}".encode()) for v in variables):
            found.append(int(path.parent.name))
    return found


pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="the stand-in for scancel looks into /proc")


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the job, with flags of its launcher."""
    for name, script in COMMANDS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    started = []

    def start(images, *flags):
        environment = {"FAKE": tmp_path, "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "n[0-1]",
                       "SLURM_NNODES": 2, "SLURM_CPUS_PER_TASK": 3, "SHARDS": images, "OUTPUT": tmp_path / "run", "NPROC": 1,
                       "OMP_NUM_THREADS": 1,
                       "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        flags = ["-a", "resnet18", "--size", "32", "--batch-size", "8", "--moco-k", "16", "--moco-dim", "8", "--workers", "1",
                 "--device", "cpu", "--amp", "fp32", "--print-freq", "1", "--epochs", "5", *flags]  # fmt: skip
        with open(tmp_path / "out", "w") as out:
            started.append(subprocess.Popen(["bash", JOB, "pretrain_moco.sh", *flags], stdout=out,
                           stderr=subprocess.STDOUT, env=os.environ | {k: str(v) for k, v in environment.items()}))  # fmt: skip
        return started[-1]

    yield start
    for job in started:
        job.kill()
    for pid in processes_of_steps(tmp_path):
        os.kill(pid, signal.SIGKILL)


def test_slurm__a_job_that_is_asked_to_stop_saves_is_requeued_and_resumes(images, tmp_path, slurm):
    metrics = tmp_path / "run/metrics.jsonl"
    job = slurm(images)
    end = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=100) == 0, (tmp_path / "out").read_text()
    steps = metrics.read_text().count("\n")
    assert 2 <= steps < 25 and (tmp_path / "run/checkpoint_latest.pth.tar").exists()
    assert (tmp_path / "requeue").read_text() == f"requeue {os.getpid()}\n"

    assert slurm(images).wait(timeout=100) == 0, (tmp_path / "out").read_text()
    epoch, _, step = re.findall(r"epochs (\d+)( \(from its step (\d+)\))? to", (tmp_path / "out").read_text())[-1]
    assert 5 * int(epoch) + int(step or 0) == steps
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(epoch, step) for epoch in range(5) for step in range(5)]
    assert (tmp_path / "requeue").read_text().count("\n") == 1  # not again: it is done


def test_slurm__asked_to_stop_before_its_processes_listen_it_is_requeued(images, tmp_path, slurm):
    """The shells of the nodes end with 138, or the agents with 0. srun ends the other node."""
    job = slurm(images)
    end = time.monotonic() + 60
    while not all(processes_of_steps(tmp_path, node) for node in (0, 1)):  # a later one would never hear of the signal
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=100) == 0, (tmp_path / "out").read_text()
    assert (tmp_path / "requeue").read_text() == f"requeue {os.getpid()}\n" and not (tmp_path / "run/metrics.jsonl").exists()
