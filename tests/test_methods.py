"""What holds for every method: a pure forward, no device mixed up, no wait for the GPU, no use of the global random state."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import batch_of, build, forward, method_args, method_of, uint8_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from methods import METHODS
from utils.data.photometric import normalized
from utils.learning.contrast import counters_on_host_
from utils.learning.method import Step

VARIANTS = {
    **{name: (name,) for name in METHODS},
    "multi-crop": ("moco", "--local-crops", "4"),
    "moco-v1": ("moco", "--moco-head", "linear", "--loss", "nce", "--aug", "v1"),
    "cmc, softmax, HSV": ("cmc", "--loss", "softmax", "--space", "HSV"),
    "cmc, three views": ("cmc", "--views", "L", "ab", "Y", "--graph", "core"),
    "moco, IM": ("moco", "--im-type", "IM", "--g-prob", "0.5", "--r-prob", "0.5"),
    "moco, Un-Mix": ("moco", "--unmix-prob", "0.5"),
    "cmc, region": ("cmc", "--im-type", "region", "--r-prob", "0.5"),
    "insdis, cutout": ("insdis", "--im-type", "cutout"),
    "insdis, softmax": ("insdis", "--loss", "softmax"),
    "cmc, alexnet": ("cmc", "--arch", "alexnet", "--size", "224"),
    "mosrep, dilated": ("mosrep", "--output-stride", "16"),
    "w2ssl, flip-aware": ("w2ssl", "--flip-aware-location"),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def batch_for(variant):
    batch = uint8_batch(method_args(*VARIANTS[variant]))
    batch.sample_ids += 3
    return batch


def step_of(method, batch):
    return forward(method, batch, Step(0, 10, 0))


@variants
def test_forward__neither_reads_nor_moves_the_global_random_state(variant):
    batch, losses = batch_for(variant), []
    for seed in range(2):
        method = build(*VARIANTS[variant])
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        losses.append(step_of(method, batch)[0].item())
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert losses[0] == losses[1]


@variants
def test_forward__changes_nothing_but_statistics(variant):
    """Only commit() changes state, so a step with a bad loss can be skipped and computed again."""
    method = build(*VARIANTS[variant])
    before = copy.deepcopy(method.state_dict())
    step_of(method, batch_for(variant))[0].backward()
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(
        name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in changed
    )


@variants
def test_forward__bytes_and_normalised_floats_are_the_same_views(variant):
    batch = batch_for(variant)
    floats = batch_of([normalized(view) for view in batch.views], batch.sample_ids, batch.flips)
    losses = [step_of(build(*VARIANTS[variant]), b)[0].item() for b in (batch, floats)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@variants
def test_stats__take_no_part_in_the_loss(variant):
    _, stats = step_of(build(*VARIANTS[variant]), batch_for(variant))
    assert len(stats) >= 1 and not any(value.requires_grad or value.ndim for value in stats.values())


def fake_cuda():
    try:
        torch.empty(1, device="cuda").uniform_()
    except RuntimeError:  # torch 2.9 built for CUDA, on a machine without its driver
        return False
    return True


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait for the GPU: synchronous copies, and large copies from unpinned memory.

    (Fake tensors refuse to be read, and cannot be pinned.)
    """

    def __init__(self):
        super().__init__()
        self.pinned = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._pin_memory.default:
            self.pinned.append(args[0])
            return args[0]
        if (
            function is torch.ops.aten._to_copy.default
            and torch.device(kwargs.get("device") or args[0].device) != args[0].device
        ):
            assert kwargs.get("non_blocking"), f"the host waits for a copy of {tuple(args[0].shape)} to {kwargs['device']}"
            pinned = any(x is args[0] for x in self.pinned) or args[0].nbytes < 2**10
            assert pinned, f"the host waits until {tuple(args[0].shape)} is copied to pinned memory"
        if function is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            assert (*args, kwargs.get("non_blocking", False))[2], f"the host waits for a copy of {tuple(args[1].shape)}"
        return function(*args, **kwargs)


@variants
def test_forward__all_tensors_are_on_the_gpu_and_nothing_waits_for_it(variant):
    """Without a GPU: fake tensors know their device and refuse to mix them. (Backward would need a real device.)"""
    args = method_args(*VARIANTS[variant])
    with FakeTensorMode():
        if not fake_cuda():
            pytest.skip("this torch has no fake CUDA")
        with torch.device("cuda"):
            method = method_of(args).train()
        batch = uint8_batch(args)
        batch = batch_of([view.cuda() for view in batch.views], batch.sample_ids.cuda(), batch.flips)
        with NoWaiting():
            loss, stats = step_of(method, batch)
            method.commit(Step(0, 10, 0))
    assert {value.device.type for value in [loss, *stats.values(), *method.buffers()]} == {"cuda"}


class Operations(TorchDispatchMode):
    """Counts operations by name and device of the first tensor."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.found[function.name(), args[0].device.type] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake():
    with FakeTensorMode():
        if not fake_cuda():
            pytest.skip("this torch has no fake CUDA")
        yield


def test_normalized__uploads_its_constants_once(fake):
    views = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
    with Operations() as operations:
        for _ in range(5):
            assert normalized(views).device.type == "cuda"
    assert operations.found["aten::_to_copy", "cpu"] == 2  # mean and factor
    assert operations.found["aten::sub.Tensor", "cuda"] == operations.found["aten::mul_.Tensor", "cuda"] == 5


@pytest.mark.parametrize("inference", [False, True])
def test_counters_on_host__batchnorm_counts_without_the_gpu(fake, inference):
    network = torch.nn.Sequential(*(torch.nn.BatchNorm2d(3, device="cuda") for _ in range(4)))
    x, adds = torch.empty(2, 3, 8, 8, device="cuda"), "aten::add_.Tensor"
    with Operations() as before:
        network(x)
    counters_on_host_(network)
    with Operations() as after, torch.inference_mode(inference):
        network(x)
    assert before.found[adds, "cuda"] == 4 and after.found[adds, "cuda"] == 0 and after.found[adds, "cpu"] == 4
    assert all(norm.running_mean.device.type == "cuda" for norm in network)


def test_counters_on_host__a_state_dict_has_them_and_loads_others():
    network, plain = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    counters_on_host_(network)
    plain[1].num_batches_tracked.fill_(7)
    network.load_state_dict(plain.state_dict())
    network(torch.randn(4, 3))
    assert list(network.state_dict()) == list(plain.state_dict()) and network.state_dict()["1.num_batches_tracked"] == 8


def test_no_waiting__sees_a_copy_that_waits():
    with FakeTensorMode():
        if not fake_cuda():
            pytest.skip("this torch has no fake CUDA")
        with NoWaiting():
            torch.zeros(2).to("cuda", non_blocking=True)
            with pytest.raises(AssertionError, match="waits for"):
                torch.zeros(2).to("cuda")
            with pytest.raises(AssertionError, match="waits until"):
                torch.zeros(500).to("cuda", non_blocking=True)
            torch.zeros(500).pin_memory().to("cuda", non_blocking=True)
