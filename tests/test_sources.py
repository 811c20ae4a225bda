"""Inputs and output folders that could be mistaken for others."""

import io
import shutil

import numpy as np
import pytest
import webdataset
from PIL import Image
from test_imagenet2wds import convert, draw, flat, refused, samples  # noqa: F401

import imagenet2wds
from utils.data.index import load_index
from utils.data.reader import Reader
from utils.data.sources import read_subset


def test_find_splits__class_called_train(tmp_path, capsys):
    for name in ("bus", "car", "train"):
        draw(tmp_path / "in" / name / "0.jpg")
    refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out")  # converting all three classes would be right too


def test_find_splits__val_without_train(tmp_path, capsys):
    for name in ("bus", "car"):
        draw(tmp_path / "in" / "val" / name / "0.jpg")
    refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out")


def test_check__source_of_same_names_and_sizes(tmp_path, capsys):
    for i in range(4):
        draw(tmp_path / "a" / f"{i}.bmp", i)
        draw(tmp_path / "b" / f"{i}.bmp", 9 + i)
    convert(tmp_path / "a", tmp_path / "out")
    refused(capsys, "-i", tmp_path / "b", "-o", tmp_path / "out")


def test_load_index__unfinished_conversion_names_the_script(flat, tmp_path):  # noqa: F811
    convert(flat, tmp_path / "out", "--shard-size", 5)
    (tmp_path / "out/train/index.json").unlink()
    (tmp_path / "out/train/train-000004.tar").unlink()
    with pytest.raises(ValueError, match="imagenet2wds.py"):
        load_index(str(tmp_path / "out/train"))


@pytest.mark.parametrize("text", ["", "[]", "5"])
def test_check__conversion_json_damaged(flat, tmp_path, capsys, text):  # noqa: F811
    convert(flat, tmp_path / "out")
    (tmp_path / "out/train/conversion.json").write_text(text)
    assert "-o " in refused(capsys, "-i", flat, "-o", tmp_path / "out")


def test_files__dangling_link_is_unreadable(flat, tmp_path):  # noqa: F811
    (flat / "z.jpg").symlink_to(tmp_path / "nowhere.jpg")
    convert(flat, tmp_path / "out")
    assert "z.jpg" in (tmp_path / "out/train/bad_images.txt").read_text()


def test_check__foreign_tmp_is_not_deleted(flat, tmp_path, capsys):  # noqa: F811
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/.precious.tmp").write_text("x")
    refused(capsys, "-i", flat, "-o", tmp_path / "out")


@pytest.mark.parametrize("mode", ["I;16B", "I"])
def test_as_png__sixteen_bits_keep_their_pixels(tmp_path, mode):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    raw = pixels.astype(">u2" if mode == "I;16B" else "<i4").tobytes()
    (tmp_path / "in").mkdir()
    Image.frombytes(mode, (8, 8), raw).save(tmp_path / "in" / "0.tif")
    convert(tmp_path / "in", tmp_path / "out")
    with Image.open(io.BytesIO(samples(tmp_path / "out/train")[0][1])) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_load_index__folder_named_like_a_shard(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(ValueError, match="--shards"):
        load_index(str(tmp_path))


def test_imagenet2wds__full_disk_names_the_flag(flat, tmp_path, capsys, monkeypatch):  # noqa: F811
    def full(self, sample):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    assert "-o " in refused(capsys, "-i", flat, "-o", tmp_path / "out", "-j", 1)


def two_splits(folder):
    for split, each in (("train", 3), ("val", 2)):
        for c, name in enumerate(("n01", "n02", "n03", "n04")):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (8, 8), (40 * c, i, 0)).save(folder / split / name / f"{i}.png")
    return folder


def test_read_subset__only_these_classes_with_new_numbers(tmp_path):
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "classes.txt"
    chosen.write_text("# a comment\n\nn04 and what it means\nn02\n")
    imagenet2wds.main(["-i", str(source), "-o", str(tmp_path / "out"), "-j", "1", "--imagenet-subset", str(chosen)])
    for split, each in (("train", 3), ("val", 2)):
        index = load_index(str(tmp_path / "out" / split))
        assert index.classes == ("n02", "n04") and index.total == 2 * each
        found = sorted((int(f.label), Image.open(io.BytesIO(f.image)).getpixel((0, 0))[0])
                       for f in (Reader(index)(i, False) for i in range(index.total)))  # fmt: skip
        assert found == [(0, 40)] * each + [(1, 120)] * each


