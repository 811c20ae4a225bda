"""Predicted bytes against those of real processes, and held memory against tensors that were counted by hand."""

import json
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from helpers import forkserver, spawn

from benchmarks import scale, step
from benchmarks.tracer import Tracer, received_by
from utils.run import dist

# cmc has no tiny network, and differs from insdis in the number of its banks alone
SIZES = {"arch": "tiny_resnet", "size": 64, "batch_size": 4, "moco_k": 64, "nce_k": 24, "samples": 100}
FEW = Namespace(methods=[case for case in step.CASES if case != "cmc"], processes=[2, 4], **SIZES)
MANY = Namespace(methods=["moco"], processes=[8, 64], **SIZES)
VIEW = 3 * 64 * 64  # values of a view


@pytest.fixture(scope="module")
def simulated():
    """The predictions: the default form on few processes, both forms on many."""
    with ProcessPoolExecutor(2, forkserver(), max_tasks_per_child=1) as pool:
        return list(pool.map(simulate, [FEW, MANY, MANY], [False, False, True]))


def simulate(args, plain):  # of this module, so that the tiny trunks are known in its process
    return scale.simulate(args, plain)


def real():
    return {case: without_memory(scale.trace(FEW, case)) for case in FEW.methods}


def without_memory(found):
    return {name: value for name, value in found.items() if name != "memory"}


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


def test_received_by__an_unknown_collective_is_not_left_out():
    with pytest.raises(NotImplementedError, match="barrier.* not counted"):
        received_by(torch.ops.c10d.barrier.default, ())


def test_main__prints_each_number_of_processes(capsys, monkeypatch):
    monkeypatch.setattr(step, "processes", forkserver)
    flags = ["--arch", "resnet18", "--size", "64", "--batch-size", "4", "--moco-k", "64"]
    flags += ["--methods", "mosrep", "insdis", "--processes"]
    scale.main([*flags, "2"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["2"] and list(results["2"]) == ["mosrep", "insdis"]
    for forms in results["2"].values():
        assert list(forms) == ["plain", "default"] and forms["default"]["memory"] < forms["plain"]["memory"]
    with pytest.raises(SystemExit):
        scale.main([*flags, "1"])
    assert "error: --processes 1: one process has no traffic" in capsys.readouterr().err
