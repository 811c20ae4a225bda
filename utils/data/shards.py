"""The order of the samples: the plan of an epoch, and each process's part of it.

Every process and worker computes the plan for itself from (seed, epoch). So it cannot depend on their number, and a run can
resume at any step without the steps before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.data.index import Index
from utils.run import dist, streams

POOL = 4096  # images in the shuffle buffers of all lanes together


@dataclass
class BatchPlan:
    """The samples that a process takes.

    epochs() gives (epoch, the sample ids of each step), epoch after epoch. replace: whether the next usable sample of the
    index replaces an unusable one; if not, the batch is smaller. lane_of_place: the lane of each place of a batch, or None.
    """

    epochs: Callable[[], Iterator[tuple[int, list[np.ndarray]]]]
    replace: bool
    lane_of_place: np.ndarray | None = None


def steps_per_epoch(total: int, batch: int) -> int:
    """The number of whole global batches in `total` samples."""
    return total // batch


def lanes_of(lanes: int | None, batch: int) -> int:
    """The number of lanes; by default the largest power of two up to 64 that divides the batch. Raises ValueError."""
    default = min(batch & -batch, 64)
    lanes = lanes or default
    if lanes < 1 or batch % lanes:
        raise ValueError(f"--lanes {lanes}: must divide --batch-size {batch}; {default} would do")
    return lanes


def epoch_plan(index: Index, batch: int, seed: int, epoch: int, lanes: int | None = None) -> np.ndarray:
    """The global batches of an epoch: steps x batch sample ids, no sample twice. Raises ValueError for --lanes.

    Shards are put in random order and joined into one ring of samples, which starts at a random sample. The ring is cut into
    `lanes` contiguous ranges, and each is shuffled by a buffer of POOL / lanes samples. Every global batch takes batch / lanes
    samples of each lane, lane after lane. So shards are read almost in sequence, and any place in the epoch is equally likely.
    """
    lanes = lanes_of(lanes, batch)
    steps = steps_per_epoch(index.total, batch)
    rng = streams.epoch_order(seed, epoch)
    first = np.cumsum([0] + [shard.samples for shard in index.shards])
    ring = np.concatenate([np.arange(first[s], first[s + 1]) for s in rng.permutation(len(index.shards))])
    ring = np.roll(ring, -rng.integers(index.total))
    ranges = ring[: steps * batch].reshape(lanes, -1)
    return shuffle_buffer(ranges, max(1, POOL // lanes), rng).reshape(lanes, steps, -1).swapaxes(0, 1).reshape(steps, batch)


def shuffle_buffer(ranges: np.ndarray, places: int, rng: np.random.Generator) -> np.ndarray:
    """Pass each row of (lanes x length) items through a shuffle buffer of `places` items. Returns the same shape.

    Each turn emits a random item of the row's buffer, and the row's next item takes its place. At the end the buffer is
    emptied in random order.
    """
    lanes, length = ranges.shape
    row = np.arange(lanes)
    buffer, out = ranges[:, :places].copy(), np.empty_like(ranges)
    turns = length - buffer.shape[1]
    picks = rng.integers(buffer.shape[1], size=(turns, lanes))
    for turn in range(turns):
        out[:, turn] = buffer[row, picks[turn]]
        buffer[row, picks[turn]] = ranges[:, places + turn]
    out[:, turns:] = rng.permuted(buffer, axis=1)
    return out


def training_plan(
    index: Index, batch: int, seed: int, epochs: range, lanes: int | None = None, first_step: int = 0
) -> BatchPlan:
    """This process's part of every global batch of these epochs, in order. The first epoch starts at `first_step`."""
    lanes, rank, world = lanes_of(lanes, batch), dist.rank(), dist.world()
    epochs_of = partial(_training_epochs, index, batch, seed, epochs, lanes, first_step, rank, world)
    return BatchPlan(epochs_of, replace=True, lane_of_place=np.array_split(np.arange(batch) // (batch // lanes), world)[rank])


def _training_epochs(index, batch, seed, epochs, lanes, first_step, rank, world):
    n = batch // world
    for epoch in epochs:
        plan = epoch_plan(index, batch, seed, epoch, lanes)[:, rank * n : (rank + 1) * n]
        yield epoch, list(plan[first_step if epoch == epochs[0] else 0 :])


def evaluation_plan(index: Index, batch: int) -> BatchPlan:
    """This process's part of the index, each sample on exactly one process, in order. `batch` is global.

    All processes have the same number of batches; the last ones may be empty.
    """
    n, parts = max(1, batch // dist.world()), np.array_split(np.arange(index.total), dist.world())
    steps = [parts[dist.rank()][start : start + n] for start in range(0, len(parts[0]), n)]  # the first part is the longest
    return BatchPlan(partial(iter, [(0, steps)]), replace=False)
