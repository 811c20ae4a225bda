"""The shards of a split, from an existing index.json or a new one."""

import glob
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from utils.data.index_file import INDEX, Shard, describe, parse_index, place_in
from utils.data.indexing import index_folder, warn
from utils.data.names import NAMES, parse_names, positions
from utils.data.remote import RemoteError, check_openable, copy, is_remote, place, tar_name
from utils.run.flags import MAX_PIXELS
from utils.run.text import brief, shown

PLAN = "conversion.json"  # imagenet2wds.py writes it at its start, and the index at its end


@dataclass(frozen=True)
class Index:
    """The shards of a split, in order.

    classes: names by label, or None. cache_dir: the folder of copies of remote shards. unlabelled: text about the
    images without a class number, if they made classes None; "" if there is no label at all. dataset: its name in torchvision,
    or "". kept: for each shard the positions of its samples that belong to the index, in ascending order; None: all.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    cache_dir: str | None = None
    unlabelled: str = ""
    max_pixels: int = MAX_PIXELS  # the largest image that is decoded
    dataset: str = ""
    kept: tuple[np.ndarray, ...] | None = None

    @cached_property
    def first(self) -> np.ndarray:
        """The id of each shard's first sample, then the number of all samples."""
        counts = [shard.samples for shard in self.shards] if self.kept is None else [len(kept) for kept in self.kept]
        return np.cumsum([0, *counts])

    @property
    def total(self) -> int:
        return int(self.first[-1])

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def hash(self) -> str:
        """sha256 of the content of the shards, and of the choice of images; it does not depend on their path."""
        content: list = [self.classes, [(s.name, s.samples, s.sha256) for s in self.shards]]
        content += [] if self.kept is None else [[kept.tolist() for kept in self.kept]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_index(
    spec: str,
    flag: str = "--shards",
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    verify_shards: bool = False,
    max_pixels: int = MAX_PIXELS,
    images: str | None = None,
) -> Index:
    """The index of a folder of shards or its index.json, of one tar, or of a glob or brace pattern of tars.

    A local folder without index.json is indexed now, and the index is written into it. The index of remote shards is read from
    their folder. images: a list of file names; the index then has only these images. The other arguments are those of
    flags.add_shard_flags. Raises ValueError, one line that names the flag, the
    value and a fix.
    """
    remote = is_remote(spec) and not _exists(Path(spec))
    shards, file = _remote(spec, flag, allow_pipe) if remote else _local(spec, flag)
    index = Index(tuple(shards), file.classes, cache_dir, file.unlabelled, max_pixels, file.dataset)
    if not index.total:
        raise ValueError(f"{flag} {shown(spec)}: no images in these shards; pass others")
    if images:
        index = _listed(index, images, _names(spec, flag, file, remote), f"{flag} {shown(spec)}")
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
        raise ValueError(f"{flag} {shown(spec)}: no {INDEX} can be read there ({error}); copy the file there: "
                         "imagenet2wds.py writes it, or the first use of a local folder") from None  # fmt: skip
    file = parse_index(content.getvalue(), partial(place, spec), flag, shown(url))
    named = _expanded(tar_name(spec), spec, flag) if tar_name(spec) else list(file.shards)
    if strangers := [name for name in named if name not in file.shards]:
        raise ValueError(f"{flag} {shown(spec)}: {strangers[0]} is not in {shown(url)}; index the shards again where they are "
                         "local")  # fmt: skip
    return [file.shards[name] for name in named], file


def _names(spec, flag, file, remote):
    """name of a shard -> the file names of its images, of all shards in the index."""
    if not file.names:
        raise ValueError(f"--images: the shards of {flag} {shown(spec)} have no file names, as those of an older or another "
                         f"converter; convert the images again, which writes {NAMES}")  # fmt: skip
    if remote:
        content, where = io.BytesIO(), shown(place(spec, NAMES))
        try:
            copy(place(spec, NAMES), content)
        except RemoteError as error:
            raise ValueError(f"{flag} {shown(spec)}: no {NAMES} can be read there ({error}); copy it there") from None
        data = content.getvalue()
    else:
        path = next(Path(shard.path).parent for shard in file.shards.values()) / NAMES
        if not path.exists():
            raise ValueError(f"{flag} {spec}: {path} is missing; copy it there, or convert again")
        data, where = path.read_bytes(), str(path)
    names = iter(parse_names(data, file.names, f"{flag} {shown(spec)}: {where}"))
    return {shard.name: list(itertools.islice(names, shard.samples)) for shard in file.shards.values()}


def _listed(index, images, names, source):
    """The images of an index whose file names a list has. Shards without any are left out."""
    chosen = positions([name for shard in index.shards for name in names[shard.name]], images, source)
    parts = np.split(chosen, np.searchsorted(chosen, index.first[1:-1]))
    kept = [(shard, part - first) for shard, part, first in zip(index.shards, parts, index.first, strict=False) if len(part)]
    return replace(index, shards=tuple(shard for shard, _ in kept), kept=tuple(part for _, part in kept))


def _exists(path):
    try:
        return path.exists()
    except OSError:  # a URL may be too long for a file name
        return False


def _local(spec, flag):
    whole = Path(spec).is_dir() or (Path(spec).name == INDEX and Path(spec).exists())
    folder, named = _folder(spec, flag) if whole else _pattern(spec, flag)
    if (path := folder / INDEX).exists():
        file = parse_index(path.read_bytes(), partial(place_in, folder), flag, path)
    else:
        file = index_folder(folder, flag)
    known = file.shards
    shards = []
    for name in dict.fromkeys([*known, *named] if whole else named):
        path = folder / name
        if name not in known:
            raise ValueError(f"{flag} {spec}: {name} is not in {folder / INDEX}; delete that file to index the folder again")
        if not path.exists() or path.stat().st_size != known[name].bytes:
            size = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
            raise ValueError(f"{flag} {spec}: {brief(name)} {size}, its index says {known[name].bytes}; copy it again, "
                             f"or delete {folder / INDEX} to index the folder again")  # fmt: skip
        shards.append(known[name])
    return shards, file


def cache_path(shard: Shard, folder: str) -> Path:
    """The place of the copy of a remote shard in --cache-dir."""
    return Path(folder) / f"{shard.sha256[:16]}-{shard.name}"


def verify(index: Index, flag: str) -> None:
    """Raise ValueError unless every local shard has the sha256 of its index. Remote shards are verified while they are read.

    A copy in the cache with another sha256 is removed, and its shard is read again.
    """
    places = [(shard, Path(shard.path)) for shard in index.shards if not is_remote(shard.path)]
    if cache := index.cache_dir:
        copies = [(shard, cache_path(shard, cache)) for shard in index.shards if is_remote(shard.path)]
        places += [(shard, path) for shard, path in copies if path.exists()]
    for shard, path in tqdm(places, desc=f"verifying {flag}", unit="shard"):
        if describe(path, shard.samples)["sha256"] == shard.sha256:
            continue
        if not is_remote(shard.path):
            raise ValueError(f"{flag} {path}: its sha256 differs from its index; copy it again, or delete the "
                             f"{INDEX} beside it to index the folder again")  # fmt: skip
        path.unlink(missing_ok=True)
        warn(f"{path}: its sha256 differs from its index; this copy is removed, and its shard is copied again")


def _folder(spec, flag):
    """The folder that spec names, itself or by its index.json, and the names of its tars."""
    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if (folder / PLAN).exists() and not (folder / INDEX).exists():
        raise ValueError(f"{flag} {spec}: an unfinished conversion; start imagenet2wds.py again with the same flags")
    if not (folder / INDEX).exists():
        _refuse_compressed(sorted(path.name for path in folder.iterdir()), spec, flag)
    if not names and not (folder / INDEX).exists():
        within = sorted({path.parent.name for path in folder.glob("*/*.tar")}, key=lambda name: (name != "train", name))
        fix = folder / within[0] if within else "a folder of shards, see imagenet2wds.py"
        raise ValueError(f"{flag} {spec}: no shards (*.tar) in it; pass {fix}")
    return folder, names


def _pattern(spec, flag):
    """The folder of the tars that spec names, and their names in its order."""
    paths = [Path(path) for pattern in _expanded(spec, spec, flag) for path in sorted(glob.glob(pattern)) or [pattern]]
    folder = paths[0].parent
    _refuse_compressed([path.name for path in paths], spec, flag)
    if any(path.parent != folder for path in paths):
        raise ValueError(f"{flag} {spec}: names shards in several folders; put them, or links to them, into one")
    if missing := [path for path in paths if not path.exists()]:
        why = "no such file or folder" if str(missing[0]) == str(Path(spec)) else f"{missing[0]} is missing"
        raise ValueError(f"{flag} {spec}: {why}; pass a folder of shards, or a glob or brace pattern of existing ones")
    return folder, [path.name for path in paths]


def _refuse_compressed(names, spec, flag):
    for name in names:
        if re.search(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", name) and name.rpartition(".tar")[0] + ".tar" not in names:
            raise ValueError(f"{flag} {spec}: {brief(name)} is compressed; unpack it, shards are plain tars")


def _expanded(pattern, spec, flag):
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{flag} {shown(spec)}: a brace is not closed; write it like train-{{000000..000009}}.tar") from None
