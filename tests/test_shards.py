import itertools
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from shards_helpers import chi_square

from utils.data import shards
from utils.data.index import Index, Shard
from utils.data.shards import (
    epoch_blocks,
    epoch_plan,
    evaluation_plan,
    lanes_of,
    shuffle_buffer,
    steps_per_epoch,
    training_plan,
)

SIZES = (10, 10, 10, 7)


def index_of(*sizes):
    """An index of shards that need not exist."""
    return Index(tuple(Shard(f"/nowhere/{i}.tar", f"{i}.tar", size, 0, "") for i, size in enumerate(sizes)), None)


def test_lanes_of__default_is_the_largest_power_of_two_up_to_64_that_divides():
    for batch in range(1, 1100):
        assert lanes_of(None, batch) == max(p for p in (1, 2, 4, 8, 16, 32, 64) if batch % p == 0)


@pytest.mark.parametrize("pool", [1, 5, 4096])
@pytest.mark.parametrize("sizes", [SIZES, (37,), (1,) * 37, (0, 30, 0, 7, 0)])
@pytest.mark.parametrize("batch", [1, 2, 5, 6, 8, 12, 36, 37])
def test_epoch_plan__every_sample_at_most_once(monkeypatch, pool, sizes, batch):
    monkeypatch.setattr(shards, "POOL", pool)
    for epoch in range(3):
        plan = epoch_plan(index_of(*sizes), batch, 0, epoch)
        assert plan.shape == (37 // batch, batch)
        seen = Counter(plan.ravel().tolist())
        assert max(seen.values()) == 1 and set(seen) <= set(range(37))
        if 37 % batch == 0:
            assert set(seen) == set(range(37))


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 12])
def test_epoch_plan__exactly_once_with_any_lanes(lanes):
    assert sorted(epoch_plan(index_of(10, 10, 10, 6), 12, 5, 1, lanes).ravel()) == list(range(36))


@pytest.mark.parametrize("lanes, batch, fix", [(3, 8, 8), (5, 12, 4), (-4, 8, 8), (16, 8, 8)])
def test_lanes_of__must_divide_the_batch(lanes, batch, fix):
    with pytest.raises(ValueError, match=f"^--lanes {lanes}: must divide --batch-size {batch}; pass {fix}$"):
        lanes_of(lanes, batch)
    assert lanes_of(fix, batch) == fix


