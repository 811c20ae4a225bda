"""The order of the samples: the plan of an epoch, and each process's part of it.

Every process and worker computes the plan for itself from (seed, epoch), block by block. So the plan does not depend on
their number, and no process holds the order of an epoch. A run resumes at any step without reading the samples before it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from utils.data.index import Index
from utils.run import dist, streams

POOL = 4096  # images in the shuffle buffers of all lanes together
BLOCK = 1 << 15  # draws of a block: few enough to stay small in every worker


@dataclass
class BatchPlan:
    """The plan of one process: its samples of each step.

    epochs() gives (epoch, the sample ids of each step), epoch after epoch. One can iterate over the steps more than once.
    replace: whether the next usable sample of the index replaces an unusable one; if not, the batch is smaller.
    lane_of_place: the lane of each place of a batch, or None. shards_of_lane: how many shards a lane reads at a time.
    """

    epochs: Callable[[], Iterator[tuple[int, Iterable[np.ndarray]]]]
    replace: bool
    lane_of_place: np.ndarray | None = None
    shards_of_lane: int = 2


def steps_per_epoch(total: int, batch: int) -> int:
    """The number of whole global batches in `total` samples."""
    return total // batch


def lanes_of(lanes: int | None, batch: int) -> int:
    """The number of lanes; by default the largest power of two up to 64 that divides the batch. Raises ValueError."""
    default = min(batch & -batch, 64)
    lanes = lanes or default
    if lanes < 1 or batch % lanes:
        raise ValueError(f"--lanes {lanes}: must divide --batch-size {batch}; pass {default}")
    return lanes


def epoch_plan(index: Index, batch: int, seed: int, epoch: int, lanes: int | None = None) -> np.ndarray:
    """The global batches of an epoch as a table: steps x batch sample ids. Raises ValueError for --lanes.

    A run never holds this table: see `epoch_blocks`.
    """
    lanes = lanes_of(lanes, batch)
    return np.concatenate([np.empty((0, batch), int), *epoch_blocks(index, batch, seed, epoch, lanes)])


def epoch_blocks(
    index: Index, batch: int, seed: int, epoch: int, lanes: int, places: range | None = None, first_step: int = 0
) -> Iterator[np.ndarray]:
    """The global batches of an epoch, no sample twice: steps x batch sample ids, in blocks of some steps.

    Shards are put in random order and joined into one ring of samples, which starts at a random sample. The ring is cut into
    `lanes` contiguous ranges, and each is shuffled by a buffer of POOL / lanes samples. Every global batch takes batch / lanes
    samples of each lane, lane after lane. So shards are read almost in sequence, and a sample is equally likely at every step.
    With `places` of the batch, only these columns. The steps before `first_step` are left out.
    """
    each, steps, rng = batch // lanes, steps_per_epoch(index.total, batch), streams.epoch_order(seed, epoch)
    order = rng.permutation(len(index.shards))
    ends = np.cumsum(np.diff(index.first)[order])  # of the shards in the ring
    shift = index.first[order + 1] - ends  # from a place in the ring to a sample id
    entry = rng.integers(index.total)
    places = range(batch) if places is None else places
    mine = slice(places.start // each, -(-places.stop // each))  # the lanes of these places
    base = entry + steps * each * np.arange(lanes)[mine, None]
    columns = slice(places.start - mine.start * each, places.stop - mine.start * each)
    rest = np.empty((len(base), 0), int)  # emitted, and less than a step
    for emitted in shuffle_buffer(lanes, steps * each, max(1, POOL // lanes), rng, mine):
        emitted = np.concatenate([rest, emitted], axis=1)
        whole = emitted.shape[1] // each
        emitted, rest = emitted[:, : whole * each], emitted[:, whole * each :]
        skipped, first_step = first_step, max(0, first_step - whole)
        if skipped < whole:
            block = (base + emitted).reshape(len(base), whole, each).swapaxes(0, 1).reshape(whole, -1)
            at = block[skipped:, columns] % index.total
            yield at + shift[np.searchsorted(ends, at, side="right")]


def shuffle_buffer(
    lanes: int, length: int, places: int, rng: np.random.Generator, mine: slice = slice(None)
) -> Iterator[np.ndarray]:
    """Pass 0, 1, ... length - 1 through a shuffle buffer of `places` items, once for each lane: lanes x turns, block by block.

    Each turn emits a random item of the lane's buffer, and the next item replaces it. At the end the buffer is emptied in
    random order. Only the lanes `mine` are computed; the draws are those of all lanes.
    """
    places = min(places, length)
    filled = np.tile(np.arange(places), (lanes, 1))
    buffer = filled[mine].copy()
    row = np.arange(len(buffer))[:, None]
    most = max(1, BLOCK // lanes)
    for start in range(places, length, most):
        turns = min(most, length - start)
        picks = rng.integers(places, size=(turns, lanes)).T[mine].astype(np.uint16)  # which numpy sorts fast
        order = picks.argsort(axis=1, kind="stable")  # turns that pick the same place follow each other
        picks = picks[row, order]
        again = picks[:, 1:] == picks[:, :-1]
        before = buffer[row, picks]
        before[:, 1:][again] = start + order[:, :-1][again]  # the item that entered at the last such turn
        last = np.pad(~again, ((0, 0), (0, 1)), constant_values=True)
        buffer[np.nonzero(last)[0], picks[last]] = start + order[last]
        out = np.empty_like(before)
        out[row, order] = before
        yield out
    yield buffer[row, rng.permuted(filled, axis=1)[mine]]


class Steps:
    """The sample ids of each step of an epoch. They are not kept: each iteration computes them again, block by block."""

    def __init__(self, blocks: Callable[[], Iterator[Iterable[np.ndarray]]]):
        self.blocks = blocks

    def __iter__(self) -> Iterator[np.ndarray]:
        return chain.from_iterable(self.blocks())


def training_plan(
    index: Index, batch: int, seed: int, epochs: range, lanes: int | None = None, first_step: int = 0
) -> BatchPlan:
    """This process's part of every global batch of these epochs, in order. The first epoch starts at `first_step`."""
    lanes, rank, world = lanes_of(lanes, batch), dist.rank(), dist.world()
    epochs_of = partial(_training_epochs, index, batch, seed, epochs, lanes, first_step, rank, world)
    lane_of_place = np.array_split(np.arange(batch) // (batch // lanes), world)[rank]
    late = 8 * (POOL // lanes) * len(index.shards) // index.total  # one sample in 3,000 leaves its buffer later
    return BatchPlan(epochs_of, replace=True, lane_of_place=lane_of_place, shards_of_lane=2 + late)


def _training_epochs(index, batch, seed, epochs, lanes, first_step, rank, world):
    n = batch // world
    for epoch in epochs:
        first = first_step if epoch == epochs[0] else 0
        yield epoch, Steps(partial(epoch_blocks, index, batch, seed, epoch, lanes, range(rank * n, (rank + 1) * n), first))


def evaluation_plan(index: Index, batch: int, images: int | None = None) -> BatchPlan:
    """This process's part of the index, each sample on exactly one process, in order. `batch` is global.

    images: take only so many samples, at equal distances. All processes have the same number of batches; the last ones may be
    empty.
    """
    rank, world, count = dist.rank(), dist.world(), min(images or index.total, index.total)
    n, (part, more) = max(1, batch // world), divmod(count, world)
    start = rank * part + min(rank, more)  # the first `more` processes have one sample more
    taken = start, start + part + (rank < more), n, -(-(part + bool(more)) // n)
    return BatchPlan(partial(iter, [(0, Steps(partial(_in_order, *taken, index.total, count)))]), replace=False)


def _in_order(start, stop, n, steps, total, count):
    batches = (np.arange(min(at, stop), min(at + n, stop)) for at in range(start, start + steps * n, n))
    yield (places * total // count for places in batches)
