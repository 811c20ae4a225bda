"""Convert images to webdataset shards with an index.

    python imagenet2wds.py -i /data/imagenet -o /data/imagenet-shards      folders train/ and val/, or the ILSVRC tars
    python imagenet2wds.py -i /data/imagenet -o /data/imagenet100-shards --imagenet-subset imagenet100.txt
    python imagenet2wds.py -i photos -o photo-shards                       class folders, or a folder of images without labels
    python imagenet2wds.py -i photos -o photo-shards --no-labels           every image below a folder, at any depth
    python imagenet2wds.py -i data -o sample-shards --dataset FashionMNIST any data set of torchvision
    python imagenet2wds.py -i /data/imagenet -o /data/imagenet-1percent --images 1percent.txt

The same command resumes an interrupted conversion. The shards are byte for byte the same, with any -j.
JPEG and PNG files are copied. All other formats that Pillow decodes become PNG, as their first frame. Orientation tags (EXIF)
are ignored in every format, as in training. Pixels of more than 8 bits are scaled from the range that the file declares;
without a declared range the image counts as unreadable. Unreadable images are skipped and listed in bad_images.txt.
A file that cannot be read from the disk stops the conversion.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import tarfile
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils.data.folders import counts
from utils.data.index_file import describe, write_index
from utils.data.local_spec import PLAN
from utils.data.names import write_names
from utils.data.sources import find_splits
from utils.data.splits import Split
from utils.data.tars import local_samples
from utils.run.files import atomic, write_json
from utils.run.flags import Parser, in_range, one_line_errors, positive
from utils.run.streams import conversion_order

PROG = "imagenet2wds.py"
BAD = "bad_images.txt"
MAX_PIXELS = 89_478_485  # Pillow's default limit
PAUSES = (0.5, 2.0, 8.0)  # seconds before a failed read is retried


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROG, description=(__doc__ or "").split("\n\n")[0], epilog=(__doc__ or "").split("\n\n")[-1])
    add = parser.add_argument
    add("-i", "--input", required=True, metavar="SRC", help="folder of images, or the root of a torchvision data set")
    add("-o", "--output", required=True, metavar="DST", help="folder for the shards: DST/train, DST/val")
    add("--dataset", metavar="NAME", help="convert a data set of torchvision, such as FashionMNIST, instead of image files")
    add("--imagenet-subset", metavar="FILE", help="convert only the classes in FILE: a folder's name (n01440764) on each line")
    add("--images", metavar="FILE", help="convert only the training images in FILE, with a file name on each line")
    add("--no-labels", action="store_true", help="convert all images below SRC, or below its train/ and val/, without labels")
    add(
        "--val-fraction", type=float, default=0.0, metavar="F", help="share of each class that goes to DST/val; 0: no val split"
    )
    add("--download", action="store_true", help="let torchvision download the data set into SRC")
    add("--shard-size", type=int, default=1000, help="images in a shard")
    add("--seed", type=int, default=0, help="seed of the order of the images")
    add("-j", "--jobs", type=int, default=os.cpu_count(), help="number of processes")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
        help="images with more pixels are unreadable, since they could fill the memory; training has a limit too")  # fmt: skip
    add("--image-extension", default="keep", choices=["jpg", "keep"],
        help="name of the images in the shards. keep: jpg or png by content; loaders read them as 'jpg;png'. "
        "jpg: all images, for loaders that read only jpg. ImageNet has one PNG file named .JPEG")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first unreadable image instead of skipping it")
    return parser.parse_args(argv)


def plan(split: Split, args: argparse.Namespace) -> dict:
    """Everything that decides the bytes of a split's shards."""
    content = [split.source.fingerprint(), split.labels, split.classes]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    options = {"no_labels": False, "val_fraction": 0.0, "max_pixels": MAX_PIXELS, "image_extension": "keep"}  # the defaults
    changed = {name: getattr(args, name) for name, default in options.items() if getattr(args, name) != default}
    planned = {"source": digest, "images": len(split.source.names), "seed": args.seed, "shard_size": args.shard_size}
    return planned | changed  # defaults are not saved, as in the plans of older versions


