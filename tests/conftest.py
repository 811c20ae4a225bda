"""Fixtures of several test files."""

import functools
import io
import os

import numpy as np
import pytest
import torch
import webdataset
from conversions import draw
from PIL import Image

from utils.evaluation import pictures
from utils.run import log

COMMIT = functools.cache(log._commit)
torch.set_num_threads(1)  # the computations of the tests are too small for several cores


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """curves.png takes matplotlib a second, and pca.png a tenth of it in each epoch; runs of test_report.py draw them."""
    for name in ("write_curves", "write_own_pca"):
        monkeypatch.setattr(pictures, name, lambda *_: None)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """A start asks git twice and waits 17 times for the disk. A test that needs them replaces or calls them itself."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(log, "_commit", COMMIT)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Shards: train/ with 40 images of two classes, red and blue; val/ with 11; plain/ without labels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, sizes, labelled in (("train", (16, 16, 8), True), ("val", (6, 5), True), ("plain", (16,), False)):
        (folder / split).mkdir()
        for number, size in enumerate(sizes):
            with webdataset.TarWriter(str(folder / split / f"{split}-{number:06d}.tar")) as tar:
                for i in range(size):
                    label = i % 2
                    pixels = rng.integers(0, 60, (24, 24, 3), dtype=np.uint8)
                    pixels[..., 2 * label] += 180  # red or blue
                    png = io.BytesIO()
                    Image.fromarray(pixels).save(png, "PNG")
                    cls = {"cls": str(label)} if labelled else {}
                    tar.write({"__key__": f"{number}-{i}", "png": png.getvalue(), **cls})
    return folder


@pytest.fixture
def flat(tmp_path):
    """A folder of 23 images without labels."""
    for i in range(23):
        draw(tmp_path / "flat" / f"{i:02d}.{'jpg' if i % 2 else 'png'}", i)
    return tmp_path / "flat"


@pytest.fixture
def tree(tmp_path):
    """Class folders in train/ (5 dogs, 3 cats, 4 birds) and val/ (2 dogs, 1 bird)."""
    for split, counts in {"train": {"dog": 5, "cat": 3, "bird": 4}, "val": {"dog": 2, "bird": 1}}.items():
        for name, count in counts.items():
            for i in range(count):
                draw(tmp_path / "tree" / split / name / f"{i}.jpg", 100 * len(split) + 10 * len(name) + i)
    return tmp_path / "tree"
