"""Collectives on several gloo processes against plain indexing of the global batch, and the same without a process group."""

import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as td
from helpers import spawn
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel

from utils.run import dist

PERMUTATIONS = {
    "identity": lambda n: torch.arange(n),
    "reversed": lambda n: torch.arange(n).flip(0),  # with two processes every row moves
    "rotated": lambda n: torch.arange(n).roll(1),  # one row moves
    "odd then even": lambda n: torch.cat([torch.arange(1, n, 2), torch.arange(0, n, 2)]),
    "random": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(n)),
}
# a process's slice, and its dtype
SLICES = [
    ((1, 3), torch.float32),
    ((3,), torch.int64),
    ((4, 3, 4, 4), torch.float32),
    ((5, 2, 3), torch.bfloat16),
    ((8, 5), torch.uint8),
    ((11, 1, 2), torch.float64),
]


def global_batch(processes, shape, dtype):
    """(processes * n) x ..., each row and column different, exact in every dtype."""
    n, inner = processes * shape[0], torch.Size(shape[1:])
    rows = torch.arange(n).view(-1, *[1] * len(inner))
    return (rows * 4 + torch.arange(inner.numel()).view(inner) % 4).to(dtype)


def mine(x):
    """This process's slice of a global batch."""
    n = len(x) // dist.world()
    return x[dist.rank() * n : dist.rank() * n + n]


def permute_everything():
    done = 0
    for shape, dtype in SLICES:
        x = global_batch(dist.world(), shape, dtype)
        for name, permutation in PERMUTATIONS.items():
            order = np.asarray(permutation(len(x)))
            wanted = torch.stack([x[i] for i in order.tolist()])
            got = dist.permute(mine(x), order)
            assert got.dtype == dtype
            assert torch.equal(got, mine(wanted)), (shape, dtype, name)
            if x.ndim == 4:  # views come with channels last in memory
                got = dist.permute(mine(x).contiguous(memory_format=torch.channels_last), order)
                assert torch.equal(got, mine(wanted)), (name, "channels last")
            done += 1
    return done


@pytest.mark.parametrize("processes", [2, 3])
def test_permute__equals_indexing_of_the_global_batch(processes):
    assert spawn(permute_everything, processes=processes) == [len(SLICES) * len(PERMUTATIONS)] * processes


def test_permute__in_one_process():
    assert permute_everything() == len(SLICES) * len(PERMUTATIONS)


def gather_and_more():
    x = torch.arange(6.0).view(2, 3) + 10 * dist.rank()
    transposed = dist.gather(x.T.contiguous().T.requires_grad_())  # neither contiguous nor without gradient
    return {
        "gathered": transposed.detach(),
        "gradient": transposed.requires_grad,
        "integers": dist.gather(torch.tensor([dist.rank(), 7])),
        "total": dist.total(torch.tensor([1.0, dist.rank()])),
        "object": dist.broadcast_object({"from": dist.rank()}),
        "objects": dist.gather_objects([{"of": dist.rank()}] * (3 * dist.rank())),  # of another size on each
        "nothing": dist.gather_objects(None),
        "place": (dist.rank(), dist.world()),
    }


def test_gather__total_and_broadcast_on_two_processes():
    for rank, got in enumerate(spawn(gather_and_more)):
        rows = [[10.0 * r + 3 * i + c for c in range(3)] for r in range(2) for i in range(2)]
        assert got["gathered"].tolist() == rows
        assert not got["gradient"]
        assert got["integers"].tolist() == [0, 7, 1, 7]
        assert got["total"].tolist() == [2, 1]
        assert got["object"] == {"from": 0}
        assert got["objects"] == [[], [{"of": 1}] * 3] and got["nothing"] == [None, None]
        assert got["place"] == (rank, 2)


def test_gather__total_and_broadcast_in_one_process():
    got = gather_and_more()
    assert got["gathered"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["total"].tolist() == [1, 0]
    assert (got["object"], got["place"]) == ({"from": 0}, (0, 1))
    assert got["objects"] == [[]] and got["nothing"] == [None]
    held = [{"a": 1}]
    assert dist.gather_objects(held)[0] is held


def first_does():
    calls, outcomes = [], []

    def work(error=None):
        calls.append(dist.rank())
        if error:
            raise error
        return f"done by {dist.rank()}"

    outcomes.append(dist.first_process_does(work))
    for error in (ValueError("--flag 3: bad"), FileNotFoundError(2, "no such file", "x.tar")):
        try:
            dist.first_process_does(lambda error=error: work(error))
        except (ValueError, OSError) as raised:
            outcomes.append((type(raised), str(raised)))
    return calls, outcomes


@pytest.mark.parametrize("processes", [1, 2])
def test_first_process_does__value_and_errors_reach_all(processes):
    results = spawn(first_does) if processes == 2 else [first_does()]
    for rank, (calls, outcomes) in enumerate(results):
        assert calls == ([] if rank else [0, 0, 0])
        assert outcomes[0] == "done by 0"
        assert outcomes[1] == (ValueError, "--flag 3: bad")
        assert outcomes[2] == (FileNotFoundError, "[Errno 2] no such file: 'x.tar'")


def ddp_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.BatchNorm1d(2, affine=False))
    model = dist.data_parallel(model, torch.device("cpu"))
    assert isinstance(model, DistributedDataParallel)
    linear, norm = model.module
    x = mine(torch.arange(24.0).view(8, 3).sin())
    model(x)  # running statistics are each process's own
    weight = torch.arange(1.0, 5)[:, None] * (1 + dist.rank())
    ((model(x) * weight).sum()).backward()
    return x, weight, linear.weight.detach(), linear.weight.grad, norm.running_mean


