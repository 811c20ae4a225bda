"""InfoNCE, moving average, shuffle-BN, queue and BatchNorm groups against slow loops."""

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
from helpers import spawn
from torch import nn

from utils.learning.contrast import ema_, enqueue_, in_groups, info_nce, key_copy, shuffled_keys
from utils.learning.method import Step
from utils.run import dist


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce__loop_with_exp_and_log(temperature):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 9), torch.tensor([0, 8, 3, 3, 1])
    losses, right = [], 0
    for row, t in zip(logits.double().tolist(), target.tolist(), strict=True):
        exps = [math.exp(s / temperature) for s in row]
        losses.append(-math.log(exps[t] / sum(exps)))
        right += row[t] == max(row)
    each, top1 = info_nce(logits, target, temperature, reduction="none")
    assert each.tolist() == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert top1.item() == pytest.approx(100 * right / 5)
    assert info_nce(logits, target, temperature)[0].item() == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_info_nce__top1_counts_and_takes_no_gradient():
    logits = torch.tensor([[3.0, 1, 2], [1, 2, 3], [1, 3, 2], [2, 1, 3]], requires_grad=True)
    loss, top1 = info_nce(logits, torch.tensor([0, 2, 0, 0]), 0.2)
    assert top1.item() == 50
    assert loss.requires_grad and not top1.requires_grad


@pytest.mark.parametrize("candidates", [33, 4097])
def test_info_nce__chance_is_the_log_of_the_number_of_candidates(candidates):
    g = torch.Generator().manual_seed(0)
    unit = nn.functional.normalize(torch.randn(candidates + 64, 512, generator=g), dim=1)  # random and nearly orthogonal
    logits = unit[candidates:] @ unit[:candidates].T
    loss, _ = info_nce(logits, torch.arange(64) % candidates, temperature=2.0)
    assert loss.item() == pytest.approx(math.log(candidates), abs=0.02)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("extra", torch.zeros(3))

    def forward(self, x):
        return self.norm(self.linear(x))


def different(seed):
    torch.manual_seed(seed)
    net = Net()
    for tensor in [*net.parameters(), net.norm.running_mean, net.norm.running_var, net.extra]:
        tensor.data.uniform_(0.5, 2)
    net.norm.num_batches_tracked.fill_(seed)
    return net


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
def test_ema__every_parameter_of_every_pair_and_no_buffer(momentum):
    pairs = [(different(1), different(2)), (different(3), different(4))]
    before = [(copy.deepcopy(q).state_dict(), copy.deepcopy(k).state_dict()) for q, k in pairs]
    ema_(pairs, momentum)
    for (query, key), (q0, k0) in zip(pairs, before, strict=True):
        parameters = {name for name, _ in key.named_parameters()}
        assert parameters == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
        for name, value in key.state_dict().items():
            if name in parameters:
                wanted = [momentum * k + (1 - momentum) * q for k, q in zip(k0[name].ravel(), q0[name].ravel(), strict=True)]
                assert value.ravel().tolist() == pytest.approx([w.item() for w in wanted], rel=1e-6)
            else:
                assert torch.equal(value, k0[name]), name
        assert all(torch.equal(value, q0[name]) for name, value in query.state_dict().items())


def test_key_copy__copies_all_and_shares_nothing():
    query, key = different(1), different(2)
    assert key_copy(query, key) is key
    for name, value in query.state_dict().items():
        assert torch.equal(key.state_dict()[name], value), name
        assert key.state_dict()[name].data_ptr() != value.data_ptr(), name
    assert not any(p.requires_grad for p in key.parameters())
    assert all(p.requires_grad for p in query.parameters())


@pytest.mark.parametrize("start, n, size", [(0, 4, 12), (8, 4, 12), (0, 12, 12), (10, 4, 12), (0, 5, 12)])
def test_enqueue__a_deque_drops_the_oldest(start, n, size):
    """The last two do not divide the queue: it wraps around in the middle of a batch."""
    queue, pointer = torch.arange(2.0 * size).view(2, size), torch.tensor([start])
    order = [(start + i) % size for i in range(size)]  # from the oldest on
    reference = deque((queue[:, i].tolist() for i in order), maxlen=size)
    for step in range(7):
        keys = 1000 * (step + 1) + torch.arange(2.0 * n).view(n, 2)
        enqueue_(queue, pointer, keys)
        for key in keys.tolist():
            reference.append(key)
        assert pointer.shape == (1,) and pointer.item() == (start + (step + 1) * n) % size
        assert [queue[:, (pointer.item() + i) % size].tolist() for i in range(size)] == list(reference)


