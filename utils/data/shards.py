"""Which samples, in which order: the plan of an epoch.

The order is a table that every process and worker computes for itself from (seed, epoch), so it cannot depend on how many of
them there are, and any step of any epoch can be looked up instead of being reached.
"""

import numpy as np

from utils.data.index import Index

POOL = 4096  # images that are mixed at a time, over all lanes together


def default_lanes(batch: int) -> int:
    """The largest power of two up to 64 that divides the batch."""
    return min(batch & -batch, 64)


def epoch_plan(index: Index, batch: int, seed: int, epoch: int, lanes: int | None = None) -> np.ndarray:
    """The global batches of an epoch: (steps x batch) sample indices, no sample twice, steps = total // batch.

    Shards are put in random order and joined into one ring of samples, which is entered at a random place. The ring is cut
    into `lanes` contiguous ranges; each is mixed by a shuffle buffer of POOL / lanes places, and every global batch takes
    batch / lanes samples of every lane, lane after lane. So a lane can be read almost in sequence, whatever holds the
    shards, and a sample's place in the epoch is uniform.
    """
    lanes = lanes or default_lanes(batch)
    if batch % lanes:
        raise ValueError(f"--lanes {lanes}: must divide --batch-size {batch}")
    steps = index.total // batch
    rng = np.random.default_rng([seed, epoch])
    first = np.cumsum([0] + [shard.samples for shard in index.shards])
    ring = np.concatenate([np.arange(first[s], first[s + 1]) for s in rng.permutation(len(index.shards))])
    ring = np.roll(ring, -rng.integers(index.total))
    ranges = ring[: steps * batch].reshape(lanes, -1)
    return shuffle_buffer(ranges, max(1, POOL // lanes), rng).reshape(lanes, steps, -1).swapaxes(0, 1).reshape(steps, batch)


def shuffle_buffer(ranges: np.ndarray, places: int, rng: np.random.Generator) -> np.ndarray:
    """What a shuffle buffer of so many places per row makes of (lanes x length) items, all rows at once.

    Each turn emits a random place of the row's buffer and refills it with the row's next item; the end empties the buffer in
    random order.
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