def test_steps_per_epoch__counts_whole_batches():
    assert [steps_per_epoch(total, 4) for total in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_epoch_plan__lanes_must_divide_the_batch():
    with pytest.raises(ValueError, match="--lanes 5.*--batch-size 12"):
        epoch_plan(index_of(*SIZES), 12, 0, 0, lanes=5)


def test_epoch_plan__function_of_seed_and_epoch_alone():
    """A new seed or epoch gives another order, (1, 2) is not (2, 1), and the global random state changes nothing."""
    plans = {}
    for seed, epoch in itertools.product(range(5), range(5)):
        plans[seed, epoch] = epoch_plan(index_of(*SIZES), 4, seed, epoch).tobytes()
    assert len(set(plans.values())) == 25
    for seed, epoch in [(3, 1), (0, 4), (1, 3)]:
        np.random.seed(epoch)
        random.seed(epoch)
        assert epoch_plan(index_of(*SIZES), 4, seed, epoch).tobytes() == plans[seed, epoch]


@pytest.mark.parametrize("pool", [1, 6, 4096])
@pytest.mark.parametrize("sizes, batch, lanes", [((5, 2, 1), 4, 2), ((1, 11), 6, 1), (SIZES, 12, 4), ((9,), 4, 4)])
def test_epoch_plan__positions_are_uniform_over_epochs(monkeypatch, pool, sizes, batch, lanes):
    """A sample has any position, or is left over, with equal probability, even without a shuffle buffer."""
    monkeypatch.setattr(shards, "POOL", pool)
    index, epochs = index_of(*sizes), 1500
    counts = np.zeros((index.total, steps_per_epoch(index.total, batch) * batch))
    for epoch in range(epochs):
        plan = epoch_plan(index, batch, 7, epoch, lanes).ravel()
        counts[plan, np.arange(len(plan))] += 1
    left_over = epochs - counts.sum(1, keepdims=True)
    positions = counts.shape[1]
    for sample in range(index.total):
        expected = np.full(positions, epochs / index.total)
        observed = counts[sample]
        if positions < index.total:
            observed = np.append(observed, left_over[sample])
            expected = np.append(expected, epochs * (1 - positions / index.total))
        assert chi_square(observed, expected) < 5


def test_epoch_plan__cuts_a_ring_of_permuted_shards_into_lanes(monkeypatch):
    """Without shuffling, the lanes joined are the shards in random order from a random start. Batches take equal parts."""
    monkeypatch.setattr(shards, "POOL", 1)
    index, batch, lanes = index_of(*SIZES, 3), 8, 4
    first = [0, 10, 20, 30, 37, 40]
    orders, entries = Counter(), set()
    for epoch in range(1000):
        plan = epoch_plan(index, batch, 0, epoch, lanes)
        ring = [plan[s, lane * 2 + k] for lane in range(lanes) for s in range(len(plan)) for k in range(2)]
        entries.add(int(ring[0]))
        ring = np.roll(ring, -ring.index(0)).tolist()  # begin with shard 0
        order = []
        while ring:
            shard = first.index(ring[0])
            samples = list(range(first[shard], first[shard + 1]))
            assert ring[: len(samples)] == samples
            order.append(shard)
            ring = ring[len(samples) :]
        orders[tuple(order)] += 1
    assert len(entries) == 40 and len(orders) == 24
    assert chi_square(list(orders.values()), [1000 / 24] * 24) < 5


@pytest.mark.parametrize("batch, lanes", [(4, 1), (64, 64), (48, 16), (100, 100)])
def test_epoch_plan__pool_is_bounded(monkeypatch, batch, lanes):
    """All buffers together hold POOL images, and a lane has the samples of its own range."""
    calls = []

    def spy(lanes, length, places, *rest):
        calls.append((lanes, length, places))
        return shuffle_buffer(lanes, length, places, *rest)

    monkeypatch.setattr(shards, "shuffle_buffer", spy)
    index = index_of(*[1000] * 13)
    plan = epoch_plan(index, batch, 0, 0, lanes)
    ((lanes_, length, places),) = calls
    assert (lanes_, length) == (lanes, len(plan) * batch // lanes)
    assert shards.POOL - lanes < places * lanes <= shards.POOL <= 5000
    monkeypatch.setattr(shards, "POOL", 1)
    ranges = epoch_plan(index, batch, 0, 0, lanes).reshape(len(plan), lanes, -1).swapaxes(0, 1).reshape(lanes, -1)
    for lane, (range_, emitted) in enumerate(zip(ranges, plan.reshape(len(plan), lanes, -1).swapaxes(0, 1), strict=True)):
        assert set(range_) == set(emitted.ravel()), lane
        assert places >= len(range_) or not np.array_equal(np.sort(range_[:100]), np.sort(emitted.ravel()[:100]))


def slow_epoch_plan(index, batch, seed, epoch, lanes):
    """The whole table at once: the order that every checkpoint since the first release relies on."""
    steps, rng = index.total // batch, np.random.default_rng([seed, epoch])
    first = np.cumsum([0] + [shard.samples for shard in index.shards])
    ring = np.concatenate([np.arange(first[s], first[s + 1]) for s in rng.permutation(len(index.shards))])
    ring = np.roll(ring, -rng.integers(index.total))
    ranges = ring[: steps * batch].reshape(lanes, -1)
    places = max(1, shards.POOL // lanes)
    row, buffer, out = np.arange(lanes), ranges[:, :places].copy(), np.empty_like(ranges)
    turns = ranges.shape[1] - buffer.shape[1]
    picks = rng.integers(buffer.shape[1], size=(turns, lanes))
    for turn in range(turns):
        out[:, turn] = buffer[row, picks[turn]]
        buffer[row, picks[turn]] = ranges[:, places + turn]
    out[:, turns:] = rng.permuted(buffer, axis=1)
    return out.reshape(lanes, steps, -1).swapaxes(0, 1).reshape(steps, batch)


def columns_of(index, batch, seed, epoch, lanes, places, first_step):
    empty = np.empty((0, len(places)), int)
    return np.concatenate([empty, *epoch_blocks(index, batch, seed, epoch, lanes, places, first_step)])


@pytest.mark.parametrize("pool", [1, 7, 64, 4096])
@pytest.mark.parametrize("block", [1, 100, 1 << 15])
def test_epoch_blocks__are_the_table_that_is_made_at_once(monkeypatch, pool, block):
    """Bit for bit, for any shards, batch, lanes and number of draws in a block; also some columns from some step on."""
    monkeypatch.setattr(shards, "POOL", pool)
    monkeypatch.setattr(shards, "BLOCK", block)
    rng = np.random.default_rng(pool)
    for epoch in range(12):
        index = index_of(*rng.integers(0, rng.choice([2, 50, 200]), size=rng.integers(1, 30)).tolist(), 1)
        batch = int(rng.integers(1, min(index.total, 200) + 1))
        lanes = int(rng.choice([n for n in range(1, batch + 1) if batch % n == 0]))
        table = slow_epoch_plan(index, batch, 3, epoch, lanes)
        assert np.array_equal(epoch_plan(index, batch, 3, epoch, lanes), table)
        low, high = np.sort(rng.choice(batch + 1, 2, replace=False)).tolist()
        for first_step in (0, len(table) // 2, len(table)):
            mine = columns_of(index, batch, 3, epoch, lanes, range(low, high), first_step)
            assert np.array_equal(mine, table[first_step:, low:high])


def test_epoch_plan__keeps_the_order_of_old_checkpoints():
    """Of a real size, with default lanes: more draws than a block has."""
    index = index_of(*[1000] * 70, 123)
    for batch in (256, 96, 1000):
        table = slow_epoch_plan(index, batch, 0, 5, lanes_of(None, batch))
        assert np.array_equal(epoch_plan(index, batch, 0, 5), table)


def test_training_plan__keeps_no_table(monkeypatch):
    """Of 20 M images, neither at the start of an epoch nor at any of its steps, nor after a walk to its middle."""
    monkeypatch.setattr(shards.dist, "world", lambda: 8)
    monkeypatch.setattr(shards.dist, "rank", lambda: 5)
    index = index_of(*[10_000] * 2000)
    for first_step in (0, 2000):
        tracemalloc.start()
        try:
            epochs = training_plan(index, 4096, 0, range(3), first_step=first_step).epochs()
            for _ in range(2):
                _, steps = next(epochs)
                assert [len(step) for step in itertools.islice(steps, 300)] == [512] * 300
            assert tracemalloc.get_traced_memory()[1] < 8e6
        finally:
            tracemalloc.stop()


def test_training_plan__steps_can_be_walked_again():
    _, steps = next(training_plan(index_of(*SIZES), 4, 0, range(1)).epochs())
    once, again = np.stack(list(steps)), np.stack(list(steps))
    assert np.array_equal(once, again) and np.array_equal(once, epoch_plan(index_of(*SIZES), 4, 0, 0))


@pytest.mark.parametrize("total, batch, world", [(37, 4, 1), (37, 8, 3), (5, 16, 8), (12, 4, 4), (13, 3, 5)])
def test_evaluation_plan__is_the_index_cut_into_even_parts(monkeypatch, total, batch, world):
    monkeypatch.setattr(shards.dist, "world", lambda: world)
    parts, n = np.array_split(np.arange(total), world), max(1, batch // world)
    for rank in range(world):
        monkeypatch.setattr(shards.dist, "rank", lambda rank=rank: rank)
        ((_, steps),) = evaluation_plan(index_of(total), batch).epochs()
        expected = [parts[rank][start : start + n] for start in range(0, len(parts[0]), n)]
        assert [step.tolist() for step in steps] == [step.tolist() for step in expected]


def emitted_by(ranges, places, rng):
    """Each row of (lanes x length) items, passed through its shuffle buffer."""
    return np.take_along_axis(ranges, np.concatenate(list(shuffle_buffer(*ranges.shape, places, rng)), axis=1), axis=1)


@pytest.mark.parametrize("length, places", [(40, 1), (40, 7), (40, 39), (40, 40), (40, 99), (1, 1), (0, 3)])
def test_shuffle_buffer__each_row_keeps_its_items_and_none_leaves_early(length, places):
    ranges = np.random.default_rng(1).permutation(30 * length).reshape(30, length)
    out = emitted_by(ranges, places, np.random.default_rng(0))
    held = []
    for row, emitted in zip(ranges.tolist(), out.tolist(), strict=True):
        assert sorted(row) == sorted(emitted)
        for turn, item in enumerate(emitted):
            assert row.index(item) < turn + places  # in the buffer by then
        read = [min(turn + places, length) for turn in range(length)]
        held.append(max((r - turn for turn, r in enumerate(read)), default=0))
    assert max(held) <= places
    if places == 1:
        assert np.array_equal(out, ranges)


def law(waiting, buffer, places):
    """{order: probability} of a shuffle buffer, by a walk through all its draws."""
    buffer, waiting = buffer + waiting[: places - len(buffer)], waiting[places - len(buffer) :]
    if not buffer:
        return {(): 1.0}
    out = Counter()
    for i, item in enumerate(buffer):
        for tail, p in law(waiting, buffer[:i] + buffer[i + 1 :], places).items():
            out[item, *tail] += p / len(buffer)
    return out


@pytest.mark.parametrize("length, places", [(5, 2), (5, 3), (4, 4), (3, 8)])
def test_shuffle_buffer__has_the_law_of_a_plain_list(length, places):
    expected, n = law(list(range(length)), [], places), 12000
    emitted = emitted_by(np.tile(np.arange(length), (n, 1)), places, np.random.default_rng(3)).tolist()
    counts = Counter(tuple(row) for row in emitted)
    assert set(counts) <= set(expected)
    assert chi_square([counts[order] for order in expected], [n * p for p in expected.values()]) < 5
    for apart in (1, 2):  # neighbouring rows are independent
        pairs = Counter((a[0], b[0]) for a, b in zip(emitted, emitted[apart:], strict=False))
        k = min(length, places)
        assert chi_square([pairs[p] for p in itertools.product(range(k), repeat=2)], [(n - apart) / k**2] * k**2) < 5
