"""main_finetune.py: two learning rates, BatchNorm, listed images, kills and signals, and messages for bad input."""

import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from conversions import convert, draw
from helpers import TINY, file_hash, opened, spawn
from runs import FLAGS, metrics, same, steps, without_clock

import main_finetune
import main_pretrain
from methods import METHODS
from utils.evaluation.frozen import read_source
from utils.run import checkpoint, engine

TUNED = [*FLAGS, "--method", "moco", "--arch", "tiny_resnet", "--size", "32", "--batch-size", "8", "--lr", "0.8"]
TUNED += ["--lr-head", "4", "--lr-steps"]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--method", "moco", "--shards", f"{images}/train", "--output-dir", str(folder), "--epochs", "1", *TINY]
    main_pretrain.main([*flags, "--device", "cpu", "--amp", "fp32", "--workers", "0"])
    return folder


def command(images, out, *flags, pretrained="random"):
    splits = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val"]
    return ["--pretrained", str(pretrained), *TUNED, *splits, "--output-dir", str(out), "--epochs", "2", *map(str, flags)]


def tune(images, out, *flags, **options):
    main_finetune.main(command(images, out, *flags, **options))
    return json.loads((out / "result.json").read_text()) if os.environ.get("RANK", "0") == "0" else None


def weights(out):
    return checkpoint.read(out / checkpoint.LATEST, "x")["state_dict"]


def test_main_finetune__learns_and_reports(images, trained, tmp_path):
    result = tune(images, tmp_path, "--epochs", 4, pretrained=trained)
    assert result["best"]["top1"] == 100.0 and result["last"]["epoch"] == 3  # red and blue
    assert result["images"] == 40 and result["checkpoint_sha256"] == file_hash(trained / checkpoint.LATEST)
    before = checkpoint.read(trained / checkpoint.LATEST, "x")["state_dict"]["module.encoder_q.conv1.weight"]
    after = weights(tmp_path)["module.trunk.conv1.weight"]
    assert after.shape == before.shape and 0 < (after - before).abs().max() < 1  # it started there, and has learned
    with pytest.raises(
        ValueError, match="--pretrained .*: is a checkpoint of a fine-tuning; pass the one that it started from"
    ):
        read_source("p", METHODS, ["--pretrained", str(tmp_path)])


RECIPES = {  # flags, and the published rates of trunk and head in epoch e of 20 or, if there are `steps`, in step s
    "swav 10 %": ([], lambda e, s: [lr * 0.2 ** ((e >= 12) + (e >= 16)) for lr in (0.01, 0.2)]),
    "swav 1 %": (["--lr", "0.02", "--lr-head", "5"], lambda e, s: [lr * 0.2 ** ((e >= 12) + (e >= 16)) for lr in (0.02, 5)]),
    "barlow 1 %": (["--lr", "0.005", "--lr-head", "0.5", "--lr-steps"],
                   lambda e, s: [lr * (1 + math.cos(math.pi * e / 20)) / 2 for lr in (0.005, 0.5)]),
    "transfer": (["--steps", "5000", "--batch-size", "64", "--lr", "0.04", "--lr-head", "0.04", "--lr-steps"],
                 lambda e, s: [0.01 * (1 + math.cos(math.pi * s / 5000)) / 2] * 2),
}  # fmt: skip


