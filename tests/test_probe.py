"""main_lincls.py against slow references: the classifier's updates, the accuracy over all images, the frozen trunk."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
import webdataset
from helpers import TINY, file_hash, opened, spawn
from PIL import Image

import main_lincls
import main_pretrain
from utils.data import shards
from utils.data.bad_samples import BadSamples
from utils.data.index import load_index
from utils.evaluation import classifiers
from utils.evaluation.frozen import Frozen
from utils.learning import backbones
from utils.run import checkpoint, dist

SIZE = 32
FLAGS = ["--method", "moco", "--device", "cpu", "--amp", "fp32", "--workers", "0", "--size", str(SIZE), "--resize", str(SIZE)]
FLAGS += ["--batch-size", "8", "--epochs", "2"]
CLASSES = 7


def write(folder, name, labels, rng):
    """Images of the size of a view, so that validation resamples nothing: noise on the grey level of the class."""
    folder.mkdir()
    pixels = rng.integers(0, 40, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    with webdataset.TarWriter(str(folder / f"{name}-000000.tar")) as tar:
        for i, label in enumerate(labels):
            pixels[i] += np.uint8(30 * max(label % CLASSES, 0))
            file = io.BytesIO()
            Image.fromarray(pixels[i]).save(file, "PNG")
            tar.write({"__key__": str(i), "png": file.getvalue(), **({} if label < 0 else {"cls": str(label)})})
    return pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders: train (28 images, 7 classes), val (11; `pixels` and `labels` beside it), one, plain, more, sparse; and run."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    write(folder / "train", "t", [i % CLASSES for i in range(28)], rng)
    labels = [0, 6, 2, 3, 3, 5, 1, 4, 6, 0, 2]
    np.save(folder / "pixels.npy", write(folder / "val", "v", labels, rng))
    np.save(folder / "labels.npy", labels)
    write(folder / "one", "v", [6], rng)
    write(folder / "plain", "p", [-1] * 12, rng)
    write(folder / "more", "v", [0, 1, 9], rng)
    write(folder / "some", "v", [0, 1, -1, 2], rng)
    flags = ["--method", "moco", "--shards", f"{folder}/train", "--output-dir", f"{folder}/run", "--epochs", "1", *TINY]
    main_pretrain.main([*flags, "--size", "32", "--device", "cpu", "--amp", "fp32", "--workers", "0"])
    return folder


def probe(data, out, *flags):
    splits = ["--train-shards", f"{data}/train", "--val-shards", f"{data}/val"]
    argv = ["--pretrained", f"{data}/run", *splits, "--output-dir", str(out), *FLAGS, *map(str, flags)]
    main_lincls.main(argv)


def result_of(data, out, *flags):
    probe(data, out, *flags)
    return json.loads((out / "result.json").read_text())


def frozen_trunk(data):
    saved = torch.load(data / "run" / checkpoint.LATEST, weights_only=True)["state_dict"]
    trunk = backbones.build("tiny_resnet", num_classes=0)
    start = "module.encoder_q."
    trunk.load_state_dict({n.removeprefix(start): v for n, v in saved.items() if n.startswith(start) and ".fc." not in n})
    return trunk.eval()


@torch.no_grad()
def by_hand(data, out):
    """Top-1 and top-5 in % of the saved classifier: one image after the other, ranks counted."""
    trunk, fc = frozen_trunk(data), torch.load(out / checkpoint.LATEST, weights_only=True)["state_dict"]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    top1 = top5 = 0
    pixels, labels = np.load(data / "pixels.npy"), np.load(data / "labels.npy")
    for image, label in zip(pixels, labels, strict=True):
        x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - mean) / std
        scores = (trunk(x) @ fc["module.fc.6.weight"].T + fc["module.fc.6.bias"])[0].tolist()
        better = sum(s > scores[label] for s in scores)
        top1 += better < 1
        top5 += better < 5
    return {"top1": 100 * top1 / len(labels), "top5": 100 * top5 / len(labels)}


@pytest.mark.parametrize("batch", [4, 8])
def test_main_lincls__accuracy_is_the_one_counted_by_hand(data, tmp_path, batch):
    """11 images, on one process and on two, with a last batch that is short or empty."""
    flags = ["--batch-size", batch, "--lr", 1.0, "--trust", 0]
    one = result_of(data, tmp_path / "one", *flags)
    expected = by_hand(data, tmp_path / "one")
    assert {k: one["last"][k] for k in expected} == pytest.approx(expected)
    assert 0 < expected["top1"] < expected["top5"]  # or the comparison would be empty
    if batch == 4:
        spawn(probe, data, tmp_path / "two", *flags)
        two = json.loads((tmp_path / "two/result.json").read_text())
        assert two["last"] == pytest.approx(one["last"]) and two["best"] == pytest.approx(one["best"])
        assert {k: two["last"][k] for k in expected} == pytest.approx(by_hand(data, tmp_path / "two"))
        assert two["trunk_sha256"] == one["trunk_sha256"]
        weights = [torch.load(tmp_path / n / checkpoint.LATEST, weights_only=True)["state_dict"] for n in ("one", "two")]
        assert list(weights[1]) == ["module.fc.6.weight", "module.fc.6.bias"]
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def evaluate_one(data, folder):
    frozen, args = opened("--pretrained", "random", "--arch", "tiny_resnet", "--train-shards", "x", "--val-shards", "x", *FLAGS)
    fc = classifiers.Classifiers(frozen.widths(args.size), CLASSES, args.seed)
    torch.nn.init.zeros_(fc.fc["6"].weight)
    fc.fc["6"].bias.data = torch.arange(CLASSES).float()  # always says 6
    indices = [load_index(f"{data}/{split}") for split in ("one", "val")]
    bad = BadSamples(folder, 12, 0.01)
    return [classifiers.evaluate(args, index, frozen, fc, torch.device("cpu"), bad)[6] for index in indices]


def test_evaluate__fewer_images_than_processes(data, tmp_path):
    load_index(f"{data}/one"), load_index(f"{data}/val")
    val = {"top1": 100 * 2 / 11, "top5": 100 * 8 / 11, "unusable": 0}  # of the 11 labels two are 6, three are below 2
    for got in [evaluate_one(data, tmp_path), *spawn(evaluate_one, data, tmp_path)]:
        assert got[0] == {"top1": 100.0, "top5": 100.0, "unusable": 0} and got[1] == pytest.approx(val)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("split, total", [("one", 1), ("val", 11), ("train", 28)])
def test_evaluation_plan__no_image_twice_and_none_lost(data, monkeypatch, world, batch, split, total):
    index, seen = load_index(f"{data}/{split}"), []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "world", lambda: world)
        seen += [int(i) for _, steps in shards.evaluation_plan(index, batch).epochs() for step in steps for i in step]
    assert sorted(seen) == list(range(total))


def test_evaluate__counting_images_twice_is_an_error(data, monkeypatch, tmp_path):
    real = classifiers.evaluation_plan
    twice = lambda *a: shards.BatchPlan(lambda: [*real(*a).epochs(), *real(*a).epochs()], replace=False)  # noqa: E731
    monkeypatch.setattr(classifiers, "evaluation_plan", twice)
    with pytest.raises(RuntimeError, match="2.*1"):
        evaluate_one(data, tmp_path)


def test_main_lincls__training_is_the_slow_loop(data, tmp_path, monkeypatch):
    """fc after 2 epochs of 7 steps: LARC without clipping, trust .001, wd 0, momentum .9, lr x 4 / 256 on a cosine by epoch."""
    seen, start = [], {}
    real_features, real_loss = Frozen.features, main_lincls.F.cross_entropy
    real_normal = torch.nn.init.normal_

    def features(*args):
        found = real_features(*args)
        start["last"] = found[6]
        return found

    def loss(logits, label):
        seen.append((start["last"], label))
        return real_loss(logits, label)

    monkeypatch.setattr(Frozen, "features", features)
    monkeypatch.setattr(main_lincls.F, "cross_entropy", loss)

    def normal(weight, *args, **kwargs):
        real_normal(weight, *args, **kwargs)
        start["weight"] = weight.detach().clone()
        return weight

    monkeypatch.setattr(torch.nn.init, "normal_", normal)
    probe(data, tmp_path, "--batch-size", 4, "--lr", 20.0)
    assert len(seen) == 14
    w, b = start["weight"], torch.zeros(CLASSES)
    m = [torch.zeros_like(w), torch.zeros_like(b)]
    for step, (x, y) in enumerate(seen):
        lr = 20.0 * 4 / 256 * (1 + math.cos(math.pi * (step // 7) / 2)) / 2
        error = (torch.softmax(x @ w.T + b, 1) - torch.eye(CLASSES)[y]) / len(y)  # d loss / d logits
        for i, (p, g) in enumerate(((w, error.T @ x), (b, error.sum(0)))):
            rate = 0.001 * p.norm() / g.norm() if p.norm() > 0 else 1.0
            m[i] = 0.9 * m[i] + rate * g
            p -= lr * m[i]
    saved = torch.load(tmp_path / checkpoint.LATEST, weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["module.fc.6.weight"], w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saved["state_dict"]["module.fc.6.bias"], b, rtol=1e-4, atol=1e-6)
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(20.0 * 4 / 256 / 2)


def test_main_lincls__the_learning_rate_drops_after_its_epochs(data, tmp_path):
    """CMC's probe: not a cosine, but steps."""
    probe(data, tmp_path, "--epochs", 4, "--lr", 16.0, "--lr-steps", 1, 3, "--lr-gamma", 0.2, "--print-freq", 9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.5, 0.1, 0.1, 0.02])


