"""Inputs and output folders that could be mistaken for others."""

import hashlib
import io
import json
import shutil

import pytest
import webdataset
from conversions import convert, draw, refused, samples
from PIL import Image

import imagenet2wds
from utils.data import sources
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


def test_load_index__unfinished_conversion_names_the_script(flat, tmp_path):
    convert(flat, tmp_path / "out", "--shard-size", 5)
    (tmp_path / "out/train/index.json").unlink()
    (tmp_path / "out/train/train-000004.tar").unlink()
    with pytest.raises(ValueError, match="imagenet2wds.py"):
        load_index(str(tmp_path / "out/train"))


@pytest.mark.parametrize("text", ["", "[]", "5"])
def test_check__conversion_json_damaged(flat, tmp_path, capsys, text):
    convert(flat, tmp_path / "out")
    (tmp_path / "out/train/conversion.json").write_text(text)
    assert "-o " in refused(capsys, "-i", flat, "-o", tmp_path / "out")


def test_files__dangling_link_is_unreadable(flat, tmp_path):
    (flat / "z.jpg").symlink_to(tmp_path / "nowhere.jpg")
    convert(flat, tmp_path / "out")
    assert "z.jpg" in (tmp_path / "out/train/bad_images.txt").read_text()


def test_check__foreign_tmp_is_not_deleted(flat, tmp_path, capsys):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/.precious.tmp").write_text("x")
    refused(capsys, "-i", flat, "-o", tmp_path / "out")


