"""Shards and views -> batches on the device."""

import errno
import functools
import gc
import itertools
import multiprocessing
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from utils.data.batch import Batch
from utils.data.index import Index
from utils.data.limits import MORE_MEMORY, SHARDS, open_shards
from utils.data.photometric import COLUMNS, photometric
from utils.data.photometric_batch import photometric_batch
from utils.data.reader import BadSample, Reader
from utils.data.remote import is_remote
from utils.data.shards import BatchPlan
from utils.data.views import NUMBERS, ViewSpec, cut_views, draw, parameters_of
from utils.run.cpu import keep_freed_memory
from utils.run.flags import RunError
from utils.run.signals import leave_to_parent

NEIGHBOURS = 100  # number of samples that are tried instead of an unusable one


class Chunk(NamedTuple):
    """A worker's part of a batch: n images."""

    crops: list[torch.Tensor]  # of each spec: n x count x 3 x size x size uint8; finished views if the worker colors them
    parameters: list[torch.Tensor]  # of each spec: n x count x len(COLUMNS)
    sample_ids: torch.Tensor  # n
    labels: torch.Tensor  # n
    bad: list[dict[str, str]]


class Chunks(IterableDataset):
    """A worker's chunk of each batch, in order. photometric_here: whether the worker applies `photometric`."""

    def __init__(self, index: Index, specs: list[ViewSpec], plan: BatchPlan, seed: int, photometric_here: bool):
        self.index, self.specs, self.plan, self.seed, self.photometric_here = index, specs, plan, seed, photometric_here
        self.open_shards = SHARDS
        self.streamed = not index.cache_dir and any(is_remote(shard.path) for shard in index.shards)

    def __iter__(self) -> Iterator[Chunk | RunError]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        keep_freed_memory()
        mine = None if (lanes := self.plan.lane_of_place) is None else np.array_split(lanes, shares)[share]
        count = 1 if mine is None else len(np.unique(mine))  # an open shard takes 600 bytes for each of its samples
        reader = Reader(self.index, max(2, min(self.open_shards, count * self.plan.shards_of_lane)))
        for epoch, steps in self.plan.epochs():
            if self.streamed:
                self._expect(reader, steps, mine, share, shares)
            for step in steps:
                sample_ids = np.array_split(step, shares)[share]
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # a view is too small for several cores
                chunk: Chunk | RunError
                try:
                    chunk = self.chunk(reader, epoch, sample_ids)
                    if worker:
                        _share_(chunk, shares)
                except RunError as error:  # the training process raises it, without the worker's traceback
                    chunk = error
                finally:
                    torch.set_num_threads(threads)  # without workers this is the training process
                yield chunk

    def _expect(self, reader, steps, mine, share, shares):
        """Announce the samples of an epoch, in the smallest type: each worker of a node keeps its own."""
        kind = np.min_scalar_type(self.index.total)
        parts = [np.array_split(sample_ids, shares)[share].astype(kind) for sample_ids in steps]
        lanes = None if mine is None else np.tile(mine.astype(np.min_scalar_type(mine.max(initial=0))), len(parts))
        reader.expect(np.concatenate([np.empty(0, kind), *parts]), lanes)

    def chunk(self, reader: Reader, epoch: int, planned: np.ndarray) -> Chunk:
        """The views of these sample ids, or of the samples that replace them."""
        Image.MAX_IMAGE_PIXELS = self.index.max_pixels
        n, counts = len(planned), [spec.count for spec in self.specs]
        crops = [torch.empty(n, s.count, s.size, s.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3) for s in self.specs]
        numbers = np.empty((n, sum(counts), NUMBERS))
        found: list[tuple[int, int]] = []  # sample id, label
        bad: list[dict[str, str]] = []
        for sample_id in planned.tolist():
            places = [place for crop in crops for place in crop[len(found)]]
            numbers[len(found)] = u = draw(self.seed, epoch, sample_id, sum(counts))
            if usable := self._usable(reader, sample_id, u, places, bad):
                found.append(usable)
        n = len(found)
        crops, of_specs = [crop[:n] for crop in crops], np.split(numbers[:n], np.cumsum(counts)[:-1], axis=1)
        parameters = [torch.from_numpy(parameters_of(spec, u)) for spec, u in zip(self.specs, of_specs, strict=True)]
        if self.photometric_here:
            crops = [photometric(crop, p) for crop, p in zip(crops, parameters, strict=True)]
        sample_ids, labels = torch.tensor(found, dtype=torch.long).view(n, 2).unbind(1)
        return Chunk(crops, parameters, sample_ids, labels, bad)

    def _usable(self, reader, sample_id, u, places, bad):
        """Write the views of the planned sample, or of the next usable one, into `places`. u: the draws of the planned sample.

        Returns its sample id and label, or None if the planned sample may not be replaced.
        """
        for attempt in range(NEIGHBOURS):
            try:
                sample = reader(sample_id, attempt == 0)
                try:
                    cut_views(sample.image, self.specs, u, places)
                    return sample_id, sample.label
                except MemoryError:
                    raise
                except Exception as error:  # PIL raises errors of many types for bytes that are no image
                    shard = self.index.shards[reader.shard_of(sample_id)].path
                    reason = re.sub(" <.*>", "", f"{type(error).__name__}: {error}")  # PIL's contains a memory address
                    raise BadSample(shard, sample.key, reason, sample_id + 1) from None
            except BadSample as error:
                bad.append(error.record)
                if not self.plan.replace:
                    return None
                sample_id = error.following % self.index.total
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
    """The batches of the plan, finished on the device. They do not depend on the number of workers.

    photometric_on: "device", "worker", or "auto": the device if it is an accelerator. On a CPU all give the same bytes; a GPU
    rounds some otherwise. Raises RunError.
    """
    if device.type == "cpu":
        keep_freed_memory()  # also the memory of the batches
    in_worker = photometric_on == "worker" or (photometric_on == "auto" and device.type == "cpu")
    pin, chunks = device.type == "cuda", Chunks(index, specs, plan, seed, in_worker)
    chunks.open_shards = open_shards(specs, workers)
    loader = DataLoader(chunks, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=leave_to_parent)
    batches = _finished(_until_a_worker_dies(loader), specs, workers, device, in_worker)
    return _beside_the_step(batches, device) if device.type == "cuda" else batches