def check(folder: Path, planned: dict) -> None:
    """Raise ValueError for an output folder that holds anything but this conversion."""
    path = folder / PLAN
    if path.exists():
        try:
            saved = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"-o {folder}: {PLAN} is damaged; delete the folder and start again") from None
        if changed := [name for name in planned | saved if saved.get(name) != planned.get(name)]:
            raise ValueError(f"-o {folder}: holds another conversion (different: {', '.join(changed)}); pass another folder")
    elif folder.exists() and any(not p.match(f".{PLAN}.*.tmp") for p in folder.iterdir()):  # left by a killed conversion
        raise ValueError(f"-o {folder}: holds files that this script did not write; pass another folder")


def claim(folder: Path, planned: dict) -> None:
    """Save the plan in the output folder, so that no other conversion is written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, planned)
    except OSError as error:
        raise ValueError(f"-o {folder}: cannot be written ({error.strerror}); pass a writable folder") from None


@dataclass
class Writer:
    """Writes the shards of a split, in a worker process."""

    split: Split
    folder: Path
    args: argparse.Namespace

    def read(self, i: int) -> tuple[str, bytes] | str:
        """(extension, encoded image), or the reason why image i is unreadable. Raises ValueError if the disk fails."""
        name, pauses = self.split.source.names[i], list(PAUSES)
        while True:
            try:
                extension, data = self.split.source.read(i)
                return ("jpg" if self.args.image_extension == "jpg" else extension), data
            except Exception as error:  # PIL raises many types for damaged files: SyntaxError, struct.error, EOFError ...
                if not (isinstance(error, OSError) and error.errno):  # PIL's own OSErrors have no errno
                    return self.reason(name, error)
                if not pauses:
                    text = f"-i {self.args.input}: {self.split.name}: {name} cannot be read ({error.strerror})"
                    raise ValueError(f"{text}; fix that, then the same command resumes") from None
            time.sleep(pauses.pop(0))

    def reason(self, name: str, error: Exception) -> str:
        """The line of bad_images.txt. Raises ValueError with --strict."""
        unknown = isinstance(error, UnidentifiedImageError)
        text = "not an image that Pillow decodes" if unknown else " ".join(str(error).split())[:200]
        reason = f"{name}\t{text or type(error).__name__}"
        if self.args.strict:
            raise ValueError(f"--strict: unreadable image {reason}; fix or remove it") from None
        return reason

    def write(self, number: int, chosen: list[int]) -> tuple[dict, list[int], list[str]]:
        """Write shard `number` with these images, unless it exists.

        Returns its index entry, the images that it holds, and the lines of its unreadable images.
        """
        path = self.folder / f"{self.split.name}-{number:06d}.tar"
        keys = {f"{number:06d}-{place:06d}": i for place, i in enumerate(chosen)}
        if path.exists() and (there := self.existing(path, keys)) is not None:
            return describe(path, len(there[0])), *there
        held, bad = [], []
        with atomic(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
            for key, i in keys.items():
                label = {"cls": str(self.split.labels[i])} if self.split.labels else {}
                if isinstance(image := self.read(i), str):
                    bad.append(image)
                else:
                    tar.write({"__key__": key, image[0]: image[1], **label})
                    held.append(i)
        return describe(path, len(held)), held, bad

    def existing(self, path: Path, keys: dict[str, int]) -> tuple[list[int], list[str]] | None:
        """The images of an existing shard, and the unreadable ones; None if the shard must be written again."""
        try:
            done = {sample.key for sample in local_samples(str(path))}
        except tarfile.TarError:  # damaged later: only complete shards get this name
            return None
        reasons = [self.read(i) for key, i in keys.items() if key not in done]
        bad = [reason for reason in reasons if isinstance(reason, str)]
        held = [i for key, i in keys.items() if key in done]
        return (held, bad) if done <= keys.keys() and len(bad) == len(reasons) else None


WRITER: Writer  # of this worker process


def start_worker(writer: Writer) -> None:
    global WRITER
    WRITER = writer
    threading.Thread(target=end_with_parent, daemon=True).start()
    Image.MAX_IMAGE_PIXELS = writer.args.max_pixels
    warnings.simplefilter("ignore")  # of odd metadata, which does not change the pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def end_with_parent() -> None:
    """Exit with the parent. Otherwise the workers of a killed parent would wait forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def write_shard(number: int, chosen: list[int]) -> tuple[dict, list[int], list[str]]:
    return WRITER.write(number, chosen)


