"""Features of an index by a frozen trunk: each image once over all processes, kept where they were computed, or in a file.

kNN, logistic regression and the measures during pre-training start from these.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.limits import check_workers
from utils.data.loader import load_batches
from utils.data.shards import evaluation_plan
from utils.data.views import ViewSpec
from utils.evaluation.frozen import Frozen
from utils.run import dist, flags
from utils.run.files import atomic
from utils.run.flags import Flags, Group, RunError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # of features that are kept
FIELDS = ("values", "labels", "sample_ids")  # of `Features`, in the file
Extract = Callable[[torch.Tensor], torch.Tensor]  # n x 3 x H x W uint8 -> n x C


@dataclass
class Features:
    """This process's part of an index: n images, in the order of their ids."""

    values: torch.Tensor  # n x C
    labels: torch.Tensor  # n, -1 for an image without a label
    sample_ids: torch.Tensor  # n
    unusable: int  # images of all processes that could not be used

    def __len__(self) -> int:
        return len(self.labels)


def add_flags(group: Group, whole: bool = False) -> None:
    """Add the flags of features. The default of --resize is None. whole: help for views of whole images."""
    default = "--size, the whole image" if whole else "8/7 of --size; of pixels: --size, the whole image"
    add = group.add_argument
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--resize", type=int,
        help=f"resize the shorter side of an image to this, then crop its centre; default: {default}")  # fmt: skip
    add("--interpolation", choices=["bicubic", "bilinear"], default="bicubic",
        help="how it is resized; bilinear is the test view of main_lincls.py")  # fmt: skip
    add("--layer", type=int, help="number of the layer whose features are used; default: the last")
    add("--dtype", choices=DTYPES, default="fp32", help="dtype in which features are kept; fp16 takes half the memory")
    add("--batch-size", type=int, default=256, identity=False, help="global batch: images of a step over all processes")
    add("--features", identity=False, metavar="FILE",
        help="load the features from this .safetensors file; if there is none, write it: the first process then holds "
             "the features of all processes in CPU memory")  # fmt: skip


