"""Samples by their ids. Local shards are read at any position, remote ones in one pass from start to end."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from utils.data.index import Index, Shard
from utils.data.remote import BLOCK, RemoteError, Source, attempts, copy, is_remote, other_shard
from utils.data.tars import LABEL_EXTENSION, TarSample, local_samples, tar_samples
from utils.run.files import atomic
from utils.run.flags import RunError


class BadSample(Exception):
    """An unusable sample: its shard, its key and the error. following: the next sample id that may be usable."""

    def __init__(self, shard: str, key: str, error: str, following: int):
        super().__init__(f"{shard}: {key}: {error}")
        self.record = {"shard": shard, "key": key, "error": error}
        self.following = following


class ShardEnds(Exception):
    """A shard whose samples cannot be read from this position to its end."""

    def __init__(self, position: int, error: str):
        super().__init__(error)
        self.position = position


@dataclass
class Sample:
    sample_id: int  # its number in the index
    key: str
    image: bytes  # encoded
    label: int  # -1 where there is none


class Reader:
    """Reads the samples of an index. Keeps up to `open_shards` local shards open. A process needs one Reader."""

    def __init__(self, index: Index, open_shards: int = 128):
        self.index, self.open_shards = index, open_shards
        self.first = np.cumsum([0] + [shard.samples for shard in index.shards])
        self.local: OrderedDict[int, LocalShard] = OrderedDict()  # by shard number
        self.passes: dict[tuple[int, int], RemoteShard] = {}  # by shard number and lane
        self.ends: dict[int, tuple[int, str]] = {}  # by shard number: (the first position that cannot be read, the error)
        self.expected = self.lane_of_sample = np.empty(0, int)

    def expect(self, sample_ids: np.ndarray, lane_of_sample: np.ndarray | None = None) -> None:
        """Announce the samples that will be read, each once, and their lanes. Remote shards keep these samples in memory.

        A shard in which two lanes meet is read once for each: one lane needs it at the start of the epoch, one at the end.
        """
        while self.passes:
            self.passes.popitem()[1].close()
        order = np.argsort(sample_ids)
        self.expected = sample_ids[order]
        self.lane_of_sample = np.zeros(len(order), int) if lane_of_sample is None else lane_of_sample[order]

    def __call__(self, sample_id: int, planned: bool = True) -> Sample:
        """A sample, 0 <= sample_id < index.total. planned: whether it was announced. Raises BadSample."""
        n = self.shard_of(sample_id)
        shard, position = self.index.shards[n], sample_id - int(self.first[n])
        end, why = self.ends.get(n, (shard.samples, ""))
        try:
            if position >= end:
                raise ShardEnds(end, why)
            found = self._open(n, sample_id, planned).read(position)
        except ShardEnds as error:
            self.ends[n] = error.position, str(error)
            raise BadSample(shard.path, f"sample {position}", str(error), int(self.first[n + 1])) from None
        except OSError as error:
            raise BadSample(shard.path, f"sample {position}", str(error), sample_id + 1) from None
        try:
            label = int(found.members[LABEL_EXTENSION]) if self.index.labelled else -1
        except (KeyError, ValueError):
            raise BadSample(shard.path, found.key, "no label, or a label that is not a number", sample_id + 1) from None
        return Sample(sample_id, found.key, found.members[found.image], label)

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds this sample."""
        return int(np.searchsorted(self.first, sample_id, side="right")) - 1

    def _open(self, n, sample_id, planned):
        shard = self.index.shards[n]
        if not is_remote(shard.path) or self.index.cache_dir:
            return self._open_local(n, shard)
        if not planned:  # its own pass: the planned one does not keep this sample
            return RemoteShard(shard, np.arange(shard.samples) == sample_id - self.first[n])
        lane = self.lane_of_sample[np.searchsorted(self.expected, sample_id)]
        if (n, lane) not in self.passes:
            low, high = np.searchsorted(self.expected, self.first[n : n + 2])
            wanted = np.zeros(shard.samples, bool)
            wanted[(self.expected[low:high] - self.first[n])[self.lane_of_sample[low:high] == lane]] = True
            self.passes[n, lane] = RemoteShard(shard, wanted)
        return self.passes[n, lane]

    def _open_local(self, n, shard):
        if n not in self.local:
            if len(self.local) >= self.open_shards:
                self.local.popitem(last=False)[1].close()
            cache = self.index.cache_dir
            path = cached(shard, cache) if cache and is_remote(shard.path) else shard.path
            try:
                self.local[n] = LocalShard(shard, path)
            except OSError as error:
                raise ShardEnds(0, str(error)) from None
        self.local.move_to_end(n)
        return self.local[n]

    def close(self) -> None:
        for shards in (self.local, self.passes):
            while shards:
                shards.popitem()[1].close()

    def __del__(self):
        self.close()