def convert(split: Split, folder: Path, args: argparse.Namespace) -> None:
    """Write the shards of a split, its lists of unreadable images and of file names, and last its index."""
    for stale in folder.glob(".*.tmp"):  # left by a killed conversion
        stale.unlink()
    order = conversion_order(args.seed).permutation(len(split.source.names)).tolist()
    chosen = [order[start : start + args.shard_size] for start in range(0, len(order), args.shard_size)]
    shards, names, bad = [], list[str](), []
    pool = ProcessPoolExecutor(args.jobs, initializer=start_worker, initargs=(Writer(split, folder, args),))
    with pool, tqdm(total=len(order), desc=split.name, unit="image") as bar:
        futures = [pool.submit(write_shard, number, images) for number, images in enumerate(chosen)]
        try:
            for future, images in zip(futures, chosen, strict=True):
                entry, held, unreadable = future.result()
                shards.append(entry)
                names += [split.source.names[i] for i in held]
                bad += unreadable
                bar.update(len(images))
        except BrokenExecutor:
            raise ValueError(f"-j {args.jobs}: a process was killed; the same command resumes, with fewer jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)
    if len(bad) == len(order):
        raise ValueError(f"-i {args.input}: none of the {len(bad)} images of {split.name} is readable, such as {bad[0]}")
    (folder / BAD).unlink(missing_ok=True)
    if bad:
        with atomic(folder / BAD) as file:
            file.write("".join(f"{line}\n" for line in sorted(bad)).encode(errors="surrogateescape"))
        example = min(bad).replace("\t", ": ")
        print(f"{split.name}: {len(bad)} unreadable images skipped, listed in {folder / BAD}, such as {example}")
    write_index(folder, shards, split.classes, dataset=split.dataset, names=write_names(folder, names))
    labels = f"{len(split.classes)} classes" if split.classes else "no labels"
    print(f"{folder}: {len(order) - len(bad)} images in {len(shards)} shards, {labels}")
    if split.others:
        print(f"{split.name}: {split.others.total()} files with other extensions were not converted: {counts(split.others)}")


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    with one_line_errors(PROG):
        positive(["--shard-size", "--jobs", "--max-pixels"], args)
        in_range("--seed", args.seed, 0, math.inf)
        in_range("--val-fraction", args.val_fraction, 0, 0.9)
        splits = {Path(args.output) / split.name: split for split in find_splits(args)}
        plans = {folder: plan(split, args) for folder, split in splits.items()}
        for folder, planned in plans.items():
            check(folder, planned)
        for folder, split in splits.items():
            claim(folder, plans[folder])
            try:
                convert(split, folder, args)
            except OSError as error:
                raise ValueError(f"-o {folder}: {error.strerror}; fix that, then the same command resumes") from None
    print(f"Shards for any launcher: SHARDS={args.output} bash pretrain_mosrep.sh")
    if unlabelled := next((folder for folder in splits if folder.name == "unlabeled"), None):
        print(f"Images without labels, for pre-training: --shards {unlabelled}")


if __name__ == "__main__":
    main()
