"""Two hosts, as network namespaces with a cable between them that is disconnected."""

import os
import shutil
import subprocess
import time

import pytest
from runs import ROOT, SCRIPT, TWO, Run, metrics, pretrain, same, steps, without_clock

from utils.run import checkpoint

HOSTS = {"10.77.33.1": "one", "10.77.33.2": "two"}


@pytest.fixture
def hosts():
    """The names of two hosts."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and the command ip (iproute2)")
    names = [f"test-{os.getpid()}-{name}" for name in HOSTS.values()]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
    for name, address in zip(names, HOSTS, strict=True):
        commands += [
            f"ip -n {name} addr add {address}/24 dev cable",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set cable up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def launched(**variables):
    """torchrun's flags that a launcher passes under these variables: a stand-in for Python prints them."""
    command = 'PYTHON=echo; source utils/run/env.sh; launch "$1"'
    environment = {"PATH": os.environ["PATH"]} | variables
    done = subprocess.run(["bash", "-euc", command, "bash", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    module, agent, *flags, script = done.stdout.split()
    assert (module, agent, script) == ("-m", "utils.run.agent", SCRIPT), done
    return flags


def test_two_hosts__pods_of_a_pytorchjob_train_as_one(images, tmp_path, hosts):
    """They train as two processes on one host do, bit for bit."""

    def pod(rank):
        common = {"MASTER_ADDR": "10.77.33.1", "MASTER_PORT": "29512"}  # as in test_clusters.py
        common |= {f"PET_{name}": value for name, value in common.items()}
        number = {"RANK": str(rank), "PET_NODE_RANK": str(rank)}
        flags = launched(**common, **number, WORLD_SIZE="2", PET_NNODES="2", PET_NPROC_PER_NODE="1")
        return Run(tmp_path, command("pods"), flags, host=hosts[rank], GLOO_SOCKET_IFNAME="cable")

    def command(name):
        return pretrain(images, tmp_path / name, "--epochs", 2)

    with pod(0) as first, pod(1) as second, Run(tmp_path, command("one"), TWO) as one:
        assert first.end() == second.end() == one.end() == 0, first.said() + second.said() + one.said()
    assert " on 2 x cpu " in first.said() and steps(tmp_path / "pods")
    assert without_clock(metrics(tmp_path / "pods")) == without_clock(metrics(tmp_path / "one"))
    pods, host = (checkpoint.find(tmp_path / name, "").content["state_dict"] for name in ("pods", "one"))
    assert same(pods, host)


def test_two_hosts__a_link_that_breaks_ends_both_and_the_run_resumes_later(images, tmp_path, hosts):
    out, epochs = tmp_path / "run", 14
    flags = ["--epochs", epochs, "--save-steps", 2, "--dist-timeout", 8]

    def start(rank):
        torchrun = ["--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1]
        torchrun += ["--master_addr", "10.77.33.1", "--master_port", 29511]
        return Run(tmp_path, pretrain(images, out, *flags), torchrun, host=hosts[rank], GLOO_SOCKET_IFNAME="cable")

    with start(0) as one, start(1) as two:
        one.until(lambda: len(steps(out)) >= 7)
        subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "down"], check=True)
        cut = time.monotonic()
        for host in (one, two):
            assert host.end(timeout=60) != 0
            assert "another process was lost, or took longer than --dist-timeout" in host.said()
        assert time.monotonic() - cut < 45  # the timeout, and what torchrun takes to end
    done = len(steps(out))
    assert 7 <= done < 5 * epochs

    subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "up"], check=True)
    with start(0) as one, start(1) as two:
        assert one.end() == two.end() == 0, one.said() + two.said()
        assert f"epochs {(done - 2) // 5}" in one.said() + two.said() or f"epochs {done // 5}" in one.said() + two.said()
    assert steps(out) == [(epoch, step) for epoch in range(epochs) for step in range(5)]
