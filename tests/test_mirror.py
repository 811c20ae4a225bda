"""The mirrored copy of a data set: the same samples in the same order, about half of them mirrored."""

import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from test_encoding import POSTSCRIPT

from utils.data.index import load_index
from utils.data.tars import local_samples
from w2ssl import mirror


def pixels_of(folder):
    found = {}
    for shard in load_index(str(folder)).shards:
        for sample in local_samples(shard.path):
            label, image = sample.members["cls"], sample.members[sample.image]
            with open(shard.path, "rb") as file:
                file.seek(image[0])
                found[sample.key] = label, np.asarray(Image.open(io.BytesIO(file.read(image[1]))).convert("RGB"))
    return found


def test_mirror__each_sample_is_equal_or_mirrored(images, tmp_path):
    copy = tmp_path / "copy"
    mirror.main(["--shards", f"{images}/train", str(copy)])
    before, after = pixels_of(images / "train"), pixels_of(copy)
    assert list(before) == list(after) and load_index(str(copy)).classes == load_index(f"{images}/train").classes
    turned = 0
    for key, (_, old) in before.items():
        new = after[key][1]
        turned += not np.array_equal(old, new)
        assert np.array_equal(new, old) or np.array_equal(new, old[:, ::-1]), key
    assert 8 <= turned <= 32  # of 40
    mirror.main(["--shards", f"{images}/train", str(tmp_path / "again")])
    assert load_index(str(tmp_path / "again")).hash == load_index(str(copy)).hash


def test_mirror__refuses_a_folder_with_files(images, tmp_path, capsys):
    (tmp_path / "x").write_text("")
    with pytest.raises(SystemExit, match="2"):
        mirror.main(["--shards", f"{images}/train", str(tmp_path)])
    assert f"folder {tmp_path}: is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_mirrored__every_mode(mode):
    noise = np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 256)
    image, file = deep if mode == "I;16" else Image.fromarray(noise).convert(mode), io.BytesIO()
    image.save(file, "TIFF")
    with Image.open(io.BytesIO(mirror.mirrored(file.getvalue()))) as after:
        expected = ImageOps.mirror(image.convert("RGB") if mode == "CMYK" else image)
        np.testing.assert_array_equal(np.asarray(after), np.asarray(expected))


def test_mirrored__postscript_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho started > {tmp_path}/started\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(Image.UnidentifiedImageError):
        mirror.mirrored(POSTSCRIPT)
    assert not (tmp_path / "started").exists()
