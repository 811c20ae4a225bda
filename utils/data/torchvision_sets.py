"""Splits that torchvision reads: its data sets, and the ILSVRC archives."""

import argparse
import shutil
import tarfile
from pathlib import Path

import torchvision
from torchvision.datasets import imagenet

from utils.data.splits import Arrays, Split


def from_torchvision(args: argparse.Namespace) -> list[Split]:
    """The training part of a torchvision data set; its test part, as `val`; for STL10 also its unlabelled images."""
    constructor = getattr(torchvision.datasets, args.dataset, None)
    if constructor is None:
        raise ValueError(f"--dataset {args.dataset}: torchvision has no such data set; pass one such as CIFAR10")
    splits = []
    parts: dict[str, tuple[dict, ...]] = {
        "train": ({"train": True}, {"split": "train"}),
        "val": ({"train": False}, {"split": "test"}),
    }
    if "unlabeled" in getattr(constructor, "splits", ()):
        parts["unlabeled"] = ({"split": "unlabeled"},)
    for name, keywords in parts.items():
        dataset = construct(constructor, args, keywords)
        labels = None if args.no_labels or name == "unlabeled" else labels_of(dataset, args.dataset)
        classes = tuple(str(c) for c in getattr(dataset, "classes", range(max(labels) + 1))) if labels else None
        splits.append(Split(name, Arrays(dataset, f"{args.dataset} {name}"), labels, classes))
    return splits


def construct(constructor, args: argparse.Namespace, choices: tuple[dict, ...]):
    """The data set, by the first of these keywords that its constructor accepts: torchvision names splits in two ways."""
    for keywords in choices:
        try:
            return constructor(args.input, **keywords, **({"download": True} if args.download else {}))
        except TypeError:
            continue
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            hint = "; pass --download" if "download=True" in str(error) else ""
            raise ValueError(f"--dataset {args.dataset} -i {args.input}: {error}{hint}") from None
    raise ValueError(f"--dataset {args.dataset}: has no training and test split known here; convert a folder instead")


def labels_of(dataset, name: str) -> list[int]:
    labels = next((getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    try:
        return [int(label) for label in (labels if labels is not None else (dataset[i][1] for i in range(len(dataset))))]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"--dataset {name}: its labels are not one class number for each image; pass --no-labels to leave them out"
        ) from None


def extract_imagenet(source: Path, split: str) -> None:
    """Unpack an ILSVRC archive into class folders next to it. The folder gets its final name when it is complete."""
    partial = f"{split}.partial"
    shutil.rmtree(source / partial, ignore_errors=True)
    print(f"Unpacking ILSVRC2012_img_{split}.tar into {source / split}/")
    try:
        if split == "train":
            imagenet.parse_train_archive(str(source), folder=partial)
        else:
            imagenet.parse_devkit_archive(str(source))
            imagenet.parse_val_archive(str(source), folder=partial)
    except (RuntimeError, ImportError, tarfile.TarError) as error:
        need = "val needs ILSVRC2012_devkit_t12.tar.gz in the same folder, and pip install scipy to read it"
        raise ValueError(f"-i {source}: {error} ({need})") from None
    (source / partial).rename(source / split)