@pytest.mark.parametrize("flags, expected", RECIPES.values(), ids=RECIPES)
def test_rates__are_the_published_ones(flags, expected):
    args = main_finetune.get_args(["--pretrained", "p", "--train-shards", "t", "--val-shards", "v", *flags])
    assert (args.epochs, args.momentum, args.weight_decay, args.size, args.resize, args.crop_min) == (
        20,
        0.9,
        0,
        224,
        256,
        0.08,
    )
    assert args.batch_size == (64 if args.steps else 256)
    for number in (0, 1, 249, 250, 251, 2999, 3000, 4000, 4999):
        assert main_finetune.rates(args, number, 250) == pytest.approx(expected(number // 250, number))


def seen(monkeypatch, images, out, *flags):
    """For each step: (rates of the optimizer's groups, whether BatchNorm is in training mode)."""
    found, real = [], engine.Engine.update

    def update(self, *args):
        found.append([group["lr"] for group in self.optimizer.param_groups])
        return real(self, *args)

    monkeypatch.setattr(engine.Engine, "update", update)
    tune(images, out, *flags)
    return found


def test_main_finetune__every_step_has_its_rates(images, tmp_path, monkeypatch):
    """Scaled once by batch / 256; --steps may end inside an epoch."""
    by_epoch = seen(monkeypatch, images, tmp_path / "a", "--epochs", 3, "--lr-steps", 1, 2, "--lr-gamma", 0.5)
    assert np.allclose(by_epoch, [[0.8 / 32 * 0.5**e, 4 / 32 * 0.5**e] for e in range(3) for _ in range(5)])
    by_step = seen(monkeypatch, images, tmp_path / "b", "--steps", 7)
    shares = [(1 + math.cos(math.pi * s / 7)) / 2 for s in range(7)]
    assert np.allclose(by_step, [[0.8 / 32 * share, 4 / 32 * share] for share in shares])
    assert steps(tmp_path / "b") == [(0, s) for s in range(5)] + [(1, 0), (1, 1)]
    assert json.loads((tmp_path / "b/result.json").read_text())["last"]["epoch"] == 1
    assert [line["epoch"] for line in metrics(tmp_path / "b") if "val_top1" in line] == [0, 1]


def test_main_finetune__update_is_that_of_a_slow_loop(images, tmp_path, monkeypatch):
    """SGD by hand, with other rates for trunk and head, on the gradients of the run; BatchNorm's statistics by hand."""
    gradients, real = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        gradients.append([[p.grad.clone() for p in group["params"]] for group in self.param_groups])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    flags = ["--weight-decay", "0.01", "--nesterov", "--epochs", "2"]
    tune(images, tmp_path, *flags)
    frozen, args = opened(*command(images, tmp_path, *flags)[:2], "--method", "moco", "--arch", "tiny_resnet", "--size", "32",
                          "--train-shards", "t", "--val-shards", "v")  # fmt: skip
    names = [f"module.trunk.{name}" for name, _ in frozen.trunk.named_parameters()]
    torch.manual_seed(0)
    start = opened("--pretrained", "random", "--method", "moco", "--arch", "tiny_resnet", "--size", "32",
                   "--train-shards", "t", "--val-shards", "v")[0].trunk  # fmt: skip
    mine = [p.detach().clone() for p in start.parameters()]
    moving = [torch.zeros_like(p) for p in mine]
    for number, (trunk, _) in enumerate(gradients):
        lr = 0.8 / 32 * (1 + math.cos(math.pi * (number // 5) / 2)) / 2
        for i, g in enumerate(trunk):
            g = g + 0.01 * mine[i]
            moving[i] = 0.9 * moving[i] + g
            mine[i] = mine[i] - lr * (g + 0.9 * moving[i])
    found = weights(tmp_path)
    for name, value in zip(names, mine, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert found["module.trunk.bn1.num_batches_tracked"] == 10  # and not those of two evaluations


def test_main_finetune__statistics_are_those_of_the_batches(images, tmp_path, monkeypatch):
    means, real = [], torch.nn.BatchNorm2d.forward
    first = None

    def forward(self, x):
        nonlocal first
        if x.shape[0] > 1 and self.training:
            first = first or self
            if self is first:
                means.append(x.detach().mean((0, 2, 3)))
        return real(self, x)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", forward)
    tune(images, tmp_path, "--epochs", 1)
    expected = torch.zeros_like(means[0])
    for mean in means:
        expected = 0.9 * expected + 0.1 * mean
    assert len(means) == 5
    torch.testing.assert_close(weights(tmp_path)["module.trunk.bn1.running_mean"], expected, rtol=1e-4, atol=1e-6)


def test_main_finetune__bf16_changes_little_and_weights_stay_float32(images, tmp_path):
    tune(images, tmp_path / "fp32", "--epochs", 1)
    tune(images, tmp_path / "bf16", "--epochs", 1, "--amp", "bf16")
    a, b = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert all(x.dtype != torch.bfloat16 for x in b.values()) and not same(a, b)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.3, abs=0.1)


OTHER = {"lr": 0.1, "lr-head": 1, "momentum": 0.5, "weight-decay": 0.1, "nesterov": "", "batch-size": 4, "size": 48,
         "crop-min": 0.5, "seed": 3}  # fmt: skip


def test_main_finetune__every_flag_acts(images, tmp_path):
    """The other flags of a run have tests of their own."""
    tune(images, tmp_path / "base", "--steps", 2)
    for name, value in OTHER.items():
        tune(images, tmp_path / name, "--steps", 2, f"--{name}", *([value] if value != "" else []))
        assert not same(weights(tmp_path / name), weights(tmp_path / "base")), name


def test_main_finetune__validates_as_often_as_asked_and_after_the_last_epoch(images, tmp_path):
    result = tune(images, tmp_path, "--epochs", 3, "--eval-every", 2, "--resize", 64)
    assert [line["epoch"] for line in metrics(tmp_path) if "val_top1" in line] == [1, 2]
    assert result["last"]["epoch"] == 2 and result["protocol"]["resize"] == 64


# ---------------------------------------------------------------- listed images


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Shards of 24 training images in two classes and 8 for validation; a list of 16 of them, and of one more."""
    folder = tmp_path_factory.mktemp("named")
    for split, each in (("train", 12), ("val", 4)):
        for number in range(2 * each):
            draw(folder / "in" / split / f"n{number % 2}" / f"n{number % 2}_{number}.JPEG", number, format="JPEG")
    convert(folder / "in", folder / "out", "--shard-size", 7)
    listed = [f"n{number % 2}_{number}.JPEG" for number in range(3, 19)]
    (folder / "list.txt").write_text("\n".join(listed))
    (folder / "bad.txt").write_text("\n".join([*listed, "n1_99.JPEG"]))
    return folder


def images_seen(folder, out, *flags):
    """The sample ids of this process in each step, as numbers in the index of the listed images; the total."""
    found, real = [], engine.Engine.update
    loaded, load = [], main_finetune.load_batches

    def batches(index, *args):
        loaded.append(index.total)
        for batch in load(index, *args):
            found.append(batch.sample_ids.tolist())
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_finetune, "load_batches", batches)
        patch.setattr(engine.Engine, "update", real)
        tune(folder / "out", out, "--images", folder / "list.txt", *flags)
    return found, loaded


def test_main_finetune__only_the_listed_images_on_one_and_two_processes(named, tmp_path):
    one, total = images_seen(named, tmp_path / "one")
    assert total == [16] and all(sorted(sum(one[e : e + 2], [])) == list(range(16)) for e in (0, 2))
    two = spawn(images_seen, named, tmp_path / "two")
    assert [a + b for a, b in zip(two[0][0], two[1][0], strict=True)] == one
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["images"] == results[1]["images"] == 16


def test_main_finetune__two_processes_agree_on_statistics_and_weights(images, tmp_path):
    """Each process normalizes by its own batch; all validate with the statistics of the first."""
    first, second = spawn(tuned_and_left, images, tmp_path)
    assert same(first, second) and same(first, checkpoint.unprefixed(weights(tmp_path)))


def tuned_and_left(images, out):
    """The state of this process's model after the last validation."""
    kept, real = {}, main_finetune.evaluate

    def evaluate(args, index, model, *rest):
        kept.update({name: value.clone() for name, value in model.state_dict().items()})
        return real(args, index, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_finetune, "evaluate", evaluate)
        tune(images, out)
    return kept


# ---------------------------------------------------------------- stops


def test_main_finetune__a_signal_in_a_shortened_epoch(images, tmp_path, monkeypatch):
    """tests/test_signals.py and tests/test_preemption.py have all other kinds of end."""
    whole = tune(images, tmp_path / "whole", "--steps", 7)
    real, calls = engine.Engine.done, []

    def and_signal(self, *args):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(engine.Engine, "done", and_signal)
    with pytest.raises(SystemExit, match="0"):
        tune(images, tmp_path / "out", "--steps", 7)
    saved = checkpoint.read(tmp_path / "out" / checkpoint.LATEST, "x")
    assert (saved["epoch"], saved["step"]) == (1, 2) and not (tmp_path / "out/result.json").exists()
    assert tune(images, tmp_path / "out", "--steps", 7, "--resume", "auto")["last"] == whole["last"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert without_clock(metrics(tmp_path / "out")) == without_clock(metrics(tmp_path / "whole"))


def test_main_finetune__another_recipe_starts_from_the_beginning(images, tmp_path, capsys):
    tune(images, tmp_path, "--epochs", 1)
    tune(images, tmp_path, "--resume", "auto", "--lr-head", 1)
    assert (
        "is of another finetune (different: epochs, lr_head); starting this one from the beginning" in capsys.readouterr().out
    )


BAD = {
    "no labels": (["--train-shards", "{images}/plain"], "--train-shards .*plain: .*needs labels"),
    "names": (["--images", "list.txt"], "--images: the shards of --train-shards .* have no file names.*convert"),
    "pixels": (["--pretrained", "pixels"], "--pretrained pixels: has no weights to fine-tune"),
    "steps": (["--steps", "9", "--lr-steps", "3"], "--steps 9: has a cosine by step; pass --lr-steps without a value"),
    "nesterov": (["--nesterov", "--momentum", "0"], "--nesterov: needs momentum; pass a --momentum above 0"),
    "head": (["--lr-head", "0"], "--lr-head 0.0: must be above 0"),
    "never": (["--eval-every", "0"], "--eval-every 0: must be above"),
    "large batch": (["--batch-size", "64"], "--batch-size 64: larger than the data set of 40"),
}  # fmt: skip


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_finetune__bad_input_is_one_line(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        tune(images, tmp_path / "out", *[flag.format(images=images) for flag in flags])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("main_finetune.py: error: ") and re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_main_finetune__list_with_an_unknown_name_is_one_line(named, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune(named / "out", tmp_path / "out", "--images", named / "bad.txt")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "bad.txt: 1 of its 17 names are not among the 24 images of --train-shards" in line and "such as n1_99.JPEG" in line