def test_main_lincls__result_has_best_and_last(data, tmp_path, monkeypatch, capsys):
    accuracies = iter([(40.0, 60.0), (80.0, 90.0), (80.0, 95.0), (30.0, 99.0)])
    monkeypatch.setattr(main_lincls, "evaluate", lambda *a: {6: dict(zip(("top1", "top5"), next(accuracies), strict=True))})
    result = result_of(data, tmp_path, "--epochs", 4)
    assert result["best"] == {"epoch": 1, "top1": 80.0, "top5": 90.0}
    assert result["last"] == {"epoch": 3, "top1": 30.0, "top5": 99.0}
    protocol = {"epochs": 4, "batch_size": 8, "lr": 0.2, "momentum": 0.9, "weight_decay": 0.0, "trust": 0.001, "crop_min": 0.08}
    assert {k: result["protocol"][k] for k in protocol} == protocol
    assert result["checkpoint_sha256"] == file_hash(data / "run" / checkpoint.LATEST)
    assert "0.2 x 8 / 256 = 0.00625" in capsys.readouterr().out


def test_main_lincls__trunk_stays_as_it_was(data, tmp_path):
    before = checkpoint.weights_hash(frozen_trunk(data))
    file = (data / "run" / checkpoint.LATEST).read_bytes()
    assert result_of(data, tmp_path)["trunk_sha256"] == before
    assert (data / "run" / checkpoint.LATEST).read_bytes() == file