def test_enqueue__a_key_that_is_not_finite_replaces_none():
    queue, keys = torch.full((3, 4), 0.5), torch.eye(3)
    keys[1, 0] = math.nan
    enqueue_(queue, torch.zeros(1, dtype=torch.long), keys)
    assert torch.equal(queue.T, torch.stack([keys[0], torch.full((3,), 0.5), keys[2], torch.full((3,), 0.5)]))


def test_enqueue__takes_keys_of_lower_precision():
    queue, pointer = torch.zeros(2, 4), torch.zeros(1, dtype=torch.long)
    enqueue_(queue, pointer, torch.ones(2, 2, dtype=torch.bfloat16))
    assert queue.dtype == torch.float32
    assert queue.tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_in_groups__is_that_many_separate_forwards(groups):
    together, apart = different(1), different(1)
    x = torch.randn(8, 4)
    got = in_groups(together, x, 8 // groups)
    n = 8 // groups
    parts = [apart(x[start : start + n]) for start in range(0, 8, n)]
    assert torch.equal(got, torch.cat(parts))
    first = different(1)  # as the first of several processes, which writes the checkpoint
    first(x[:n])
    assert all(torch.equal(a, b) for a, b in zip(together.buffers(), first.buffers(), strict=True))
    assert together.norm.track_running_stats
    if groups > 1:
        assert not torch.allclose(got, different(1)(x), atol=1e-2)


def test_step__rng_is_functions_of_seed_and_step():
    def numbers(step, steps, seed):
        return Step(step, steps, seed).rng.random(4).tolist()

    np.random.seed(0), torch.manual_seed(0)
    first = numbers(5, 20, 3)
    np.random.seed(1), torch.manual_seed(1)
    assert numbers(5, 400, 3) == first  # a longer training starts with the same steps
    others = [numbers(step, 20, seed) for step in range(20) for seed in range(4)]
    assert len({tuple(o) for o in others}) == 80
    assert first in others


class Keys(nn.Module):
    """A key encoder with only BatchNorm. It records the images of each call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x[:, -1].long().tolist())  # the last column of a row is its image's number
        return nn.functional.batch_norm(x, None, None, training=True)


def shuffle(n, seeds, groups=1):
    """For each seed: (keys of the whole batch, images this process's BatchNorm groups saw, next random number)."""
    out = []
    for seed in seeds:
        x = torch.randn(dist.world() * n, 3, generator=torch.Generator().manual_seed(seed))
        x[:, -1] = torch.arange(len(x))
        mine = x[dist.rank() * n :][:n]
        keys, rng = Keys(), np.random.default_rng(seed)
        result = shuffled_keys(lambda x, keys=keys: in_groups(keys, x, len(x) // groups), mine, rng)
        out.append((x, result, keys.seen, rng.random()))
    return out


@pytest.mark.parametrize("processes, n, groups", [(1, 8, 1), (1, 8, 2), (2, 4, 1), (2, 6, 3)])
def test_shuffled_keys__statistics_of_other_images_and_keys_back_in_order(processes, n, groups):
    seeds = list(range(6))
    results = spawn(shuffle, n, seeds, groups) if processes > 1 else [shuffle(n, seeds, groups)]
    partitions = []
    for number in range(len(seeds)):
        x, keys, _, random = results[0][number]
        dealt = [group for process in results for group in process[number][2]]  # which images met in BatchNorm
        assert sorted(sum(dealt, [])) == list(range(processes * n))  # every image once
        assert {len(group) for group in dealt} == {n // groups}
        for group in dealt:
            rows = x[group]
            for i in group:
                wanted = (x[i] - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
                assert torch.allclose(keys[i], wanted, atol=1e-5)
        for process in results:
            assert torch.equal(process[number][1], keys)  # the same keys everywhere
            assert process[number][3] == random  # and the generators are still equal
        partitions.append({frozenset(group) for group in dealt})
    if processes * groups > 1:
        size = n // groups
        unshuffled = {frozenset(range(start, start + size)) for start in range(0, processes * n, size)}
        assert sum(p == unshuffled for p in partitions) <= 1
        assert len({frozenset(p) for p in partitions}) > 2  # another deal each step


def test_shuffled_keys__take_no_gradient():
    weight = torch.ones(3, requires_grad=True)
    keys = shuffled_keys(lambda x: x * weight, torch.randn(4, 3), np.random.default_rng(0))
    assert not keys.requires_grad
