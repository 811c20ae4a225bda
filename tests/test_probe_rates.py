"""Probes with several learning rates in one pass: each as if alone, chosen on a part of the training images."""

import json
import re

import pytest
import torch
from helpers import spawn

import main_lincls
from utils.data.index import load_index
from utils.run import checkpoint

TINY = ["--method", "moco", "--arch", "tiny_resnet", "--size", "32", "--resize", "32", "--batch-size", "4", "--trust", "0"]
ALEXNET = ["--method", "cmc", "--arch", "alexnet", "--layer", "1", "5", "--batch-size", "8"]
FLAGS = ["--pretrained", "random", "--device", "cpu", "--amp", "fp32", "--workers", "0"]


def run(images, out, *flags):
    splits = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val"]
    main_lincls.main([*FLAGS, *splits, "--output-dir", str(out), *map(str, flags)])


def probe(images, out, *flags):
    run(images, out, *flags)
    return json.loads((out / "result.json").read_text())


def state_of(out):
    return checkpoint.read(out / checkpoint.LATEST, "x")


def test_main_lincls__each_rate_learns_as_if_alone(images, tmp_path, monkeypatch):
    rates = ["0.5", "8", "2"]
    several = probe(images, tmp_path / "all", *TINY, "--epochs", 2, "--lr", *rates, "--val-fraction", 0.25)
    real = main_lincls.held_out

    def same_images(args, train):
        args.val_fraction, before = 0.25, args.val_fraction
        ids, args.val_fraction = real(args, train), before
        return ids

    monkeypatch.setattr(main_lincls, "held_out", same_images)
    together = state_of(tmp_path / "all")["state_dict"]
    for i, rate in enumerate(rates):
        alone = probe(images, tmp_path / rate, *TINY, "--epochs", 2, "--lr", rate)
        assert several["rates"]["6"][rate] == {"best": alone["best"], "last": alone["last"]}
        for name, value in state_of(tmp_path / rate)["state_dict"].items():
            assert torch.equal(value, together[name.replace("fc.6", f"fc.6_{i}") if i else name])
    assert len({x["last"]["held_out"] for x in several["rates"]["6"].values()}) > 1 or several["lr"]["6"] == 0.5
    lines = [json.loads(line) for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines()]
    assert {"top1_lr0.5", "top1_lr8", "top1_lr2"} <= lines[0].keys() and lines[0]["lr"] == 0.5 * 4 / 256


def test_main_lincls__the_rate_is_chosen_on_the_held_out_images(images, tmp_path, monkeypatch):
    """Not on the test images: there another rate is the best."""
    trained, held = [], []

    def accuracies(args, index, *rest):
        part = index.kept is not None
        held.extend([index] * part)
        return {
            head: {"top1": x, "top5": 100.0}
            for head, x in zip((6, "6_1", "6_2"), (10, 30, 20) if part else (90, 50, 70), strict=True)
        }

    real = main_lincls.training_plan
    monkeypatch.setattr(main_lincls, "training_plan", lambda index, *a, **k: trained.append(index) or real(index, *a, **k))
    monkeypatch.setattr(main_lincls, "evaluate", accuracies)
    result = probe(images, tmp_path, *TINY, "--epochs", 2, "--lr", 0.1, 0.3, 1, "--val-fraction", 0.3)
    assert result["lr"] == {"6": 0.3} and result["last"]["top1"] == 50 and result["last"]["held_out"] == 30
    assert {rate: x["last"]["top1"] for rate, x in result["rates"]["6"].items()} == {"0.1": 90, "0.3": 50, "1": 70}
    assert result["protocol"]["lr"] == [0.1, 0.3, 1.0] and result["protocol"]["val_fraction"] == 0.3
    (train,), (part,) = trained, held  # each training image is in one of both
    assert (train.total, part.total) == (28, 12)
    shards = {}
    for index in (train, part):
        for shard, kept in zip(index.shards, index.kept, strict=True):
            shards.setdefault(shard.name, []).extend(kept.tolist())
    whole = load_index(f"{images}/train").shards
    assert {name: sorted(kept) for name, kept in shards.items()} == {s.name: list(range(s.samples)) for s in whole}


def test_main_lincls__resumed_probe_of_layers_and_rates_is_the_unbroken_one(images, tmp_path, monkeypatch):
    flags = [*ALEXNET, "--epochs", 1, "--lr", 3, 1, "--save-steps", 2]
    whole = probe(images, tmp_path / "whole", *flags)
    real, calls = main_lincls.evaluate, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:  # on the held-out images
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(main_lincls, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        probe(images, tmp_path / "part", *flags)
    monkeypatch.undo()
    assert state_of(tmp_path / "part")["step"] == 2
    part = probe(images, tmp_path / "part", *flags, "--resume", "auto")
    assert list(whole["layers"]) == list(whole["rates"]) == ["1", "5"] and list(whole["rates"]["1"]) == ["3", "1"]
    for entry in ("layers", "rates", "lr", "best", "last"):
        assert part[entry] == whole[entry]
    states = [state_of(tmp_path / name) for name in ("whole", "part")]
    assert list(states[0]["state_dict"]) == [
        f"module.fc.{head}.{x}" for head in ("1", "1_1", "5", "5_1") for x in ("weight", "bias")
    ]
    assert all(torch.equal(states[0]["state_dict"][name], value) for name, value in states[1]["state_dict"].items())


def test_main_lincls__two_processes_choose_from_the_same_images(images, tmp_path):
    flags = [*TINY, "--epochs", 1, "--lr", 0.5, 8]
    one = probe(images, tmp_path / "one", *flags)
    spawn(run, images, tmp_path / "two", *flags)
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert two["lr"] == one["lr"]
    for rate, found in one["rates"]["6"].items():
        assert two["rates"]["6"][rate]["last"] == pytest.approx(found["last"])


def test_main_lincls__one_rate_in_a_list_is_the_usual_probe(images, tmp_path):
    usual, listed = (
        probe(images, tmp_path / name, *TINY, "--epochs", 1, *more) for name, more in (("a", []), ("b", ["--lr", 0.2]))
    )
    assert usual["protocol"]["lr"] == listed["protocol"]["lr"] == 0.2 and usual["last"] == listed["last"]
    assert "rates" not in usual and usual["protocol"]["val_fraction"] is None


BAD = {
    "no choice": (["--val-fraction", "0.1"], "--val-fraction 0.1: is for the choice among several --lr; leave it out"),
    "no image": (["--lr", "1", "2", "--val-fraction", "0.001"], "--val-fraction 0.001: must lie in"),
    "twice": (["--lr", "1", "2", "1"], "--lr 1.0 2.0 1.0: has a value twice"),
    "zero": (["--lr", "1", "0"], "--lr 0.0: must be above 0"),
    "few": (["--lr", "1", "2", "--batch-size", "40"], "--batch-size 40: larger than the data set of 36 images"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_lincls__rates_that_cannot_work_are_one_line(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        probe(images, tmp_path / "out", *TINY, *flags)
    assert re.search(f"error: {message}", capsys.readouterr().err.splitlines()[-1]) and not (tmp_path / "out").exists()