def _share_(chunk, workers):
    """Move the tensors to shared memory. The queue does it too, but a failure there loses the chunk without a message."""
    try:
        for tensor in (*chunk.crops, *chunk.parameters, chunk.sample_ids, chunk.labels):
            if tensor.numel():
                tensor.share_memory_()
    except RuntimeError as error:
        raise _lost(workers, str(error).splitlines()[0]) from None


def _lost(workers, why):
    fix = "pass fewer --workers or raise ulimit -n" if "open files" in why else MORE_MEMORY
    return RunError(f"--workers {workers}: a batch could not be handed over ({why}); {fix}")


def _finished(stream, specs, workers, device, in_worker):
    while parts := list(itertools.islice(stream, max(workers, 1))):  # one chunk of every worker makes a batch
        for part in parts:
            if isinstance(part, RunError):
                raise RunError(str(part))  # the traceback of `part` holds this frame, which would keep the workers alive
        if len(parts) < workers:
            raise _lost(workers, f"{len(parts)} of {workers} parts came")
        batch = _joined(parts, specs, device, in_worker)
        del parts, part  # their shared memory is free for the next chunks
        yield batch


def _joined(parts, specs, device, in_worker):
    views: list[torch.Tensor] = []
    parameters = [torch.cat([part.parameters[i] for part in parts]) for i in range(len(specs))]  # n x count x len(COLUMNS) each
    for _, same in itertools.groupby(range(len(specs)), lambda i: specs[i].size):  # views of one size are colored together
        numbers = list(same)
        # each chunk is pinned, their concatenation is not
        crops = [part.crops[i].flatten(0, 1).to(device, non_blocking=True) for i in numbers for part in parts]
        view = torch.cat(crops)
        if not in_worker:
            view = view.contiguous(memory_format=torch.channels_last)  # lost if a part has no image or one
            color = photometric if device.type == "cpu" else photometric_batch
            view = color(view, torch.cat([parameters[i].flatten(0, 1) for i in numbers]))
        for i, x in zip(numbers, view.split([parameters[i][..., 0].numel() for i in numbers]), strict=True):
            views.append(x if specs[i].count == 1 else x.unflatten(0, (-1, specs[i].count)))
    flips = [p[..., COLUMNS.index("flip")].bool() for p in parameters]
    sample_ids, labels = (
        torch.cat(x).to(device, non_blocking=True) for x in zip(*[(p.sample_ids, p.labels) for p in parts], strict=True)
    )
    return Batch(views, flips, sample_ids, labels, [record for part in parts for record in part.bad])


@functools.cache
def _side_stream(device):
    """One for all loaders of this process: each stream keeps the memory that its batches have used."""
    return torch.cuda.Stream(device)


def _beside_the_step(batches, device):
    """Prepare batches on a separate CUDA stream. A step is launched without waiting for its end, so the device computes the
    step and prepares the next batch at the same time.
    """
    side = _side_stream(device)
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        step = torch.cuda.current_stream(device)
        step.wait_stream(side)
        for x in (*batch.views, batch.sample_ids, batch.labels):
            x.record_stream(step)  # so that the next batch does not get this memory while the step reads it
        yield batch


def _until_a_worker_dies(chunks):
    """The chunks. A worker that is killed during a transfer breaks its connection, often before torch notices its death."""
    workers: list[multiprocessing.process.BaseProcess] = []
    try:
        gc.freeze()  # in a worker, a collection would write to every object of this process, and so copy it
        stream = iter(chunks)
        gc.unfreeze()
        workers = multiprocessing.active_children()
        yield from stream
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise _lost(chunks.num_workers, "too many open files") from None
        end = time.monotonic() + 10
        while workers and time.monotonic() < end:
            if dead := next((worker for worker in workers if worker.exitcode is not None), None):
                raise RunError(f"DataLoader worker (pid {dead.pid}) was killed or exited unexpectedly (code {dead.exitcode}). "
                               "Too little memory is a common reason: try fewer --workers") from None  # fmt: skip
            time.sleep(0.1)
        raise
