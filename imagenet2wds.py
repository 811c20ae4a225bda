"""Images -> webdataset shards with an index.

    python imagenet2wds.py -i /data/imagenet -o /data/imagenet-shards      folders train/ and val/, or the ILSVRC tars
    python imagenet2wds.py -i /data/imagenet -o /data/imagenet100-shards --imagenet-subset classes.txt
    python imagenet2wds.py -i photos -o photo-shards                       a folder of classes, or of images without labels
    python imagenet2wds.py -i data -o sample-shards --dataset FashionMNIST any data set of torchvision

Stopped and started again it goes on where it was, and the shards are the same to the byte, whatever -j.
"""

import hashlib
import json
import math
import multiprocessing
import os
import tarfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils.data.index import PLAN, describe, write_index
from utils.data.sources import Split, find_splits
from utils.data.tars import local_samples
from utils.run.files import atomic
from utils.run.flags import Parser, in_range, one_line_errors, positive

PROG = "imagenet2wds.py"
BAD = "bad_images.txt"


def get_args(argv=None):
    parser = Parser(prog=PROG, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("-i", "--input", required=True, metavar="SRC", help="folder of images, or the root of a torchvision data set")
    add("-o", "--output", required=True, metavar="DST", help="folder for the shards: DST/train, DST/val")
    add("--dataset", metavar="NAME", help="a data set of torchvision, such as FashionMNIST, instead of image files")
    add("--imagenet-subset", metavar="FILE", help="convert only these classes: a class folder's name (n01440764) on each line")
    add("--download", action="store_true", help="let torchvision download that data set into SRC")
    add("--shard-size", type=int, default=1000, help="images in a shard")
    add("--seed", type=int, default=0, help="decides the order of the images")
    add("-j", "--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--strict", action="store_true", help="stop at the first unreadable image instead of leaving it out")
    return parser.parse_args(argv)


def plan(split: Split, args) -> dict:
    """What decides every byte of a split's shards."""
    content = [split.source.fingerprint(), split.labels, split.classes]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"source": digest, "images": len(split.source.names), "seed": args.seed, "shard_size": args.shard_size}


def check(folder: Path, planned: dict) -> None:
    """Refuse an output folder that is for something else."""
    path = folder / PLAN
    if path.exists():
        try:
            noted = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"-o {folder}: {PLAN} is damaged; delete the folder to begin again") from None
        if changed := [name for name, value in planned.items() if noted.get(name) != value]:
            raise ValueError(f"-o {folder}: holds another conversion (different: {', '.join(changed)}); pass another folder")
    elif folder.exists() and any(not p.match(f".{PLAN}.*.tmp") for p in folder.iterdir()):  # of one that was killed
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
            done = {sample.key for sample in local_samples(path)}
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
            try:
                convert(split, folder, args)
            except OSError as error:
                raise ValueError(f"-o {folder}: {error.strerror}; mend that and start again to go on") from None
    print(f"Shards for any launcher: SHARDS={args.output} bash pretrain_mosrep.sh")


if __name__ == "__main__":
    main()
