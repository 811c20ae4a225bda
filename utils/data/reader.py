"""Samples by their ids. Local shards are read at any position, remote ones in one pass from start to end."""

import errno
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

import numpy as np

from utils.data.index import Index, cache_path
from utils.data.index_file import Shard
from utils.data.indexing import class_number
from utils.data.remote import BLOCK, RemoteError, Source, copy, is_remote, other_shard, retried
from utils.data.tars import LABEL_EXTENSION, TarSample, local_samples, open_tar, read_members, tar_samples
from utils.run.files import atomic
from utils.run.flags import RunError
from utils.run.text import brief, shown


class BadSample(Exception):
    """An unusable sample: its shard, its key and the error. following: the next sample id that may be usable."""

    def __init__(self, shard: str, key: str, error: str, following: int):
        self.record = {"shard": shown(shard), "key": brief(key, 200), "error": brief(shown(error), 200)}
        super().__init__(": ".join(self.record.values()))
        self.following = following


class Lost(Exception):
    """Samples of a shard that cannot be read: those from position `start` to before `end`."""

    def __init__(self, start: int, end: int, error: str):
        super().__init__(error)
        self.start, self.end = start, end


@dataclass
class Sample:
    sample_id: int  # its number in the index
    key: str
    image: bytes  # encoded
    label: int  # -1 if the sample has no label


