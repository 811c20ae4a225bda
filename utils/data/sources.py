"""The splits that imagenet2wds.py finds in its input."""

import argparse
import hashlib
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.data.encoding import extensions
from utils.data.folders import has_images, is_system_folder, list_images
from utils.data.names import positions
from utils.data.splits import Files, Split
from utils.data.torchvision_sets import extract_imagenet, from_torchvision
from utils.run.streams import validation_split

# name -> sha256 of published lists of classes: of the CMC authors (docs/methods.md, "CMC, InsDis, MoCo-v1")
PUBLISHED = {"imagenet100.txt": "79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397"}


def find_splits(args: argparse.Namespace) -> list[Split]:
    """The splits to convert. Raises ValueError for an input that cannot be converted."""
    source, flag = Path(args.input), f"--imagenet-subset {args.imagenet_subset}"
    if args.download and not args.dataset:
        raise ValueError("--download: needs --dataset NAME, a data set of torchvision; pass that, or leave --download out")
    if args.dataset and (args.imagenet_subset or args.val_fraction):
        folder_flag = flag if args.imagenet_subset else f"--val-fraction {args.val_fraction}"
        raise ValueError(f"{folder_flag}: is for class folders; leave out --dataset {args.dataset}")
    if args.no_labels and args.imagenet_subset:
        raise ValueError(f"{flag}: chooses by labels; leave out --no-labels")
    if not source.is_dir() and not args.download:
        raise ValueError(f"-i {source}: no such folder; pass the one that holds the images, or train/ and val/")
    if args.dataset:
        splits = from_torchvision(args)
        return [listed(splits[0], args), *splits[1:]]
    if args.val_fraction and ((source / "val").is_dir() or (source / "ILSVRC2012_img_val.tar").exists()):
        raise ValueError(f"--val-fraction {args.val_fraction}: -i {source} has a validation split; leave the flag out")
    chosen = read_subset(args.imagenet_subset, source) if args.imagenet_subset else None  # before hours of unpacking archives
    splits = from_folders(source, args.no_labels)
    if chosen is not None:
        if unlabelled := [split.name for split in splits[1:] if split.labels is None]:
            print(f"{flag}: {' and '.join(unlabelled)} skipped, without class folders")
        splits = [subset(split, chosen, flag) for split in splits if split.name not in unlabelled]
    train = listed(splits[0], args)
    return [*(divided(train, args.val_fraction, args.seed) if args.val_fraction else [train]), *splits[1:]]


def from_folders(source: Path, no_labels: bool) -> list[Split]:
    """The splits of a folder, or the folder as `train`. Unpacks the ILSVRC archives in it."""
    for split in ("val", "train"):  # val first: it fails early without its kit, while train takes hours
        if (source / f"ILSVRC2012_img_{split}.tar").exists() and not (source / split).is_dir():
            extract_imagenet(source, split)
    others = [name for name in ("val", "test") if (source / name).is_dir()]
    if not (source / "train").is_dir():
        if others:
            raise ValueError(f"-i {source}: has {others[0]}/ but no train/; pass {source / others[0]} to convert it alone")
        return [from_folder(source, "train", None, no_labels)]
    more = [p for p in sorted(source.iterdir()) if p.name not in ("train", "val", "test") and p.suffix != ".partial"]
    if stray := next((p for p in more if p.is_dir() and not is_system_folder(p.name) and has_images(p)), None):
        raise ValueError(f"-i {source}: has images in {stray.name}/ next to train/; remove it, or move all classes into train/")
    train = from_folder(source / "train", "train", None, no_labels)
    return [train, *(from_folder(source / name, name, train.classes, no_labels) for name in others)]


def from_folder(folder: Path, name: str, classes: tuple[str, ...] | None, no_labels: bool) -> Split:
    """Class folders, or images without labels. Labels follow `classes`, or by default the sorted names of the folders."""
    listing = list_images(folder)
    listing.report()
    files, names = listing.files, listing.files.names
    if not names:
        raise ValueError(f"-i {folder}: no images in it (.{' .'.join(extensions())}); pass a folder that has some")
    flat = [n for n in names if os.sep not in n]
    if no_labels or len(flat) == len(names):
        return Split(name, files, None, None, listing.others)
    if flat:
        raise ValueError(f"-i {folder}: has class folders and also images without a class, such as {flat[0]}; "
                         "remove either, or pass --no-labels")  # fmt: skip
    found = [n.split(os.sep)[0] for n in names]
    if not classes and (empty := sorted(listing.folders - set(found))):
        print(f"{folder}: no class for {len(empty)} folders without images: {', '.join(empty[:5])}")
    classes = classes or tuple(sorted(set(found)))
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"-i {folder}: the training split has no class {', '.join(unknown[:5])}; rename or remove the folder")
    number = {c: i for i, c in enumerate(classes)}
    return Split(name, files, [number[c] for c in found], classes, listing.others)


