"""Images -> webdataset shards with an index.

    python imagenet2wds.py -i /data/imagenet -o /data/imagenet-shards      folders train/ and val/, or the ILSVRC tars
    python imagenet2wds.py -i photos -o photo-shards                       a folder of classes, or of images without labels
    python imagenet2wds.py -i data -o sample-shards --dataset FashionMNIST any data set of torchvision

Stopped and started again it goes on where it was, and the shards are the same to the byte, whatever -j.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import tarfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
import webdataset
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import imagenet
from tqdm import tqdm

from utils.files import atomic
from utils.flags import Parser, in_range, one_line_errors, positive
from utils.index import IMAGE_EXTENSIONS, describe, scan_tar, write_index

PROG = "imagenet2wds.py"
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # formats that keep their bytes; every other becomes PNG
PLAN, BAD = "conversion.json", "bad_images.txt"


def get_args(argv=None):
    parser = Parser(prog=PROG, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("-i", "--input", required=True, metavar="SRC", help="folder of images, or the root of a torchvision data set")
    add("-o", "--output", required=True, metavar="DST", help="folder for the shards: DST/train, DST/val")
    add("--dataset", metavar="NAME", help="a data set of torchvision, such as FashionMNIST, instead of image files")
    add("--download", action="store_true", help="let torchvision download that data set into SRC")
    add("--shard-size", type=int, default=1000, help="images in a shard")
    add("--seed", type=int, default=0, help="decides the order of the images")
    add("-j", "--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--strict", action="store_true", help="stop at the first unreadable image instead of leaving it out")
    return parser.parse_args(argv)


class Files:
    """Image files below a folder."""

    def __init__(self, folder: Path, paths: list[str]):
        self.folder, self.names = folder, paths

    def fingerprint(self):
        return [(name, (self.folder / name).stat().st_size) for name in self.names]

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
    file = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(file, "PNG")
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


def find_splits(args) -> list[Split]:
    """What there is to convert."""
    source = Path(args.input)
    if args.download and not args.dataset:
        raise ValueError("--download: needs --dataset NAME, a data set of torchvision; pass that, or leave --download out")
    if not source.is_dir() and not args.download:
        raise ValueError(f"-i {source}: no such folder; pass the one that holds the images, or train/ and val/")
    if args.dataset:
        return from_torchvision(args)
    for split in ("val", "train"):  # val first: a missing kit shows before the hours that train takes
        if (source / f"ILSVRC2012_img_{split}.tar").exists() and not (source / split).is_dir():
            extract_imagenet(source, split)
    if not (source / "train").is_dir():
        return [from_folder(source, "train", None)]
    train = from_folder(source / "train", "train", None)
    others = [name for name in ("val", "test") if (source / name).is_dir()]
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


def plan(split: Split, args) -> dict:
    """What decides every byte of a split's shards."""
    content = [split.source.fingerprint(), split.labels, split.classes]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"source": digest, "images": len(split.source.names), "seed": args.seed, "shard_size": args.shard_size}


def check(folder: Path, planned: dict) -> None:
    """Refuse an output folder that is for something else."""
    path = folder / PLAN
    if path.exists():
        noted = json.loads(path.read_text())
        if changed := [name for name, value in planned.items() if noted.get(name) != value]:
            raise ValueError(f"-o {folder}: holds another conversion (different: {', '.join(changed)}); pass another folder")
    elif folder.exists() and any(p.suffix != ".tmp" for p in folder.iterdir()):  # killed before PLAN: only its .tmp
        raise ValueError(f"-o {folder}: holds files that this script did not write; pass another folder")