def test_data_parallel__averages_gradients_and_leaves_buffers_alone():
    results = spawn(ddp_gradient)
    alone = []
    for x, weight, w, _, _ in results:
        w = w.clone().requires_grad_()
        z = x @ w.T
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        (z * weight).sum().backward()
        alone.append(w.grad)
    mean = (alone[0] + alone[1]) / 2
    for _, _, _, gradient, _ in results:
        assert torch.allclose(gradient, mean, rtol=1e-4, atol=1e-4 * mean.abs().max().item())
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)
    for x, _, w, _, running_mean in results:
        assert torch.allclose(running_mean, (1 - 0.9**2) * (x @ w.T).mean(0), rtol=1e-4, atol=1e-6)


def test_data_parallel__is_the_model_itself_in_one_process():
    model = torch.nn.Linear(1, 1)
    assert dist.data_parallel(model, torch.device("cpu")) is model


def group_facts():
    first = td.get_backend(), dist.setup("auto" if not torch.cuda.is_available() else "cpu").type, td.get_world_size()
    dist.teardown()
    return *first, td.is_initialized(), dist.world()


def test_setup__joins_what_torchrun_describes_and_teardown_leaves_it():
    assert spawn(group_facts) == [("gloo", "cpu", 2, False, 1)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_setup__refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"--device cuda: .*--device auto"):
        dist.setup("cuda")
    assert not td.is_initialized()


def fail_on_one():
    if dist.rank() == 1:
        raise KeyError("rank one is at fault")
    td.barrier()  # waits for ever


def wait_for_each_other():
    if dist.rank() == 0:
        td.barrier()
    else:
        time.sleep(60)


def test_spawn__raises_the_error_of_any_process():
    with pytest.raises(Exception, match="rank one is at fault"):
        spawn(fail_on_one)


def test_spawn__ends_processes_that_hang():
    with pytest.raises(TimeoutError, match="wait_for_each_other"):
        spawn(wait_for_each_other, timeout=1)


def test_spawn__leaves_this_process_alone():
    before = dict(os.environ)
    spawn(dist.rank)
    assert dict(os.environ) == before
    assert not td.is_initialized()


def slow_first_process(alive):
    dist._limit = 2.0 if alive else 1.0

    def slow():
        for _ in range(7 if alive else 10):
            time.sleep(0.5)
            if alive:
                dist.alive()
        return "done"

    try:
        return dist.first_process_does(slow)
    except DistError as error:
        dist.broadcast_object(None)
        return str(error)


def test_first_process_does__may_take_longer_than_the_limit_while_it_is_alive():
    assert spawn(slow_first_process, True) == ["done", "done"]
    first, second = spawn(slow_first_process, False)
    assert (first, second) == ("done", "no sign of it for 1 s")


def parts_of_first_node():
    done = []
    dist.first_node_does(lambda *part: done.append(part))
    return done, dist.first_process_does(lambda: "next")


def test_first_node_does__each_process_its_part():
    assert spawn(parts_of_first_node) == [([(0, 2)], "next"), ([(1, 2)], "next")]
    assert parts_of_first_node() == ([(0, 1)], "next")  # without a process group


def collected(counts):
    """Rows of this process: their number is its entry of `counts`, their value its rank."""
    x = torch.full((counts[dist.rank()], 2), dist.rank(), dtype=torch.int64)
    return dist.to_first(x)


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (4, 0)])
def test_to_first__takes_any_number_of_rows(counts):
    first, other = spawn(collected, counts)
    assert other is None and first[:, 0].tolist() == [0] * counts[0] + [1] * counts[1] and first.shape[1] == 2
    assert torch.equal(collected(counts), first[: counts[0]])  # without a process group


# ---------------------------------------------------------------- devices


def beside_a_counter():
    """A buffer on the meta device, which no process can send, stands for a counter in CPU memory beside a GPU."""
    torch.manual_seed(dist.rank())
    model = torch.nn.Linear(2, 2)
    model.register_buffer("counter", torch.zeros(1, device="meta"))
    dist.data_parallel(model, torch.device("cpu"))(torch.ones(1, 2)).sum().backward()
    return model.weight.tolist()


def test_data_parallel__sends_no_buffer_of_another_device():
    first, second = spawn(beside_a_counter)
    assert first == second


@pytest.mark.parametrize("device, bound", [("cuda", torch.device("cuda", 1)), ("cpu", None)])
def test_setup__binds_the_process_group_to_its_gpu(monkeypatch, device, bound):
    given = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist.td, "rendezvous", lambda *_, **__: iter([(td.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist.td, "init_process_group", lambda *backend, **flags: given.update(flags, backend=backend))
    monkeypatch.setattr(dist, "_store", None)
    monkeypatch.setattr(dist, "_limit", 0)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert dist.setup(device).type == device
    assert given["device_id"] == bound and given["backend"] == ("nccl" if bound else "gloo",)
