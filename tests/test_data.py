"""The embedded samples agree with their description."""

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from utils.data.index import load_index
from utils.data.reader import Reader

DATA = Path(__file__).parent.parent / "data"
RAW = DATA / "FashionMNIST" / "raw"
NAMES = {"train": "train", "test": "t10k"}


@pytest.mark.parametrize("split, each", [("train", 600), ("test", 100)])
def test_data__torchvision_reads_balanced_classes(split, each):
    dataset = torchvision.datasets.FashionMNIST(str(DATA), train=split == "train")
    assert dataset.data.shape == (10 * each, 28, 28)
    assert Counter(dataset.targets.tolist()) == dict.fromkeys(range(10), each)
    image, label = dataset[len(dataset) - 1]
    assert (image.size, image.mode, label) == ((28, 28), "L", int(dataset.targets[-1]))


@pytest.mark.parametrize("split, count", [("train", 6000), ("test", 1000)])
def test_data__raw_layout(split, count):
    """IDX: the magic number (8 for unsigned bytes, then the number of axes), the axes as big-endian int32, then the bytes."""
    images = (RAW / f"{NAMES[split]}-images-idx3-ubyte").read_bytes()
    labels = (RAW / f"{NAMES[split]}-labels-idx1-ubyte").read_bytes()
    assert np.frombuffer(images[:16], ">i4").tolist() == [0x803, count, 28, 28] and len(images) == 16 + count * 28 * 28
    assert np.frombuffer(labels[:8], ">i4").tolist() == [0x801, count] and len(labels) == 8 + count


def test_data__no_image_in_both_splits_and_no_blank_image():
    seen = {}
    for split, stem in NAMES.items():
        pixels = np.frombuffer((RAW / f"{stem}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 784)
        assert (pixels.max(axis=1) > pixels.min(axis=1)).all()
        seen[split] = {image.tobytes() for image in pixels}
    assert not seen["train"] & seen["test"]


def test_data__checksums_and_licence_match_the_readme():
    text = (DATA / "README.md").read_text()
    stated = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) == 2 and len(cells[0]) == 64:
            stated[cells[1]] = cells[0]
    files = [*RAW.iterdir(), *DATA.glob("clipart/*/*.tar")]
    names = [path.name if path.parent == RAW else str(path.relative_to(DATA)) for path in files]
    assert stated == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in zip(names, files, strict=True)}
    assert len(stated) == 6 and "Creative Commons Public Domain Dedication" in text
    assert "MIT License" in text and "Copyright © 2017 Zalando SE" in text
    notice = " ".join(text.split())
    assert "The above copyright notice and this permission notice shall be included in all copies" in notice
    assert "WITHOUT WARRANTY OF ANY KIND" in notice and "dataset-fashion-mnist" in notice


CLIPART = {"train": 1507, "val": 376}


@pytest.mark.parametrize("split", CLIPART)
def test_clipart__coloured_shards_with_an_index(split):
    index = load_index(str(DATA / "clipart" / split), verify_shards=True)
    assert index.classes == ("animals", "food", "people", "games", "flags", "tools", "transportation")
    assert index.total == CLIPART[split]
    reader, labels, coloured = Reader(index), [], 0
    for i in range(0, index.total, 3):
        found = reader(i, True)
        with Image.open(io.BytesIO(found.image)) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            coloured += (np.ptp(np.asarray(image).astype(int), axis=2) > 30).mean() > 0.01
        labels.append(found.label)
    assert set(labels) == set(range(7)) and coloured > 0.7 * len(labels)


def test_clipart__no_picture_in_both_splits():
    seen = []
    for split in CLIPART:
        index = load_index(str(DATA / "clipart" / split))
        reader = Reader(index)
        seen.append({reader(i, True).image for i in range(index.total)})
        assert len(seen[-1]) == index.total
    assert not seen[0] & seen[1]
