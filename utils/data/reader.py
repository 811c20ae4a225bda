"""Reading samples by their number: from local shards anywhere, from remote ones as they pass."""

import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.index import Index, Shard
from utils.data.remote import BLOCK, RemoteError, Source, attempts, copy, is_remote, other_shard
from utils.data.tars import LABEL_EXTENSION, TarSample, local_samples, tar_samples
from utils.run.files import atomic
from utils.run.flags import RunError


class BadSample(Exception):
    """A sample that cannot be used: its shard, its key, why, and the number of the next one that may be better."""

    def __init__(self, shard: str, key: str, error: str, following: int):
        super().__init__(f"{shard}: {key}: {error}")
        self.record = {"shard": shard, "key": key, "error": error}
        self.following = following


class ShardEnds(Exception):
    """A shard that cannot be read from this position on."""

    def __init__(self, position: int, error: str):
        super().__init__(error)
        self.position = position


@dataclass
class Sample:
    number: int
    key: str
    image: bytes
    label: int  # -1 where there is none


class Reader:
    """Reads samples of an index by their number. Keeps up to `open_shards` local shards open; one Reader per process."""

    def __init__(self, index: Index, open_shards: int = 128):
        self.index, self.open_shards = index, open_shards
        self.first = np.cumsum([0] + [shard.samples for shard in index.shards])
        self.local: OrderedDict[int, LocalShard] = OrderedDict()  # by shard number
        self.passes: dict[tuple[int, int], RemoteShard] = {}  # by shard number and lane
        self.ends: dict[int, tuple[int, str]] = {}  # shard number -> (position that it cannot be read from on, why)
        self.expected = self.lanes = np.empty(0, int)

    def expect(self, samples: np.ndarray, lanes: np.ndarray | None = None) -> None:
        """What will be asked for from now on, each once, and the lane of each: what a remote shard holds back as it passes.

        A shard in which two lanes meet passes once for each: one lane uses its part at the epoch's start, the other at its end.
        """
        while self.passes:
            self.passes.popitem()[1].close()
        order = np.argsort(samples)
        self.expected = samples[order]
        self.lanes = np.zeros(len(samples), int) if lanes is None else lanes[order]

    def __call__(self, number: int, planned: bool = True) -> Sample:
        """A sample, 0 <= number < index.total; `planned` if it is one of those expected. Raises BadSample."""
        n = self.shard_of(number)
        shard, position = self.index.shards[n], number - int(self.first[n])
        end, why = self.ends.get(n, (shard.samples, ""))
        try:
            if position >= end:
                raise ShardEnds(end, why)
            found = self._open(n, number, planned).read(position)
        except ShardEnds as error:
            self.ends[n] = error.position, str(error)
            raise BadSample(shard.path, f"sample {position}", str(error), int(self.first[n + 1])) from None
        except OSError as error:
            raise BadSample(shard.path, f"sample {position}", str(error), number + 1) from None
        try:
            label = int(found.members[LABEL_EXTENSION]) if self.index.labelled else -1
        except (KeyError, ValueError):
            raise BadSample(shard.path, found.key, "no label, or one that is no number", number + 1) from None
        return Sample(number, found.key, found.members[found.image], label)

    def shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.first, number, side="right")) - 1

    def _open(self, n, number, planned):
        shard = self.index.shards[n]
        if not is_remote(shard.path) or self.index.cache_dir:
            return self._open_local(n, shard)
        if not planned:  # out of turn, so that the pass over it cannot give it
            return RemoteShard(shard, np.arange(shard.samples) == number - self.first[n])
        lane = self.lanes[np.searchsorted(self.expected, number)]
        if (n, lane) not in self.passes:
            low, high = np.searchsorted(self.expected, self.first[n : n + 2])
            wanted = np.zeros(shard.samples, bool)
            wanted[(self.expected[low:high] - self.first[n])[self.lanes[low:high] == lane]] = True
            self.passes[n, lane] = RemoteShard(shard, wanted)
        return self.passes[n, lane]

    def _open_local(self, n, shard):
        if n not in self.local:
            if len(self.local) >= self.open_shards:
                self.local.popitem(last=False)[1].close()
            path = cached(shard, self.index.cache_dir) if is_remote(shard.path) else shard.path
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
    """Any sample of a shard in a local file."""

    def __init__(self, shard: Shard, path: str):
        self.samples, self.damage = [], ""
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
        """A sample. Raises ShardEnds behind a damage of the tar, OSError if the file has become shorter."""
        if position >= len(self.samples):
            raise ShardEnds(len(self.samples), f"the shard is damaged: {self.damage}")
        sample = self.samples[position]
        return TarSample(sample.key, {e: self._bytes(*place) for e, place in sample.members.items() if place})

    def _bytes(self, offset, size):
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise OSError(f"the shard ends before byte {offset + size}; was it changed meanwhile?")
        return data

    def close(self) -> None:
        os.close(self.fd)


def cached(shard: Shard, folder: str) -> str:
    """The path of a copy of a remote shard, which is made if it is not there."""
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
        raise RunError(f"--cache-dir {folder}: cannot take {shard.name} ({error}); give it room, or leave it out") from None
    return str(path)


class RemoteShard:
    """One pass over a remote shard. Holds what has passed, is wanted, and was not asked for yet.

    wanted: bool, for each of its samples.
    """

    def __init__(self, shard: Shard, wanted: np.ndarray):
        self.shard, self.wanted = shard, wanted
        self.end = int(np.flatnonzero(wanted)[-1]) + 1  # nothing is wanted behind it
        self.passed, self.held = 0, {}
        self.source = self.samples = None

    def read(self, position: int) -> TarSample:
        """A sample that is wanted, once. Raises ShardEnds if it cannot be had."""
        while position not in self.held:
            sample = self._next()
            if self.wanted[self.passed]:
                self.held[self.passed] = sample
            self.passed += 1
            if self.passed == self.end:
                self.close()
        return self.held.pop(position)

    def _next(self):
        """The next sample of the stream, which is opened again where it broke off."""
        for again in attempts():
            try:
                if self.source is None:
                    self._open()
                sample = next(self.samples)
                if self.passed + 1 == self.shard.samples:
                    self._check_whole()
                return sample
            except (RemoteError, tarfile.TarError) as error:
                self.close()
                if not again:
                    raise ShardEnds(self.passed, f"cannot be read on: {error}") from None

    def _open(self):
        done = self.passed
        self.source = Source(self.shard.path)
        tar = tarfile.open(fileobj=self.source, mode="r|", bufsize=BLOCK)  # noqa: SIM115 - closed with its source

        def take(member, number):
            return tar.extractfile(member).read() if done <= number < self.shard.samples and self.wanted[number] else None

        self.samples = tar_samples(tar, take, self.shard.samples)
        for _ in range(done):
            next(self.samples)

    def _check_whole(self):
        """Read what is behind the last sample. A stream that breaks off there may have lost a part of that sample."""
        while self.source.read(BLOCK):
            pass
        if self.source.size < self.shard.bytes:
            raise RemoteError(f"ends after {self.source.size} of {self.shard.bytes} bytes")
        if (self.source.size, self.source.hash.hexdigest()) != (self.shard.bytes, self.shard.sha256):
            raise other_shard(self.shard.path)

    def close(self) -> None:
        if self.source:
            self.source.close()
            self.source = self.samples = None