def claim(folder: Path, planned: dict) -> None:
    """Note in the output folder what it is for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / PLAN) as file:
            file.write(json.dumps(planned, indent=1).encode() + b"\n")
    except OSError as error:
        raise ValueError(f"-o {folder}: cannot be written ({error.strerror}); pass a folder that can") from None


@dataclass
class Writer:
    """Writes the shards of a split, in a process of its own."""

    split: Split
    folder: Path
    strict: bool

    def read(self, i: int) -> tuple[str, bytes] | str:
        """(extension, encoded image), or why there is none."""
        try:
            return self.split.source.read(i)
        except Exception as error:  # whatever PIL's decoders meet in damaged files: SyntaxError, struct.error, EOFError ...
            what = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            reason = f"{self.split.source.names[i]}\t{what or type(error).__name__}"
            if self.strict:
                raise ValueError(f"--strict: unreadable image {reason}; mend or remove it") from None
            return reason

    def write(self, number: int, chosen: list[int]) -> tuple[dict, list[str]]:
        """Write shard `number` with these images, unless it is there. -> (its entry in the index, unreadable images)."""
        path = self.folder / f"{self.split.name}-{number:06d}.tar"
        keys = {f"{number:06d}-{place:06d}": i for place, i in enumerate(chosen)}
        if path.exists() and (bad := self.missing(path, keys)) is not None:
            return describe(path, len(keys) - len(bad)), bad
        bad = []
        with atomic(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
            for key, i in keys.items():
                image = self.read(i)
                if isinstance(image, str):
                    bad.append(image)
                    continue
                label = {} if self.split.labels is None else {"cls": str(self.split.labels[i])}
                tar.write({"__key__": key, image[0]: image[1], **label})
        return describe(path, len(keys) - len(bad)), bad

    def missing(self, path: Path, keys: dict[str, int]) -> list[str] | None:
        """The unreadable images that a shard, written before, was made without; None if it has to be made anew."""
        try:
            done = {sample.key for sample in scan_tar(path)}
        except tarfile.TarError:  # damaged since: it was complete when it got its name
            return None
        left_out = [self.read(i) for key, i in keys.items() if key not in done]
        return left_out if done <= keys.keys() and all(isinstance(reason, str) for reason in left_out) else None


WRITER: Writer  # of this worker process


def start_worker(writer: Writer) -> None:
    global WRITER
    WRITER = writer
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # about odd metadata: the pixels are decoded all the same
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def write_shard(number: int, chosen: list[int]) -> tuple[dict, list[str]]:
    return WRITER.write(number, chosen)


def convert(split: Split, folder: Path, args) -> None:
    for stale in folder.glob(".*.tmp"):  # of a conversion that was killed
        stale.unlink()
    order = np.random.default_rng(args.seed).permutation(len(split.source.names)).tolist()
    chosen = [order[start : start + args.shard_size] for start in range(0, len(order), args.shard_size)]
    shards, bad = [], []
    bar = tqdm(total=len(order), desc=split.name, unit="image")
    with ProcessPoolExecutor(args.jobs, initializer=start_worker, initargs=(Writer(split, folder, args.strict),)) as pool:
        futures = [pool.submit(write_shard, number, images) for number, images in enumerate(chosen)]
        try:
            for future, images in zip(futures, chosen, strict=True):
                entry, unreadable = future.result()
                shards.append(entry)
                bad += unreadable
                bar.update(len(images))
        except BrokenProcessPool:
            raise ValueError(f"-j {args.jobs}: a process was killed; start again to go on, with fewer jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()
    if len(bad) == len(order):
        raise ValueError(f"-i {args.input}: none of the {len(bad)} images of {split.name} is readable, such as {bad[0]}")
    (folder / BAD).unlink(missing_ok=True)
    if bad:
        with atomic(folder / BAD) as file:
            file.write("".join(f"{line}\n" for line in sorted(bad)).encode(errors="surrogateescape"))
        print(f"{split.name}: {len(bad)} unreadable images left out, listed in {folder / BAD}")
    write_index(folder, shards, split.classes)
    labels = f"{len(split.classes)} classes" if split.classes else "no labels"
    print(f"{folder}: {len(order) - len(bad)} images in {len(shards)} shards, {labels}")


def main(argv=None):
    args = get_args(argv)
    with one_line_errors(PROG):
        positive(["--shard-size", "--jobs"], args)
        in_range("--seed", args.seed, 0, math.inf)
        splits = {Path(args.output) / split.name: split for split in find_splits(args)}
        for folder, split in splits.items():
            check(folder, plan(split, args))
        for folder, split in splits.items():
            claim(folder, plan(split, args))
            convert(split, folder, args)
    print(f"Next: SHARDS={args.output} bash pretrain_mosrep.sh")


if __name__ == "__main__":
    main()
