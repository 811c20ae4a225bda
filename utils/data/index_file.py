"""The file index.json: the shards of a folder, and the names of their classes."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.remote import is_remote
from utils.run import dist
from utils.run.files import atomic
from utils.run.text import brief

INDEX = "index.json"
LARGEST_LABEL = 999999


@dataclass(frozen=True)
class Shard:
    path: str
    name: str
    samples: int
    bytes: int
    sha256: str


class IndexFile(NamedTuple):
    """The content of an index.json."""

    shards: dict[str, Shard]  # by name
    classes: tuple[str, ...] | None
    unlabelled: str = ""  # see Index
    dataset: str = ""  # its name in torchvision, if the converter knew it
    names: str = ""  # sha256 of the names.txt beside it; empty: the file names are not known


def parse_index(data: bytes, place_of: Callable[[str], str], flag: str, source: object) -> IndexFile:
    """The content of an index.json. place_of: name -> path or URL.

    It may come from a server. So every field is checked, and messages do not contain its text.
    """
    try:
        content = json.loads(data)
        _require(isinstance(content, dict) and isinstance(content.get("shards"), list), "it has no list of shards")
        shards = [shard_of(place_of, entry, f"shard {n}") for n, entry in enumerate(content["shards"])]
        by_name = {shard.name: shard for shard in shards}
        _require(len(by_name) == len(shards), "two shards have one name")
        classes = content.get("classes", 0)
        unlabelled, dataset, digest = (content.get(key, "") for key in ("unlabelled", "dataset", "names"))
        names = isinstance(classes, list) and len(classes) <= LARGEST_LABEL + 1 and all(isinstance(c, str) for c in classes)
        _require(classes is None or names, "classes are neither null nor a list of names")
        for key, text in (("unlabelled", unlabelled), ("dataset", dataset), ("names", digest)):
            _require(isinstance(text, str), f"{key} is not a text")
    except (ValueError, RecursionError) as error:
        why = error if type(error) is ValueError else "it is not JSON"
        raise ValueError(f"{flag} {source}: not a readable index ({why}); delete it to index the folder again") from None
    return IndexFile(by_name, tuple(classes) if names else None, brief(unlabelled, 200), brief(dataset), digest)


def _require(holds, text):
    if not holds:
        raise ValueError(text)


def shard_of(place_of: Callable[[str], str], entry: Any, which: str) -> Shard:
    """The shard of an entry. which: the name of the entry in a ValueError."""
    _require(isinstance(entry, dict), f"{which} is not an object")
    name, samples, size, digest = (entry.get(key) for key in ("name", "samples", "bytes", "sha256"))
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) < 256 and Path(name).name == name
    _require(plain, f"the name of {which} is not that of a file beside it")
    # the name becomes a part of a shell command
    _require(not is_remote(place_of(name)) or re.fullmatch(r"\w[\w.+@=-]*", name), f"{which} has no plain name")
    _require(type(size) is int and 0 <= size < 1 << 50, f"bytes of {which} is not a whole number below 2^50")
    most = size // 512  # a sample has one header or more
    _require(type(samples) is int and 0 <= samples <= most, f"samples of {which} is not a whole number from 0 to bytes / 512")
    _require(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest), f"sha256 of {which} is not 64 digits 0-9 a-f")
    return Shard(place_of(name), name, samples, size, digest)


def place_in(folder: Path, name: str) -> str:
    """The place of a file in a local folder."""
    return str(folder.resolve() / name)


def describe(path: Path, samples: int) -> dict:
    """The entry of a shard in the index. samples: its number of samples."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            dist.alive()
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_index(folder: Path, shards: list[dict], classes: tuple[str, ...] | None, name: str = INDEX, **texts: str) -> None:
    """Write an index. shards: of `describe`. texts: the last fields of IndexFile, which are left out if empty."""
    known = {key: text for key, text in texts.items() if text}
    content = {"total": sum(s["samples"] for s in shards), "classes": classes, **known, "shards": shards}
    with atomic(folder / name) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
