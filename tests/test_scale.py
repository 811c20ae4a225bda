"""Predicted bytes against those of real processes, and held memory against tensors that were counted by hand."""

import json
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from helpers import forkserver, spawn

from benchmarks import devices, scale, step
from benchmarks.tracer import Tracer, received_by
from utils.run import dist

# cmc differs from insdis in the number of its banks alone
SIZES = {"arch": "tiny_resnet", "size": 64, "batch_size": 4, "moco_k": 64, "nce_k": 24, "samples": 100,
         "accumulate": 2, "devices": ["H100"]}  # fmt: skip
FEW = Namespace(methods=[case for case in step.CASES if case != "cmc"], processes=[2, 4], **SIZES)
MANY = Namespace(methods=["moco"], processes=[8, 64], **SIZES)
VIEW = 3 * 64 * 64  # values of a view


@pytest.fixture(scope="module")
def simulated():
    """The predictions: the default form on few processes, both forms on many."""
    with ProcessPoolExecutor(2, forkserver(), max_tasks_per_child=1) as pool:
        return list(pool.map(simulate, [FEW, MANY, MANY], ["default", "default", "plain"]))


def simulate(args, form):  # of this module, so that the tiny trunks are known in its process
    return scale.simulate(args, form)


def real():
    return {case: without_memory(scale.trace(FEW, case)) for case in FEW.methods}


def without_memory(found):
    return {name: value for name, value in found.items() if name not in ("memory", "H100")}


@pytest.mark.parametrize("processes", [2, 4])
def test_simulate__bytes_are_those_of_real_processes(simulated, processes):
    counted = spawn(real, processes=processes)[0]
    assert counted == {case: without_memory(found) for case, found in simulated[0][processes].items()}
    assert all(sum(found.values()) > 1e5 for found in counted.values())


@pytest.mark.parametrize("processes", [8, 64])
def test_simulate__shuffled_views_travel_once_and_as_bytes(simulated, processes):
    """A process sends and receives (W - 1) / W of its views on average; a gather receives W - 1 times, in float32."""
    default, plain = (form[processes]["moco"] for form in simulated[1:])
    keys = (processes - 1) * MANY.batch_size * 128 * 4
    views = plain["all_gather"] - keys
    assert views == (processes - 1) * MANY.batch_size * VIEW * 4 and "all_to_all" not in plain
    assert default["all_to_all"] % VIEW == 0 and default["all_to_all"] <= MANY.batch_size * VIEW
    assert 8 * default["all_to_all"] <= views and default["all_gather"] == keys
    assert default["memory"] < plain["memory"]


def collectives():
    """The counts on 2 processes, for collectives with known bytes."""
    x = torch.zeros(6, 5, dtype=torch.bfloat16)
    with Tracer() as tracer:
        dist.gather(x)  # not counted yet
        tracer.start()
        dist.gather(x)
        dist.total(torch.zeros(7))
        dist.permute(x, np.roll(np.arange(12), 1))
        with pytest.raises(NotImplementedError, match="broadcast_"):
            torch.distributed.broadcast(x, 0)
    return dict(tracer.received)


def test_tracer__counts_what_reaches_a_process():
    assert spawn(collectives) == [{"all_gather": 60, "all_reduce": 28, "all_to_all": 10}] * 2


def test_tracer__memory_is_what_storages_hold_at_a_time():
    with Tracer() as tracer:
        kept = torch.zeros(1000)
        tracer.start()
        a = kept + 1  # 4000 bytes more
        view = a[5:].view(-1, 5)
        a = None  # the view holds them
        b = kept.double()  # 8000 more
        del view, b
        held = tracer.held
        c = kept.exp()
        del c
    assert (tracer.peak, held) == (16000, 4000)


def test_tracer__work_is_arithmetic_and_traffic_of_each_operation():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    with Tracer() as tracer:
        a @ b  # not counted yet
        tracer.start()
        c = (a @ b).t()  # a view costs nothing
        c.add_(1)
        c + a.new_ones(1)
    bytes_ = [4 * n for n in (12 + 20 + 15, 15 + 15, 1, 15 + 1 + 15)]
    assert tracer.work[:2] == [(2 * 3 * 4 * 5, bytes_[0]), (0, bytes_[1])]
    assert tracer.work[-1][1] == bytes_[3]


def test_seconds__the_longer_of_arithmetic_traffic_and_host():
    device = devices.Device(flops=1e12, memory_rate=1e9, memory=1e9, link=1e6, network=1e5)
    work = [(devices.COMPUTE * 3e12, 5), (7, devices.STREAM * 2e9)]  # 3 s of arithmetic, 2 s of memory
    assert devices.seconds(device, work, 0, 1) == pytest.approx(5)
    assert devices.seconds(device, work, 1e6, 8) == pytest.approx(6)
    assert devices.seconds(device, work, 1e6, 9) == pytest.approx(15)
    assert devices.seconds(device, [(0, 0)] * 10**6, 0, 1) == pytest.approx(1e6 * devices.LAUNCH)


def test_received_by__an_unknown_collective_is_not_left_out():
    with pytest.raises(NotImplementedError, match="barrier.* not counted"):
        received_by(torch.ops.c10d.barrier.default, ())


def test_main__prints_each_number_of_processes(capsys, monkeypatch):
    monkeypatch.setattr(step, "processes", forkserver)
    flags = ["--arch", "resnet18", "--size", "224", "--batch-size", "32", "--moco-k", "64", "--samples", "1000"]
    flags += ["--methods", "mosrep", "--processes"]
    scale.main([*flags, "1", "2", "--accumulate", "4"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["1", "2"] and list(results["2"]) == ["mosrep"]
    for number in ("1", "2"):
        for forms in results[number].values():
            assert list(forms) == ["plain", "default", "slices"]
            assert forms["slices"]["memory"] < forms["default"]["memory"] < forms["plain"]["memory"]
            assert forms["default"]["H100"] > forms["slices"]["H100"] > 0 and "H100" not in forms["plain"]
            assert ("all_reduce" in forms["default"]) == (number == "2")
    with pytest.raises(SystemExit):
        scale.main([*flags, "1", "--accumulate", "3"])
    assert "error: --accumulate 3: must divide --batch-size 32" in capsys.readouterr().err