def test_load_index__folder_named_like_a_shard(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(ValueError, match="--shards"):
        load_index(str(tmp_path))


def test_imagenet2wds__full_disk_names_the_flag(flat, tmp_path, capsys, monkeypatch):
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


def test_read_subset__a_published_list_is_verified_by_its_hash(tmp_path, capsys, monkeypatch):
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "imagenet100.txt"
    chosen.write_text("n04\nn02\n")
    error = refused(capsys, "-i", source, "-o", tmp_path / "out", "--imagenet-subset", chosen)
    found = hashlib.sha256(b"n04\nn02\n").hexdigest()[:16]
    assert f"--imagenet-subset {chosen}: its sha256 is {found}, that of the published list 79f3f1552ccc478c; download" in error
    monkeypatch.setitem(sources.PUBLISHED, "imagenet100.txt", hashlib.sha256(chosen.read_bytes()).hexdigest())
    convert(source, tmp_path / "out", "--imagenet-subset", chosen)
    assert load_index(str(tmp_path / "out/train")).classes == ("n02", "n04")


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


def test_find_splits__subset_of_a_train_split_without_labels(flat, tmp_path, capsys):
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


@pytest.fixture
def nested(tmp_path):
    """9 photographs at several depths, without classes."""
    for i, name in enumerate(
        ["0.jpg", "1.png", *(f"2024/{i}.jpg" for i in range(4)), *(f"2025/may/{i}.jpg" for i in range(3))]
    ):
        draw(tmp_path / "nested" / name, i)
    return tmp_path / "nested"


def test_no_labels__images_at_any_depth(nested, tmp_path, capsys):
    assert "--no-labels" in refused(capsys, "-i", nested, "-o", tmp_path / "out")
    convert(nested, tmp_path / "out", "--no-labels")
    index = load_index(str(tmp_path / "out" / "train"))
    assert index.total == 9 and not index.labelled and index.classes is None
    stored = sorted(data for _, data, _ in samples(tmp_path / "out" / "train"))
    assert stored == sorted(path.read_bytes() for path in nested.rglob("*.*") if path.is_file())


def test_no_labels__is_part_of_the_plan(tmp_path, capsys):
    source = two_splits(tmp_path / "source")
    convert(source, tmp_path / "out", "--no-labels")
    for split, each in (("train", 3), ("val", 2)):
        index = load_index(str(tmp_path / "out" / split))
        assert index.total == 4 * each and not index.labelled
    convert(source, tmp_path / "out", "--no-labels")
    assert "holds another conversion (different: source, no_labels)" in refused(capsys, "-i", source, "-o", tmp_path / "out")


def test_no_labels__with_a_subset_is_refused(tmp_path, capsys):
    source, chosen = two_splits(tmp_path / "source"), tmp_path / "classes.txt"
    chosen.write_text("n01")
    flags = ["--no-labels", "--imagenet-subset", chosen]
    assert "chooses by labels; leave out --no-labels" in refused(capsys, "-i", source, "-o", tmp_path / "out", *flags)


@pytest.fixture
def classes(tmp_path):
    """Class folders without val/: 10 cats, 5 dogs, 1 emu."""
    for c, (name, count) in enumerate({"cat": 10, "dog": 5, "emu": 1}.items()):
        for i in range(count):
            draw(tmp_path / "classes" / name / f"{i}.jpg", 20 * c + i)
    return tmp_path / "classes"


def contents(folder):
    return sorted((data, label) for _, data, label in samples(folder))


@pytest.mark.parametrize("fraction, expected", [(0.2, (2, 1, 0)), (0.5, (5, 2, 0)), (0.01, (1, 1, 0)), (0.9, (9, 4, 0))])
def test_val_fraction__of_each_class(classes, tmp_path, fraction, expected):
    convert(classes, tmp_path / "out", "--val-fraction", fraction)
    convert(classes, tmp_path / "all")
    train, val = (contents(tmp_path / "out" / split) for split in ("train", "val"))
    assert tuple(sum(label == c for _, label in val) for c in range(3)) == expected
    assert sorted(train + val) == contents(tmp_path / "all" / "train") and not {d for d, _ in train} & {d for d, _ in val}
    for split in ("train", "val"):
        assert load_index(str(tmp_path / "out" / split)).classes == ("cat", "dog", "emu")


def test_val_fraction__same_images_with_any_jobs_others_with_another_seed(classes, tmp_path):
    for name, flags in (("a", ["-j", 1]), ("b", ["-j", 2]), ("c", ["--seed", 1])):
        convert(classes, tmp_path / name, "--val-fraction", 0.5, *flags)
    a, b, c = (contents(tmp_path / name / "val") for name in "abc")
    assert a == b and a != c
    shards = [(tmp_path / name / "train" / "train-000000.tar").read_bytes() for name in "ab"]
    assert shards[0] == shards[1]


def test_val_fraction__of_images_without_labels(nested, tmp_path):
    convert(nested, tmp_path / "out", "--no-labels", "--val-fraction", 0.3)
    assert [load_index(str(tmp_path / "out" / split)).total for split in ("train", "val")] == [6, 3]


def test_val_fraction__of_a_subset(classes, tmp_path):
    (tmp_path / "classes.txt").write_text("dog\nemu\n")
    convert(classes, tmp_path / "out", "--val-fraction", 0.4, "--imagenet-subset", tmp_path / "classes.txt")
    assert [label for _, label in contents(tmp_path / "out" / "val")] == [0, 0]
    assert load_index(str(tmp_path / "out" / "train")).classes == ("dog", "emu")


@pytest.mark.parametrize("flags, different", [
    (["--val-fraction", 0.3], "source, images, val_fraction"), ([], "source, images, val_fraction"),
    (["--val-fraction", 0.5, "--image-extension", "jpg"], "image_extension"),
    (["--val-fraction", 0.5, "--max-pixels", 99], "max_pixels"),
])  # fmt: skip
def test_check__options_are_part_of_the_plan(classes, tmp_path, capsys, flags, different):
    convert(classes, tmp_path / "out", "--val-fraction", 0.5)
    line = refused(capsys, "-i", classes, "-o", tmp_path / "out", *flags)
    assert f"holds another conversion (different: {different})" in line


def test_check__plan_without_options_is_that_of_older_versions(classes, tmp_path):
    convert(classes, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "train" / "conversion.json").read_text())
    assert list(plan) == ["source", "images", "seed", "shard_size"]


@pytest.mark.parametrize("flags, message", [
    (["--val-fraction", 0.1], "--val-fraction 0.1: -i {s} has a validation split; leave the flag out"),
    (["--val-fraction", 1], "--val-fraction 1.0: must lie in [0, 0.9]"),
    (["--val-fraction", 0.1, "--dataset", "CIFAR10"], "--val-fraction 0.1: is for class folders; leave out --dataset CIFAR10"),
    (["--max-pixels", 0], "--max-pixels 0: must be above 0"),
])  # fmt: skip
def test_find_splits__options_that_do_not_fit_are_one_line(tmp_path, capsys, flags, message):
    source = two_splits(tmp_path / "source")
    assert message.format(s=source) in refused(capsys, "-i", source, "-o", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_val_fraction__without_two_images_of_a_class(tmp_path, capsys):
    draw(tmp_path / "in" / "emu" / "0.jpg")
    line = refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out", "--val-fraction", 0.5)
    assert f"--val-fraction 0.5: no class of -i {tmp_path / 'in'} has two images; leave the flag out" in line
