"""Count what a training step asks of a GPU, without one: operations, copies and waits of the host.

    python tests/launches.py                          every method: ResNet-50, 32 images
    python tests/launches.py --methods moco --top 20  its most frequent operations

The step of main_pretrain.py runs in bf16 with fake CUDA tensors: shapes without content. An operation counts as one launch,
although a library may need several. Views and new memory launch nothing. `color` is the work of `--photometric device`.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import step
from methods import METHODS
from utils.data.photometric import COLUMNS
from utils.data.photometric_batch import photometric_batch
from utils.data.views import ViewSpec, draw, parameters_of
from utils.evaluation.fit import random_batch
from utils.learning.contrast import counters_on_host_
from utils.learning.method import Step
from utils.run.engine import Votes
from utils.run.flags import Parser, one_line_errors, positive
from utils.run.log import Log

MEMORY_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
KINDS = ("launches", "pinned copies", "pageable copies", "copies back", "waits")


class Launches(TorchDispatchMode):
    """A context that counts operations on fake CUDA tensors. found: kind -> number; operations: name -> number.

    A pinned copy goes from pinned memory to the device, a pageable one from other memory, a copy back to the host. Waits are
    copies that are not `non_blocking`.
    """

    def __init__(self):
        super().__init__()
        self.found, self.operations = Counter(dict.fromkeys(KINDS, 0)), Counter[str]()
        self.pinned: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._pin_memory.default:  # fake tensors cannot be pinned
            self.pinned.append(args[0].untyped_storage())
            return args[0]
        with self:  # a composite operation, which inference mode leaves whole
            result = function.decompose(*args, **kwargs) if function.namespace == "aten" else NotImplemented
        if result is not NotImplemented:
            return result
        name = function._opname
        result = function(*args, **kwargs) if not name.startswith("_fused") else None  # they have no fake form, and no result
        tensors = [x for x in tree_leaves([args, kwargs, result]) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if "cuda" not in devices or function.is_view or name in MEMORY_ONLY or function.namespace == "prim":
            return result
        if len(devices) > 1 and name in ("_to_copy", "copy_"):
            self._copy(function, args, kwargs, result)
        else:
            self.found["launches"] += launches_of(name, args)
            self.operations[name] += launches_of(name, args)
        return result

    def _copy(self, function, args, kwargs, result):
        source = args[0] if function._opname == "_to_copy" else args[1]
        waits = not (kwargs.get("non_blocking") or (function._opname == "copy_" and len(args) > 2 and args[2]))
        if result.device.type != "cuda":
            kind = "copies back"
        else:
            pinned = any(x._cdata == source.untyped_storage()._cdata for x in self.pinned)
            kind = "pinned copies" if pinned else "pageable copies"
        self.found[kind] += 1
        self.found["waits"] += waits
        self.operations[kind] += 1


def launches_of(name: str, args: tuple) -> int:
    """1, but one for each gradient of a convolution, and for each group of tensors in a `_foreach` or fused operation."""
    if name == "convolution_backward":
        return sum(args[10])
    if isinstance(args[0], (list, tuple)) and name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor)]
        group = (110, 64, 48, 36, 30)[len(lists) - 1]  # tensors in the arguments of one kernel (torch's MultiTensorApply.cuh)
        blocks = sum(-(-x.numel() // 65536) for x in args[0])
        return max(-(-len(args[0]) // group), -(-blocks // 320))
    return 1


class Unread(Votes):
    """The votes of a GPU: one copy to it and one back, which the host reads a step later. Fake tensors have no events."""

    def __call__(self, inputs, bad, *wishes):
        own = torch.tensor(wishes, dtype=torch.float32).pin_memory().to(self.device, non_blocking=True)
        ballot = torch.cat([bad.float().view(1), own])
        torch.empty(len(ballot)).copy_(ballot, non_blocking=True)
        return ballot[0], [0] * len(wishes)


@torch.no_grad()
def backward(loss: torch.Tensor) -> None:
    """The backward pass. torch's engine needs the device; the nodes of the graph do not, so this calls them in order."""
    order: list[Any] = []
    seen, stack = set(), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((before, False) for before, _ in node.next_functions)]
    gradients: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        given = gradients.pop(node, {})
        for i, gradient in given.items():  # as the engine does
            wanted = node._input_metadata[i]
            gradient = gradient.sum_to_size(wanted.shape) if gradient.shape != wanted.shape else gradient
            given[i] = gradient.to(wanted.dtype)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
            continue
        outputs = getattr(node, "apply", node)(*(given.get(i) for i in range(len(node._input_metadata))))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (before, i), gradient in zip(node.next_functions, outputs, strict=False):
            if before is not None and gradient is not None:
                there = gradients.setdefault(before, {})
                there[i] = there[i] + gradient if i in there else gradient


