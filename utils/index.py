"""Which shards there are: index.json, and the samples inside a tar."""

import glob
import hashlib
import json
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm

from utils.files import atomic

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "webp", "tif", "tiff", "gif")
LABEL_EXTENSION = "cls"
INDEX = "index.json"
PLAN = "conversion.json"  # what imagenet2wds.py begins with; the index is what it ends with


@dataclass(frozen=True)
class Shard:
    path: str
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The shards of a split, in order. classes: names by label, None without labels."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None

    @property
    def total(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def hash(self) -> str:
        """sha256 of what the shards hold, wherever they lie."""
        content = [self.classes, [(s.name, s.samples, s.sha256) for s in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass
class TarSample:
    """The members of one key: extension -> (offset of the data, size in bytes)."""

    key: str
    members: dict[str, tuple[int, int]]


def scan_tar(path: str) -> list[TarSample]:
    """The samples of a local tar, from its headers alone.

    As in WebDataset, a key is the member's path up to the first dot of its name, the extension is the rest in lower case, and
    consecutive members of one key are one sample; an extension that comes again opens the next one, so that none is lost. A
    group without an image is not a sample. Raises tarfile.TarError for a tar that is damaged or cut short.
    """
    samples: list[TarSample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            if member.isfile() and stem and extension:
                key = f"{folder}/{stem}" if folder else stem
                extension = extension.lower()
                if not samples or samples[-1].key != key or extension in samples[-1].members:
                    samples.append(TarSample(key, {}))
                samples[-1].members[extension] = (member.offset_data, member.size)
            tar.members.clear()  # it would keep every header of the archive
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes it for the end all the same
            raise tarfile.ReadError(f"no valid header and no end at byte {tar.offset}")
    return [sample for sample in samples if not sample.members.keys().isdisjoint(IMAGE_EXTENSIONS)]


def load_index(spec: str, flag: str = "--shards") -> Index:
    """The index of a folder of shards or its index.json, of one tar, or of the tars that a glob or a brace pattern names.

    Shards in a folder without index.json (someone else's) are indexed now, and the index is written beside them. Raises
    ValueError, one line with the flag, the value and a mend.
    """
    whole = Path(spec).is_dir() or (Path(spec).name == INDEX and Path(spec).exists())
    folder, named = _folder(spec, flag) if whole else _pattern(spec, flag)
    known, classes = _read(folder / INDEX, flag) if (folder / INDEX).exists() else index_folder(folder, flag)
    shards = []
    for name in dict.fromkeys([*known, *named] if whole else named):
        path = folder / name
        if name not in known:
            raise ValueError(f"{flag} {spec}: {name} is not in {folder / INDEX}; delete that file to index the folder again")
        if not path.exists() or path.stat().st_size != known[name].bytes:
            size = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
            raise ValueError(f"{flag} {spec}: {name} {size}, its index says {known[name].bytes}; copy it again, "
                             f"or delete {folder / INDEX} to index the folder again")  # fmt: skip
        shards.append(known[name])
    index = Index(tuple(shards), classes)
    if not index.total:
        raise ValueError(f"{flag} {spec}: no images in these shards; pass others")
    return index


def _folder(spec, flag):
    """(the folder that spec is, or whose index.json it is; the tars in it)"""
    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if (folder / PLAN).exists() and not (folder / INDEX).exists():
        raise ValueError(f"{flag} {spec}: a conversion that is not finished; start imagenet2wds.py again as it was started")
    if not names and not (folder / INDEX).exists():
        within = sorted({path.parent.name for path in folder.glob("*/*.tar")}, key=lambda name: (name != "train", name))
        mend = folder / within[0] if within else "a folder of shards, see imagenet2wds.py"
        raise ValueError(f"{flag} {spec}: no shards (*.tar) in it; pass {mend}")
    return folder, names


def _pattern(spec, flag):
    """(the folder of the tars that spec names, their names in its order)"""
    try:
        patterns = list(braceexpand(spec))
    except UnbalancedBracesError:
        raise ValueError(f"{flag} {spec}: a brace is not closed; write such as train-{{000000..000009}}.tar") from None
    paths = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
    folder = paths[0].parent
    if any(path.parent != folder for path in paths):
        raise ValueError(f"{flag} {spec}: names shards of several folders; put them, or links to them, into one")
    if missing := [path for path in paths if not path.exists()]:
        what = "no such file or folder" if str(missing[0]) == str(Path(spec)) else f"{missing[0]} is missing"
        raise ValueError(f"{flag} {spec}: {what}; pass a folder of shards, or a glob or brace pattern of some that exist")
    return folder, [path.name for path in paths]


def _read(path, flag):
    try:
        content = json.loads(path.read_text())
        classes = content["classes"]
        shards = {s["name"]: _shard(path.parent, s) for s in content["shards"]}
        if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise TypeError("classes are not names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {path}: not a readable index ({error!r}); delete it to index the folder again") from None
    return shards, tuple(classes) if classes is not None else None


def _shard(folder, entry):
    if Path(entry["name"]).name != entry["name"]:
        raise ValueError(f"{entry['name']} is not the name of a file beside it")
    path = str(folder.resolve() / entry["name"])
    return Shard(path, entry["name"], int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))


def index_folder(folder: Path, flag: str) -> tuple[dict[str, Shard], tuple[str, ...] | None]:
    """Index someone else's shards. Labels that are numbers give classes named after them; no or other labels give None."""
    shards, labels = {}, set()
    for path in tqdm(sorted(p for p in folder.glob("*.tar") if p.is_file()), desc=f"indexing {folder}", unit="shard"):
        try:
            samples = scan_tar(path)
        except tarfile.TarError as error:
            raise ValueError(f"{flag} {path}: not a whole tar ({error}); copy it again or take it out of the folder") from None
        labels |= _labels(path, samples)
        shards[path.name] = describe(path, len(samples))
    numbers = {int(label) for label in labels if label.isdecimal() and len(label) < 7}  # more digits are no class number
    classes = tuple(str(c) for c in range(max(numbers) + 1)) if numbers and len(numbers) == len(labels) else None
    try:
        write_index(folder, list(shards.values()), classes)
    except OSError as error:
        tqdm.write(f"warning: {folder / INDEX} cannot be written ({error.strerror}); these shards are indexed at every start",
                   file=sys.stderr)  # fmt: skip
    return {name: _shard(folder, entry) for name, entry in shards.items()}, classes


def _labels(path, samples):
    """The labels of these samples as text, "" for one that has none."""
    with open(path, "rb") as file:
        found = set()
        for sample in samples:
            offset, size = sample.members.get(LABEL_EXTENSION, (0, 0))
            file.seek(offset)
            found.add(file.read(size).decode(errors="replace").strip())
        return found


def describe(path: Path, samples: int) -> dict:
    """A shard's entry in the index."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest}


def write_index(folder: Path, shards: list[dict], classes: tuple[str, ...] | None) -> None:
    content = {"total": sum(s["samples"] for s in shards), "classes": classes, "shards": shards}
    with atomic(folder / INDEX) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