class Reader:
    """Reads the samples of an index. Keeps up to `open_shards` local shards open. A process needs one Reader."""

    def __init__(self, index: Index, open_shards: int = 128):
        self.index, self.open_shards = index, open_shards
        self.first = index.first
        self.local: OrderedDict[int, LocalShard] = OrderedDict()  # by shard number
        self.passes: dict[tuple[int, int], RemoteShard] = {}  # by shard number and lane
        self.ends: dict[int, tuple[int, str]] = {}  # by shard number: (the first position that cannot be read, the error)
        self.expected, self.lanes = np.empty(0, int), 1  # in order: sample id x lanes + lane

    def expect(self, sample_ids: np.ndarray, lane_of_sample: np.ndarray | None = None) -> None:
        """Announce the samples that will be read, each once, and their lanes. Remote shards keep these samples in memory.

        A shard in which two lanes meet is read once for each: one lane needs it at the start of the epoch, one at the end.
        """
        while self.passes:
            self.passes.popitem()[1].close()
        self.lanes = 1 + int(lane_of_sample.max(initial=0)) if lane_of_sample is not None else 1
        self.expected = sample_ids.astype(np.int64) * self.lanes  # numpy 1 would keep the small type of sample_ids
        if lane_of_sample is not None:
            self.expected += lane_of_sample
        self.expected.sort()

    def __call__(self, sample_id: int, planned: bool = True) -> Sample:
        """A sample, 0 <= sample_id < index.total. planned: whether it was announced. Raises BadSample."""
        n = self.shard_of(sample_id)
        shard, position = self.index.shards[n], int(self._position(n, sample_id))
        end, why = self.ends.get(n, (shard.samples, ""))
        try:
            if position >= end:
                raise Lost(end, shard.samples, why)
            if is_remote(shard.path) and not self.index.cache_dir:
                found = self._remote(n, sample_id, planned).read(position)
            else:
                found = self._read_local(n, shard, position)
        except Lost as error:
            if error.end == shard.samples:
                self.ends[n] = error.start, str(error)
            raise BadSample(shard.path, f"sample {position}", str(error), self._id_from(n, error.end)) from None
        label = class_number(found.members.get(LABEL_EXTENSION)) if self.index.classes is not None else -1
        if label is None or label >= len(self.index.classes or ()):
            why = "no label, or a label that is not a number" if label is None else "a label that is not one of the classes"
            raise BadSample(shard.path, found.key, why, sample_id + 1)
        return Sample(sample_id, found.key, found.members[found.image], label)

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds this sample."""
        return int(np.searchsorted(self.first, sample_id, side="right")) - 1

    def _position(self, n, sample_ids):
        """The position in shard n of a sample, or of several. It is not their order if the index is a choice of images."""
        order = sample_ids - self.first[n]
        return order if self.index.kept is None else self.index.kept[n][order]

    def _id_from(self, n, position):
        """The id of the first sample of the index at this position of shard n or after it."""
        kept = self.index.kept
        return int(self.first[n] + (position if kept is None else np.searchsorted(kept[n], position)))

    def _remote(self, n, sample_id, planned):
        shard = self.index.shards[n]
        if not planned:  # a separate pass, because the planned pass does not keep this sample
            return RemoteShard(shard, np.arange(shard.samples) == self._position(n, sample_id))
        lane = int(self.expected[np.searchsorted(self.expected, sample_id * self.lanes)]) % self.lanes
        if (n, lane) not in self.passes:
            low, high = np.searchsorted(self.expected, self.first[n : n + 2] * self.lanes)
            here, lane_of_sample = np.divmod(self.expected[low:high], self.lanes)
            wanted = np.zeros(shard.samples, bool)
            wanted[self._position(n, here[lane_of_sample == lane])] = True
            self.passes[n, lane] = RemoteShard(shard, wanted)
        return self.passes[n, lane]

    def _read_local(self, n, shard, position):
        """A sample. An unreadable file is opened once more: its server may have replaced it."""
        for again in (True, False):
            try:
                return self._open_local(n, shard).read(position)
            except OSError as error:
                if n in self.local:
                    self.local.pop(n).close()
                if not again:
                    raise Lost(position, position + 1, str(error)) from None

    def _open_local(self, n, shard):
        if n not in self.local:
            if len(self.local) >= self.open_shards:
                self.local.popitem(last=False)[1].close()
            cache = self.index.cache_dir
            path = cached(shard, cache) if cache and is_remote(shard.path) else shard.path
            try:
                self.local[n] = retried(lambda: _local_shard(shard, path), path, (OSError,))
            except OSError as error:
                raise Lost(0, shard.samples, str(error)) from None
        self.local.move_to_end(n)
        return self.local[n]

    def close(self) -> None:
        for shards in (self.local, self.passes):
            while shards:
                shards.popitem()[1].close()

    def __del__(self):
        self.close()


class LocalShard:
    """A shard in a local file. A damaged part loses its samples. The two ends of the shard show both ends of one part. If there
    are several parts, the samples between them are lost too, unless no sample is missing.
    """

    def __init__(self, shard: Shard, path: str):
        damages: list[tuple[int, str]] = []
        self.samples: list[TarSample | None] = []
        try:
            for sample in local_samples(path, damages=damages):
                self.samples.append(sample)
        except tarfile.TarError as error:
            damages.append((len(self.samples), str(error)))
        missing = shard.samples - len(self.samples)
        if missing < 0 or (missing and not damages):
            raise RunError(f"{path} holds {len(self.samples)} samples, its index says {shard.samples}; delete the index.json "
                           "beside it to index again")  # fmt: skip
        if missing:
            start, end = damages[0][0], damages[-1][0]
            self.samples[start:end] = [None] * (end - start + missing)
        self.damage = damages[0][1] if damages else ""
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, position: int) -> TarSample:
        """A sample. Raises Lost for one in a damaged part or if the file has become shorter, and OSError."""
        if (sample := self.samples[position]) is None:
            usable = (n for n in range(position, len(self.samples)) if self.samples[n])
            start = next((n for n in range(position, -1, -1) if self.samples[n]), -1) + 1
            raise Lost(start, next(usable, len(self.samples)), f"the shard is corrupt: {self.damage}")
        members = {e: os.pread(self.fd, place[1], place[0]) for e, place in sample.members.items() if place}
        if any(len(data) != sample.members[e][1] for e, data in members.items()):
            raise Lost(position, position + 1, "the shard has become shorter since it was opened")
        return TarSample(sample.key, members)

    def close(self) -> None:
        os.close(self.fd)


def _local_shard(shard, path):
    try:
        return LocalShard(shard, path)
    except OSError as error:
        if error.errno == errno.EMFILE:  # not a fault of the shard
            raise RunError("too many open files; pass fewer --workers, or raise the limit with ulimit -n 4096") from None
        raise


def cached(shard: Shard, folder: str) -> str:
    """The path of a local copy of a remote shard, which is fetched if necessary. Raises Lost or RunError."""
    path = cache_path(shard, folder)
    if path.exists() and path.stat().st_size == shard.bytes:
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            copy(shard.path, file, (shard.bytes, shard.sha256))
    except RemoteError as error:
        raise Lost(0, shard.samples, str(error)) from None
    except OSError as error:
        raise RunError(f"--cache-dir {folder}: cannot store {shard.name} ({error}); free space, or omit --cache-dir") from None
    return str(path)


class RemoteShard:
    """One pass over a remote shard. Holds each wanted sample from its reading until its use.

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
        """A wanted sample, once. Raises Lost if it cannot be read."""
        while position not in self.held:
            sample = self._next()
            if self.wanted[self.passed]:
                self.held[self.passed] = sample
            self.passed += 1
            if self.passed == self.end:
                self.close()
        return self.held.pop(position)

    def _next(self):
        """The next sample. A broken stream is opened again."""
        try:
            return retried(self._try_next, self.shard.path, (RemoteError, tarfile.TarError))
        except (RemoteError, tarfile.TarError) as error:
            raise Lost(self.passed, self.shard.samples, f"cannot be read further: {error}") from None

    def _try_next(self):
        try:
            source = self.source or self._open()
            sample = next(self.samples)
            if self.passed + 1 == self.shard.samples:
                self._check_whole(source)
            return sample
        except (RemoteError, tarfile.TarError):
            self.close()
            raise

    def _open(self):
        done = self.passed
        self.source = source = Source(self.shard.path)
        tar = open_tar(source, "r|", bufsize=BLOCK)

        def take(member, position):
            wanted = done <= position < self.shard.samples and self.wanted[position]
            return cast(IO[bytes], tar.extractfile(member)).read() if wanted else None

        self.samples = tar_samples(read_members(tar, self.shard.bytes), take, self.shard.samples)
        for _ in range(done):
            next(self.samples)
        return source

    def _check_whole(self, source):
        """Read to the end. A stream that breaks off after the last sample's header may have lost a part of that sample."""
        while source.size <= self.shard.bytes and source.read(BLOCK):
            pass
        if source.size < self.shard.bytes:
            raise RemoteError(f"ends after {source.size} of {self.shard.bytes} bytes")
        if (source.size, source.hash.hexdigest()) != (self.shard.bytes, self.shard.sha256):
            raise other_shard(self.shard.path)

    def close(self) -> None:
        if self.source:
            self.source.close()
            self.source, self.samples = None, iter(())
