"""main_transfer.py: splits, choice and score against scikit-learn and loops; two processes; kept results; errors."""

import io
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import webdataset
from helpers import spawn
from PIL import Image
from sklearn.linear_model import LogisticRegression

import main_transfer
from utils.data.index_file import INDEX
from utils.evaluation import logistic
from utils.evaluation.logistic import GRID

SIZE, CLASSES = 4, 3
FLAGS = ["--device", "cpu", "--workers", "0", "--batch-size", "8", "--size", str(SIZE)]


def write(folder, count, seed, labelled=True):
    """Images of the size of a view: noise, and a brighter channel for each class. The first class is the most frequent."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(CLASSES), rng.choice(CLASSES, count - CLASSES, p=[0.6, 0.2, 0.2])])
    pixels = rng.integers(0, 200, (count, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += np.uint8(40)
    with webdataset.TarWriter(str(folder / "s-000000.tar")) as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(pixels[i]).save(file, "PNG")
            tar.write({"__key__": str(i), "png": file.getvalue(), **({"cls": str(labels[i])} if labelled else {})})
    flat = pixels.transpose(0, 3, 1, 2).reshape(count, -1) / 255
    np.savez(folder / "images.npz", x=flat, y=labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sets: two and small (train, val), three (train, val, test), plain (without labels)."""
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "two/train", 61, 1), write(folder / "two/val", 40, 2)
    write(folder / "three/train", 61, 1), write(folder / "three/val", 30, 3), write(folder / "three/test", 40, 2)
    write(folder / "small/train", 12, 6), write(folder / "small/val", 10, 7)
    write(folder / "plain/train", 10, 4, labelled=False), write(folder / "plain/val", 10, 5)
    return folder


@pytest.fixture
def few(monkeypatch):
    """A few values of l2: the tests are about the rest."""
    monkeypatch.setattr(logistic, "GRID", GRID[20::6])


def arrays(folder):
    found = np.load(folder / "images.npz")
    return found["x"], found["y"]


def transfer(out, *flags):
    main_transfer.main(["--pretrained", "pixels", *FLAGS, "--output-dir", str(out), *map(str, flags)])


def on_two(out, *flags):
    logistic.GRID = GRID[20::6]  # in this process of its own
    transfer(out, *flags)


def result(out, name):
    return json.loads((out / name / "result.json").read_text())


def sklearns(x, y, l2):
    return LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(x, y)


def per_class(predicted, y):
    return 100 * np.mean([np.mean(predicted[y == c] == c) for c in range(CLASSES)])


@pytest.mark.parametrize("metric", ["top1", "mean-per-class"])
def test_main_transfer__is_the_protocol_with_scikit_learn(data, tmp_path, few, metric):
    """l2 on val/, a fit of train/ and val/ together, all images of test/ once."""
    transfer(tmp_path, "--sets", data / "three", "--metric", metric)
    found = result(tmp_path, "three")
    (x, y), (val_x, val_y), (test_x, test_y) = (arrays(data / "three" / split) for split in ("train", "val", "test"))
    scores = {}
    for l2 in sorted(logistic.GRID, reverse=True):
        predicted = sklearns(x, y, l2).predict(val_x)
        scores[str(l2)] = 100 * np.mean(predicted == val_y) if metric == "top1" else per_class(predicted, val_y)
    assert found["validation"] == pytest.approx(scores)
    l2 = float(max(scores, key=lambda l2: (scores[l2], float(l2))))
    predicted = sklearns(np.concatenate([x, val_x]), np.concatenate([y, val_y]), l2).predict(test_x)
    assert (found["l2"], found["metric"], found["converged"]) == (l2, metric, True)
    assert found["top1"] == pytest.approx(100 * np.mean(predicted == test_y))
    assert found["mean-per-class"] == pytest.approx(per_class(predicted, test_y))
    assert found["score"] == found[metric] and found["used"] == {"train": 61, "val": 30, "test": 40}


def test_main_transfer__two_processes_give_the_same_result(data, tmp_path, few):
    for name in ("two", "three"):  # the index is written by the first use
        (data / name / "train" / INDEX).unlink(missing_ok=True)
    sets = ["--sets", data / "two", data / "three"]
    transfer(tmp_path / "one", *sets)
    spawn(on_two, tmp_path / "two", *sets)
    for name in ("two", "three"):
        one, two = result(tmp_path / "one", name), result(tmp_path / "two", name)
        assert one.pop("protocol") and two.pop("protocol") and one == two


