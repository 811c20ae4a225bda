"""The splits that imagenet2wds.py converts: labels, and images that are read one by one."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    """The images of a torchvision data set that keeps them in arrays, as PNG. numbers: of the images; None: all."""

    def __init__(self, dataset, name: str, numbers: Sequence[int] | None = None):
        self.dataset, self.name, self.numbers = dataset, name, range(len(dataset)) if numbers is None else numbers
        self.names = [f"{name} {number}" for number in self.numbers]

    def part(self, kept: Sequence[int]) -> "Arrays":
        return Arrays(self.dataset, self.name, [self.numbers[i] for i in kept])

    def fingerprint(self) -> list:
        """Hashes of the first and the last image, and of the names of a part. An image that PNG cannot hold has the hash of its
        pixels.
        """
        hashes = [(self.names[i], hashlib.sha256(self.content(i)).hexdigest()) for i in {0, len(self.names) - 1}]
        return hashes if len(self.names) == len(self.dataset) else [*hashes, self.names]

    def content(self, i: int) -> bytes:
        try:
            return self.read(i)[1]
        except ValueError:
            return np.asarray(self.dataset[self.numbers[i]][0]).tobytes()

    def read(self, i: int) -> tuple[str, bytes]:
        image = self.dataset[self.numbers[i]][0]
        return "png", as_png(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


@dataclass
class Split:
    """The images of one split. labels[i] is the class number of source.read(i). Without labels, both lists are None."""

    name: str
    source: Files | Arrays
    labels: list[int] | None
    classes: tuple[str, ...] | None
    others: Counter[str] = field(default_factory=Counter)  # extension -> files that are not converted
    dataset: str = ""  # of torchvision

    def part(self, kept: Sequence[int]) -> "Split":
        """Only these images, with the same class numbers."""
        labels = [self.labels[i] for i in kept] if self.labels else None
        return replace(self, source=self.source.part(kept), labels=labels)


def extension_of(name: str) -> str:
    """The extension in lower case, without the dot; "" if there is none."""
    return Path(name).suffix[1:].lower()
