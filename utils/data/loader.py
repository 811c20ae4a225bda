"""Shards and views -> batches on the device."""

import re
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from utils.data.batch import Batch
from utils.data.index import Index
from utils.data.photometric import COLUMNS, photometric
from utils.data.reader import BadSample, Reader
from utils.data.shards import BatchPlan
from utils.data.views import DRAWS, ViewSpec, cut_views, draw, parameters_of
from utils.run.cpu import keep_freed_memory
from utils.run.flags import RunError
from utils.run.signals import leave_to_parent

NEIGHBOURS = 100  # that are tried in the place of an unusable sample


class Chunks(IterableDataset):
    """One worker's share of each batch, decoded and cut, a chunk for each batch: (crops and parameters of each spec, sample
    numbers, labels, unusable samples). The crops are finished uint8 views with `photometric_here`.
    """

    def __init__(self, index: Index, specs: list[ViewSpec], plan: BatchPlan, seed: int, photometric_here: bool):
        self.index, self.specs, self.plan, self.seed, self.photometric_here = index, specs, plan, seed, photometric_here

    def __iter__(self):
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        keep_freed_memory()
        reader = Reader(self.index)
        for epoch, steps in self.plan.epochs():
            mine = [np.array_split(samples, shares)[share] for samples in steps]
            lanes = None if self.plan.lane_of_place is None else np.array_split(self.plan.lane_of_place, shares)[share]
            reader.expect(np.concatenate([np.empty(0, int), *mine]), None if lanes is None else np.tile(lanes, len(mine)))
            for samples in mine:
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # a view is too small to share between cores
                try:
                    chunk = self.chunk(reader, epoch, samples)
                except RunError as error:  # raised in the training process instead, without this one's traceback
                    chunk = error
                finally:
                    torch.set_num_threads(threads)  # without workers this is the training process
                yield chunk

    def chunk(self, reader, epoch, planned):
        n = len(planned)
        crops = [torch.empty(n, s.count, s.size, s.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3) for s in self.specs]
        u = np.empty((n, sum(s.count for s in self.specs), DRAWS))
        numbers, labels, bad = torch.empty(n, dtype=torch.long), torch.empty(n, dtype=torch.long), []
        rows = 0
        for sample in planned:
            u[rows] = draw(self.seed, epoch, int(sample), u.shape[1])
            found = self._usable(reader, int(sample), u[rows], bad)
            if found is None:
                continue
            numbers[rows], labels[rows], views = found
            for view, place in zip(views, [place for crop in crops for place in crop[rows]], strict=True):
                place.copy_(view)
            rows += 1
        ends = np.cumsum([s.count for s in self.specs])[:-1]
        parts = zip(self.specs, np.split(u[:rows], ends, axis=1), strict=True)
        parameters = [torch.from_numpy(parameters_of(spec, part)) for spec, part in parts]
        crops = [crop[:rows] for crop in crops]
        if self.photometric_here:
            crops = [photometric(crop, p) for crop, p in zip(crops, parameters, strict=True)]
        return crops, parameters, numbers[:rows], labels[:rows], bad

    def _usable(self, reader, sample, u, bad):
        """(its number, label, views) of the sample, or of the next one that can be used; None if it may not be replaced."""
        number, planned = sample, True
        for _ in range(NEIGHBOURS):
            try:
                found = reader(number, planned)
                try:
                    return found.number, found.label, cut_views(found.image, self.specs, u)
                except MemoryError:
                    raise
                except Exception as error:  # PIL raises all kinds of errors for bytes that are no image
                    shard = self.index.shards[reader.shard_of(number)].path
                    reason = re.sub(" <.*>", "", f"{type(error).__name__}: {error}")  # PIL's has an address of memory
                    raise BadSample(shard, found.key, reason, number + 1) from None
            except BadSample as error:
                bad.append(error.record)
                if not self.plan.replace:
                    return None
                number, planned = error.following % self.index.total, False
        raise RunError(f"{NEIGHBOURS} samples in a row cannot be used; the first: {bad[-NEIGHBOURS]}")


def load_batches(
    index: Index,
    specs: list[ViewSpec],
    plan: BatchPlan,
    seed: int,
    workers: int,
    device: torch.device,
    photometric_on: str = "auto",
) -> Iterator[Batch]:
    """The batches, finished on the device. The result does not depend on the number of workers.

    photometric_on: "device", "worker", or "auto": the device if it is an accelerator. Both give the same views.
    """
    if device.type == "cpu":
        keep_freed_memory()  # of the batches too
    in_worker = photometric_on == "worker" or (photometric_on == "auto" and device.type == "cpu")
    chunks = DataLoader(
        Chunks(index, specs, plan, seed, in_worker),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_to_parent,
    )
    batches = _finished(_until_a_worker_dies(chunks), specs, workers, device, in_worker)
    return _beside_the_step(batches, device) if device.type == "cuda" else batches


def _finished(stream, specs, workers, device, in_worker):
    for parts in zip(*[stream] * max(workers, 1), strict=True):  # one chunk of every worker makes a batch
        for part in parts:
            if isinstance(part, RunError):
                raise RunError(str(part))  # `part` itself would keep the workers alive: its traceback holds this frame
        crops, parameters, samples, labels, bad = zip(*parts, strict=True)
        views = []
        for i, spec in enumerate(specs):
            # chunks of n x count x 3 x H x W; pinned each, their sum is not
            view = torch.cat([c[i].flatten(0, 1).to(device, non_blocking=True) for c in crops])
            if not in_worker:
                view = photometric(view, torch.cat([p[i] for p in parameters]).view(-1, len(COLUMNS)))
            views.append(view if spec.count == 1 else view.unflatten(0, (-1, spec.count)))
        flips = [torch.cat([p[i] for p in parameters])[..., -1].bool() for i in range(len(specs))]
        samples, labels = (torch.cat(x).to(device, non_blocking=True) for x in (samples, labels))
        yield Batch(views, flips, samples, labels, sum(bad, []))


def _beside_the_step(batches, device):
    """Copies and photometric work on a CUDA stream of their own: when a batch is asked for, the device still computes the step
    before, which was only launched, and does both at once.
    """
    side = torch.cuda.Stream(device)
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        step = torch.cuda.current_stream(device)
        step.wait_stream(side)
        for x in (*batch.views, batch.sample_ids, batch.labels):
            x.record_stream(step)  # or its memory could be given to the next batch while the step reads it
        yield batch


def _until_a_worker_dies(chunks):
    """The chunks. A worker that is killed while it hands one over breaks its connection before torch hears of its death."""
    try:
        yield from chunks
    except (OSError, EOFError):
        if chunks.num_workers:
            time.sleep(10)  # until torch's signal handler names the worker, by a RuntimeError
        raise
