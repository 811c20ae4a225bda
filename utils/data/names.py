"""The file names of the images in shards: names.txt beside index.json, and lists that choose images by name (--images)."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.run.files import atomic
from utils.run.text import brief

NAMES = "names.txt"  # a line for each image, in the order of the index; it is only read for --images
FLAG = "--images"
IMAGENET = 1_281_167  # images in its training set
HASHES = {  # sha256 of SimCLR's lists, imagenet_subsets/ of github.com/google-research/simclr
    "1percent.txt": "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    "10percent.txt": "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}


def write_names(folder: Path, names: Sequence[str]) -> str:
    """Write names.txt. Returns its sha256, which belongs into the index."""
    lines = "".join(f"{name}\n" for name in (name.replace("\n", " ").replace(os.sep, "/") for name in names))
    data = lines.encode(errors="surrogateescape")
    with atomic(folder / NAMES) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def parse_names(data: bytes, sha256: str, where: object) -> list[str]:
    """The names in a names.txt. Raises ValueError if it is not the file that the index was written with."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{where} is not the file of its index.json; copy it again, or convert again")
    return data.decode(errors="surrogateescape").split("\n")[:-1]


def read_list(path: str, images: int) -> list[str]:
    """The lines of a list of names. images: of the data set; SimCLR's lists of ImageNet must have their published sha256."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{FLAG} {path}: cannot be read ({error.strerror}); pass a list with a name on each line") from None
    wanted = HASHES.get(Path(path).name) if images == IMAGENET else None
    if wanted and (found := hashlib.sha256(data).hexdigest()) != wanted:
        raise ValueError(f"{FLAG} {path}: its sha256 is {found[:8]}..., that of SimCLR's list is {wanted[:8]}...; download it "
                         "again, or rename a list of your own")  # fmt: skip
    lines = data.decode("utf-8-sig", errors="surrogateescape").splitlines()
    listed = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not listed:
        raise ValueError(f"{FLAG} {path}: names no image; pass a file with a file name on each line")
    return listed


def positions(names: Sequence[str], path: str, source: str) -> np.ndarray:
    """The positions of the listed images, in ascending order. names: paths of all images of `source`, a flag with its value.

    A line is the end of a path, from a folder's or the file's name on. Raises ValueError for a line that names no image or
    several ones.
    """
    listed = read_list(path, len(names))
    depths, found = {line.count("/") for line in listed}, dict.fromkeys(listed, -1)
    for i, name in enumerate(names):
        parts = name.replace(os.sep, "/").split("/")
        for line in {"/".join(parts[-depth - 1 :]) for depth in depths} & found.keys():
            if found[line] >= 0:
                raise ValueError(f"{FLAG} {path}: {brief(line)} names several images of {source}; write their folders too, as "
                                 f"in {brief(name)}")  # fmt: skip
            found[line] = i
    if unknown := [line for line, i in found.items() if i < 0]:
        raise ValueError(f"{FLAG} {path}: {len(unknown)} of its {len(listed)} names are not among the {len(names)} images of "
                         f"{source}, such as {brief(unknown[0])}; pass a list of these images")  # fmt: skip
    return np.array(sorted(set(found.values())))