def divided(train: Split, fraction: float, seed: int) -> list[Split]:
    """Divide a split into train and val. A random `fraction` of each class, at least one of two images, goes to val."""
    assert isinstance(train.source, Files)
    labels = np.array(train.labels or [0] * len(train.source.names))
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels).tolist():
        own = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        held[validation_split(seed, label).permutation(own)[:count]] = True
    if not held.any():
        raise ValueError(f"--val-fraction {fraction}: no class of -i {train.source.folder} has two images; leave the flag out")
    parts = []
    for name, chosen in (("train", ~held), ("val", held)):
        parts.append(replace(train.part(np.flatnonzero(chosen).tolist()), name=name))
    parts[1].others = Counter()
    return parts


def listed(train: Split, args: argparse.Namespace) -> Split:
    """The images of --images, or all without that flag."""
    if not args.images:
        return train
    return train.part(positions(train.source.names, args.images, f"-i {args.input}").tolist())


def class_names(source: Path) -> set[str]:
    """Names of the class folders, without unpacking an archive. Raises ValueError for a damaged training archive."""
    train, archive = source / "train", source / "ILSVRC2012_img_train.tar"
    if not archive.exists() or train.is_dir():
        folders = [path.name for path in (train if train.is_dir() else source).iterdir() if path.is_dir()]
        return {name for name in folders if not is_system_folder(name) and name not in ("val", "test")}
    try:
        with tarfile.open(archive, "r:") as tar:  # it holds one tar for each class; listing them only seeks
            return {Path(name).stem for name in tar.getnames()}
    except tarfile.TarError as error:
        raise ValueError(f"-i {source}: {archive.name} is damaged ({error}); download it again") from None


def read_subset(path: str, source: Path) -> set[str]:
    """The classes in a list. A line, or its first word, is a class; # starts a comment.

    A list with the name of a published one must have its sha256. Raises ValueError for another one, for a list that cannot be
    read or is empty, and for a class that the source does not have.
    """
    try:
        content = Path(path).read_bytes()
        lines = [line.partition("#")[0].strip() for line in content.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--imagenet-subset {path}: cannot be read ({error}); pass a file with a class on each line") from None
    digest, published = hashlib.sha256(content).hexdigest(), PUBLISHED.get(Path(path).name)
    if published not in (None, digest):
        raise ValueError(f"--imagenet-subset {path}: its sha256 is {digest[:16]}, that of the published list {published[:16]}; "
                         "download it again, or give a list of your own another name")  # fmt: skip
    known = class_names(source)
    chosen = {line if line in known else line.split()[0] for line in lines if line}
    if not chosen:
        raise ValueError(f"--imagenet-subset {path}: names no class; pass a file with a class on each line")
    if unknown := ", ".join(sorted(chosen - known)[:5]):
        hint = f"each line names a class folder, such as {min(known, default='n01440764')}"
        raise ValueError(f"--imagenet-subset {path}: {unknown}: -i {source} has no such class; {hint}")
    return chosen


def subset(split: Split, chosen: set[str], flag: str) -> Split:
    """The images of these classes, renumbered in their order. Raises ValueError if there are none."""
    assert isinstance(split.source, Files)
    classes, folder = split.classes or (), split.source.folder
    if missing := ", ".join(sorted(chosen - set(classes))[:5]):
        raise ValueError(f"{flag}: {missing}: no images in {folder}; leave out the class, or add its images")
    kept_classes = tuple(name for name in classes if name in chosen)
    number = {classes.index(name): i for i, name in enumerate(kept_classes)}
    kept = [i for i, label in enumerate(split.labels or ()) if label in number]
    if not kept:
        raise ValueError(f"{flag}: {folder} has no image of these classes; add a class that it has")
    labels = [number[label] for label in split.labels or () if label in number]
    return Split(split.name, split.source.part(kept), labels, kept_classes, split.others)
