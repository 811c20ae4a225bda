"""Helpers of the input pipeline's tests: encoded images, small shards, photographs, statistics."""

import functools
import io
import json
import tarfile

import numpy as np
import skimage.data
import torch
from PIL import Image

from utils.data.index import Index, load_index

torch.set_num_threads(1)  # on a busy machine the threads of an operation wait for each other ten times longer than they work


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@functools.cache
def photograph(name: str) -> Image.Image:
    """A real photograph, RGB: astronaut 512x512, chelsea 300x451, coffee 400x600 (height x width)."""
    return Image.fromarray(getattr(skimage.data, name)())


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def color_of(number: int) -> tuple[int, int, int]:
    """A color that is different for each number below 256."""
    return number, 255 - number, (37 * number) % 256


def one_color(number: int, size=(17, 13)) -> bytes:
    """An image of one color, so that any crop identifies it."""
    return encode(Image.new("RGB", size, color_of(number)), "PNG")


def one_photograph(number: int) -> bytes:
    """A part of a photograph, another for each number below 90."""
    left, top = 30 * (number % 10), 40 * (number // 10)
    return encode(photograph("astronaut").crop((left, top, left + 60 + number % 7, top + 50)), "JPEG")


def one_png(number: int) -> bytes:
    """The same part, without loss and never decoded at a reduced size."""
    left, top = 30 * (number % 10), 40 * (number // 10)
    return encode(photograph("astronaut").crop((left, top, left + 40, top + 30 + number % 7)), "PNG")


def write_members(path, members) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, sizes, image=one_color, label=lambda number: number % 3) -> Index:
    """Shards of these sizes. Sample `number` of all has the data image(number) and, unless that is None, label(number)."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            members.append((f"{number:05d}.png", image(number)))
            if label is not None and label(number) is not None:
                members.append((f"{number:05d}.cls", str(label(number)).encode()))
            number += 1
        write_members(folder / f"{shard:03d}.tar", members)
    return load_index(str(folder))


def name_classes(folder, classes) -> Index:
    """Write class names into the index of a folder, for any labels in its shards, and load it."""
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"classes": classes}))
    return load_index(str(folder))


def member_at(path, name: str) -> tuple[int, int]:
    """(offset of the header, offset of the data) of a tar's member."""
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
        return member.offset, member.offset_data


def overwrite(path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def chi_square(counts, expected) -> float:
    """Distance of the statistic from its mean, in standard deviations. counts: a histogram with the sum of `expected`."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    assert expected.min() > 4 and abs(counts.sum() - expected.sum()) < 1e-6 * expected.sum()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


def ks_distance(a, b) -> float:
    """Kolmogorov-Smirnov statistic of two samples in units where 1.95 is passed once in a thousand times by chance."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()
    return gap * (len(a) * len(b) / (len(a) + len(b))) ** 0.5
