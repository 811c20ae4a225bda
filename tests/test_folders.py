"""The contents of a folder of images: links, system folders, other files, folders that cannot be read."""

import os
import shutil
from collections import Counter

import pytest
from conversions import convert, draw, refused, samples

from utils.data.folders import list_images
from utils.data.index import load_index


def classes_and_counts(folder):
    index = load_index(str(folder))
    counts = Counter(label for _, _, label in samples(folder))
    return {name: counts[i] for i, name in enumerate(index.classes)}


EXPECTED = {"bird": 4, "cat": 3, "dog": 5}  # of tree/train


@pytest.mark.parametrize("target", [".", "..", "../..", "{t}"])
def test_list_images__link_to_a_parent_folder_adds_no_images(tree, tmp_path, capsys, target):
    (tree / "train" / "cat" / "loop").symlink_to(target.format(t=tree / "train"))
    (tree / "train" / "cat" / "second").symlink_to(target.format(t=tree / "train"))
    shutil.rmtree(tree / "val")
    if target == "../..":  # train/cat/loop/train would be train again
        (tree / "train" / "other.txt").write_text("")
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED
    assert "link to a parent folder (cat/loop" in capsys.readouterr().out


def test_list_images__links_to_each_other_end(tree):
    (tree / "train" / "cat" / "dogs").symlink_to("../dog")
    (tree / "train" / "dog" / "cats").symlink_to("../cat")
    listing = list_images(tree / "train")
    assert len(listing.files.names) == 4 + (3 + 5) + (5 + 3) and len(listing.skipped) == 2


def test_list_images__link_to_a_folder_elsewhere_is_followed(tree, tmp_path):
    draw(tmp_path / "elsewhere" / "deep" / "0.jpg")
    (tree / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tree / "train" / "cow").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(tree / "val")
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED | {"cat": 4, "cow": 1}


@pytest.mark.parametrize("name", ["bird", "dog/deeper"])
def test_list_images__unreadable_folder_is_refused(tree, tmp_path, capsys, monkeypatch, name):
    """A faked error: permissions do not stop root, who may run the tests. Without the folder, labels would shift."""
    folder, scandir = tree / "train" / name, os.scandir
    draw(folder / "0.jpg")

    def refuse(path="."):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    line = refused(capsys, "-i", tree, "-o", tmp_path / "out", "-j", 1)
    assert f"-i {folder}: cannot be read (Permission denied); fix or remove it" in line
    assert not (tmp_path / "out").exists()


def test_has_images__unreadable_folder_next_to_train_is_ignored(tree, tmp_path, monkeypatch):
    (tree / "private").mkdir()
    scandir = os.scandir

    def refuse(path="."):
        if str(path) == str(tree / "private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED


def test_list_images__link_to_a_missing_class_folder_is_refused(tree, tmp_path, capsys):
    (tree / "train" / "ant").symlink_to(tmp_path / "unmounted" / "ant")
    line = refused(capsys, "-i", tree, "-o", tmp_path / "out", "-j", 1)
    assert f"-i {tree}/train/ant: cannot be read (a link to a missing file or folder); fix or remove it" in line


SYSTEM = ["@eaDir", "$RECYCLE.BIN", "__MACOSX", ".ipynb_checkpoints", "lost+found", "System Volume Information", "#recycle"]


@pytest.mark.parametrize("name", SYSTEM)
def test_list_images__system_folder_is_no_class(tree, tmp_path, capsys, name):
    for place in (tree, tree / "train", tree / "train" / "cat", tree / "val"):
        draw(place / name / "0.jpg")
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED
    assert classes_and_counts(tmp_path / "out" / "val") == {"bird": 1, "cat": 0, "dog": 2}
    printed = capsys.readouterr().out
    assert f"{tree}/train: skipped {name}/ 2" in printed and f"{tree}/val: skipped {name}/ 1" in printed


def test_list_images__system_folder_next_to_flat_images(tmp_path):
    draw(tmp_path / "in" / "0.jpg")
    draw(tmp_path / "in" / "@eaDir" / "0.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    convert(tmp_path / "in", tmp_path / "out")
    assert len(samples(tmp_path / "out" / "train")) == 1


def test_list_images__appledouble_files_are_no_images(tree, tmp_path, capsys):
    for name in ("cat/._0.jpg", "cat/._1.jpg", "dog/._0.jpg"):
        (tree / "train" / name).write_bytes(b"\0\5\26\7")
    (tree / "train" / "dog" / ".hidden.png").write_bytes(b"x")
    (tree / "train" / ".DS_Store").write_bytes(b"x")
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED
    assert not (tmp_path / "out" / "train" / "bad_images.txt").exists()
    assert f"{tree}/train: skipped AppleDouble files (._*) 3, hidden images 1" in capsys.readouterr().out


def test_list_images__folder_without_images_is_named(tree, tmp_path, capsys):
    (tree / "train" / "ant").mkdir()
    convert(tree, tmp_path / "out")
    assert f"{tree}/train: no class for 1 folders without images: ant" in capsys.readouterr().out


def test_imagenet2wds__other_files_are_counted_in_one_line(tree, tmp_path, capsys):
    for i in range(8):
        (tree / "train" / "cat" / f"{i}.HEIC").write_bytes(b"x")
    for i in range(4):
        (tree / "train" / "dog" / f"{i}.svg").write_text("<svg/>")
    (tree / "train" / "LICENSE").write_text("P6 is how this text begins")
    convert(tree, tmp_path / "out")
    line = "train: 13 files with other extensions were not converted: .heic 8, .svg 4, none 1"
    assert [text for text in capsys.readouterr().out.splitlines() if "other extensions" in text] == [line]
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED


def test_list_images__image_without_extension_is_used(tree, tmp_path):
    shutil.copy(tree / "train" / "cat" / "0.jpg", tree / "train" / "cat" / "image")
    draw(tree / "train" / "dog" / "picture", format="BMP")
    convert(tree, tmp_path / "out")
    assert classes_and_counts(tmp_path / "out" / "train") == EXPECTED | {"cat": 4, "dog": 6}
    assert Counter(extension for extension, _, _ in samples(tmp_path / "out" / "train")) == {"jpg": 13, "png": 1}


def test_list_images__file_vanishes_while_it_is_listed(tree, tmp_path, capsys, monkeypatch):
    scandir = os.scandir

    def late(path="."):
        entries = list(scandir(path))
        for entry in entries:
            if entry.name == "3.jpg":
                os.unlink(entry.path)

        class Found(list):
            __enter__ = list.__iter__
            __exit__ = lambda *_: None  # noqa: E731

        return Found(entries)

    monkeypatch.setattr(os, "scandir", late)
    line = refused(capsys, "-i", tree, "-o", tmp_path / "out", "-j", 1)
    assert "3.jpg: cannot be read (No such file or directory)" in line
