"""Helpers for several processes. All of them also work in a single process without a process group."""

import itertools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from inspect import signature

import numpy as np
import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = 1800.0  # seconds
_store: td.Store | None = None  # of the process group
_limit, _told = TIMEOUT, 0.0  # its timeout; the time of the last `alive`
_calls = itertools.count()  # the same on every process


def setup(device_flag: str, timeout: float = TIMEOUT) -> torch.device:
    """Join the process group that torchrun describes, if any, and choose this process's device.

    device_flag: auto prefers cuda, then mps. timeout: seconds that a process waits for another one. Raises ValueError.
    """
    if device_flag == "auto":
        device_flag = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device_flag)
    if device.type == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not gpus:
            raise ValueError("--device cuda: this machine shows no CUDA device; pass --device auto")
        if local_rank >= gpus:
            raise ValueError(f"--nproc_per_node: process {local_rank} has no GPU; pass at most {gpus}, as many as there are")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    global _store, _limit
    if "WORLD_SIZE" in os.environ and not td.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, world = next(td.rendezvous("env://", timeout=limit))
        # when torchrun restarts all processes, its store may still hold values of the attempt before
        store = td.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        bound = device if backend == "nccl" else None  # connects at once: a fault shows here, not in the first collective
        td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit, device_id=bound)
        _store, _limit = store, timeout
    return device


def teardown() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def data_parallel(model: nn.Module, device: torch.device, **options) -> nn.Module:
    """DDP with these options, if there are several processes. Buffers (BatchNorm statistics, queues) are not broadcast.

    At its start a newer torch does it once, but not for those on another device, such as counters in CPU memory.
    """
    if world() == 1:
        return model
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.15
    options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    elsewhere = [name for name, buffer in model.named_buffers() if buffer.device.type != device.type]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, elsewhere)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)


def rank() -> int:
    """The number of this process, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return td.get_world_size() if td.is_initialized() else 1


def broadcast_object(obj):
    """The object of the first process, on every process. Pickle-based, between our own processes only."""
    box = [obj]
    if world() > 1:
        td.broadcast_object_list(box, src=0)
    return box[0]


def first_process_does(fn):
    """Run `fn` on the first process; return its result, or raise its ValueError or OSError, on every process.

    It may take longer than --dist-timeout if it calls `alive` meanwhile.
    """
    outcome, done = None, f"call {next(_calls)}"
    if rank() == 0:
        try:
            outcome = fn()
        except (ValueError, OSError) as error:
            outcome = error
        if _store is not None:
            _store.set(done, "")
    else:
        _wait([done])
    outcome = broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def first_node_does(fn: Callable[[int, int], None]) -> None:
    """Run fn(part, parts) on each process of the first node. The first process waits for the others, while one is alive."""
    call, parts = next(_calls), int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _store is not None else 1
    if rank() < parts and os.environ.get("GROUP_RANK", "0") == "0":
        fn(rank(), parts)
        if _store is not None:
            _store.set(f"call {call} {rank()}", "")
    if rank() == 0:
        _wait([f"call {call} {part}" for part in range(parts)])


def alive() -> None:
    """Tell the processes that wait for this one that it advances."""
    global _told
    if _store is not None and time.monotonic() - _told > 1:
        _told = time.monotonic()
        _store.add("alive", 1)


def _wait(keys):
    """Wait until the store has these keys. Raises DistError if no process was alive for --dist-timeout seconds."""
    seen, since = -1, time.monotonic()
    while _store is not None:
        try:
            return _store.wait(keys, timedelta(seconds=min(_limit, 5)))
        except td.DistStoreError:
            now = _store.add("alive", 0)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > _limit:
                raise td.DistStoreError(f"no sign of it for {_limit:g} s") from None


def gather_objects(obj) -> list:
    """The object of each process, in rank order, on every process. Pickle-based, between our own processes only."""
    out = [obj] * world()
    if world() > 1:
        td.all_gather_object(out, obj)
    return out


@torch.no_grad()
def gather(x: torch.Tensor) -> torch.Tensor:
    """n x ... on each process -> (world * n) x ... on every process, in rank order. No gradient."""
    if world() == 1:
        return x
    out = x.new_empty(world() * x.shape[0], *x.shape[1:])
    renamed = hasattr(td, "all_gather_single")  # in torch 2.14
    all_gather = td.all_gather_single if renamed else td.all_gather_into_tensor
    all_gather(out, x.detach().contiguous())
    return out


def to_first(x: torch.Tensor) -> torch.Tensor | None:
    """The rows of all processes, any number each, in rank order and in CPU memory, on the first process. None on the others."""
    counts = gather_objects(len(x))
    if rank() > 0:
        td.send(x.contiguous(), 0)
        return None
    rows = torch.empty(sum(counts), *x.shape[1:], dtype=x.dtype)
    for sender, part in enumerate(rows.split(counts)):
        received = x if sender == 0 else x.new_empty(part.shape)
        if sender > 0:
            td.recv(received, sender)
        part.copy_(received)
    return rows


class _Total(torch.autograd.Function):  # torch's own has another name in each of the releases that we support
    @staticmethod
    def forward(ctx, x):
        return total(x.clone(memory_format=torch.contiguous_format))

    backward = forward  # gradients are summed the same way


def gather_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """As `gather`, of n x C; backward sums the gradients of all processes' losses for this process's rows."""
    before, after = rank() * len(x), (world() - 1 - rank()) * len(x)
    return total_with_gradient(nn.functional.pad(x, (0, 0, before, after)))


def total_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """Sum over processes, a new tensor; backward sums the gradients of all processes' losses."""
    return _Total.apply(x) if world() > 1 else x


def permute(x: torch.Tensor, permutation: np.ndarray) -> torch.Tensor:
    """This process's slice of the global batch (rank order) reordered by `permutation`, known to every process.

    x: n x ..., this process's slice. permutation: N = world * n integers. Row i of the result over all processes is row
    permutation[i] of the input over all processes. Each row is sent once, directly to its new owner.
    """
    n = x.shape[0]
    if world() == 1:
        return x[on_device(permutation, x.device)]
    owner, row = permutation // n, permutation % n
    slices = owner.reshape(world(), n)  # the sender of each row that process p will hold
    mine = slices == rank()
    outgoing = row.reshape(world(), n)[mine]  # grouped by receiver, in the receiver's order
    sends = mine.sum(1).tolist()
    receives = np.bincount(slices[rank()], minlength=world()).tolist()
    arrived = torch.empty_like(x, memory_format=torch.contiguous_format)
    td.all_to_all_single(arrived, x[on_device(outgoing, x.device)].contiguous(), receives, sends)
    # rows arrive grouped by sender; a stable sort of the senders gives the place of each
    place = np.argsort(slices[rank()], kind="stable")
    return arrived[on_device(np.argsort(place), x.device)]


def on_device(indices: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Indices that the host has drawn, on the device, without waiting: CUDA copies pinned memory in the background."""
    host = torch.from_numpy(indices) if isinstance(indices, np.ndarray) else indices
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def own(x, n: int):
    """This process's n entries of x, which holds n for each process, in rank order."""
    return x[rank() * n :][:n]


def from_first_(tensors: list[torch.Tensor]) -> None:
    """Overwrite these tensors with those of the first process."""
    if world() > 1:
        for x in tensors:
            td.broadcast(x, src=0)


def largest(x: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over processes, in place."""
    if world() > 1:
        td.all_reduce(x, td.ReduceOp.MAX)
    return x


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place."""
    if world() > 1:
        td.all_reduce(x)
    return x
