"""What imagenet2wds.py converts: the images of a split, read one by one, and their labels."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # formats whose bytes are copied; all others become PNG


class Files:
    """Image files below a folder."""

    def __init__(self, folder: Path, paths: list[str]):
        self.folder, self.names = folder, paths

    def fingerprint(self) -> list:
        """Names and sizes. Sizes say little of formats without compression, so some of those files are hashed as well."""
        paths = [self.folder / name for name in self.names]
        sizes = [path.stat().st_size if path.exists() else -1 for path in paths]  # -1: a dangling link
        plain = [path for path in paths if path.suffix.lower() not in (".jpg", ".jpeg", ".png")]
        content = [path.read_bytes() if path.exists() else b"" for path in plain[:: 1 + len(plain) // 64]]
        return [list(zip(self.names, sizes, strict=True)), [hashlib.sha256(data).hexdigest() for data in content]]

    def read(self, i: int) -> tuple[str, bytes]:
        """(extension, encoded image). Raises PIL's error for an image that does not decode completely."""
        data = (self.folder / self.names[i]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return (COPIED[image.format], data) if image.format in COPIED else ("png", as_png(image))


class Arrays:
    """The images of a torchvision data set, as PNG."""

    def __init__(self, dataset, name: str):
        self.dataset, self.names = dataset, [f"{name} {i}" for i in range(len(dataset))]

    def fingerprint(self) -> list:
        return [(self.names[i], hashlib.sha256(self.read(i)[1]).hexdigest()) for i in {0, len(self.names) - 1}]

    def read(self, i: int) -> tuple[str, bytes]:
        image = self.dataset[i][0]
        return "png", as_png(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


@dataclass
class Split:
    """The images of one split. labels[i], an index into classes, belongs to source.read(i). Without labels, both are None."""

    name: str
    source: Files | Arrays
    labels: list[int] | None
    classes: tuple[str, ...] | None


def as_png(image: Image.Image) -> bytes:
    """The image as PNG. Raises ValueError for pixels that PNG cannot hold."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray(pixels.astype(np.uint16))
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