def check(args: Namespace) -> None:
    """Raise ValueError for values of `add_flags` that cannot work."""
    flags.check_evaluation_flags(args)
    flags.positive(["--batch-size"], args)
    flags.in_range("--size", args.size, 1, math.inf)
    flags.in_range("--resize", args.resize, args.size, math.inf)
    if args.features and not args.features.endswith(".safetensors"):
        raise ValueError(f"--features {args.features}: must end with .safetensors; pass features.safetensors")
    if args.features and not find_spec("safetensors"):
        raise ValueError(f"--features {args.features}: needs the package safetensors; run pip install safetensors")
    check_workers([test_view(args)], max(1, args.batch_size // dist.world()), args.workers)


def test_view(args: Namespace) -> ViewSpec:
    """The central crop of a resized image."""
    return ViewSpec("test", args.size, resize=args.resize, bicubic=args.interpolation == "bicubic")


@torch.no_grad()
def features(args: Namespace, index: Index, view: ViewSpec, extract: Extract, device: torch.device, bad: BadSamples,
             ask: Callable[[], None] = lambda: None, dtype: torch.dtype = torch.float32,
             images: int | None = None, keep: torch.device | None = None) -> Features:  # fmt: skip
    """The features of this process's part of the index. Every image counts once over all processes.

    args: batch_size (global), seed, workers, photometric. ask: called before each step, equally often on all processes; it may
    raise. dtype, keep: of the result, and its device if it is another one. images: see `evaluation_plan`. Raises RunError if
    too many images are unusable.
    """
    images = min(images or index.total, index.total)
    plan, rows = evaluation_plan(index, args.batch_size, images), -(-images // dist.world())
    values, labels, ids, met = torch.empty(0, 0), [], [], []
    n = 0
    batches = load_batches(index, [view], plan, args.seed, args.workers, device, args.photometric)
    hide, steps = None if dist.rank() == 0 else True, -(-rows // max(1, args.batch_size // dist.world()))
    for batch in tqdm(batches, desc="features", total=steps, leave=False, disable=hide):
        ask()
        met += batch.bad
        found = extract(batch.views[0])
        if not values.numel():
            values = torch.empty(rows, found.shape[1], dtype=dtype, device=keep or device)
        values[n : n + len(found)] = found
        n += len(found)
        labels.append(batch.labels)
        ids.append(batch.sample_ids)
    bad.add(met)
    unusable = sum(len(part) for part in dist.gather_objects(met))
    count = dist.total(torch.tensor(n, device=device)).item()
    if count + unusable != images:
        raise RuntimeError(f"features of {count} images, {unusable} unusable, of {images} in the index")
    if not count:
        raise RunError(f"none of {unusable} images can be used; pass other shards")
    return Features(values[:n], torch.cat(labels).to(values.device), torch.cat(ids).to(values.device), unusable)


def of_sets(args: Flags, sets: dict[str, Index], frozen: Frozen, weights: str, device: torch.device,
            ask: Callable[[], None] = lambda: None) -> dict[str, Features]:  # fmt: skip
    """This process's part of the features of the frozen trunk's only chosen layer: from the file --features, or computed.

    args: those of `features`, and features, dtype, amp, output_dir, max_bad. All flags of the identity of the command must be
    ones that decide the features. weights: the hash of the trunk's weights. Raises ValueError, OSError, RunError.
    """
    keep = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    identity = flags.meaning(args) | {"weights": weights} | {name: index.hash for name, index in sets.items()}
    path = Path(args.features) if args.features else None
    if path and dist.first_process_does(path.exists):
        return load(path, identity, keep)
    (layer,) = frozen.layers
    bad = BadSamples(Path(args.output_dir), sum(index.total for index in sets.values()), args.max_bad)
    found = {}

    def extract(x):
        return frozen.features(x, args.amp)[layer]

    for name, index in sets.items():
        found[name] = features(args, index, test_view(args), extract, device, bad, ask, DTYPES[args.dtype], keep=keep)
        check_finite(found[name])
    if path:
        save(path, identity, found)
    return found


def check_finite(found: Features) -> None:
    """Raise RunError on every process if a feature is not a finite number, for example too large for fp16."""
    if dist.largest(found.values.isfinite().logical_not().any().float().view(1)).item():
        raise RunError("features are not finite: the weights have diverged, or a value is too large for --dtype fp16")


def save(path: Path, identity: dict[str, Any], sets: dict[str, Features]) -> None:
    """Write the rows of all processes into a .safetensors file. Every process calls it.

    identity: the values that decide the features; `load` compares it. Raises ValueError or OSError on every process.
    """
    rows = {f"{name}.{field}": dist.to_first(getattr(found, field)) for name, found in sets.items() for field in FIELDS}
    facts = {"identity": json.dumps(identity), "unusable": json.dumps({name: found.unusable for name, found in sets.items()})}

    def write() -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            with atomic(path) as file:
                save_file({name: x for name, x in rows.items() if x is not None}, file.name, facts)
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"--features {path}: {error}; pass a file where there is room") from None

    dist.first_process_does(write)


def load(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Features]:
    """This process's part of the features of `save`; another number of processes may have written them.

    Raises ValueError for a file of other features.
    """
    from safetensors import SafetensorError, safe_open

    sets = {}
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            found, unusable = json.loads(facts["identity"]), json.loads(facts["unusable"])
            other = [name for name in identity | found if identity.get(name) != found.get(name)]
            if other:
                raise ValueError(f"--features {path}: was made with other {', '.join(other)}; pass another file, or delete it")
            for name, count in unusable.items():
                values, labels, ids = (_own_rows(file.get_slice(f"{name}.{field}")).to(device) for field in FIELDS)
                sets[name] = Features(values, labels, ids, count)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"--features {path}: is no file of features ({type(error).__name__}); pass another file") from None
    return sets


def _own_rows(stored):
    part, more = divmod(stored.get_shape()[0], dist.world())
    start = dist.rank() * part + min(dist.rank(), more)
    return stored[start : start + part + (dist.rank() < more)]


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in rank order; each process may have another number of them."""
    counts = dist.gather_objects(len(x))
    blocks = dist.gather(padded(x, max(counts))).split(max(counts))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def padded(x, rows):
    """x with rows of 0 at its end, up to this number."""
    return x if len(x) == rows else F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)))
