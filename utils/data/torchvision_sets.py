"""Splits that torchvision reads: its data sets, and the ILSVRC archives."""

import argparse
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import torchvision
from torchvision.datasets import imagenet

from utils.data.splits import Arrays, Files, Split

PARTS = {  # data sets with other parts than train and test, which becomes `val`: our name -> torchvision's
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102"), {"train": "train", "val": "val", "test": "test"}),
    "OxfordIIITPet": {"train": "trainval", "val": "test"},
    "STL10": {"train": "train", "val": "test", "unlabeled": "unlabeled"},
}


def from_torchvision(args: argparse.Namespace) -> list[Split]:
    """The official parts of a torchvision data set: `train`; its test part, as `val`; or those of PARTS."""
    constructor = getattr(torchvision.datasets, args.dataset, None)
    if constructor is None:
        raise ValueError(f"--dataset {args.dataset}: torchvision has no such data set; pass one such as CIFAR10")
    splits = []
    parts: dict[str, tuple[dict, ...]] = {
        "train": ({"train": True}, {"split": "train"}),
        "val": ({"train": False}, {"split": "test"}),
    }
    if args.dataset in PARTS:
        parts = {name: ({"split": theirs},) for name, theirs in PARTS[args.dataset].items()}
    for name, keywords in parts.items():
        dataset = construct(constructor, args, keywords)
        labels = None if args.no_labels or name == "unlabeled" else labels_of(dataset, args.dataset)
        classes = tuple(str(c) for c in getattr(dataset, "classes", range(max(labels) + 1))) if labels else None
        source = files_of(dataset, args) or Arrays(dataset, f"{args.dataset} {name}")
        splits.append(Split(name, source, labels, classes, dataset=args.dataset))
    return splits


def files_of(dataset, args: argparse.Namespace) -> Files | None:
    """The image files of a data set, which are copied, or None if it keeps arrays. Raises ValueError for a missing file."""
    found = next((getattr(dataset, a) for a in ("_image_files", "_images", "_samples", "samples") if hasattr(dataset, a)), None)
    paths = [entry[0] if isinstance(entry, tuple) else entry for entry in found or ()]
    if not paths or not all(isinstance(path, str | Path) for path in paths):
        return None
    try:
        return Files(Path(args.input), [os.path.relpath(path, args.input) for path in paths], list(map(os.path.getsize, paths)))
    except OSError as error:
        raise ValueError(f"--dataset {args.dataset}: {error.filename}: {error.strerror}; unpack the data set again") from None


def construct(constructor, args: argparse.Namespace, choices: tuple[dict, ...]):
    """The data set, by the first of these keywords that its constructor accepts: torchvision names splits in two ways."""
    for keywords in choices:
        try:
            return constructor(args.input, **keywords, **({"download": True} if args.download else {}))
        except TypeError:
            continue
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            hint = "; pass --download" if "download=True" in str(error) else ""
            hint = f"; pip install {error.name}" if isinstance(error, ImportError) else hint
            raise ValueError(f"--dataset {args.dataset} -i {args.input}: {error}{hint}") from None
    raise ValueError(f"--dataset {args.dataset}: has no training and test split known here; convert a folder instead")


def labels_of(dataset, name: str) -> list[int]:
    labels = next((getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    if labels is None:  # pairs of an image and its label, in a list or read one by one
        pairs = getattr(dataset, "_samples", None) or (dataset[i] for i in range(len(dataset)))
        labels = (pair[1] for pair in pairs)
    try:
        return [int(label) for label in labels]
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Python 3.14 will", DeprecationWarning)  # of torchvision, on Python 3.12 and 3.13
            if split == "train":
                imagenet.parse_train_archive(str(source), folder=partial)
            else:
                imagenet.parse_devkit_archive(str(source))
                imagenet.parse_val_archive(str(source), folder=partial)
    except (RuntimeError, ImportError, tarfile.TarError) as error:
        need = "val needs ILSVRC2012_devkit_t12.tar.gz in the same folder, and pip install scipy to read it"
        raise ValueError(f"-i {source}: {error} ({need})") from None
    (source / partial).rename(source / split)
