"""Helpers of the converter's tests: images of noise, a conversion, and what it has written."""

import tarfile

import numpy as np
import pytest
from PIL import Image

import imagenet2wds


def draw(path, seed=0, **kwargs):
    """Write an image of noise, 20 x 16 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def convert(source, target, *flags):
    imagenet2wds.main(["-i", str(source), "-o", str(target), "-j", "1", *map(str, flags)])


def refused(capsys, *argv):
    """The last line that main prints on stderr, where a progress bar may come before it. The exit code is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        imagenet2wds.main([str(a) for a in argv])
    assert stop.value.code == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("imagenet2wds.py: error: ")
    return line


def samples(folder):
    """[(extension, image bytes, label or None)] of all shards in a folder, in order, by tarfile alone."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        groups = {}
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, extension = member.name.partition(".")
                groups.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for members in groups.values():
            label = members.pop("cls", None)
            ((extension, data),) = members.items()
            found.append((extension, data, None if label is None else int(label)))
    return found


def files(folder):
    """{path: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
