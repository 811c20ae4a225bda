import errno
import gc
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
import webdataset
from conversions import convert, draw, files, refused, samples
from PIL import Image

import imagenet2wds
from utils.data.index import load_index

ROOT = Path(imagenet2wds.__file__).parent
SAMPLE = ROOT / "data"


def test_imagenet2wds__jpeg_and_png_are_copied_byte_for_byte(flat, tmp_path):
    convert(flat, tmp_path / "out", "--shard-size", 10)
    found = samples(tmp_path / "out" / "train")
    assert sorted(data for _, data, _ in found) == sorted(p.read_bytes() for p in flat.iterdir())
    assert Counter(extension for extension, _, _ in found) == {"jpg": 11, "png": 12}
    assert {label for _, _, label in found} == {None}
    index = load_index(str(tmp_path / "out" / "train"))
    assert [s.samples for s in index.shards] == [10, 10, 3] and not index.labelled


def test_imagenet2wds__extension_follows_the_content(tmp_path):
    png = draw(tmp_path / "in" / "0.jpg", format="PNG")  # ImageNet has one of these
    convert(tmp_path / "in", tmp_path / "out")
    assert samples(tmp_path / "out" / "train") == [("png", png.read_bytes(), None)]


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tif", "tiff", "gif", "webp", "BMP"])
def test_imagenet2wds__other_formats_become_png(tmp_path, suffix):
    path = draw(tmp_path / "in" / f"0.{suffix}")
    convert(tmp_path / "in", tmp_path / "out")
    ((extension, data, _),) = samples(tmp_path / "out" / "train")
    with Image.open(path) as before, Image.open(io.BytesIO(data)) as after:
        assert (extension, after.format) == ("png", "PNG")
        np.testing.assert_array_equal(before.convert("RGB"), after.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_imagenet2wds__every_mode_is_stored(tmp_path, mode):
    (tmp_path / "in").mkdir()
    Image.new(mode, (9, 5)).save(tmp_path / "in" / "0.tif")
    convert(tmp_path / "in", tmp_path / "out", "--strict")
    with Image.open(io.BytesIO(samples(tmp_path / "out" / "train")[0][1])) as image:
        assert image.size == (9, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_imagenet2wds__modes_that_png_has_keep_every_pixel(tmp_path, mode):
    size = {"LA": 2, "RGB": 3, "RGBA": 4, "I;16": 2}.get(mode, 1) * 8 * 6
    noise = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8).tobytes()
    image = Image.frombytes("L", (8, 6), noise).convert("1") if mode == "1" else Image.frombytes(mode, (8, 6), noise)
    if mode == "P":
        image.putpalette(bytes(range(255, -1, -1)) * 3)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "0.tif")
    convert(tmp_path / "in", tmp_path / "out", "--strict")
    ((extension, data, _),) = samples(tmp_path / "out" / "train")
    with Image.open(io.BytesIO(data)) as after:
        assert (extension, after.format, after.mode) == ("png", "PNG", mode)
        assert after.tobytes() == image.tobytes() and after.getpalette() == image.getpalette()


def test_imagenet2wds__class_folders(tree, tmp_path):
    convert(tree, tmp_path / "out", "--shard-size", 5)
    for split in ("train", "val"):
        expected = [(p.read_bytes(), ["bird", "cat", "dog"].index(p.parent.name)) for p in (tree / split).rglob("*.jpg")]
        assert sorted((data, label) for _, data, label in samples(tmp_path / "out" / split)) == sorted(expected)
        assert load_index(str(tmp_path / "out" / split)).classes == ("bird", "cat", "dog")


