"""Training with labels: parts that the linear probe and fine-tuning share."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from utils.data.index import Index
from utils.data.limits import check_workers
from utils.data.views import ViewSpec, side_before_crop
from utils.evaluation.classifiers import Head
from utils.evaluation.frozen import Source
from utils.evaluation.session import check_classes, default_folder
from utils.run import checkpoint, dist, flags, resume
from utils.run.files import write_json
from utils.run.log import say
from utils.run.text import shown_flags

TYPES = {"best": dict, "state_dict": dict, "optimizer": dict, "epoch": int, "step": int}  # of a checkpoint
Metrics = dict[str, float]  # of a layer: top1, top5, unusable


def add_data_flags(parser: flags.Parser) -> None:
    """Add the flags of shards and views."""
    add = parser.group("data").add_argument
    add("--train-shards", required=True, identity=False, metavar="DIR", help="labelled shards: folder, glob or brace pattern")
    add("--val-shards", required=True, identity=False, metavar="DIR", help="labelled validation shards; each image counts once")
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--resize", type=int, help="resize the shorter side of test images to this, then crop; default: 8/7 of --size")
    add("--crop-min", type=float, default=0.08, help="smallest area of a training crop, as a share of the image")


def fill_in(args: Namespace, folder: str) -> None:
    """Fill in the defaults that depend on other flags. folder: see session.default_folder."""
    if args.resize is None:
        args.resize = side_before_crop(args.size)
    if args.output_dir is None:
        args.output_dir = default_folder(args.pretrained, folder)


def check(args: Namespace, train: Index, val: Index, specs: list[ViewSpec]) -> None:
    """Raise ValueError for general flags and data that cannot work. specs: the views of a training image."""
    flags.check_run_flags(args)
    flags.check_lr_steps(args)
    flags.positive(["--epochs", "--batch-size", "--size", "--lr"], args)
    flags.in_range("--crop-min", args.crop_min, 1e-8, 1)
    flags.in_range("--resize", args.resize, args.size, math.inf)
    flags.check_batch(args, train.total)
    both = [*specs, ViewSpec("test", args.size, resize=args.resize)]  # their workers live side by side
    check_workers(both, args.batch_size // dist.world(), args.workers)
    check_classes(("--train-shards", args.train_shards, train), ("--val-shards", args.val_shards, val))


def open_run(args: flags.Flags, key: str, source: Source, train: Index, val: Index, heads: Iterable[Head], device: torch.device,
             load: Callable[[dict], None], older: Mapping[str, Any] = MappingProxyType({})
             ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Open the folder of results and resume from --resume. Returns (progress, identity). --dry-run writes nothing.

    key, load, older: see `restore`. heads: names of the classifiers.
    """
    dry = args.dry_run is not None
    path = dist.first_process_does(lambda: resume.open_run(args.output_dir, args.resume, dry))
    identity = flags.meaning(args) | {"weights": source.sha256, "train": train.hash, "val": val.hash}
    progress: dict[str, Any] = {"epoch": 0, "step": 0, "best": {head: {"top1": -1.0} for head in heads}, "last": None}
    if path:
        progress |= restore(path, args, key, identity, load, older)
    start = progress["epoch"], progress["step"]
    if not dry:
        facts = {"train_index": train.hash, "val_index": val.hash, "device": str(device)}
        resumed = path if start > (0, 0) else None
        dist.first_process_does(lambda: resume.begin(Path(args.output_dir), args, resumed, start, **facts))
    return progress, identity


def restore(path: Path, args: Namespace, key: str, identity: dict[str, Any], load: Callable[[dict], None],
            older: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:  # fmt: skip
    """Load a checkpoint and return its progress; empty if it is of another run and --resume is auto.

    key: "probe" or "finetune", the entry of the identity. load: loads model and optimizer from the checkpoint's content.
    older: values of flags that older checkpoints lack. Raises ValueError if it is of another run and --resume names it.
    """
    saved = checkpoint.read(path, "--resume")
    there = saved.get(key)
    there = {**older, **there} if isinstance(there, dict) else {}
    if there != identity:
        other = ", ".join(name for name, value in identity.items() if there.get(name) != value)
        if args.resume != "auto":
            raise ValueError(f"--resume {path}: is of another {key} (different: {other}); pass another --output-dir")
        say(f"{path} is of another {key} (different: {other}); starting this one from the beginning")
        return {}
    checkpoint.check_types(saved, TYPES, f"--resume {path}: is not a checkpoint of a {key}")
    try:
        load(saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"--resume {path}: its weights or optimizer have other names; pass another --output-dir") from None
    return {name: saved.get(name) for name in ("epoch", "step", "best", "last")}


def note(progress: dict[str, Any], epoch: int, result: dict[Head, Metrics]) -> None:
    """Note a validation: the last and the best one of each classifier. A checkpoint that is being written keeps the old."""
    progress["last"] = {head: {"epoch": epoch, **found} for head, found in result.items()}
    best = {head: max(progress["best"][head], found, key=lambda r: r["top1"]) for head, found in progress["last"].items()}
    progress["best"] = best


def report(args: Namespace, progress: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write result.json, and print the accuracies. facts: more entries of it."""
    path = Path(args.output_dir) / "result.json"
    layers = {layer: {name: progress[name][layer] for name in ("best", "last")} for layer in progress["last"]}
    several = {"layers": layers} if len(layers) > 1 else {}
    if dist.rank() == 0:
        write_json(path, {**list(layers.values())[-1], **several, "protocol": shown_flags(vars(args)), **facts})
    say("")
    for layer, found in layers.items():
        best, last, at = found["best"], found["last"], f"Layer {layer}: top-1" if several else "Top-1"
        say(f"{at} {last['top1']:.2f} %, top-5 {last['top5']:.2f} % (best {best['top1']:.2f} %, epoch {best['epoch']})")
    say(f"Results: {path}")