@pytest.mark.parametrize("spoil", ["statistics", "weight"])
def test_main_lincls__a_trunk_that_moves_gives_no_result(data, tmp_path, monkeypatch, spoil):
    real = Frozen.features

    def features(frozen, x, name):
        if spoil == "statistics" and len(x) > 1:
            frozen.trunk.train()
        if spoil == "weight":
            next(frozen.trunk.parameters()).data[0] += 1e-3
        return real(frozen, x, name)

    monkeypatch.setattr(Frozen, "features", features)
    with pytest.raises(RuntimeError, match="frozen trunk changed"):
        probe(data, tmp_path)
    assert not (tmp_path / "result.json").exists()


BAD = {
    "training images without labels": (["--train-shards", "{}/plain"], r"--train-shards \S+/plain: .*label"),
    "validation images without labels": (["--val-shards", "{}/plain"], r"--val-shards \S+/plain: .*label"),
    "some images without labels": (["--val-shards", "{}/some"], r"--val-shards \S+/some: .*label"),
    "other classes": (["--val-shards", "{}/more"], r"--val-shards \S+/more: .*classes"),
    "empty folder": (["--val-shards", "{}/empty"], r"--val-shards \S+/empty: "),
    "unknown arch": (["--pretrained", "random", "--arch", "resnet5O"], "--arch resnet5O: .*resnet50"),
    "crops": (["--crop-min", "0"], "--crop-min 0.0: "),
    "epochs": (["--epochs", "0"], "--epochs 0: "),
    "learning rate": (["--lr", "nan"], "--lr nan: "),
    "folder": (["--output-dir", "/proc/version/x"], "--output-dir /proc/version/x: "),
    "resume": (["--resume", "/nowhere.pth.tar"], "--resume /nowhere.pth.tar: "),
    "not a probe": (["--resume", "{}/run/checkpoint_latest.pth.tar"], r"--resume \S+: .*another probe"),
    "no feature vector": (["--pretrained", "random", "--arch", "vit_tiny_patch16_224"], "--arch vit_tiny|--size 32"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_lincls__bad_input(data, tmp_path, capsys, flags, message):
    (data / "empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        probe(data, tmp_path / "out", *[f.format(data) for f in flags])
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "indexing" not in line]
    err = [line for line in err if not line.startswith("warning: ")]  # of the index, about labels
    assert stop.value.code == 2 and len(err) == 1 and re.search(message, err[0]), err
    assert not list(tmp_path.glob("out/*"))


def test_main_lincls__a_probe_is_not_overwritten_by_another(data, tmp_path, capsys):
    probe(data, tmp_path, "--epochs", 1)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(SystemExit):
        probe(data, tmp_path, "--epochs", 2)
    assert "--output-dir" in capsys.readouterr().err and (tmp_path / "result.json").read_bytes() == before


def test_main_lincls__random_does_not_follow_the_global_state(data, tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        results.append(result_of(data, tmp_path / name, "--pretrained", "random", "--arch", "tiny_resnet", "--epochs", 1))
    assert results[0]["trunk_sha256"] == results[1]["trunk_sha256"] and results[0]["last"] == results[1]["last"]
    assert results[0]["checkpoint_sha256"] is None
