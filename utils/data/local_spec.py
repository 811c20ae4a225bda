"""The local tars that a value of --shards names: a folder, its index.json, a tar, a glob or a brace pattern."""

import glob
import re
from pathlib import Path

from braceexpand import braceexpand

from utils.data.index_file import INDEX
from utils.run.text import brief, shown

PLAN = "conversion.json"  # imagenet2wds.py writes it at its start, and the index at its end


def named_tars(spec: str, flag: str) -> tuple[bool, Path, list[str]]:
    """(whether all shards of the folder are meant, folder, names of the tars). Raises ValueError."""
    whole = Path(spec).is_dir() or (Path(spec).name == INDEX and Path(spec).exists())
    return whole, *(_folder(spec, flag) if whole else _pattern(spec, flag))


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
    paths = [Path(path) for pattern in expanded(spec, spec, flag) for path in sorted(glob.glob(pattern)) or [pattern]]
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


def expanded(pattern: str, spec: str, flag: str) -> list[str]:
    """The names that a brace pattern stands for. Raises ValueError."""
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{flag} {shown(spec)}: a brace is not closed; write it like train-{{000000..000009}}.tar") from None
