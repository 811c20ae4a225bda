"""The splits that imagenet2wds.py converts: labels, and images that are read one by one."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.encoding import as_png, encode

DANGLING = -1  # the size of a link to a missing file


class Files:
    """Image files below a folder: paths in it, and sizes in bytes."""

    def __init__(self, folder: Path, names: list[str], sizes: list[int]):
        self.folder, self.names, self.sizes = folder, names, sizes

    def part(self, kept: Sequence[int]) -> "Files":
        return Files(self.folder, [self.names[i] for i in kept], [self.sizes[i] for i in kept])

    def fingerprint(self) -> list:
        """Names and sizes. Files without compression often have equal sizes, so some of them are hashed too."""
        plain = [i for i, name in enumerate(self.names) if not name.lower().endswith((".jpg", ".jpeg", ".png"))]
        content = (b"" if self.sizes[i] == DANGLING else self.content(i) for i in plain[:: 1 + len(plain) // 64])
        return [list(zip(self.names, self.sizes, strict=True)), [hashlib.sha256(data).hexdigest() for data in content]]

    def content(self, i: int) -> bytes:
        return (self.folder / self.names[i]).read_bytes()

    def read(self, i: int) -> tuple[str, bytes]:
        """(extension, encoded image). Raises OSError with an errno for a failed read, other errors for an undecodable image."""
        if self.sizes[i] == DANGLING:
            raise ValueError("a link to a missing file")
        return encode(self.content(i), extension_of(self.names[i]))


class Arrays:
    """The images of a torchvision data set, as PNG."""

    def __init__(self, dataset, name: str):
        self.dataset, self.names = dataset, [f"{name} {i}" for i in range(len(dataset))]

    def fingerprint(self) -> list:
        """Hashes of the first and the last image. An image that PNG cannot hold has the hash of its pixels."""
        return [(self.names[i], hashlib.sha256(self.content(i)).hexdigest()) for i in {0, len(self.names) - 1}]

    def content(self, i: int) -> bytes:
        try:
            return self.read(i)[1]
        except ValueError:
            return np.asarray(self.dataset[i][0]).tobytes()

    def read(self, i: int) -> tuple[str, bytes]:
        image = self.dataset[i][0]
        return "png", as_png(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


@dataclass
class Split:
    """The images of one split. labels[i] is the class number of source.read(i). Without labels, both lists are None."""

    name: str
    source: Files | Arrays
    labels: list[int] | None
    classes: tuple[str, ...] | None
    others: Counter[str] = field(default_factory=Counter)  # extension -> files that are not converted


def extension_of(name: str) -> str:
    """The extension in lower case, without the dot; "" if there is none."""
    return Path(name).suffix[1:].lower()
