"""What a launcher starts under the variables of each scheduler, with a stand-in for Python that prints its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = "set -euo pipefail; source utils/run/env.sh; launch main.py --lr 1"
# Kubeflow Training Operator 1.9, pkg/controller.v1/pytorch/envvar.go: two pods of 4 processes, the second one
PYTORCHJOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_MASTER_ADDR": "job-master-0",
              "PET_MASTER_PORT": "23456", "WORLD_SIZE": "8", "RANK": "1", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1",
              "PET_NNODES": "2"}  # fmt: skip
# the same with an elasticPolicy and without a master: elastic.go
ELASTIC = {"PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "4", "PET_RDZV_BACKEND": "c10d",
           "PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_ID": "job", "PET_MAX_RESTARTS": "3"}  # fmt: skip
# Kubeflow Trainer 2, pkg/runtime/framework/plugins/torch/torch.go
TRAINJOB = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job",
            "PET_MASTER_PORT": "29500"}  # fmt: skip
# SkyPilot 0.14, "Environment variables for run"
SKYPILOT = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "4"}  # fmt: skip
# srun of Slurm, "OUTPUT ENVIRONMENT VARIABLES": a step on two of the four nodes of a job
SLURM = {"SLURM_JOB_ID": "71234", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]",
         "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[3-4]",
         "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "NPROC": "4"}  # fmt: skip
# Open MPI 5.0, "Environment variables set for MPI applications"
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
           "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_NODE_RANK": "0", "OMPI_UNIVERSE_SIZE": "16",
           "NPROC": "4"}  # fmt: skip
OURS = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC": "4"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function of variables -> what `launch` would run, or its error."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {"python": 'echo "$@"; env | grep -E "^(RANK|WORLD_SIZE|PET_(RDZV|STANDALONE|NN|NODE))" || true',
               "scontrol": 'echo "first of ${@: -1}"'}  # fmt: skip
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    def run(variables):
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python"} | variables
        done = subprocess.run(["bash", "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr == "") in [(0, True), (1, False)]
        return done.stdout.removesuffix("main.py --lr 1\n").strip() if done.returncode == 0 else done.stderr

    return run


def node(address, port=29500, rank=1, processes=4, restarts=0):
    nodes = f"--nnodes 2 --node_rank {rank} --master_addr {address} --master_port {port}"
    return f"-m utils.run.agent --nproc_per_node {processes} --max_restarts {restarts} {nodes}"


ALONE = "-m utils.run.agent --nproc_per_node 4 --max_restarts 0 --standalone"
STARTS = {
    "pytorchjob": (PYTORCHJOB, node("job-master-0", 23456)),
    "pytorchjob, auto": (
        PYTORCHJOB | {"PET_NPROC_PER_NODE": "auto", "WORLD_SIZE": "2", "NPROC": "4"},
        node("job-master-0", 23456),
    ),
    "pytorchjob before 2023": (
        {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1", "NPROC": "4"},
        node("job-master-0", 23456),
    ),
    "pytorchjob of one pod": (
        {"MASTER_ADDR": "job-master-0", "WORLD_SIZE": "1", "RANK": "0", "PET_NNODES": "1", "PET_NODE_RANK": "0", "NPROC": "4"},
        ALONE,
    ),
    "pytorchjob of one process": ({"MASTER_ADDR": "job-master-0", "WORLD_SIZE": "1", "RANK": "0", "NPROC": "1"}, ""),
    "trainjob": (TRAINJOB, node("job-node-0-0.job")),
    "skypilot": (SKYPILOT, node("10.0.0.1")),
    "skypilot before NUM_NODES": ({n: v for n, v in SKYPILOT.items() if n != "SKYPILOT_NUM_NODES"}, node("10.0.0.1")),
    "skypilot of one node": (
        SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "1.2.3.4"},
        ALONE,
    ),
    "slurm": (SLURM, node("first of n[3-4]", 20000 + 71234 % 10000)),
    "slurm of one node": (SLURM | {f"SLURM_{n}": "1" for n in ("NNODES", "STEP_NUM_NODES", "STEP_NUM_TASKS")}, ALONE),
    "a batch script of one node": ({"SLURM_JOB_ID": "3", "SLURM_NNODES": "1", "SLURM_NTASKS": "8", "NPROC": "4"}, ALONE),
    "openmpi": (OPENMPI | {"MASTER_ADDR": "a"}, node("a")),
    "openmpi in a slurm job": (
        OPENMPI | {"MASTER_ADDR": "a", "SLURM_JOB_ID": "3", "SLURM_NNODES": "2", "SLURM_NODEID": "0"},
        node("a"),
    ),
    "ours": (OURS, node("first")),
    "ours agree with slurm": (OURS | SLURM | {"MASTER_PORT": "5"}, node("first", 5)),
    "NNODES=1 wins": (PYTORCHJOB | SLURM | {"NNODES": "1", "NPROC": "4"}, ALONE),
    "NPROC wins": (SKYPILOT | {"NPROC": "2"}, node("10.0.0.1", processes=2)),
    "MAX_RESTARTS of torchrun": (PYTORCHJOB | {"PET_MAX_RESTARTS": "2"}, node("job-master-0", 23456, restarts=2)),
    "no scheduler": ({"NPROC": "4"}, ALONE),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_launch__each_scheduler_starts_its_node(launched, case):
    variables, expected = STARTS[case]
    assert launched(variables) == expected


def test_launch__an_elastic_job_lets_torchrun_number_the_nodes(launched):
    first, *variables = launched(ELASTIC).splitlines()
    assert first == ("-m utils.run.agent --nproc_per_node 4 --max_restarts 3 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint "
                     "job-worker-0:23456 --rdzv_id job main.py --lr 1")  # fmt: skip
    assert "PET_RDZV_ID=job" in variables


ALL = "a launcher starts all processes of its node; start it once on each node"
ALONE_OR = "or NNODES=1 to train on this node alone"
UNKNOWN = "the number of nodes is not set; set NNODES, to 1 for this node alone"
WRONG = "unset the wrong one, or set NNODES=1 to train on this node alone"
DIES = [
    (PYTORCHJOB | {"WORLD_SIZE": "6"}, f"WORLD_SIZE=6: contradicts PET_NNODES=2; {WRONG}"),
    (PYTORCHJOB | {"RANK": "0"}, f"RANK=0: contradicts PET_NODE_RANK=1; {WRONG}"),
    (PYTORCHJOB | {"NODE_RANK": "0"}, f"PET_NODE_RANK=1: contradicts NODE_RANK=0; {WRONG}"),
    (PYTORCHJOB | {"PET_NNODES": "1:4"},
     "PET_NNODES=1:4: a run has a fixed number of nodes; make both numbers equal, such as PET_NNODES=4"),
    (PYTORCHJOB | {"PET_NODE_RANK": "2", "RANK": "2"}, "PET_NODE_RANK=2: PET_NNODES=2, so the last node is 1"),
    (PYTORCHJOB | {"PET_NPROC_PER_NODE": "cpu"}, f"WORLD_SIZE=8: contradicts PET_NNODES=2; {WRONG}"),
    (TRAINJOB | {"NPROC": "", "PET_NPROC_PER_NODE": "cpu"}, "PET_NPROC_PER_NODE=cpu: must be a whole number, such as 1"),
    (TRAINJOB | {"PET_STANDALONE": ""}, "PET_STANDALONE=: contradicts PET_NNODES=2; unset it"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"},
     f"WORLD_SIZE=2: NODE_RANK is not set; set NODE_RANK, {ALONE_OR}"),
    ({"RANK": "0", "MASTER_ADDR": "a"}, f"RANK=0: {UNKNOWN}"),
    ({"MASTER_ADDR": "a"}, f"MASTER_ADDR=a: {UNKNOWN}"),
    ({"PET_RDZV_ENDPOINT": "a:1"}, f"PET_RDZV_ENDPOINT=a:1: {UNKNOWN}"),
    ({"NNODES": "2", "NODE_RANK": "0"}, f"NNODES=2: MASTER_ADDR is not set; set MASTER_ADDR, {ALONE_OR}"),
    (PYTORCHJOB | {"LOCAL_RANK": "0"}, f"LOCAL_RANK=0: {ALL}, without LOCAL_RANK"),
    (SKYPILOT | {"SKYPILOT_NUM_NODES": "3"}, f"lines of SKYPILOT_NODE_IPS=2: contradicts SKYPILOT_NUM_NODES=3; {WRONG}"),
    (SKYPILOT | {"SKYPILOT_NODE_RANK": ""},
     f"SKYPILOT_NUM_NODES=2: NODE_RANK is not set; set NODE_RANK, {ALONE_OR}"),
    (SKYPILOT | {"PET_NNODES": "4"}, f"SKYPILOT_NUM_NODES=2: contradicts PET_NNODES=4; {WRONG}"),
    (SLURM | {"NNODES": "4"}, f"SLURM_NNODES=2: contradicts NNODES=4; {WRONG}"),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, f"SLURM_STEP_NUM_TASKS=8: {ALL}, with srun --ntasks-per-node=1"),
    ({"SLURM_JOB_ID": "3", "SLURM_NNODES": "2", "SLURM_NODEID": "0"},
     "SLURM_NNODES=2: only this node runs the launcher; start it with srun on each node, or set NNODES=1"),
    (OPENMPI, f"OMPI_COMM_WORLD_SIZE=2: MASTER_ADDR is not set; set MASTER_ADDR, {ALONE_OR}"),
    (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, f"OMPI_COMM_WORLD_LOCAL_SIZE=8: {ALL}, with mpirun --map-by ppr:1:node"),
    (OPENMPI | {"OMPI_COMM_WORLD_SIZE": ""},
     f"OMPI_COMM_WORLD_RANK=1: {UNKNOWN}"),
    ({"SLURM_JOB_ID": "3", "SLURM_STEP_ID": "0", "SLURM_NNODES": "two"}, "SLURM_NNODES=two: must be a whole number, such as 1"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DIES)))
def test_launch__contradicting_or_missing_variables_are_one_line(launched, case):
    variables, expected = DIES[case]
    assert launched({"NPROC": "4"} | variables) == f"error: {expected}\n"
