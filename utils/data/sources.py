"""Where images come from before they are shards: folders, the ILSVRC archives, the data sets of torchvision."""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from torchvision.datasets import imagenet

from utils.data.tars import IMAGE_EXTENSIONS

COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # formats that keep their bytes; every other becomes PNG


class Files:
    """Image files below a folder."""

    def __init__(self, folder: Path, paths: list[str]):
        self.folder, self.names = folder, paths

    def fingerprint(self):
        """Names and sizes; sizes say little of formats without compression, so some of those files are hashed."""
        plain = [name for name in self.names if not name.lower().endswith((".jpg", ".jpeg", ".png"))]
        hashed = [hashlib.sha256(self.bytes(name)).hexdigest() for name in plain[:: 1 + len(plain) // 64]]
        return [[(name, self.size(name)) for name in self.names], hashed]

    def size(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.exists() else -1  # a link to nowhere

    def bytes(self, name: str) -> bytes:
        path = self.folder / name
        return path.read_bytes() if path.exists() else b""

    def read(self, i: int) -> tuple[str, bytes]:
        """(extension, encoded image); raises what PIL raises for an image that cannot be decoded whole."""
        data = (self.folder / self.names[i]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return (COPIED[image.format], data) if image.format in COPIED else ("png", as_png(image))


class Arrays:
    """A data set of torchvision, held in memory or read by it."""

    def __init__(self, dataset, name: str):
        self.dataset, self.names = dataset, [f"{name} {i}" for i in range(len(dataset))]

    def fingerprint(self):
        return [(self.names[i], hashlib.sha256(self.read(i)[1]).hexdigest()) for i in {0, len(self.names) - 1}]

    def read(self, i: int) -> tuple[str, bytes]:
        image = self.dataset[i][0]
        return "png", as_png(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


def as_png(image: Image.Image) -> bytes:
    """The image as PNG; raises ValueError for pixels that PNG cannot hold."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray(pixels.astype(np.uint16))
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass
class Split:
    """The images of one split: source.read(i) has label labels[i], a place in classes; both are None without labels."""

    name: str
    source: Files | Arrays
    labels: list[int] | None
    classes: list[str] | None


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def image_files(folder: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(folder, followlinks=True):  # a subset of ImageNet is often a folder of links
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(at) / name for name in files if is_image(name))


def from_folder(folder: Path, name: str, classes: list[str] | None) -> Split:
    """Folders of one class each, or images without labels. Labels follow `classes`, else the sorted folder names."""
    names = sorted(str(path.relative_to(folder)) for path in image_files(folder))
    if not names:
        raise ValueError(f"-i {folder}: no images in it (.{' .'.join(IMAGE_EXTENSIONS)}); pass a folder that has some")
    flat = [n for n in names if os.sep not in n]
    if len(flat) == len(names):
        return Split(name, Files(folder, names), None, None)
    if flat:
        raise ValueError(f"-i {folder}: has images beside its class folders, such as {flat[0]}; move either away")
    found = sorted({n.split(os.sep)[0] for n in names})
    classes = classes or found
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"-i {folder}: the training split has no class {', '.join(unknown[:5])}; rename or remove the folder")
    number = {c: i for i, c in enumerate(classes)}
    return Split(name, Files(folder, names), [number[n.split(os.sep)[0]] for n in names], classes)


def class_names(source: Path) -> set[str]:
    """Names of class folders, known before anything is unpacked; raises ValueError for a damaged training archive."""
    train, archive = source / "train", source / "ILSVRC2012_img_train.tar"
    if not archive.exists() or train.is_dir():
        folders = [path.name for path in (train if train.is_dir() else source).iterdir() if path.is_dir()]
        return {name for name in folders if not name.startswith(".") and name not in ("val", "test")}
    try:
        with tarfile.open(archive, "r:") as tar:  # a tar for each class; their names are read by seeking
            return {Path(name).stem for name in tar.getnames()}
    except tarfile.TarError as error:
        raise ValueError(f"-i {source}: {archive.name} is damaged ({error}); download it again") from None


def read_subset(path: str, source: Path) -> set[str]:
    """The classes that a list names: a line is one, or its first word is; # begins a comment.

    Raises ValueError for a list that cannot be read, that names no class, or a class that the source has not.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--imagenet-subset {path}: cannot be read ({error}); pass a file with a class on each line") from None
    known = class_names(source)
    chosen = {line if line in known else line.split()[0] for line in lines if line}
    if not chosen:
        raise ValueError(f"--imagenet-subset {path}: names no class; pass a file with a class on each line")
    if unknown := ", ".join(sorted(chosen - known)[:5]):
        mend = f"each line names a class folder, such as {min(known, default='n01440764')}"
        raise ValueError(f"--imagenet-subset {path}: {unknown}: -i {source} has no such class; {mend}")
    return chosen


def subset(split: Split, chosen: set[str], flag: str) -> Split:
    """The images of these classes, numbered anew in the order they had; raises ValueError where there are none."""
    if missing := ", ".join(sorted(chosen - set(split.classes or ()))[:5]):
        raise ValueError(f"{flag}: {missing}: no images in {split.source.folder}; leave out the class, or add its images")
    classes = [name for name in split.classes if name in chosen]
    number = {split.classes.index(name): i for i, name in enumerate(classes)}
    kept = [i for i, label in enumerate(split.labels) if label in number]
    if not kept:
        raise ValueError(f"{flag}: {split.source.folder} has no image of these; name a class that it has, or move it away")
    source = Files(split.source.folder, [split.source.names[i] for i in kept])
    return Split(split.name, source, [number[split.labels[i]] for i in kept], classes)


def find_splits(args) -> list[Split]:
    """What there is to convert; raises ValueError for what cannot be."""
    source, flag = Path(args.input), f"--imagenet-subset {args.imagenet_subset}"
    if args.download and not args.dataset:
        raise ValueError("--download: needs --dataset NAME, a data set of torchvision; pass that, or leave --download out")
    if args.dataset and args.imagenet_subset:
        raise ValueError(f"{flag}: is for class folders; leave out --dataset {args.dataset}")
    if not source.is_dir() and not args.download:
        raise ValueError(f"-i {source}: no such folder; pass the one that holds the images, or train/ and val/")
    if args.dataset:
        return from_torchvision(args)
    if not args.imagenet_subset:
        return from_folders(source)
    chosen = read_subset(args.imagenet_subset, source)  # before the hours that unpacking takes
    train, *others = from_folders(source)
    if unlabelled := [split.name for split in others if split.labels is None]:
        print(f"{flag}: {' and '.join(unlabelled)} left out, for want of class folders")
    return [subset(split, chosen, flag) for split in (train, *others) if split.name not in unlabelled]


def from_folders(source: Path) -> list[Split]:
    """The splits of a folder, or the folder as `train`; unpacks the ILSVRC archives in it."""
    for split in ("val", "train"):  # val first: a missing kit shows before the hours that train takes
        if (source / f"ILSVRC2012_img_{split}.tar").exists() and not (source / split).is_dir():
            extract_imagenet(source, split)
    others = [name for name in ("val", "test") if (source / name).is_dir()]
    if not (source / "train").is_dir():
        if others:
            raise ValueError(f"-i {source}: has {others[0]}/ but no train/; pass {source / others[0]} to convert it alone")
        return [from_folder(source, "train", None)]
    beside = [p for p in sorted(source.iterdir()) if p.name not in ("train", "val", "test") and p.suffix != ".partial"]
    if stray := next((p for p in beside if p.is_dir() and next(image_files(p), None)), None):
        raise ValueError(f"-i {source}: has images in {stray.name}/ beside train/; move it away, or all classes into train/")
    train = from_folder(source / "train", "train", None)
    return [train, *(from_folder(source / name, name, train.classes) for name in others)]


def extract_imagenet(source: Path, split: str) -> None:
    """Unpack an ILSVRC archive into class folders beside it, by torchvision. The folder gets its name when it is whole."""
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
        need = "val needs ILSVRC2012_devkit_t12.tar.gz beside the archives, and pip install scipy to read it"
        raise ValueError(f"-i {source}: {error} ({need})") from None
    (source / partial).rename(source / split)


def from_torchvision(args) -> list[Split]:
    """Training and test part of a data set of torchvision; the latter becomes `val`."""
    constructor = getattr(torchvision.datasets, args.dataset, None)
    if constructor is None:
        raise ValueError(f"--dataset {args.dataset}: torchvision has no such data set; pass one such as CIFAR10")
    splits = []
    for name, keywords in (("train", ({"train": True}, {"split": "train"})), ("val", ({"train": False}, {"split": "test"}))):
        dataset = construct(constructor, args, keywords)
        labels = labels_of(dataset, args.dataset)
        classes = [str(c) for c in getattr(dataset, "classes", range(max(labels) + 1))]
        splits.append(Split(name, Arrays(dataset, f"{args.dataset} {name}"), labels, classes))
    return splits


def labels_of(dataset, name: str) -> list[int]:
    labels = next((getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    try:
        return [int(label) for label in (labels if labels is not None else (dataset[i][1] for i in range(len(dataset))))]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"--dataset {name}: its labels are not one class number an image; convert a folder instead") from None


def construct(constructor, args, choices):
    """torchvision names its splits in two ways."""
    extra = {"download": True} if args.download else {}
    for keywords in choices:
        try:
            return constructor(args.input, **keywords, **extra)
        except TypeError:
            continue
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            mend = "; the flag for that is --download" if "download=True" in str(error) else ""
            raise ValueError(f"--dataset {args.dataset} -i {args.input}: {error}{mend}") from None
    raise ValueError(f"--dataset {args.dataset}: has no training and test split known here; convert a folder instead")
