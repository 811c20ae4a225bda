"""The embedded sample, against its description and the loader that it is laid out for."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torchvision

DATA = Path(__file__).parent.parent / "data"
RAW = DATA / "FashionMNIST" / "raw"
NAMES = {"train": "train", "test": "t10k"}


@pytest.mark.parametrize("split, each", [("train", 600), ("test", 100)])
def test_data__torchvision_loads_it_class_balanced(split, each):
    dataset = torchvision.datasets.FashionMNIST(str(DATA), train=split == "train")
    assert dataset.data.shape == (10 * each, 28, 28)
    assert Counter(dataset.targets.tolist()) == dict.fromkeys(range(10), each)
    image, label = dataset[len(dataset) - 1]
    assert (image.size, image.mode, label) == ((28, 28), "L", int(dataset.targets[-1]))


@pytest.mark.parametrize("split, count", [("train", 6000), ("test", 1000)])
def test_data__raw_layout(split, count):
    """IDX: magic 8 (unsigned bytes) and number of axes, the axes as big-endian int32, the bytes."""
    images = (RAW / f"{NAMES[split]}-images-idx3-ubyte").read_bytes()
    labels = (RAW / f"{NAMES[split]}-labels-idx1-ubyte").read_bytes()
    assert np.frombuffer(images[:16], ">i4").tolist() == [0x803, count, 28, 28] and len(images) == 16 + count * 28 * 28
    assert np.frombuffer(labels[:8], ">i4").tolist() == [0x801, count] and len(labels) == 8 + count


def test_data__no_image_in_both_splits_and_none_blank():
    seen = {}
    for split, stem in NAMES.items():
        pixels = np.frombuffer((RAW / f"{stem}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 784)
        assert (pixels.max(axis=1) > pixels.min(axis=1)).all()
        seen[split] = {image.tobytes() for image in pixels}
    assert not seen["train"] & seen["test"]


def test_data__checksums_and_licence_are_as_in_the_readme():
    text = (DATA / "README.md").read_text()
    stated = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) == 2 and len(cells[0]) == 64:
            stated[cells[1]] = cells[0]
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in RAW.iterdir()}
    assert len(stated) == 4
    assert "MIT License" in text and "Copyright © 2017 Zalando SE" in text
    notice = " ".join(text.split())
    assert "The above copyright notice and this permission notice shall be included in all copies" in notice
    assert "WITHOUT WARRANTY OF ANY KIND" in notice and "dataset-fashion-mnist" in notice
