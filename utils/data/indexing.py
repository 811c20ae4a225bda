"""Index a local folder: count the samples of its shards and read their labels, with progress on disk."""

import contextlib
import hashlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils.data.index_file import INDEX, LARGEST_LABEL, IndexFile, describe, place_in, shard_of, write_index
from utils.data.tars import LABEL_EXTENSION, TarSample, UnsupportedTar, local_samples
from utils.run.files import encoded
from utils.run.text import brief

KINDS = 5  # kinds of left-out files that get a line


def index_places(folder: Path, cache_dir: str | None) -> list[Path]:
    """Where the index of a folder may be: in the folder or, if that cannot be written, in --cache-dir."""
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return [folder / INDEX, *([Path(cache_dir) / f"{digest[:16]}-{INDEX}"] if cache_dir else [])]


def index_folder(folder: Path, flag: str, cache_dir: str | None = None) -> IndexFile:
    """Index a local folder. Left-out files are counted and named.

    Labels that are numbers give classes with these names. If a sample has no label or another kind of label, classes are None.
    """
    place = _writable(folder, cache_dir)
    scans = scan_shards(folder, flag, place)
    left_out: dict[str, tuple[int, str]] = {}  # reason: (number of files, the first one)
    for scan in scans:
        for why, (count, name) in scan["left_out"].items():
            why = why if why in left_out or len(left_out) < 100 else "others"
            left_out[why] = left_out.get(why, (0, ""))[0] + count, left_out.get(why, (0, name))[1]
    for why, (count, name) in sorted(left_out.items(), key=lambda kind: -kind[1][0])[:KINDS]:
        warn(f"{flag} {folder}: leaves out {count} {brief(why)}, the first: {name}")
    if len(left_out) > KINDS:
        warn(f"{flag} {folder}: leaves out {sum(n for n, _ in left_out.values())} names of {len(left_out)} kinds in all")
    shards = [shard_of(partial(place_in, folder), s["shard"], f"{flag} {brief(s['shard']['name'])}") for s in scans]
    total, without = sum(shard.samples for shard in shards), sum(scan["without"] for scan in scans)
    numbers = {number for scan in scans for number in scan["numbers"]}
    classes = tuple(str(c) for c in range(max(numbers) + 1)) if numbers and not without else None
    unlabelled = ""
    if classes is None and any(scan["some"] for scan in scans):
        first = next(scan["first"] for scan in scans if scan["without"])
        unlabelled = f"{without} of {total} have no .cls with a number from 0 to {LARGEST_LABEL}, the first: {first}"
        warn(f"{flag} {folder}: indexed without labels: of its images, {unlabelled}")
    elif classes and len(numbers) < len(classes):
        warn(f"{flag} {folder}: {len(numbers)} labels from {min(numbers)} to {max(numbers)}: of the {len(classes)} classes, "
              f"{len(classes) - len(numbers)} have no image here")  # fmt: skip
    target = place or folder / INDEX
    try:
        write_index(target.parent, [scan["shard"] for scan in scans], classes, target.name, unlabelled=unlabelled)
    except OSError as error:
        warn(f"{target} cannot be written ({error.strerror}); every start will index these shards again; --cache-dir DIR keeps "
             "the index in DIR")  # fmt: skip
    for file in target.parent.glob(f"{target.name}.scanned.*"):
        file.unlink(missing_ok=True)
    return IndexFile({shard.name: shard for shard in shards}, classes, unlabelled)


def scan_part(folder: Path, flag: str, cache_dir: str | None, part: int, parts: int) -> None:
    """Scan one of equal parts of a folder's shards, as a process of several. Errors are left to index_folder."""
    if place := _writable(folder, cache_dir):
        with contextlib.suppress(ValueError, OSError):
            scan_shards(folder, flag, place, part, parts)


def scan_shards(folder: Path, flag: str, place: Path | None, part: int = 0, parts: int = 1) -> list[dict]:
    """The result of `_scan` for each shard of a part. place: of the index; each result is written beside it immediately.

    Results of an earlier, interrupted scan are taken if size and time of the shard are the same. Raises ValueError.
    """
    known = _scanned(place) if place else {}
    paths = sorted(path for path in folder.glob("*.tar") if path.is_file())[part::parts]
    share = f", a share of {parts} processes" if parts > 1 else ""
    found = []
    for path in tqdm(paths, desc=f"indexing {folder}{share}", unit="shard", disable=part > 0):
        status = path.stat()
        at = {"bytes": status.st_size, "mtime": status.st_mtime_ns}
        scan = known.get(path.name)
        if not scan or scan["at"] != at:
            scan = {"at": at, **_scan(path, flag)}
            if place:
                with contextlib.suppress(OSError), open(f"{place}.scanned.{part}", "ab") as file:
                    file.write(b"\n" + encoded([scan]))  # a killed process may have left a line without its end
        found.append(scan)
    return found


def _scanned(place: Path) -> dict[str, dict]:
    """The results of an interrupted scan, by the name of the shard."""
    found = {}
    for file in place.parent.glob(f"{place.name}.scanned.*"):
        with contextlib.suppress(FileNotFoundError):  # another run has just finished the index
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # an incomplete line
                    scan = json.loads(line)
                    found[scan["shard"]["name"]] = scan
    return found


def _scan(path: Path, flag: str) -> dict:
    """The facts of a shard for the index of its folder, ready for JSON. Raises ValueError."""
    left_out: dict[str, tuple[int, str]] = {}

    def note(why, name):
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
        raise ValueError(f"{flag} {path.parent}: {left_out['links'][0]} images or labels of {path.name} are links, the first: "
                         f"{left_out['links'][1]}; pack them with tar --dereference --hard-dereference")  # fmt: skip
    texts = list(_labels(path, samples))
    numbers = [class_number(text) for _, text in texts]
    without = [key for (key, _), number in zip(texts, numbers, strict=True) if number is None]
    return {
        "shard": describe(path, len(samples)),
        "numbers": sorted({number for number in numbers if number is not None}),
        "without": len(without),  # samples without a class number, the first one, and whether any has a label
        "first": f"{brief(without[0], 60)} in {brief(path.name, 60)}" if without else "",
        "some": any(text is not None for _, text in texts),
        "left_out": left_out,  # reason: (number of files, the first one)
    }


def _writable(folder, cache_dir):
    """The first place for an index that can be written, or None."""
    for place in index_places(folder, cache_dir):
        with contextlib.suppress(OSError):
            if place.parent != folder:
                place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                return place
    return None


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
