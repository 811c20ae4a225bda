"""The data sets of the transfer table, as tiny folders in torchvision's format, and the conversion of listed images."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conversions import convert, draw, refused, samples
from shards_helpers import write_shards

from utils.data import names as names_module
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.names import positions
from utils.data.reader import BadSample, Reader
from utils.data.shards import epoch_plan, evaluation_plan
from utils.data.views import ViewSpec


def food101(root):
    for split, each in (("train", 2), ("test", 1)):
        listing = {name: [f"{name}/{split}{i}" for i in range(each)] for name in ("apple_pie", "waffles")}
        for name in sum(listing.values(), []):
            draw(root / "food-101/images" / f"{name}.jpg", len(name))
        (root / "food-101/meta").mkdir(exist_ok=True)
        (root / "food-101/meta" / f"{split}.json").write_text(json.dumps(listing))
    return {"train": [0, 0, 1, 1], "val": [0, 1]}, ("apple_pie", "waffles")


def flowers102(root):
    base = root / "flowers-102"
    for i in range(1, 8):
        draw(base / "jpg" / f"image_{i:05d}.jpg", i)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 102, 1, 2, 102, 3]])})
    scipy.io.savemat(base / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [[6, 7]]})
    return {"train": [0, 1, 101], "val": [0, 1], "test": [101, 2]}, tuple(torchvision.datasets.Flowers102.classes)


def dtd(root):
    base = root / "dtd/dtd"
    for split in ("train", "val", "test"):
        listed = [f"{name}/{name}_{split}.jpg" for name in ("banded", "zigzagged")]
        for name in listed:
            draw(base / "images" / name, len(name))
        (base / "labels").mkdir(exist_ok=True)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(listed))
    return {"train": [0, 1], "val": [0, 1], "test": [0, 1]}, ("banded", "zigzagged")


def pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, each in (("trainval", 3), ("test", 2)):
        lines = [f"{name}_{split}{i} {number} 1 1" for number, name in ((1, "Abyssinian"), (2, "great_pyrenees"))
                 for i in range(each)]  # fmt: skip
        for line in lines:
            draw(base / "images" / f"{line.split()[0]}.jpg", len(line))
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))
    return {"train": [0, 0, 0, 1, 1, 1], "val": [0, 0, 1, 1]}, ("Abyssinian", "Great Pyrenees")


def cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "u1")]
    for folder, path, labels in (("cars_train", "devkit/cars_train_annos.mat", [1, 2, 1]),
                                 ("cars_test", "cars_test_annos_withlabels.mat", [2, 1])):  # fmt: skip
        rows = [(f"{i + 1:05d}.jpg", label) for i, label in enumerate(labels)]
        for name, label in rows:
            draw(base / folder / name, label)
        scipy.io.savemat(base / path, {"annotations": np.array(rows, kind)})
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], object)})
    return {"train": [0, 1, 0], "val": [1, 0]}, ("AM General Hummer", "Acura RL")


def aircraft(root):
    base = root / "fgvc-aircraft-2013b/data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nA330-200\n")
    for split, labels in (("train", "707-320 A330-200"), ("val", "A330-200"), ("test", "707-320 707-320")):
        lines = [f"{split}{i} {label}" for i, label in enumerate(labels.split())]
        for line in lines:
            draw(base / "images" / f"{line.split()[0]}.jpg", len(line))
        (base / f"images_variant_{split}.txt").write_text("\n".join(lines))
    return {"train": [0, 1], "val": [1], "test": [0, 0]}, ("707-320", "A330-200")


def cifar(root, folder, parts, meta, key, monkeypatch, kind):
    (root / folder).mkdir()
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    for number, (name, labels) in enumerate(parts.items()):
        data = np.random.default_rng(number).integers(256, size=(len(labels), 3072), dtype=np.uint8)
        (root / folder / name).write_bytes(pickle.dumps({"data": data, key: labels}))
    (root / folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: ["apple", "bear", "cat"]}))


def cifar10(root, monkeypatch):
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    parts = {**{f"data_batch_{i}": [i % 3] for i in range(1, 6)}, "test_batch": [2, 1]}
    cifar(root, "cifar-10-batches-py", parts, kind.meta, "labels", monkeypatch, kind)
    return {"train": [1, 2, 0, 1, 2], "val": [2, 1]}, ("apple", "bear", "cat")


def cifar100(root, monkeypatch):
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    cifar(root, "cifar-100-python", {"train": [2, 0], "test": [1]}, kind.meta, "fine_labels", monkeypatch, kind)
    return {"train": [2, 0], "val": [1]}, ("apple", "bear", "cat")


def stl10(root, monkeypatch):
    (root / "stl10_binary").mkdir()
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for split, labels in (("train", [1, 10]), ("test", [3]), ("unlabeled", None)):
        size = (len(labels) if labels else 4) * 3 * 96 * 96
        np.random.default_rng(size).integers(256, size=size, dtype=np.uint8).tofile(root / "stl10_binary" / f"{split}_X.bin")
        if labels:
            np.array(labels, np.uint8).tofile(root / "stl10_binary" / f"{split}_y.bin")
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    (root / "stl10_binary/class_names.txt").write_text("\n".join(names))
    return {"train": [0, 9], "val": [2], "unlabeled": [None] * 4}, names


FILES = {"Food101": food101, "Flowers102": flowers102, "DTD": dtd, "OxfordIIITPet": pets, "StanfordCars": cars,
         "FGVCAircraft": aircraft}  # fmt: skip
ARRAYS = {"CIFAR10": cifar10, "CIFAR100": cifar100, "STL10": stl10}


def make(name, root, monkeypatch):
    root.mkdir()
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    return FILES[name](root) if name in FILES else ARRAYS[name](root, monkeypatch)


@pytest.mark.parametrize("name", [*FILES, *ARRAYS])
def test_from_torchvision__official_splits_and_names(tmp_path, monkeypatch, name):
    """Labels, class names, and pixels of each split are torchvision's; image files are copied byte for byte."""
    labels, classes = make(name, tmp_path / "in", monkeypatch)
    convert(tmp_path / "in", tmp_path / "out", "--dataset", name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(labels)
    for split, wanted in labels.items():
        folder = tmp_path / "out" / split
        index, found = load_index(str(folder)), samples(folder)
        assert sorted(map(str, [label for *_, label in found])) == sorted(map(str, wanted))
        assert (index.classes, index.dataset) == (None if None in wanted else classes, name)
        listed = (folder / "names.txt").read_text().splitlines()
        assert len(listed) == len(wanted)
        if name in FILES:
            assert [data for _, data, _ in found] == [(tmp_path / "in" / path).read_bytes() for path in listed]
        else:
            assert sorted(listed) == [f"{name} {split} {i}" for i in range(len(wanted))]


def test_from_torchvision__data_set_without_official_splits_is_one_line(tmp_path, capsys):
    line = refused(capsys, "-i", tmp_path, "-o", tmp_path / "out", "--dataset", "Caltech101")
    assert "--dataset Caltech101: has no training and test split known here; convert a folder instead" in line


def test_from_torchvision__missing_image_is_one_line(tmp_path, capsys, monkeypatch):
    make("DTD", tmp_path / "in", monkeypatch)
    (tmp_path / "in/dtd/dtd/images/banded/banded_val.jpg").unlink()
    line = refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out", "--dataset", "DTD")
    assert "banded_val.jpg: No such file or directory; unpack the data set again" in line


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six shards of 5 images in three class folders, three of which are unreadable; and the source."""
    folder = tmp_path_factory.mktemp("named")
    for number in range(33):
        draw(folder / "in" / f"n{number % 3}" / f"n{number % 3}_{number}.JPEG", number, format="JPEG")
    for number in (4, 17, 30):
        (folder / "in" / f"n{number % 3}" / f"n{number % 3}_{number}.JPEG").write_text("no image")
    convert(folder / "in", folder / "out", "--shard-size", 6)
    return folder


def image_of(folder, name):
    return (folder / "in" / name.split("_")[0] / name).read_bytes()


LISTED = ["n0_0.JPEG", "n2_32.JPEG", "n1_1.JPEG", "n1_10.JPEG", "n0_27.JPEG", "n2_5.JPEG", "n2_8.JPEG"]


def test_images__reader_gives_exactly_the_listed_ones(shards, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join([*LISTED, "", LISTED[0]]))
    index = load_index(str(shards / "out/train"), images=str(tmp_path / "list.txt"))
    reader = Reader(index)
    found = [reader(i) for i in range(index.total)]
    assert sorted(sample.image for sample in found) == sorted(image_of(shards, name) for name in LISTED)
    of_label = {image_of(shards, name): int(name[1]) for name in LISTED}
    assert all(sample.label == of_label[sample.image] for sample in found)
    whole = load_index(str(shards / "out/train"))
    assert index.classes == whole.classes and index.hash != whole.hash
    assert sorted(epoch_plan(index, 7, 0, 0).ravel()) == list(range(7))


def test_images__some_shards_of_a_pattern(shards, tmp_path):
    """The names are those of these shards, not of the first ones in the index."""
    second = sorted((shards / "out/train").glob("*.tar"))[1]
    names = (shards / "out/train/names.txt").read_text().splitlines()
    index = load_index(str(shards / "out/train"))
    mine = names[index.first[1] : index.first[2]]
    (tmp_path / "list.txt").write_text("\n".join(sorted(mine)[:2]))
    chosen = load_index(str(second), images=str(tmp_path / "list.txt"))
    reader = Reader(chosen)
    assert sorted(reader(i).image for i in range(chosen.total)) == sorted(
        (shards / "in" / name).read_bytes() for name in sorted(mine)[:2]
    )


def test_images__remote_shards(shards, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(LISTED))
    index = load_index(
        f"pipe:cat {shards}/out/train/train-{{000000..000005}}.tar", allow_pipe=True, images=str(tmp_path / "list.txt")
    )
    assert index.total == 7 and len(index.shards) < 6
    reader = Reader(index)
    reader.expect(np.array([5, 0, 3]))
    local = Reader(load_index(str(shards / "out/train"), images=str(tmp_path / "list.txt")))
    for i, planned in ((5, True), (1, False), (0, True), (3, True), (6, False)):
        assert reader(i, planned).image == local(i).image


@pytest.mark.parametrize("processes", [1, 2])
def test_images__every_process_count_sees_the_same(shards, tmp_path, monkeypatch, processes):
    (tmp_path / "list.txt").write_text("\n".join(LISTED))
    index = load_index(str(shards / "out/train"), images=str(tmp_path / "list.txt"))
    seen = []
    for rank in range(processes):
        monkeypatch.setattr("utils.run.dist.rank", lambda rank=rank: rank)
        monkeypatch.setattr("utils.run.dist.world", lambda: processes)
        batches = load_batches(index, [ViewSpec("test", 16, resize=16)], evaluation_plan(index, 4), 0, 0, torch.device("cpu"))
        seen += [i for batch in batches for i in batch.sample_ids.tolist()]
    assert sorted(seen) == list(range(7))


def test_images__unusable_image_is_followed_by_the_next_listed_one(tmp_path):
    """A damaged part of a shard: the id that follows is the first listed sample after it."""
    index = write_shards(tmp_path / "s", [8])
    path = tmp_path / "s/000.tar"
    data = bytearray(path.read_bytes())
    at = data.find(b"00003.png")
    data[at : data.find(b"00005.png")] = bytes([255]) * (data.find(b"00005.png") - at)
    path.write_bytes(data)
    chosen = index.__class__(index.shards, index.classes, kept=(np.array([1, 3, 4, 6]),))
    reader = Reader(chosen)
    assert reader(0).key == "00001" and reader(3).key == "00006"
    with pytest.raises(BadSample) as error:
        reader(1)
    assert error.value.following == 3


@pytest.mark.parametrize("text, message", [
    ("n0_0.JPEG\nn0_1.JPEG\nn7_7.JPEG\n", "2 of its 3 names are not among the 30 images of --shards {s}, such as n0_1.JPEG"),
    ("n1_4.JPEG", "1 of its 1 names are not among the 30 images"), ("\n \n", "names no image"), (None, "cannot be read"),
])  # fmt: skip
def test_images__bad_list_is_one_line(shards, tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        load_index(str(shards / "out/train"), images=str(tmp_path / "list.txt"))
    assert str(error.value).startswith(f"--images {tmp_path}/list.txt: ")
    assert message.format(s=shards / "out/train") in str(error.value) and "\n" not in str(error.value)


def test_images__shards_without_names_are_one_line(tmp_path):
    write_shards(tmp_path / "s", [3])
    with pytest.raises(ValueError, match="--images: the shards of --shards .*/s have no file names.*convert the images again"):
        load_index(str(tmp_path / "s"), images="list.txt")


def test_images__other_names_file_is_refused(tmp_path):
    draw(tmp_path / "in/a.jpg")
    convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "list.txt").write_text("a.jpg")
    (tmp_path / "out/train/names.txt").write_text("b.jpg\n")
    with pytest.raises(ValueError, match="names.txt is not the file of its index.json"):
        load_index(str(tmp_path / "out/train"), images=str(tmp_path / "list.txt"))
    (tmp_path / "out/train/names.txt").unlink()
    with pytest.raises(ValueError, match="names.txt is missing"):
        load_index(str(tmp_path / "out/train"), images=str(tmp_path / "list.txt"))


def test_positions__ends_of_paths(tmp_path):
    names = ["dog/0.jpg", "dog/1.jpg", "cat/0.jpg"]
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfcat/0.jpg\r\n1.jpg\r\n")
    assert positions(names, str(path), "-i x").tolist() == [1, 2]
    path.write_text("0.jpg")
    with pytest.raises(ValueError, match="0.jpg names several images of -i x; write their folders too"):
        positions(names, str(path), "-i x")


def test_positions__list_of_simclr_has_its_published_hash(tmp_path, monkeypatch):
    """Under that name and for as many images as ImageNet has; other data sets may have a list with this name."""
    monkeypatch.setattr(names_module, "IMAGENET", 2)
    path = tmp_path / "1percent.txt"
    path.write_text("a.JPEG\n")
    with pytest.raises(ValueError, match="--images .*: its sha256 is .* that of SimCLR's list is 71e82a48"):
        positions(["a.JPEG", "b.JPEG"], str(path), "-i x")
    monkeypatch.setitem(names_module.HASHES, "1percent.txt", hashlib.sha256(b"a.JPEG\n").hexdigest())
    assert positions(["a.JPEG", "b.JPEG"], str(path), "-i x").tolist() == [0]
    path.write_text("c.JPEG\n")
    assert positions(["a.JPEG", "b.JPEG", "c.JPEG"], str(path), "-i x").tolist() == [2]


def test_images__converter_writes_only_the_listed_ones(shards, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(LISTED))
    flags = ["--images", tmp_path / "list.txt", "--shard-size", 3]
    convert(shards / "in", tmp_path / "out", *flags)
    found = samples(tmp_path / "out/train")
    assert sorted(data for _, data, _ in found) == sorted(image_of(shards, name) for name in LISTED)
    assert load_index(str(tmp_path / "out/train")).classes == ("n0", "n1", "n2")
    names = (tmp_path / "out/train/names.txt").read_text()
    (tmp_path / "out/train/names.txt").unlink()
    (tmp_path / "out/train/index.json").unlink()
    (tmp_path / "out/train/train-000001.tar").unlink()
    convert(shards / "in", tmp_path / "out", *flags)  # resumed
    assert (tmp_path / "out/train/names.txt").read_text() == names


def test_images__converter_keeps_the_other_splits_whole(tmp_path, monkeypatch, capsys):
    make("CIFAR10", tmp_path / "in", monkeypatch)
    (tmp_path / "list.txt").write_text("CIFAR10 train 4\nCIFAR10 train 1\n")
    flags = "--dataset", "CIFAR10", "--images", tmp_path / "list.txt"
    convert(tmp_path / "in", tmp_path / "out", *flags)
    assert sorted(label for *_, label in samples(tmp_path / "out/train")) == [2, 2]
    assert load_index(str(tmp_path / "out/val")).total == 2
    (tmp_path / "list.txt").write_text("CIFAR10 train 4\nCIFAR10 train 0\n")
    assert "different: source" in refused(capsys, "-i", tmp_path / "in", "-o", tmp_path / "out", *flags)