class LocalShard:
    """A shard in a local file."""

    def __init__(self, shard: Shard, path: str):
        self.samples: list[TarSample] = []
        self.damage = ""
        try:
            for sample in local_samples(path):
                self.samples.append(sample)
        except tarfile.TarError as error:
            self.damage = str(error)
        if len(self.samples) != shard.samples and not self.damage:
            raise RunError(f"{path} holds {len(self.samples)} samples, its index says {shard.samples}; delete the index.json "
                           "beside it to index again")  # fmt: skip
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, position: int) -> TarSample:
        """A sample. Raises ShardEnds after a corrupt part of the tar, and OSError if the file has become shorter."""
        if position >= len(self.samples):
            raise ShardEnds(len(self.samples), f"the shard is corrupt: {self.damage}")
        sample = self.samples[position]
        return TarSample(sample.key, {e: self._bytes(*place) for e, place in sample.members.items() if place})

    def _bytes(self, offset, size):
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise OSError(f"the shard ends before byte {offset + size}, unlike when it was opened")
        return data

    def close(self) -> None:
        os.close(self.fd)


def cached(shard: Shard, folder: str) -> str:
    """The path of a local copy of a remote shard, which is fetched if necessary. Raises ShardEnds or RunError."""
    path = Path(folder) / f"{shard.sha256[:16]}-{shard.name}"
    if path.exists() and path.stat().st_size == shard.bytes:
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            copy(shard.path, file, (shard.bytes, shard.sha256))
    except RemoteError as error:
        raise ShardEnds(0, str(error)) from None
    except OSError as error:
        raise RunError(f"--cache-dir {folder}: cannot store {shard.name} ({error}); free some space, or leave it out") from None
    return str(path)


class RemoteShard:
    """One pass over a remote shard. Holds the samples that are wanted and have been passed, until they are read.

    wanted: bool, for each sample of the shard.
    """

    def __init__(self, shard: Shard, wanted: np.ndarray):
        self.shard, self.wanted = shard, wanted
        self.end = int(np.flatnonzero(wanted)[-1]) + 1  # no later sample is wanted
        self.passed = 0
        self.held: dict[int, TarSample] = {}
        self.source: Source | None = None
        self.samples: Iterator[TarSample] = iter(())

    def read(self, position: int) -> TarSample:
        """A wanted sample, once. Raises ShardEnds if it cannot be read."""
        while position not in self.held:
            sample = self._next()
            if self.wanted[self.passed]:
                self.held[self.passed] = sample
            self.passed += 1
            if self.passed == self.end:
                self.close()
        return self.held.pop(position)

    def _next(self):
        """The next sample. A stream that breaks off is opened again."""
        for again in attempts():
            try:
                source = self.source or self._open()
                sample = next(self.samples)
                if self.passed + 1 == self.shard.samples:
                    self._check_whole(source)
                return sample
            except (RemoteError, tarfile.TarError) as error:
                self.close()
                if not again:
                    raise ShardEnds(self.passed, f"cannot be read further: {error}") from None

    def _open(self):
        done = self.passed
        self.source = source = Source(self.shard.path)
        tar = tarfile.open(fileobj=cast(IO[bytes], source), mode="r|", bufsize=BLOCK)  # noqa: SIM115 - closed with its source

        def take(member, position):
            wanted = done <= position < self.shard.samples and self.wanted[position]
            return cast(IO[bytes], tar.extractfile(member)).read() if wanted else None

        self.samples = tar_samples(tar, take, self.shard.samples)
        for _ in range(done):
            next(self.samples)
        return source

    def _check_whole(self, source):
        """Read to the end. A stream that breaks off after the last sample's header may have lost a part of that sample."""
        while source.read(BLOCK):
            pass
        if source.size < self.shard.bytes:
            raise RemoteError(f"ends after {source.size} of {self.shard.bytes} bytes")
        if (source.size, source.hash.hexdigest()) != (self.shard.bytes, self.shard.sha256):
            raise other_shard(self.shard.path)

    def close(self) -> None:
        if self.source:
            self.source.close()
            self.source, self.samples = None, iter(())
