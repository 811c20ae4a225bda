"""Count the bytes of a step's collectives and the memory of its tensors, operation by operation."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from utils.run import dist


class Tracer(TorchDispatchMode):
    """A context around the building of a model and its steps, with real or fake tensors.

    received: collective -> bytes that reach this process from others. An all-reduce counts as a ring: 2 (W - 1) / W of its
    tensors. peak: the most bytes that tensors have held at a time since `start`. It does not contain the memory of a device's
    libraries, such as cuDNN's workspace and the allocator's gaps. work: (FLOPs, bytes read and written) of each operation
    since `start`, except views and collectives.
    """

    def __init__(self):
        super().__init__()
        self.received: Counter[str] = Counter()
        self.work: list[tuple[float, float]] = []
        self.counting, self.held, self.peak, self.known = False, 0, 0, set()

    def start(self) -> None:
        """Begin to count; existing tensors count as held."""
        self.counting, self.peak = True, self.held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.counting and function.namespace == "c10d":
            name, received = received_by(function, args)
            self.received[name] += received
        result = function(*args, **(kwargs or {}))
        if self.counting and function.namespace != "c10d" and not _is_view(function):
            count = flop_registry.get(function._overloadpacket)
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
            self.work.append((count(*args, **(kwargs or {}), out_val=result) if count else 0.0, moved))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes()).atexit = False

    def _release(self, key, size):
        self.known.discard(key)
        self.held -= size


def _is_view(function):
    """Whether its result shares the memory of an argument, unchanged."""
    return any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)


def received_by(function, args) -> tuple[str, int]:
    """(the collective's name, bytes that this process receives). Raises NotImplementedError for an unknown one."""
    name, world = function._opname, dist.world()
    if name == "allreduce_":
        return "all_reduce", sum(2 * (world - 1) * x.nbytes // world for x in args[0])
    if name == "_allgather_base_":
        return "all_gather", (world - 1) * args[1].nbytes
    if name == "alltoall_base_":
        output, _, _, rows, _ = args[:5]
        return "all_to_all", (len(output) - rows[dist.rank()]) * (output.nbytes // len(output))
    raise NotImplementedError(f"{function}: this collective is not counted yet")