@pytest.mark.parametrize("text, more, message", [
    ("n02\nn77\n", [], "n77: -i {s} has no such class; each line names a class folder, such as n01"),
    ("n02\nn05", [], "n05: no images in {s}/train; leave out the class"), ("# nothing\n \n", [], "names no class"),
    (None, [], "cannot be read"), ("n02".encode("utf-16"), [], "cannot be read"),
    ("n02", ["--dataset", "CIFAR10"], "is for class folders; leave out --dataset CIFAR10"),
])  # fmt: skip
def test_read_subset__bad_input_is_one_line(tmp_path, capsys, text, more, message):
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "classes.txt"
    (source / "train" / "n05").mkdir()
    if text is not None:
        chosen.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match="2"):
        imagenet2wds.main(["-i", str(source), "-o", str(tmp_path / "out"), "--imagenet-subset", str(chosen), *more])
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"--imagenet-subset {chosen}" in error[0] and message.format(s=source) in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, expected", [
    ("n01440764 tench, Tinca tinca\n", {"n01440764"}), ("n01440764# tench\n#great\n", {"n01440764"}),
    ("\ufeffn01440764\r\n\r\ngreat white\r\n", {"n01440764", "great white"}), ("\tgreat white # a shark", {"great white"}),
    ("great white shark", {"great"}), ("great\ngreat\n", {"great"}), ("h\u00e9ron", {"h\u00e9ron"}),
])  # fmt: skip
def test_read_subset__a_line_starts_with_a_class(tmp_path, text, expected):
    for name in ("n01440764", "great", "great white", "h\u00e9ron"):
        (tmp_path / "source" / "train" / name).mkdir(parents=True)
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_subset(str(tmp_path / "classes.txt"), tmp_path / "source") == expected


@pytest.mark.parametrize("flat_splits, line", [(["test"], "test skipped"), (["test", "val"], "val and test skipped")])
def test_find_splits__subset_skips_splits_without_labels(tmp_path, capsys, flat_splits, line):
    """In Kaggle's layout test/ holds images without class folders."""
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "classes.txt"
    for name in flat_splits:
        shutil.rmtree(source / name, ignore_errors=True)
        draw(source / name / "0.jpg")
    chosen.write_text("n01\nn03\n")
    convert(source, tmp_path / "out", "--imagenet-subset", chosen)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train", "val"} - set(flat_splits)
    assert load_index(str(tmp_path / "out" / "train")).total == 6
    printed = [text for text in capsys.readouterr().out.splitlines() if "skipped" in text]
    assert printed == [f"--imagenet-subset {chosen}: {line}, without class folders"]


def test_find_splits__subset_of_a_train_split_without_labels(flat, tmp_path, capsys):  # noqa: F811
    (flat / "n01").mkdir()  # an empty folder: the images have no labels
    (tmp_path / "classes.txt").write_text("n01\n")
    error = refused(capsys, "-i", flat, "-o", tmp_path / "out", "--imagenet-subset", tmp_path / "classes.txt")
    assert f"n01: no images in {flat}" in error and not (tmp_path / "out").exists()


def test_subset__labelled_split_without_an_image(tmp_path, capsys):
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "classes.txt"
    for name in ("n02", "n04"):
        shutil.rmtree(source / "val" / name)
    chosen.write_text("n01\nn02\n")  # val has one of them
    convert(source, tmp_path / "both", "--imagenet-subset", chosen)
    assert load_index(str(tmp_path / "both" / "val")).total == 2
    chosen.write_text("n02\nn04\n")
    error = refused(capsys, "-i", source, "-o", tmp_path / "out", "--imagenet-subset", chosen)
    assert f"--imagenet-subset {chosen}: {source / 'val'} has no image of these classes; add a class that it has" in error
    assert not (tmp_path / "out").exists()