def test_main_transfer__a_part_of_train_is_drawn_by_the_seed(data, tmp_path, few, monkeypatch):
    real, seen = logistic.linear_transfer, []
    monkeypatch.setattr(
        logistic, "linear_transfer", lambda train, val, *rest: seen.append((train, val)) or real(train, val, *rest)
    )
    for number, flags in enumerate([[], [], ["--seed", 1], ["--val-fraction", 0.5]]):
        transfer(tmp_path / str(number), "--sets", data / "two", *flags)
    x, y = arrays(data / "two/train")
    for train, val in seen:  # each image is in one of both, with its label
        rows = torch.cat([train[0], val[0]])
        order = [int(np.abs(x - row.numpy()).sum(1).argmin()) for row in rows]
        assert sorted(order) == list(range(61)) and torch.cat([train[1], val[1]]).tolist() == y[order].tolist()
    assert [len(val[1]) for _, val in seen] == [12, 12, 12, 30]  # 20 % of 61
    assert torch.equal(seen[0][1][0], seen[1][1][0]) and not torch.equal(seen[0][1][0], seen[2][1][0])


def test_main_transfer__the_metric_is_that_of_the_data_set(data, tmp_path, few):
    for name in ("DTD", "OxfordIIITPet"):
        shutil.copytree(data / "two", tmp_path / name)
        transfer(tmp_path / "first", "--sets", tmp_path / name)  # writes the index
        path = tmp_path / name / "train" / INDEX
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": name}))
        transfer(tmp_path / "out", "--sets", tmp_path / name)
    assert result(tmp_path / "out", "DTD")["metric"] == "top1"
    assert result(tmp_path / "out", "OxfordIIITPet")["metric"] == "mean-per-class"


def test_main_transfer__a_result_is_kept_for_the_same_measurement_only(data, tmp_path, few, capsys):
    transfer(tmp_path, "--sets", data / "two")
    kept = (tmp_path / "two/result.json").read_bytes()
    capsys.readouterr()
    transfer(tmp_path, "--sets", data / "two", data / "three")
    assert "two: measured before" in capsys.readouterr().out and (tmp_path / "two/result.json").read_bytes() == kept
    transfer(tmp_path, "--sets", data / "two", "--seed", 3)
    assert "measured before" not in capsys.readouterr().out and (tmp_path / "two/result.json").read_bytes() != kept


def test_main_transfer__features_of_a_file_need_no_images(data, tmp_path, few, monkeypatch):
    file = tmp_path / "f.safetensors"
    transfer(tmp_path / "a", "--sets", data / "three", "--features", file)
    monkeypatch.setattr("utils.evaluation.features.load_batches", None)
    transfer(tmp_path / "b", "--sets", data / "three", "--features", file)
    assert result(tmp_path / "a", "three")["validation"] == result(tmp_path / "b", "three")["validation"]


def test_main_transfer__a_signal_leaves_the_results_of_finished_sets(data, tmp_path, few, monkeypatch, capsys):
    real = logistic.linear_transfer

    def and_signal(train, *rest):
        if (tmp_path / "two/result.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(train, *rest)

    monkeypatch.setattr(logistic, "linear_transfer", and_signal)
    with pytest.raises(SystemExit, match="0"):
        transfer(tmp_path, "--sets", data / "two", data / "three")
    kept = (tmp_path / "two/result.json").read_bytes()
    assert not (tmp_path / "three/result.json").exists() and not (tmp_path / ".lock").exists()
    monkeypatch.undo()
    monkeypatch.setattr(logistic, "GRID", GRID[20::6])
    transfer(tmp_path, "--sets", data / "two", data / "three")
    assert "two: measured before" in capsys.readouterr().out
    assert (tmp_path / "two/result.json").read_bytes() == kept and (tmp_path / "three/result.json").exists()


BAD = {
    "no folder": (["--sets", "/nowhere"], "--sets /nowhere: no such folder"),
    "no shards": (["--sets", "{}/two/val"], "--sets .*two/val/train: "),
    "no labels": (["--sets", "{}/plain"], "--sets .*plain/train: .*needs labels"),
    "the same name": (["--sets", "{}/two", "{}/two"], "--sets .*two: a second set with the name two; rename"),
    "fraction": (["--sets", "{}/two", "--val-fraction", "1"], "--val-fraction 1.0: must lie in"),
    "no image": (["--sets", "{}/small", "--val-fraction", "0.01"], "--val-fraction 0.01: is no image of"),
    "several": (["--sets", "{}/two", "{}/three", "--features", "f.safetensors"], "--features f.*: holds one set, --sets has 2"),
    "file": (["--sets", "{}/two", "--features", "f.pt"], "--features f.pt: must end with .safetensors"),
    "small resize": (["--sets", "{}/two", "--resize", "2"], "--resize 2: must lie in"),
    "missing checkpoint": (["--sets", "{}/two", "--pretrained", "/nowhere"], "--pretrained /nowhere.*: no such file"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_transfer__bad_input_is_one_line(data, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        transfer(tmp_path / "out", *[flag.format(data) for flag in flags])
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("main_")]
    assert stop.value.code == 2 and len(lines) == 1 and re.search(f"^main_transfer.py: error: {message}", lines[0]), lines
    assert not (tmp_path / "out").exists()