def test_imagenet2wds__links_to_class_folders_without_splits(tree, tmp_path):
    """Subsets of ImageNet are often links to class folders. Hidden folders are skipped."""
    (tmp_path / "subset").mkdir()
    for name in ("dog", "cat"):
        (tmp_path / "subset" / name).symlink_to(tree / "train" / name)
    draw(tmp_path / "subset" / ".thumbnails" / "0.jpg")
    convert(tmp_path / "subset", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["train"]
    assert Counter(label for _, _, label in samples(tmp_path / "out" / "train")) == {0: 3, 1: 5}


def test_imagenet2wds__val_takes_the_class_numbers_of_train(tree, tmp_path):
    for path in (tree / "val" / "bird").iterdir():
        path.unlink()
    (tree / "val" / "bird").rmdir()
    convert(tree, tmp_path / "out")
    assert [label for _, _, label in samples(tmp_path / "out" / "val")] == [2, 2]  # bird cat dog
    assert json.loads((tmp_path / "out" / "val" / "index.json").read_text())["classes"] == ["bird", "cat", "dog"]


def test_imagenet2wds__classes_are_sorted_as_text(tmp_path):
    for name in ("n2", "n10", "N3"):
        draw(tmp_path / "in" / name / "0.jpg", len(name))
        (tmp_path / "in" / name / "0.jpg").rename(tmp_path / "in" / name / f"{name}.jpg")
    convert(tmp_path / "in", tmp_path / "out")
    assert load_index(str(tmp_path / "out" / "train")).classes == ("N3", "n10", "n2")
    data = {label: data for _, data, label in samples(tmp_path / "out" / "train")}
    assert data == {i: (tmp_path / "in" / n / f"{n}.jpg").read_bytes() for i, n in enumerate(("N3", "n10", "n2"))}


@pytest.mark.parametrize("count, size, expected", [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 3, [2]), (3, 1, [1, 1, 1])])
def test_imagenet2wds__only_the_last_shard_is_short(tmp_path, count, size, expected):
    for i in range(count):
        draw(tmp_path / "in" / f"{i}.png", i)
    convert(tmp_path / "in", tmp_path / "out", "--shard-size", size)
    found = []
    for path in sorted((tmp_path / "out" / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append(len(tar.getnames()))
    content = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert found == expected == [entry["samples"] for entry in content["shards"]] and content["total"] == count


def test_imagenet2wds__shuffles_across_all_shards(flat, tmp_path):
    convert(flat, tmp_path / "out", "--shard-size", 8)
    place = {p.read_bytes(): i for i, p in enumerate(sorted(flat.iterdir()))}
    order = [place[data] for _, data, _ in samples(tmp_path / "out" / "train")]
    assert sorted(order) == list(range(23))
    for start in (0, 8, 16):  # each shard holds images of every third of the folder
        assert {i // 8 for i in order[start : start + 8]} == {0, 1, 2}


def test_imagenet2wds__index_equals_a_recount(tree, tmp_path):
    convert(tree, tmp_path / "out", "--shard-size", 5)
    folder = tmp_path / "out" / "train"
    content = json.loads((folder / "index.json").read_text())
    assert [entry["name"] for entry in content["shards"]] == sorted(p.name for p in folder.glob("*.tar"))
    for entry in content["shards"]:
        data = (folder / entry["name"]).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            count = sum(name.endswith(".jpg") for name in tar.getnames())
        assert entry | {"name": 0} == {
            "name": 0, "samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
    assert content["total"] == 12


def test_imagenet2wds__seed_decides_the_order(flat, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(flat, tmp_path / name, "--seed", seed)
    a, b, c = (samples(tmp_path / name / "train") for name in "abc")
    by_name = [p.read_bytes() for p in sorted(flat.iterdir())]
    assert a == b and a != c and sorted(a) == sorted(c) and [data for _, data, _ in a] != by_name


def test_imagenet2wds__any_number_of_jobs_gives_the_same_bytes(flat, tmp_path):
    (flat / "bad.jpg").write_bytes(b"junk")
    (flat / "more.jpg").write_bytes(b"junk")
    for jobs in (1, 2):
        convert(flat, tmp_path / str(jobs), "--shard_size", 4, "-j", jobs)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_imagenet2wds__killed_conversion_resumes(flat, tmp_path):
    """A pipe in place of an image stops the conversion within a shard, where it is killed."""
    (flat / "11.jpg").write_bytes(b"")  # the size that a pipe has
    order = np.random.default_rng(0).permutation(23).tolist()
    ends = {i: sorted(flat.iterdir())[i] for i in (order[1], order[22])}  # of the first and the last shard
    ends[order[1]].write_bytes(ends[order[1]].read_bytes()[:-200])
    ends[order[22]].write_text("<html>404</html>")
    convert(flat, tmp_path / "unbroken", "--shard-size", 3)
    listed = (tmp_path / "unbroken" / "train" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == sorted(["11.jpg", *(path.name for path in ends.values())])
    (flat / "11.jpg").unlink()
    os.mkfifo(flat / "11.jpg")
    held = order.index(11) // 3
    assert 0 < held < 7
    out = tmp_path / "out" / "train"
    command = [sys.executable, ROOT / "imagenet2wds.py", "-i", flat, "-o", tmp_path / "out", "-j", "1", "--shard-size", "3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            end = time.monotonic() + 120
            while not list(out.glob(f".train-{held:06d}.tar.*.tmp")):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)  # returns when no process holds stderr: no worker survives
    assert sorted(p.name for p in out.glob("*.tar")) == [f"train-{i:06d}.tar" for i in range(held)]
    assert not (out / "index.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}

    (flat / "11.jpg").unlink()
    (flat / "11.jpg").write_bytes(b"")
    convert(flat, tmp_path / "out", "--shard-size", 3, "-j", 2)
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # finished shards were not written again


@pytest.mark.parametrize("size", [0, 600, 1536])
def test_imagenet2wds__damaged_shard_is_written_again(flat, tmp_path, size):
    convert(flat, tmp_path / "out", "--shard-size", 10)
    before = files(tmp_path / "out")
    os.truncate(tmp_path / "out" / "train" / "train-000001.tar", size)
    convert(flat, tmp_path / "out", "--shard-size", 10)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change, message",
    [(["--seed", 1], "different: seed"), (["--shard-size", 5], "different: shard_size"), ("file", "different: source, images"),
     ("size", "different: source"), ("class", "different: source")],
)  # fmt: skip
def test_imagenet2wds__another_conversion_into_the_same_folder_is_refused(tree, tmp_path, capsys, change, message):
    convert(tree, tmp_path / "out")
    before = files(tmp_path / "out")
    if change == "file":
        draw(tree / "train" / "dog" / "9.jpg")
    elif change == "size":
        with open(tree / "train" / "dog" / "0.jpg", "ab") as file:
            file.write(b" ")
    elif change == "class":
        (tree / "train" / "dog").rename(tree / "train" / "duck")
        (tree / "val" / "dog").rename(tree / "val" / "duck")
    line = refused(capsys, "-i", tree, "-o", tmp_path / "out", *(change if isinstance(change, list) else []))
    assert f"-o {tmp_path / 'out' / 'train'}: holds another conversion ({message}); pass another folder" in line
    assert files(tmp_path / "out") == before


def test_imagenet2wds__one_split_refused_leaves_the_other_alone(tree, tmp_path, capsys):
    draw(tmp_path / "out" / "val" / "0.jpg")
    refused(capsys, "-i", tree, "-o", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["val"]


@pytest.fixture
def damaged(flat):
    """The flat folder, with 5 unreadable images and 18 readable ones."""
    (flat / "00.png").write_bytes(b"junk")
    (flat / "01.jpg").write_bytes(b"")
    data = (flat / "02.png").read_bytes()
    (flat / "02.png").write_bytes(data[: len(data) // 2])
    data = (flat / "21.jpg").read_bytes()
    (flat / "21.jpg").write_bytes(data[: len(data) // 2])
    Image.new("1", (10_000, 10_000)).save(flat / "03.jpg", "PNG")  # 12 kB, 100 million pixels
    return flat


def test_imagenet2wds__unreadable_images_are_listed_and_skipped(damaged, tmp_path, capfd):
    convert(damaged, tmp_path / "out", "--shard-size", 10)
    assert len(samples(tmp_path / "out" / "train")) == load_index(str(tmp_path / "out" / "train")).total == 18
    listed = (tmp_path / "out" / "train" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["00.png", "01.jpg", "02.png", "03.jpg", "21.jpg"]
    assert " at 0x" not in "".join(listed)  # no addresses, so the list is the same in every run
    out, err = capfd.readouterr()
    assert "train: 5 unreadable images skipped" in out and "Warning" not in err
    before = files(tmp_path / "out")
    convert(damaged, tmp_path / "out", "--shard-size", 10)
    assert files(tmp_path / "out") == before


def test_imagenet2wds__repaired_image_is_added(flat, tmp_path):
    good = (flat / "05.jpg").read_bytes()
    (flat / "05.jpg").write_bytes(bytes(len(good)))
    convert(flat, tmp_path / "out", "--shard-size", 10)
    assert load_index(str(tmp_path / "out" / "train")).total == 22
    (flat / "05.jpg").write_bytes(good)
    convert(flat, tmp_path / "out", "--shard-size", 10)
    assert load_index(str(tmp_path / "out" / "train")).total == 23
    assert not (tmp_path / "out" / "train" / "bad_images.txt").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_imagenet2wds__strict_stops_at_the_first(damaged, tmp_path, capsys, jobs):
    line = refused(capsys, "-i", damaged, "-o", tmp_path / "out", "--strict", "--shard-size", 10, "-j", jobs)
    assert re.search("--strict: unreadable image (00.png|01.jpg|02.png|03.jpg|21.jpg) ", line)
    assert line.endswith("; fix or remove it")
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    assert not list((tmp_path / "out" / "train").glob(".*"))


def test_imagenet2wds__nothing_readable(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(b"junk")
    line = refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out")
    assert "none of the 1 images of train is readable" in line


@pytest.mark.parametrize("jobs", [1, 2])
def test_imagenet2wds__full_disk_leaves_only_whole_shards(flat, tmp_path, capsys, monkeypatch, jobs):
    convert(flat, tmp_path / "whole", "--shard-size", 4)
    write = webdataset.TarWriter.write

    def full(self, sample):
        if sample["__key__"] == "000002-000001":  # the file already holds one image of the shard
            raise OSError(28, "No space left on device")
        return write(self, sample)

    monkeypatch.setattr(webdataset.TarWriter, "write", full)  # the processes of the conversion are forked
    line = refused(capsys, "-i", flat, "-o", tmp_path / "out", "--shard-size", 4, "-j", jobs)
    assert "No space left on device" in line
    left, whole = files(tmp_path / "out"), files(tmp_path / "whole")
    assert left.items() <= whole.items() and "train/index.json" not in left and "train/train-000002.tar" not in left
    monkeypatch.undo()
    convert(flat, tmp_path / "out", "--shard-size", 4, "-j", jobs)
    assert files(tmp_path / "out") == whole


def broken_reads(monkeypatch, number, times, names, tmp_path):
    """Let Path.read_bytes fail for these files. times: failures of each file, which are counted across processes."""
    read_bytes = Path.read_bytes

    def fail(self):
        count = tmp_path / f"failures-{self.name}"
        if self.name in names and (not count.exists() or count.stat().st_size < times):
            with open(count, "a") as file:
                file.write("x")
            raise OSError(number, os.strerror(number), str(self))
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", fail)  # the processes of the conversion are forked
    monkeypatch.setattr(imagenet2wds, "PAUSES", (0.01, 0.01, 0.01), raising=False)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENOENT, errno.EACCES])
@pytest.mark.parametrize("jobs", [1, 2])
def test_imagenet2wds__failing_disk_stops_and_resumes(flat, tmp_path, capsys, monkeypatch, number, jobs):
    """The images used to be skipped, with exit code 0."""
    (flat / "22.png").write_bytes(b"junk")  # undecodable, which does not stop the conversion
    convert(flat, tmp_path / "whole", "--shard-size", 4)
    order = np.random.default_rng(0).permutation(23).tolist()
    lost = {sorted(flat.iterdir())[i].name for i in order[9:] if i != 22}  # the disk vanishes within the third shard
    broken_reads(monkeypatch, number, 10**6, lost, tmp_path)
    line = refused(capsys, "-i", flat, "-o", tmp_path / "out", "--shard-size", 4, "-j", jobs)
    assert re.search(rf"-i {flat}: train: \d\d\.(png|jpg) cannot be read \({os.strerror(number)}\); fix that, then", line)
    left, whole = files(tmp_path / "out"), files(tmp_path / "whole")
    assert left.items() <= whole.items() and "train/index.json" not in left and "train/train-000002.tar" not in left
    monkeypatch.undo()
    convert(flat, tmp_path / "out", "--shard-size", 4, "-j", jobs)
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_imagenet2wds__transient_read_error_is_retried(flat, tmp_path, monkeypatch, number):
    convert(flat, tmp_path / "whole")
    broken_reads(monkeypatch, number, 3, {path.name for path in flat.iterdir()}, tmp_path)
    convert(flat, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_imagenet2wds__folder_that_vanishes(tree, tmp_path, capsys, monkeypatch):
    """Without a fake: a class folder is moved away after it was listed, and back before the second start."""
    monkeypatch.setattr(imagenet2wds, "PAUSES", (0.01,), raising=False)
    convert(tree, tmp_path / "whole", "--shard-size", 3)
    claim = imagenet2wds.claim

    def move(folder, planned):
        claim(folder, planned)
        if folder.name == "train":
            (tree / "train" / "dog").rename(tmp_path / "dog")

    monkeypatch.setattr(imagenet2wds, "claim", move)
    line = refused(capsys, "-i", tree, "-o", tmp_path / "out", "--shard-size", 3, "-j", 1)
    assert re.search(r"train: dog/\d.jpg cannot be read \(No such file or directory\); fix that, then", line)
    (tmp_path / "dog").rename(tree / "train" / "dog")
    monkeypatch.undo()
    convert(tree, tmp_path / "out", "--shard-size", 3)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_imagenet2wds__target_that_cannot_be_written(flat, tmp_path, capsys, monkeypatch):
    """A faked error: permissions do not stop root, who may run the tests."""

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(imagenet2wds, "write_json", refuse)
    line = refused(capsys, "-i", flat, "-o", tmp_path / "out", "-j", 1)
    assert f"-o {tmp_path / 'out' / 'train'}: cannot be written (Permission denied); pass a writable folder" in line


def test_imagenet2wds__foreign_shards_are_not_touched(flat, tmp_path, capsys):
    convert(flat, tmp_path / "out")
    (tmp_path / "out" / "train" / "conversion.json").unlink()
    before = files(tmp_path / "out")
    line = refused(capsys, "-i", flat, "-o", tmp_path / "out")
    assert "holds files that this script did not write; pass another folder" in line
    assert files(tmp_path / "out") == before


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The embedded sample, converted as the launchers do, and the output of the script."""
    out = tmp_path_factory.mktemp("sample")
    command = [sys.executable, "-W", "error", ROOT / "imagenet2wds.py", "-i", SAMPLE, "-o", out, "--dataset", "FashionMNIST"]
    return out, subprocess.run([*command, "-j", "2"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("split, each", [("train", 600), ("val", 100)])
def test_imagenet2wds__torchvision_data_set_keeps_every_pixel(sample, split, each):
    dataset = torchvision.datasets.FashionMNIST(str(SAMPLE), train=split == "train")
    expected = Counter((bytes(image.numpy()), int(label)) for image, label in zip(dataset.data, dataset.targets, strict=True))
    found = samples(sample[0] / split)
    assert {extension for extension, _, _ in found} == {"png"}
    assert Counter((Image.open(io.BytesIO(data)).tobytes(), label) for _, data, label in found) == expected
    assert Counter(label for _, _, label in found) == dict.fromkeys(range(10), each)
    assert load_index(str(sample[0] / split)).classes == tuple(dataset.classes)


def test_imagenet2wds__prints_counts_and_the_next_command(sample):
    out, printed = sample
    assert printed.splitlines() == [
        f"{out}/train: 6000 images in 6 shards, 10 classes",
        f"{out}/val: 1000 images in 1 shards, 10 classes",
        f"Shards for any launcher: SHARDS={out} bash pretrain_mosrep.sh",
    ]


class Coloured:
    """Arrays, as some torchvision data sets have them: splits by name, labels in an attribute with a special name."""

    def __init__(self, root, split):
        if split not in ("train", "test"):
            raise ValueError(f"no split {split}")
        self._labels = [0, 2, 1] if split == "train" else [1]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        return np.full((4, 6, 3), 10 * i, np.uint8), self._labels[i]


class Boxes(Coloured):
    """A data set without class labels."""

    def __getitem__(self, i):
        return np.zeros((4, 6, 3), np.uint8), {"boxes": []}

    def __len__(self):
        return 2

    _labels = property(lambda self: None, lambda self, value: None)


def test_imagenet2wds__data_set_with_other_keywords(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Coloured", Coloured, raising=False)
    convert(tmp_path, tmp_path / "out", "--dataset", "Coloured")
    found = [(np.asarray(Image.open(io.BytesIO(data))).mean(), label) for _, data, label in samples(tmp_path / "out" / "train")]
    assert sorted(found) == [(0, 0), (10, 2), (20, 1)]
    assert load_index(str(tmp_path / "out" / "val")).classes == ("0", "1")


def test_imagenet2wds__data_set_without_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets, "Boxes", Boxes, raising=False)
    line = refused(capsys, "-i", tmp_path, "-o", tmp_path / "out", "--dataset", "Boxes")
    assert "--dataset Boxes: its labels are not one class number for each image" in line


def test_imagenet2wds__data_set_without_classes_and_no_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Boxes", Boxes, raising=False)
    convert(tmp_path, tmp_path / "out", "--dataset", "Boxes", "--no-labels")
    assert not load_index(str(tmp_path / "out" / "train")).labelled


class STL10:
    """STL10 as torchvision has it, with few images: 3 for training, 2 for test, 7 without labels."""

    splits = ("train", "train+unlabeled", "unlabeled", "test")
    classes = ["airplane", "bird"]

    def __init__(self, root, split="train", folds=None):
        self.split = split
        self.labels = np.array(
            {"train": [0, 1, 0], "test": [1, 0], "unlabeled": [-1] * 7}[split], np.uint8 if split != "unlabeled" else int
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.new("RGB", (6, 4), (20 * i, 20 * len(self), 0)), int(self.labels[i])


def test_imagenet2wds__unlabelled_split_of_stl10(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", STL10)
    convert(tmp_path, tmp_path / "out", "--dataset", "STL10")
    for split, total, classes in (("train", 3, ("airplane", "bird")), ("val", 2, ("airplane", "bird")), ("unlabeled", 7, None)):
        index = load_index(str(tmp_path / "out" / split))
        assert (index.total, index.classes, index.labelled) == (total, classes, classes is not None)
    found = {(extension, Image.open(io.BytesIO(data)).getpixel((0, 0)), label)
             for extension, data, label in samples(tmp_path / "out" / "unlabeled")}  # fmt: skip
    assert found == {("png", (20 * i, 140, 0), None) for i in range(7)}
    assert f"for pre-training: --shards {tmp_path / 'out' / 'unlabeled'}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, extensions", [
    ([], {"jpg": 2, "png": 3}), (["--image-extension", "keep"], {"jpg": 2, "png": 3}),
    (["--image-extension", "jpg"], {"jpg": 5}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_imagenet2wds__image_extension_in_webdataset(tmp_path, flags, extensions):
    """ImageNet has a PNG file that is named .JPEG. Loaders that ask for jpg alone fail on a png."""
    for i, (name, kind) in enumerate(
        [("0.JPEG", "JPEG"), ("1.JPEG", "PNG"), ("2.jpg", "JPEG"), ("3.png", "PNG"), ("4.bmp", "BMP")]
    ):
        draw(tmp_path / "in" / f"n0{i % 2}" / name, i, format=kind)
    convert(tmp_path / "in", tmp_path / "out", *flags)
    assert Counter(extension for extension, _, _ in samples(tmp_path / "out" / "train")) == extensions
    url = str(tmp_path / "out" / "train" / "train-000000.tar")
    for wanted in ["jpg;png;jpeg"] + ["jpg"] * (len(extensions) == 1):
        pipeline = webdataset.WebDataset(url, shardshuffle=False).decode("pil").to_tuple(wanted, "cls")
        assert Counter((image.size, label) for image, label in pipeline) == {((20, 16), 0): 3, ((20, 16), 1): 2}
        del pipeline
        gc.collect()


@pytest.fixture
def archives(tree, tmp_path, monkeypatch):
    """Small ILSVRC2012 archives, with a development kit that needs no parsing."""
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for at in sorted((tree / "train").iterdir()):
            with tarfile.open(tmp_path / "inner.tar", "w") as inner:
                for path in sorted(at.iterdir()):
                    inner.add(path, path.name)
            outer.add(tmp_path / "inner.tar", f"{at.name}.tar")
    wnids = []
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, path in enumerate(sorted((tree / "val").rglob("*.jpg"))):
            tar.add(path, f"ILSVRC2012_val_{number:08d}.JPEG")
            wnids.append(path.parent.name)
    meta = torchvision.datasets.imagenet.ARCHIVE_META
    for name in ("train", "val"):
        monkeypatch.setitem(meta, name, (meta[name][0], None))  # these have other checksums

    def parse(root):
        torch.save(({}, wnids), Path(root) / "meta.bin")

    monkeypatch.setattr(torchvision.datasets.imagenet, "parse_devkit_archive", parse)
    return folder


def test_imagenet2wds__archives_equal_their_folders(archives, tree, tmp_path):
    draw(archives / "train.partial" / "dog" / "8.jpg")  # left by a killed extraction
    convert(archives, tmp_path / "a")
    convert(tree, tmp_path / "b")
    for split in ("train", "val"):
        assert sorted(samples(tmp_path / "a" / split)) == sorted(samples(tmp_path / "b" / split))
    assert sorted(p.name for p in archives.iterdir() if p.is_dir()) == ["train", "val"]


def test_imagenet2wds__archives_with_a_development_kit(archives, tree, tmp_path, monkeypatch):
    """A small development kit: synsets are not sorted by name, and one is not a class."""
    wnids = [at.name for p in sorted((tree / "val").rglob("*.jpg")) for at in [p.parent]]
    number = {"dog": 1, "bird": 2, "cat": 3}
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(i, name, f"{name}, {name}s", "", 0) for name, i in number.items()] + [(4, "animal", "animal", "", 3)]
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number[w]}\n" for w in wnids))
    with tarfile.open(archives / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    monkeypatch.undo()
    meta = torchvision.datasets.imagenet.ARCHIVE_META
    for name in ("train", "val", "devkit"):
        monkeypatch.setitem(meta, name, (meta[name][0], None))
    convert(archives, tmp_path / "a")
    convert(tree, tmp_path / "b")
    for split in ("train", "val"):
        assert sorted(samples(tmp_path / "a" / split)) == sorted(samples(tmp_path / "b" / split))


def test_imagenet2wds__archives_without_kit(archives, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    line = refused(capsys, "-i", archives, "-o", tmp_path / "out")
    assert f"-i {archives}: " in line and "ILSVRC2012_devkit_t12.tar.gz in the same folder, and pip install scipy" in line
    assert not (archives / "train").exists() and not (archives / "val").exists() and not (tmp_path / "out").exists()


def test_imagenet2wds__subset_of_the_archives(archives, tmp_path):
    (tmp_path / "classes.txt").write_text("dog a hound\nbird\n")
    convert(archives, tmp_path / "out", "--imagenet-subset", tmp_path / "classes.txt")
    os.truncate(archives / "ILSVRC2012_img_train.tar", 0)  # not needed any more: train/ exists
    convert(archives, tmp_path / "out", "--imagenet-subset", tmp_path / "classes.txt")
    assert load_index(str(tmp_path / "out" / "train")).classes == ("bird", "dog")
    for split, counts in (("train", {0: 4, 1: 5}), ("val", {0: 1, 1: 2})):
        assert Counter(label for _, _, label in samples(tmp_path / "out" / split)) == counts


@pytest.mark.parametrize("unpacked", ["", "train", "val"])
@pytest.mark.parametrize(
    "text, message", [("dog\nwolf", "wolf: -i {s} has no such class"), ("", "names no class"), (None, "cannot be read")]
)
def test_imagenet2wds__subset_is_checked_before_unpacking(archives, tree, tmp_path, capsys, unpacked, text, message):
    if unpacked:
        (tree / unpacked).rename(archives / unpacked)
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    before = files(archives)
    line = refused(capsys, "-i", archives, "-o", tmp_path / "out", "--imagenet-subset", tmp_path / "classes.txt")
    assert f"--imagenet-subset {tmp_path / 'classes.txt'}: " in line and message.format(s=archives) in line
    assert files(archives) == before and not list(archives.glob("*.partial"))


@pytest.mark.parametrize("size", [0, 700, 5000])
def test_imagenet2wds__subset_of_a_damaged_archive(archives, tmp_path, capsys, size):
    (tmp_path / "classes.txt").write_text("dog")
    os.truncate(archives / "ILSVRC2012_img_train.tar", size)
    line = refused(capsys, "-i", archives, "-o", tmp_path / "out", "--imagenet-subset", tmp_path / "classes.txt")
    assert f"-i {archives}: ILSVRC2012_img_train.tar is damaged (" in line and line.endswith("; download it again")
    assert not (archives / "val").exists()


def empty(tree):
    (tree / "empty").mkdir()


def beside(tree):
    draw(tree / "train" / "0.jpg")


def unknown_class(tree):
    (tree / "val" / "dog").rename(tree / "val" / "wolf")


BAD = {
    "no source": ("-i {t}/none -o {o}", None, "-i {t}/none: no such folder; pass the one that holds the images"),
    "no images": ("-i {t}/empty -o {o}", empty, "-i {t}/empty: no images in it"),
    "images beside classes": (
        "-i {t} -o {o}",
        beside,
        "-i {t}/train: has class folders and also images without a class, such as 0.jpg;",
    ),
    "class of val only": ("-i {t} -o {o}", unknown_class, "-i {t}/val: the training split has no class wolf; rename"),
    "unknown data set": ("-i {t} -o {o} --dataset Fashion", None, "--dataset Fashion: torchvision has no such data set; pass"),
    "no data set": ("-i {t} -o {o} --dataset transforms", None, "--dataset transforms: torchvision has no such data set; pass"),
    "data set elsewhere": ("-i {t} -o {o} --dataset MNIST", None, "--dataset MNIST -i {t}: Dataset not found. "),
    "splits unknown": ("-i {t} -o {o} --dataset EMNIST", None, "--dataset EMNIST -i {t}: Unknown value 'train'"),
    "download of nothing": ("-i {t} -o {o} --download", None, "--download: needs --dataset NAME"),
    "shard size": ("-i {t} -o {o} --shard-size 0", None, "--shard-size 0: must be above 0"),
    "jobs": ("-i {t} -o {o} -j 0", None, "--jobs 0: must be above 0"),
    "seed": ("-i {t} -o {o} --seed -1", None, "--seed -1: must lie in"),
    "abbreviation": ("-i {t} -o {o} --shard 5", None, "--shard: no such flag; did you mean --shard-size?"),
    "no target": ("-i {t}", None, "the following arguments are required: -o/--output"),
    "target is a file": ("-i {t} -o {t}/train/dog/0.jpg", None, "0.jpg/train: cannot be written (Not a directory); pass"),
    "target is in use": ("-i {t} -o {t}", None, "-o {t}/train: holds files that this script did not write; pass another"),
}


@pytest.mark.parametrize("case", BAD)
def test_imagenet2wds__bad_input_is_one_clear_line(tree, tmp_path, capsys, case):
    command, break_, message = BAD[case]
    if break_:
        break_(tree)
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        imagenet2wds.main(command.format(t=tree, o=tmp_path / "out").split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert message.format(t=tree) in err and err.startswith("imagenet2wds.py: error: ")
    assert files(tmp_path) == before


def test_imagenet2wds__worker_that_dies_ends_the_run(flat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet2wds, "write_shard", die)
    line = refused(capsys, "-i", flat, "-o", tmp_path / "out", "-j", 2)
    assert "-j 2: a process was killed; the same command resumes, with fewer jobs" in line


def die(number, chosen):
    os.kill(os.getpid(), signal.SIGKILL)
