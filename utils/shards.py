"""Which samples, in which order: the plan of an epoch, and how a planned sample is read.

The order is a table that every process and worker computes for itself from (seed, epoch), so it cannot depend on how many of
them there are, and any step of any epoch can be looked up instead of being reached.
"""

import os
from collections import OrderedDict

import numpy as np

from utils.index import IMAGE_EXTENSIONS, LABEL_EXTENSION, Index, scan_tar

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


class Reader:
    """Reads samples of an index by their number. Keeps up to `open_shards` shards open; open one Reader per process."""

    def __init__(self, index: Index, open_shards: int = 128):
        self.index = index
        self.first = np.cumsum([0] + [shard.samples for shard in index.shards])
        self.open_shards = open_shards
        self.shards: OrderedDict[int, tuple[int, list]] = OrderedDict()  # shard number -> (file descriptor, samples)

    def __call__(self, sample: int) -> tuple[bytes, int]:
        """(encoded image, label or -1) of a sample, 0 <= sample < index.total."""
        number = int(np.searchsorted(self.first, sample, side="right")) - 1
        fd, samples = self._open(number)
        members = samples[sample - self.first[number]].members
        extension = next(e for e in members if e in IMAGE_EXTENSIONS)
        label = int(self._read(fd, *members[LABEL_EXTENSION])) if self.index.labelled else -1
        return self._read(fd, *members[extension]), label

    def _open(self, number):
        if number not in self.shards:
            shard = self.index.shards[number]
            if len(self.shards) >= self.open_shards:
                os.close(self.shards.popitem(last=False)[1][0])
            samples = scan_tar(shard.path)
            if len(samples) != shard.samples:
                raise RuntimeError(
                    f"{shard.path} holds {len(samples)} samples, its index says {shard.samples}; delete index.json "
                    "to index again"
                )
            self.shards[number] = os.open(shard.path, os.O_RDONLY), samples
        self.shards.move_to_end(number)
        return self.shards[number]

    def _read(self, fd, offset, size):
        data = os.pread(fd, size, offset)
        if len(data) != size:
            raise RuntimeError(f"a shard ended before byte {offset + size}; was it changed while it was read?")
        return data

    def close(self) -> None:
        while self.shards:
            os.close(self.shards.popitem()[1][0])

    def __del__(self):
        self.close()