def count(args, case: str) -> dict[str, Launches]:
    """What `case` asks of a GPU in a step: `step`, and `color`, with which `--photometric device` prepares its batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    flags = step.flags_of(args, case, "bf16" if case not in ("cmc", "insdis") else "fp32", args.batch_size)
    specs = METHODS[flags.method].views(flags)
    drawn = parameters(specs, args.batch_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),  # torch disables autocast
        mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),  # without a GPU
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),  # and takes fake tensors one by one
        FakeTensorMode(allow_non_fake_inputs=True),
        Log(Path(folder), (0, 0), 2**40, 2**40, args.batch_size, None) as log,
    ):
        device = torch.device("cuda:0")
        with device:
            method = METHODS[flags.method](flags, args.samples).train()
        counters_on_host_(method)
        train = step.train_step(method, method, flags, Unread(device, True), backward)
        batch = random_batch(specs, args.batch_size, device)
        for i, view in enumerate(batch.views):  # as the workers make them
            batch.views[i] = view.flatten(0, -4).contiguous(memory_format=torch.channels_last).view(view.shape)
        log.epoch(0)
        for number in range(2):  # momentum exists from the second step on
            with Launches() as of_step:
                loss, stats = train(batch, Step(number, 1000, 0))
                log.add(number, loss, stats, 0.1, [])
        of_color = Launches()
        for size in dict.fromkeys(spec.size for spec in specs):  # as the loader does
            same = [i for i, spec in enumerate(specs) if spec.size == size]
            views = torch.cat([batch.views[i].flatten(0, -4) for i in same])
            with of_color:
                photometric_batch(views, np.concatenate([drawn[i].reshape(-1, len(COLUMNS)) for i in same]))
    return {"step": of_step, "color": of_color}


def parameters(specs: list[ViewSpec], n: int) -> list[np.ndarray]:
    """Parameters of the colours of n images, as workers draw them: n x count x len(COLUMNS) of each spec."""
    counts = [spec.count for spec in specs]
    u = np.stack([draw(0, 0, i, sum(counts)) for i in range(n)])
    return [parameters_of(*drawn) for drawn in zip(specs, np.split(u, np.cumsum(counts)[:-1], axis=1), strict=True)]


def main(argv=None):
    parser = Parser(prog="tests/launches.py", description=__doc__.split("\n\n")[0])
    step.add_sizes(parser, batch_size=32, samples=1281167)
    parser.add_argument("--top", type=int, default=0, help="print this number of the most frequent operations")
    args = parser.parse_args(argv)
    with one_line_errors("tests/launches.py"):
        positive(step.SIZES, args)
        found = {case: count(args, case) for case in args.methods}
    print(f"{args.arch}, {args.size} pixels, {args.batch_size} images, torch {torch.__version__}\n{'':24}"
          + "".join(f"{kind:>16}" for kind in KINDS))  # fmt: skip
    for case, parts in found.items():
        for part, counted in parts.items():
            print(f"{f'{case} {part}':24}" + "".join(f"{counted.found[kind]:16}" for kind in KINDS))
            for name, times in counted.operations.most_common(args.top):
                print(f"{'':24}{times:16} {name}")
    print(json.dumps({case: {part: dict(counted.found) for part, counted in parts.items()} for case, parts in found.items()}))


if __name__ == "__main__":
    main()
