"""Index a local folder: count the samples of its shards and read their labels."""

import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils.data.index_file import INDEX, LARGEST_LABEL, IndexFile, Shard, describe, place_in, shard_of, write_index
from utils.data.tars import LABEL_EXTENSION, TarSample, UnsupportedTar, local_samples
from utils.run.text import brief

KINDS = 5  # kinds of left-out files that get a line


def index_folder(folder: Path, flag: str) -> IndexFile:
    """Index a local folder. Left-out files are counted and named.

    Labels that are numbers give classes with these names. If a sample has no label or another kind of label, classes are None.
    """
    shards: dict[str, Shard] = {}
    entries: list[dict] = []
    numbers: set[int] = set()
    without, some, first = 0, False, ""  # samples without a class number; whether any has a label; the first of these
    left_out: dict[str, tuple[int, str]] = {}  # reason: (number of files, the first one)
    for path in tqdm(sorted(p for p in folder.glob("*.tar") if p.is_file()), desc=f"indexing {folder}", unit="shard"):

        def note(why, name, path=path):
            why = why if why in left_out or len(left_out) < 100 else "others"
            count, first = left_out.get(why, (0, f"{brief(name, 60)} in {brief(path.name, 60)}"))
            left_out[why] = count + 1, first

        try:
            samples = list(local_samples(str(path), note))
        except UnsupportedTar as error:
            raise ValueError(f"{flag} {path}: {error}") from None
        except tarfile.TarError as error:
            raise ValueError(f"{flag} {path}: not a whole tar ({error}); copy it again or remove it from the folder") from None
        if "links" in left_out:
            raise ValueError(f"{flag} {folder}: {left_out['links'][0]} images or labels of {path.name} are links, the first: "
                             f"{left_out['links'][1]}; pack them with tar --dereference --hard-dereference")  # fmt: skip
        for key, text in _labels(path, samples):
            some |= text is not None
            if (number := class_number(text)) is not None:
                numbers.add(number)
            else:
                without, first = without + 1, first or f"{brief(key, 60)} in {brief(path.name, 60)}"
        entries.append(describe(path, len(samples)))
        shards[path.name] = shard_of(partial(place_in, folder), entries[-1], f"{flag} {brief(str(path))}")
    for why, (count, name) in sorted(left_out.items(), key=lambda kind: -kind[1][0])[:KINDS]:
        warn(f"{flag} {folder}: leaves out {count} {brief(why)}, the first: {name}")
    if len(left_out) > KINDS:
        warn(f"{flag} {folder}: leaves out {sum(n for n, _ in left_out.values())} names of {len(left_out)} kinds in all")
    total = sum(shard.samples for shard in shards.values())
    classes = tuple(str(c) for c in range(max(numbers) + 1)) if numbers and not without else None
    unlabelled = ""
    if classes is None and some:
        unlabelled = f"{without} of {total} have no .cls with a number from 0 to {LARGEST_LABEL}, the first: {first}"
        warn(f"{flag} {folder}: indexed without labels: of its images, {unlabelled}")
    elif classes and len(numbers) < len(classes):
        warn(f"{flag} {folder}: {len(numbers)} labels from {min(numbers)} to {max(numbers)}: of the {len(classes)} classes, "
              f"{len(classes) - len(numbers)} have no image here")  # fmt: skip
    try:
        write_index(folder, entries, classes, unlabelled=unlabelled)
    except OSError as error:
        warn(f"{folder / INDEX} cannot be written ({error.strerror}); every start will index these shards again")
    return IndexFile(shards, classes, unlabelled)


def class_number(text: bytes | None) -> int | None:
    """The label in a .cls, or None if it is no whole number from 0 to LARGEST_LABEL."""
    text = (text or b"").strip()
    return int(text) if text.isdigit() and len(text) <= len(str(LARGEST_LABEL)) else None


def _labels(path: Path, samples: list[TarSample]) -> Iterator[tuple[str, bytes | None]]:
    """Key and label of these samples; the label is None if a sample has none."""
    with open(path, "rb") as file:
        for sample in samples:
            offset, size = sample.members.get(LABEL_EXTENSION, (0, -1))
            file.seek(offset)
            yield sample.key, file.read(min(size, 100)) if size >= 0 else None


def warn(text: str) -> None:
    """Print a line on stderr without breaking a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
