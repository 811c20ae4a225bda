"""The index of a split: its shards, in index.json."""

import glob
import hashlib
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from utils.data.remote import RemoteError, check_openable, copy, is_remote, place, tar_name
from utils.data.tars import LABEL_EXTENSION, local_samples
from utils.run.files import atomic

INDEX = "index.json"
PLAN = "conversion.json"  # imagenet2wds.py writes it at its start, and the index at its end


@dataclass(frozen=True)
class Shard:
    path: str
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The shards of a split, in order. classes: names by label, or None. cache_dir: the folder of copies of remote shards."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    cache_dir: str | None = None

    @property
    def total(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def hash(self) -> str:
        """sha256 of the content of the shards, in whatever place they are."""
        content = [self.classes, [(s.name, s.samples, s.sha256) for s in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_index(
    spec: str, flag: str = "--shards", cache_dir: str | None = None, allow_pipe: bool = False, verify_shards: bool = False
) -> Index:
    """The index of a folder of shards or its index.json, of one tar, or of a glob or brace pattern of tars.

    A local folder without index.json is indexed now, and the index is written into it. The index of remote shards is read from
    their folder. The other arguments are those of flags.add_shard_flags. Raises ValueError, one line that names the flag, the
    value and a fix.
    """
    if is_remote(spec) and not Path(spec).exists():
        shards, classes = _remote(spec, flag, allow_pipe)
    else:
        shards, classes = _local(spec, flag)
    index = Index(tuple(shards), classes, cache_dir)
    if not index.total:
        raise ValueError(f"{flag} {spec}: no images in these shards; pass others")
    if verify_shards:
        verify(index, flag)
    return index


def _remote(spec, flag, allow_pipe):
    check_openable(spec, flag, allow_pipe)
    url = place(spec, INDEX)
    content = io.BytesIO()
    try:
        copy(url, content)
    except RemoteError as error:
        raise ValueError(f"{flag} {spec}: no {INDEX} can be read there ({error}); copy one there: imagenet2wds.py writes it, "
                         "and so does the first use of a local folder") from None  # fmt: skip
    known, classes = _parse(content.getvalue(), partial(place, spec), flag, url)
    named = _expanded(tar_name(spec), spec, flag) if tar_name(spec) else list(known)
    if strangers := [name for name in named if name not in known]:
        raise ValueError(f"{flag} {spec}: {strangers[0]} is not in {url}; index the shards again where they are local")
    return [known[name] for name in named], classes


def _local(spec, flag):
    whole = Path(spec).is_dir() or (Path(spec).name == INDEX and Path(spec).exists())
    folder, named = _folder(spec, flag) if whole else _pattern(spec, flag)
    if (path := folder / INDEX).exists():
        known, classes = _parse(path.read_bytes(), partial(_path, folder), flag, path)
    else:
        known, classes = index_folder(folder, flag)
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
    return shards, classes


def verify(index: Index, flag: str) -> None:
    """Raise ValueError unless every local shard has the sha256 of its index. Remote shards are verified while they are read."""
    for shard in tqdm([s for s in index.shards if not is_remote(s.path)], desc=f"verifying {flag}", unit="shard"):
        if describe(Path(shard.path), shard.samples)["sha256"] != shard.sha256:
            raise ValueError(f"{flag} {shard.path}: its sha256 is not the one in its index; copy it again, or delete the "
                             f"{INDEX} beside it to index the folder again")  # fmt: skip


def _folder(spec, flag):
    """The folder that spec names, itself or by its index.json, and the names of its tars."""
    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if (folder / PLAN).exists() and not (folder / INDEX).exists():
        raise ValueError(f"{flag} {spec}: an unfinished conversion; start imagenet2wds.py again with the same flags")
    if not names and not (folder / INDEX).exists():
        within = sorted({path.parent.name for path in folder.glob("*/*.tar")}, key=lambda name: (name != "train", name))
        fix = folder / within[0] if within else "a folder of shards, see imagenet2wds.py"
        raise ValueError(f"{flag} {spec}: no shards (*.tar) in it; pass {fix}")
    return folder, names


def _pattern(spec, flag):
    """The folder of the tars that spec names, and their names in its order."""
    paths = [Path(path) for pattern in _expanded(spec, spec, flag) for path in sorted(glob.glob(pattern)) or [pattern]]
    folder = paths[0].parent
    if any(path.parent != folder for path in paths):
        raise ValueError(f"{flag} {spec}: names shards in several folders; put them, or links to them, into one")
    if missing := [path for path in paths if not path.exists()]:
        why = "no such file or folder" if str(missing[0]) == str(Path(spec)) else f"{missing[0]} is missing"
        raise ValueError(f"{flag} {spec}: {why}; pass a folder of shards, or a glob or brace pattern of existing ones")
    return folder, [path.name for path in paths]


def _expanded(pattern, spec, flag):
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{flag} {spec}: a brace is not closed; write it like train-{{000000..000009}}.tar") from None


def _path(folder, name):
    return str(folder.resolve() / name)


def _parse(data, place_of, flag, source):
    """The shards by name and the classes of an index.json. place_of: name -> path or URL."""
    try:
        content = json.loads(data)
        classes = content["classes"]
        shards = {s["name"]: _shard(place_of, s) for s in content["shards"]}
        if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise TypeError("classes are not names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {source}: not a readable index ({error!r}); delete it to index the folder again") from None
    return shards, tuple(classes) if classes is not None else None


def _shard(place_of, entry):
    name = entry["name"]
    if Path(name).name != name:
        raise ValueError(f"{name} is not the name of a file beside it")
    if is_remote(place_of(name)) and not re.fullmatch(r"\w[\w.+@=-]*", name):  # it becomes a part of a shell command
        raise ValueError(f"{name!r} is not a plain name")
    return Shard(place_of(name), name, int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))


def index_folder(folder: Path, flag: str) -> tuple[dict[str, Shard], tuple[str, ...] | None]:
    """Index a local folder. Number labels give classes with these names; without labels, or with others, classes are None."""
    shards: dict[str, dict] = {}
    labels: set[str] = set()
    for path in tqdm(sorted(p for p in folder.glob("*.tar") if p.is_file()), desc=f"indexing {folder}", unit="shard"):
        try:
            imageless: list[str] = []
            samples = list(local_samples(str(path), imageless))
        except tarfile.TarError as error:
            raise ValueError(f"{flag} {path}: not a whole tar ({error}); copy it again or remove it from the folder") from None
        if imageless:
            tqdm.write(f"warning: {path}: skips {len(imageless)} keys without an image, the first: {imageless[0]}",
                       file=sys.stderr)  # fmt: skip
        labels |= _labels(path, samples)
        shards[path.name] = describe(path, len(samples))
    # a label of more than six digits is not a class
    numbers = {int(label) for label in labels if label.isascii() and label.isdecimal() and len(label) < 7}
    classes = tuple(str(c) for c in range(max(numbers) + 1)) if numbers and len(numbers) == len(labels) else None
    try:
        write_index(folder, list(shards.values()), classes)
    except OSError as error:
        tqdm.write(f"warning: {folder / INDEX} cannot be written ({error.strerror}); every start will index these shards again",
                   file=sys.stderr)  # fmt: skip
    return {name: _shard(partial(_path, folder), entry) for name, entry in shards.items()}, classes


def _labels(path, samples):
    """The labels of these samples as text, "" for a sample without one."""
    with open(path, "rb") as file:
        found = set()
        for sample in samples:
            offset, size = sample.members.get(LABEL_EXTENSION, (0, 0))
            file.seek(offset)
            found.add(file.read(size).decode(errors="replace").strip())
        return found


def describe(path: Path, samples: int) -> dict:
    """The entry of a shard in the index. samples: its number of samples."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest}


def write_index(folder: Path, shards: list[dict], classes: tuple[str, ...] | None) -> None:
    content = {"total": sum(s["samples"] for s in shards), "classes": classes, "shards": shards}
    with atomic(folder / INDEX) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
