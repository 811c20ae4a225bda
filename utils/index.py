"""Which shards there are: index.json, and the samples inside a tar."""

import glob
import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from utils.files import atomic

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "webp", "tif", "tiff", "gif")
LABEL_EXTENSION = "cls"
INDEX = "index.json"


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
    consecutive members of one key are one sample. A group without an image is not a sample.
    """
    samples: list[TarSample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            if member.isfile() and stem and extension:
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(TarSample(key, {}))
                samples[-1].members[extension.lower()] = (member.offset_data, member.size)
            tar.members.clear()  # it would keep every header of the archive
    return [sample for sample in samples if not sample.members.keys().isdisjoint(IMAGE_EXTENSIONS)]


def load_index(spec: str, flag: str = "--shards") -> Index:
    """The index of a folder of shards, of one tar, or of the tars that a glob or a brace pattern names.

    Shards in a folder without index.json (someone else's) are indexed now, and the index is written beside them. Raises
    ValueError, one line with the flag, the value and a mend.
    """
    folder = Path(spec)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths and not (folder / INDEX).exists():
            within = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and next(p.glob("*.tar"), None)]
            mend = folder / within[0] if within else "a folder of shards, see imagenet2wds.py"
            raise ValueError(f"{flag} {spec}: no shards (*.tar) in it; pass {mend}")
    else:
        paths = [Path(path) for pattern in braceexpand(spec) for path in sorted(glob.glob(pattern)) or [pattern]]
        folder = paths[0].parent
        if not paths[0].exists():
            raise ValueError(f"{flag} {spec}: no such file or folder; pass a folder of shards, or a glob or brace pattern")
        if any(path.parent != folder for path in paths):
            raise ValueError(f"{flag} {spec}: names shards of several folders; put them, or links to them, into one")
    known, classes = _read(folder / INDEX, flag) if (folder / INDEX).exists() else index_folder(folder)
    named = known if Path(spec).is_dir() else [path.name for path in paths]
    shards = []
    for name in named:
        path = folder / name
        if name not in known:
            raise ValueError(f"{flag} {spec}: {name} is not in {folder / INDEX}; delete that file to index the folder again")
        if not path.exists() or path.stat().st_size != known[name]["bytes"]:
            size = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
            raise ValueError(f"{flag} {spec}: {name} {size}, its index says {known[name]['bytes']}; copy it again, "
                             f"or delete {folder / INDEX} to index the folder again")  # fmt: skip
        shards.append(Shard(path=str(path.resolve()), **known[name]))
    index = Index(tuple(shards), classes)
    if not index.total:
        raise ValueError(f"{flag} {spec}: no images in these shards; pass others")
    return index


def _read(path, flag):
    try:
        content = json.loads(path.read_text())
        classes = content["classes"]
        shards = {s["name"]: {k: s[k] for k in ("name", "samples", "bytes", "sha256")} for s in content["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {path}: not a readable index ({error!r}); delete it to index the folder again") from None
    return shards, tuple(classes) if classes is not None else None


def index_folder(folder: Path) -> tuple[dict[str, dict], tuple[str, ...] | None]:
    """Index someone else's shards. Labels that are numbers give classes named after them; no or other labels give None."""
    shards, labels = {}, set()
    for path in tqdm(sorted(folder.glob("*.tar")), desc=f"indexing {folder}", unit="shard"):
        try:
            samples = scan_tar(path)
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a readable tar ({error}); copy it again or take it out of the folder") from None
        labels |= _labels(path, samples)
        shards[path.name] = describe(path, len(samples))
    numbers = {int(label) for label in labels if label.isdigit()}
    classes = tuple(str(c) for c in range(max(numbers) + 1)) if numbers and len(numbers) == len(labels) else None
    try:
        write_index(folder, list(shards.values()), classes)
    except OSError as error:
        tqdm.write(f"warning: {folder / INDEX} cannot be written ({error.strerror}); these shards are indexed at every start")
    return shards, classes


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
