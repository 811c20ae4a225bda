"""The shards of a split, from an existing index.json or a new one.

python -m utils.data.index -j 8 DIR        index the shards of a folder before their first use
"""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.data.index_file import INDEX, Shard, describe, parse_index, place_in
from utils.data.indexing import index_folder, index_places, scan_part, warn
from utils.data.local_spec import expanded, named_tars
from utils.data.names import NAMES, parse_names, positions
from utils.data.remote import RemoteError, check_openable, copy, is_remote, place, tar_name
from utils.run import dist
from utils.run.flags import MAX_PIXELS, Parser, one_line_errors, positive
from utils.run.text import brief, shown


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

    def part(self, ids: np.ndarray) -> "Index":
        """The index of these samples, in ascending order. Shards without any are left out."""
        parts = np.split(ids, np.searchsorted(ids, self.first[1:-1]))
        within = [part - first for part, first in zip(parts, self.first, strict=False)]  # positions in each shard
        kept = within if self.kept is None else [old[new] for old, new in zip(self.kept, within, strict=True)]
        chosen = [(shard, positions) for shard, positions in zip(self.shards, kept, strict=True) if len(positions)]
        return replace(self, shards=tuple(shard for shard, _ in chosen), kept=tuple(positions for _, positions in chosen))

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

    A local folder without index.json is indexed now, and the index is written into it, or into cache_dir if the folder is
    read-only. The index of remote shards is read from their folder. images: a list of file names; the index then has only
    these images. The other arguments are those of flags.add_shard_flags. Raises ValueError, one line that names the flag,
    the value and a fix.
    """
    remote = is_remote(spec) and not _exists(Path(spec))
    shards, file = _remote(spec, flag, allow_pipe) if remote else _local(spec, flag, cache_dir)
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
    pattern = tar_name(spec)
    named = expanded(pattern, spec, flag) if pattern else list(file.shards)
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
    """The images of an index whose file names a list has."""
    return index.part(positions([name for shard in index.shards for name in names[shard.name]], images, source))


def _exists(path):
    try:
        return path.exists()
    except OSError:  # a URL may be too long for a file name
        return False


def load_index_together(spec: str, flag: str = "--shards", **options) -> Index:
    """The result of load_index on every process. A folder without an index is indexed by all processes of the first node."""
    dist.first_node_does(lambda part, parts: index_part(spec, flag, options.get("cache_dir"), part, parts))
    return dist.first_process_does(lambda: load_index(spec, flag, **options))


def index_part(spec: str, flag: str, cache_dir: str | None, part: int, parts: int) -> None:
    """Scan one of equal parts of the shards that load_index will index, so that it finds their scans. Raises nothing."""
    with contextlib.suppress(ValueError, OSError):
        if not is_remote(spec) or _exists(Path(spec)):
            folder = named_tars(spec, flag)[1]
            if not any(path.exists() for path in index_places(folder, cache_dir)):
                scan_part(folder, flag, cache_dir, part, parts)


def _local(spec, flag, cache_dir):
    whole, folder, named = named_tars(spec, flag)
    index = next((path for path in index_places(folder, cache_dir) if path.exists()), None)
    if index:
        file = parse_index(index.read_bytes(), partial(place_in, folder), flag, index)
    else:
        file, index = index_folder(folder, flag, cache_dir), folder / INDEX
    known = file.shards
    shards = []
    for name in dict.fromkeys([*known, *named] if whole else named):
        path = folder / name
        if name not in known:
            raise ValueError(f"{flag} {spec}: {name} is not in {index}; delete that file to index the folder again")
        if not path.exists() or path.stat().st_size != known[name].bytes:
            size = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
            raise ValueError(f"{flag} {spec}: {brief(name)} {size}, its index says {known[name].bytes}; copy it again, "
                             f"or delete {index} to index the folder again")  # fmt: skip
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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m utils.data.index", description="Index the shards of a local folder, once.")
    parser.add_argument("dir", metavar="DIR", help="folder of shards, or a pattern of them")
    parser.add_argument("-j", "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="number of processes")
    parser.add_argument("--cache-dir", metavar="DIR", help="where to write the index if the folder of the shards is read-only")
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        positive(["--jobs"], args)
        parts = [(args.dir, "DIR", args.cache_dir, part, args.jobs) for part in range(args.jobs)]
        others = [multiprocessing.Process(target=index_part, args=part, daemon=True) for part in parts[1:]]
        for process in others:
            process.start()
        index_part(*parts[0])
        for process in others:
            process.join()
        index = load_index(args.dir, "DIR", args.cache_dir)
        labels = f"{len(index.classes)} classes" if index.classes else "no labels"
        print(f"{args.dir}: {index.total} images in {len(index.shards)} shards, {labels}")


if __name__ == "__main__":
    main()
