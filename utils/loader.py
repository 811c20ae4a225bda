"""Shards and views -> batches on the device."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from utils import dist
from utils.index import Index
from utils.photometric import photometric
from utils.shards import Reader, epoch_plan
from utils.views import DRAWS, ViewSpec, color_parameters, cut, decode, draw


@dataclass
class Batch:
    """This process's part of a global batch. A view is n x 3 x H x W, or n x count x 3 x H x W if its spec counts several."""

    views: list[torch.Tensor]
    index: torch.Tensor  # n, sample numbers
    label: torch.Tensor  # n, -1 where there is none


class Chunks(IterableDataset):
    """One worker's share of each batch, decoded and cut: (crops, parameters, sample numbers, labels), a chunk for each batch.

    `batches` is called in the worker and yields (epoch, this process's sample numbers) for each step.
    """

    def __init__(self, index: Index, specs: list[ViewSpec], batches: Callable[[], Iterable], seed: int):
        self.index, self.specs, self.batches, self.seed = index, specs, batches, seed

    def __iter__(self):
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = Reader(self.index)
        threads = torch.get_num_threads()
        for epoch, samples in self.batches():
            torch.set_num_threads(1)  # crops are too small to share between cores
            chunk = self.chunk(reader, epoch, np.array_split(samples, shares)[share])
            torch.set_num_threads(threads)  # without workers this is the training process
            yield chunk

    def chunk(self, reader, epoch, samples):
        crops = [torch.empty(len(samples), s.count, 3, s.size, s.size, dtype=torch.uint8) for s in self.specs]
        draws = np.empty((len(samples), sum(s.count for s in self.specs), DRAWS))
        labels = torch.empty(len(samples), dtype=torch.long)
        for i, sample in enumerate(samples):
            data, labels[i] = reader(sample)
            image = decode(data)
            draws[i] = draw(self.seed, epoch, int(sample), draws.shape[1])
            view = 0
            for spec, out in zip(self.specs, crops, strict=True):
                for j in range(spec.count):
                    out[i, j] = cut(image, spec, draws[i, view])
                    view += 1
        ends = np.cumsum([s.count for s in self.specs])[:-1]
        parts = zip(self.specs, np.split(draws, ends, axis=1), strict=True)
        parameters = [torch.from_numpy(color_parameters(spec, u)) for spec, u in parts]
        return crops, parameters, torch.from_numpy(samples), labels


def load(
    index: Index, specs: list[ViewSpec], batches: Callable[[], Iterable], seed: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches, finished on the device. The result does not depend on the number of workers."""
    chunks = DataLoader(
        Chunks(index, specs, batches, seed), batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"
    )
    stream = iter(chunks)
    for parts in zip(*[stream] * max(workers, 1), strict=True):  # one chunk of every worker makes a batch
        crops, parameters, samples, labels = zip(*parts, strict=True)
        views = [
            _finish(spec, [c[i] for c in crops], torch.cat([p[i] for p in parameters]), device) for i, spec in enumerate(specs)
        ]
        samples, labels = (torch.cat(x).to(device, non_blocking=True) for x in (samples, labels))
        yield Batch(views, samples, labels)


def _finish(spec, chunks, parameters, device):
    crops = torch.cat([chunk.to(device, non_blocking=True) for chunk in chunks])  # the chunks are pinned, their sum is not
    view = photometric(crops, parameters)
    if spec.count == 1:
        return view.squeeze(1).contiguous(memory_format=torch.channels_last)
    return view


def training_batches(index: Index, batch: int, seed: int, epochs: range, lanes: int | None = None) -> Callable[[], Iterable]:
    """This process's part of every global batch of these epochs, in order."""
    return partial(_training_batches, index, batch, seed, epochs, lanes, dist.rank(), dist.world())


def _training_batches(index, batch, seed, epochs, lanes, rank, world):
    n = batch // world
    for epoch in epochs:
        for samples in epoch_plan(index, batch, seed, epoch, lanes):
            yield epoch, samples[rank * n : (rank + 1) * n]


def evaluation_batches(index: Index, batch: int) -> Callable[[], Iterable]:
    """This process's part of the index, each sample on exactly one process, in order. `batch` is global."""
    return partial(_evaluation_batches, index, batch, dist.rank(), dist.world())


def _evaluation_batches(index, batch, rank, world):
    mine = np.array_split(np.arange(index.total), world)[rank]
    n = max(1, batch // world)
    for start in range(0, len(mine), n):
        yield 0, mine[start : start + n]
