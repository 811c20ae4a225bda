"""main_lincls.py: the protocol, the frozen trunk, each validation image once, and messages for bad input."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import TINY, file_hash, method_args, method_of, opened, spawn
from PIL import Image
from shards_helpers import encode, write_members

import main_lincls
import main_pretrain
from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.index import load_index_together
from utils.data.shards import BatchPlan
from utils.evaluation import classifiers
from utils.evaluation.classifiers import Classifiers, evaluate, largest_change
from utils.evaluation.frozen import read_source
from utils.learning import backbones, layouts, optim
from utils.run import checkpoint
from utils.run.flags import RunError

FLAGS = ["--method", "moco", "--device", "cpu", "--amp", "fp32", "--workers", "0", "--size", "64", "--batch-size", "8"]
FLAGS += ["--lr", "3.2", "--trust", "0"]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--method", "moco", "--shards", f"{images}/train", "--output-dir", str(folder), "--epochs", "1", *TINY]
    main_pretrain.main([*flags, "--device", "cpu", "--amp", "fp32", "--workers", "0"])
    return folder


def probe(images, trained, out, *flags):
    splits = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val"]
    main_lincls.main(["--pretrained", str(trained), *splits, "--output-dir", str(out), *FLAGS, *map(str, flags)])
    return json.loads((out / "result.json").read_text())


def test_main_lincls__learns_and_reports(images, trained, tmp_path):
    result = probe(images, trained, tmp_path, "--epochs", 4)
    assert result["best"]["top1"] == 100.0  # red and blue
    assert result["last"]["top5"] == 100.0 and result["last"]["epoch"] == 3
    assert result["protocol"]["lr"] == 3.2 and result["protocol"]["arch"] == "tiny_resnet"
    path = trained / checkpoint.LATEST
    assert result["checkpoint_sha256"] == file_hash(path)
    trunk = backbones.build("tiny_resnet", num_classes=0)
    layouts.load_trunk(trunk, layouts.trunk_state(checkpoint.read(path, "x")["state_dict"]), "fc", "x")
    assert result["trunk_sha256"] == checkpoint.weights_hash(trunk)  # BatchNorm statistics included


BANKS = (60, 256, 0, 30, [30, 40, 50])
PUBLISHED = {  # epochs, batch, trust, learning rate of the whole batch, steps
    **dict.fromkeys(("moco", "mosrep"), (90, 4096, 0.001, 3.2, [])), "w2ssl": (100, 256, 0, 0.1, []),
    "cmc": BANKS, "insdis": BANKS,
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
def test_main_lincls__published_protocol_is_the_default(method):
    paths = ["--pretrained", "p", "--train-shards", "t", "--val-shards", "v"]
    args = main_lincls.get_args(["--method", method, *paths])
    epochs, batch, trust, lr, steps = PUBLISHED[method]
    assert (args.epochs, args.batch_size, args.momentum, args.weight_decay, args.trust) == (epochs, batch, 0.9, 0.0, trust)
    assert (args.size, args.resize, args.crop_min) == (224, 256, 0.08)
    if method != "cmc":  # by the arch
        assert optim.scaled_lr(args.lr, args.batch_size) == pytest.approx(lr)
    assert args.lr_steps == steps and (not steps or args.lr_gamma == 0.2)
    assert (args.amp, args.aug) == ("fp32", "v1" if method == "insdis" else "crop")


V1 = {"aug": "v1", "batch_size": 256, "epochs": 60, "lr": 30, "lr_gamma": 0.2, "lr_steps": [30, 40, 50], "trust": 0}
V2 = {"aug": "crop", "batch_size": 4096, "crop_min": 0.08, "epochs": 90, "lr": 0.2, "lr_steps": [], "trust": 0.001}
UNMIX = V1 | {"aug": "crop", "crop_min": 0.08, "epochs": 100, "lr_gamma": 0.1, "lr_steps": [60, 80]}


@pytest.mark.parametrize("method, flags, expected", [
    ("moco", [], V2), ("moco", ["--crop-min", "0.3"], V2), ("mosrep", ["--crop-min", "0.3"], V2),
    ("moco", ["--local-crops", "4"], V2), ("moco", ["--unmix-prob", "0.5"], UNMIX), ("moco", ["--unmix-prob", "0"], UNMIX),
    ("moco", ["--moco-head", "linear", "--aug", "v1", "--crop-min", "0.08"], V1 | {"crop_min": 0.08}),
    ("moco", ["--moco-head", "linear"], V1 | {"crop_min": 0.2}), ("insdis", [], V1 | {"crop_min": 0.08}),
    ("insdis", ["--crop-min", "0.2"], V1 | {"crop_min": 0.2}),
    ("cmc", ["--crop-min", "0.2"], V1 | {"aug": "crop", "crop_min": 0.2}),
])  # fmt: skip
def test_get_args__the_protocol_follows_the_flags_of_the_training(tmp_path, method, flags, expected):
    paths, _ = saved_by(method, tmp_path, *flags)
    _, args = opened(*paths)
    assert {name: vars(args)[name] for name in expected} == expected
    _, args = opened(*paths, "--crop-min", "0.5", "--aug", "crop", "--lr-steps", "--amp", "bf16")
    assert (args.crop_min, args.aug, args.lr_steps, args.amp) == (0.5, "crop", [], "bf16")


@pytest.mark.parametrize("arch, crop_min", [("alexnet", 0.2), ("resnet50v1", 0.08)])
def test_get_args__crops_of_an_alexnet_are_larger(arch, crop_min):
    paths = ["--pretrained", "random", "--train-shards", "t", "--val-shards", "v"]
    assert opened("--method", "cmc", *paths, "--arch", arch)[1].crop_min == crop_min


@pytest.mark.parametrize("aug, jitter_p, gray_p", [("crop", 0, 0), ("v1", 1, 0.2)])
def test_specs__jitter_of_moco_v1(aug, jitter_p, gray_p):
    """Gray with probability .2 before a jitter of .4 .4 .4 .4 in every view, and a flip."""
    paths = ["--pretrained", "p", "--train-shards", "t", "--val-shards", "v"]
    (spec,) = main_lincls.specs(main_lincls.get_args(["--method", "moco", *paths, "--aug", aug, "--crop-min", "0.2"]))
    assert (spec.size, spec.scale, spec.flip_p, spec.blur_p, spec.solarize_p) == (224, (0.2, 1.0), 0.5, 0, 0)
    assert (spec.jitter_p, spec.gray_p, spec.gray_first) == (jitter_p, gray_p, aug == "v1")
    assert spec.jitter == ((0.4,) * 4 if aug == "v1" else (0,) * 4)


def test_main_lincls__a_probe_of_an_older_version_resumes(images, trained, tmp_path, capsys):
    """It has no --aug in its identity: its views were cropped and flipped."""
    whole = probe(images, trained, tmp_path / "whole", "--epochs", 2)
    probe(images, trained, tmp_path / "old", "--epochs", 2)
    path = checkpoint.saved_in(tmp_path / "old")[0]
    saved = checkpoint.read(path, "x")
    del saved["probe"]["aug"]
    for other in (tmp_path / "old").glob("*.tar"):
        other.unlink()
    torch.save(saved, path)
    assert probe(images, trained, tmp_path / "old", "--epochs", 2, "--resume", "auto")["last"] == whole["last"]
    assert "another probe" not in capsys.readouterr().out
    torch.save(saved, tmp_path / "old" / "checkpoint_latest.pth.tar")
    probe(images, trained, tmp_path / "old", "--epochs", 2, "--resume", "auto", "--aug", "v1")
    assert "another probe (different: aug)" in capsys.readouterr().out


@pytest.mark.parametrize("arch, lr", [("alexnet", 0.1), ("resnet18v1", 30), ("resnet18v2", 30), ("resnet18v3", 50)])
def test_build_trunk__cmcs_learning_rate_is_that_of_its_arch(arch, lr):
    paths = ["--pretrained", "random", "--train-shards", "t", "--val-shards", "v"]
    _, args = opened("--method", "cmc", *paths, "--arch", arch)
    assert optim.scaled_lr(args.lr, args.batch_size) == lr
    _, args = opened("--method", "cmc", *paths, "--arch", arch, "--lr", "7")
    assert args.lr == 7


def test_build_trunk__an_untrained_trunk_has_the_methods_arch():
    for method, arch in (("cmc", "resnet50v1"), ("insdis", "resnet50")):
        _, args = opened("--method", method, "--pretrained", "random", "--train-shards", "t", "--val-shards", "v")
        assert args.arch == arch


@pytest.mark.parametrize("steps, lr, drops", [(90, 0.05, []), (40, 3.2, []), (60, 30.0, [30, 50])])
def test_largest_change__bounds_the_steepest_growth(steps, lr, drops):
    """The gradient that lets a weight grow fastest has its direction, in every step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer, start, total = optim.sgd([weight], lr, 0.9, 0.0, 0.001), weight.norm().item(), 0.0
    for step in range(steps):
        now = optim.lr_at(lr, step, steps, drops=drops)
        optim.set_lr(optimizer, now)
        total += now
        weight.grad = -weight.detach().clone()
        optimizer.step()
    bound = largest_change(0.001, 0.9, total)
    growth = math.log(weight.norm().item() / start)
    assert 0.4 * bound < growth <= bound


@pytest.mark.parametrize("images, flags, warned", [
    (66, ["--batch-size", "64"], True),  # one step an epoch: accuracy was 13.6 %, with --trust 0 it was 86.4 %
    (66, ["--batch-size", "8"], True),
    (66, ["--batch-size", "64", "--trust", "0"], False),
    (1281167, [], False),  # ImageNet: 312 steps x 90 epochs at lr 3.2
    (126689, [], False),  # ImageNet-100
])  # fmt: skip
def test_warn_if_slow__when_the_rate_cannot_move_the_classifier(capsys, images, flags, warned):
    paths = ["--pretrained", "random", "--train-shards", "t", "--val-shards", "v"]
    args = main_lincls.get_args(["--method", "mosrep", *paths, *flags])
    main_lincls.warn_if_slow(args, images // args.batch_size)
    out = capsys.readouterr().out
    assert bool(out) == warned and len(out.splitlines()) <= 1
    if flags == ["--batch-size", "64"]:
        assert re.search(r"--trust 0.001 with --lr 0.2: in 90 steps .* at most 2.3 %.*pass --trust 0", out)


def test_main_lincls__warns_of_a_slow_rate_and_shows_chance(images, trained, tmp_path, capsys):
    probe(images, trained, tmp_path / "slow", "--epochs", 2, "--trust", 0.001)
    out = capsys.readouterr().out
    assert out.count("warning: --trust 0.001 with --lr 3.2: in 10 steps") == 1
    assert f"(chance {math.log(2):.3f})" in out
    probe(images, trained, tmp_path / "plain", "--epochs", 2, "--trust", 0)  # the flag that the warning offers
    assert "warning" not in capsys.readouterr().out


def saved_by(method, folder, *flags):
    """A checkpoint as main_pretrain.py saves it."""
    args = method_args(method, *flags)
    content = {"method": method, "arch": args.arch, "flags": vars(args), "epoch": 1, "step": 0}
    path = folder / f"{method}.pth.tar"
    torch.save(content | {"state_dict": checkpoint.prefixed(method_of(args))}, path)
    return ["--pretrained", path, "--train-shards", "t", "--val-shards", "v", "--size", 64], args


@pytest.mark.parametrize("method", METHODS)
def test_get_args__method_arch_and_protocol_are_the_checkpoints(tmp_path, method):
    paths, trained = saved_by(method, tmp_path)
    _, args = opened(*paths)
    assert (args.method, args.arch) == (method, trained.arch)
    by_hand = main_lincls.get_args(["--method", method, "--arch", trained.arch, *map(str, paths)])
    assert vars(args) == vars(by_hand)
    published = METHODS[method].probe(trained.arch, vars(trained))
    assert {name: vars(args)[name] for name in published} == published
    _, args = opened(*paths, "--epochs", 3, "--lr", 7)
    assert (args.epochs, args.lr, args.method) == (3, 7, method)


@pytest.mark.parametrize("method", METHODS)
def test_read_source__another_method_than_the_checkpoints_is_refused(tmp_path, method):
    paths, _ = saved_by(method, tmp_path)
    for other in METHODS.keys() - {method}:
        with pytest.raises(ValueError) as error:
            opened("--method", other, *paths)
        assert str(error.value) == (f"--method {other}: {paths[1]} is a checkpoint of {method}; leave it out, "
                                    f"or pass --method {method}")  # fmt: skip
    assert opened("--method", method, *paths)[1].method == method


def test_read_source__a_checkpoint_of_a_probe_is_refused(images, trained, tmp_path):
    probe(images, trained, tmp_path, "--epochs", 1)
    with pytest.raises(ValueError, match="--pretrained .*checkpoint_0000.pth.tar: is a checkpoint of a linear probe; pass the"):
        read_source("p", METHODS, ["--pretrained", str(tmp_path)])


def test_read_source__a_method_that_is_not_here_is_refused(tmp_path):
    torch.save({"method": "simsiam", "state_dict": {}}, tmp_path / "c.pth.tar")
    with pytest.raises(ValueError, match="--pretrained .*c.pth.tar: is of method simsiam, not one of mosrep, .*pass another"):
        read_source("p", METHODS, ["--pretrained", str(tmp_path / "c.pth.tar")])


def test_main_lincls__says_which_method_arch_and_protocol(images, trained, tmp_path, capsys):
    probe(images, trained, tmp_path, "--epochs", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("linear probe of")]
    assert lines == [f"linear probe of {trained}: method moco (flag), arch tiny_resnet (checkpoint), protocol of moco except "
                     "--epochs 1 --batch-size 8 --lr 3.2 --trust 0.0"]  # fmt: skip
    with_source = read_source("p", METHODS, ["--pretrained", str(trained)])
    assert with_source.facts == "method moco (checkpoint), arch tiny_resnet (checkpoint)"
    untrained = read_source("p", METHODS, ["--pretrained", "random", "-a", "resnet18"])
    assert untrained.facts == "method mosrep (default), arch resnet18 (flag)" and untrained.path is None


def test_sgd__layer_wise_rate_is_that_of_a_slow_loop():
    torch.manual_seed(0)
    fc = torch.nn.Linear(5, 3)
    ours = optim.sgd(fc.parameters(), 3.2, 0.9, 0.0, 0.001)
    weights = [p.detach().clone() for p in fc.parameters()]
    moving = [torch.zeros_like(w) for w in weights]
    for _ in range(4):
        for i, p in enumerate(fc.parameters()):
            p.grad = torch.randn_like(p)
            rate = 0.001 * weights[i].norm() / p.grad.norm()  # not clipped at the learning rate
            moving[i] = 0.9 * moving[i] + p.grad * rate
            weights[i] = weights[i] - 3.2 * moving[i]
        ours.step()
    for p, w in zip(fc.parameters(), weights, strict=True):
        assert torch.allclose(p, w, rtol=1e-5, atol=1e-7)


def evaluate_here(images, fc_state, batch, folder, max_bad=0.1):
    """Top-1 of a fixed classifier by main_lincls' own evaluation, on this process's share of the images."""
    flags = ["--pretrained", "random", "--arch", "tiny_resnet", "--train-shards", "x", "--val-shards", "x", *FLAGS]
    torch.manual_seed(5)
    frozen, args = opened(*flags, "--batch-size", batch)
    fc = Classifiers(frozen.widths(64), 2, 0)
    fc.fc["6"].load_state_dict(fc_state)
    index = load_index_together(f"{images}/val")
    return evaluate(args, index, frozen, fc, torch.device("cpu"), BadSamples(folder, 51, max_bad))[6]


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_evaluate__each_image_counts_once_on_one_and_two_processes(images, tmp_path, batch):
    torch.manual_seed(6)
    state = torch.nn.Linear(96, 2).state_dict()
    one = evaluate_here(images, state, 1, tmp_path)
    assert (one["top1"] * 11 / 100) == pytest.approx(round(one["top1"] * 11 / 100))  # a whole number of the 11 images
    assert evaluate_here(images, state, batch, tmp_path) == one and one["unusable"] == 0
    if batch == 4:
        assert spawn(evaluate_here, images, state, batch, tmp_path) == [one, one]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """val/ in all/: seven images of two classes, of which 1 and 5 cannot be used; in kept/: the other five; in none/: these."""
    folder = tmp_path_factory.mktemp("faulty")
    pixels = np.random.default_rng(3).integers(0, 256, (7, 24, 24, 3), dtype=np.uint8)
    for name, numbers in (("all", range(7)), ("kept", (0, 2, 3, 4, 6)), ("none", (1, 5))):
        members = []
        for i in numbers:
            image = b"no image" if i in (1, 5) else encode(Image.fromarray(pixels[i]), "PNG")
            members += [(f"{i}.png", image), (f"{i}.cls", b"%d" % (i % 2))]
        (folder / name / "val").mkdir(parents=True)
        write_members(folder / name / "val" / "0.tar", members)
    return folder


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_evaluate__unusable_images_are_left_out_and_counted(faulty, tmp_path, batch):
    """Shares are of the images that were seen, and all processes agree on both."""
    torch.manual_seed(6)
    state = torch.nn.Linear(96, 2).state_dict()
    expected = evaluate_here(faulty / "kept", state, 4, tmp_path) | {"unusable": 2}
    assert 0 < expected["top1"] < 100
    assert evaluate_here(faulty / "all", state, batch, tmp_path) == expected
    if batch == 4:
        assert spawn(evaluate_here, faulty / "all", state, batch, tmp_path) == [expected, expected]
    found = [json.loads(line)["key"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert found == ["1", "5"]


def test_evaluate__more_unusable_images_than_allowed_end_it(faulty, tmp_path):
    with pytest.raises(RunError, match="--max-bad 0.02: 2 of 51 images cannot be used"):
        evaluate_here(faulty / "all", torch.nn.Linear(96, 2).state_dict(), 4, tmp_path, 0.02)


def test_evaluate__nothing_but_unusable_images_is_one_line(faulty, tmp_path):
    with pytest.raises(RunError):
        evaluate_here(faulty / "none", torch.nn.Linear(96, 2).state_dict(), 4, tmp_path)


def test_evaluate__lost_images_are_an_error(images, tmp_path, monkeypatch):
    short = BatchPlan(lambda: iter([(0, [torch.arange(10).numpy()])]), replace=False)
    monkeypatch.setattr(classifiers, "evaluation_plan", lambda index, batch: short)
    with pytest.raises(RuntimeError, match="validation counted 10 . 0 images, the index has 11"):
        evaluate_here(images, torch.nn.Linear(96, 2).state_dict(), 4, tmp_path)


def test_main_lincls__classifier_starts_as_published(images, trained, tmp_path, monkeypatch):
    seen = {}

    def look(args, train_index, val_index, frozen, classifiers, optimizer, progress, *rest):
        fc = classifiers.fc["6"]
        seen.update(weight=fc.weight.detach(), bias=fc.bias.detach(), training=frozen.trunk.training)
        seen["grad"] = any(p.requires_grad for p in frozen.parameters())
        progress["best"] = progress["last"] = {6: {"epoch": 0, "top1": 1.0, "top5": 1.0}}
        return 0

    monkeypatch.setattr(main_lincls, "train", look)
    probe(images, trained, tmp_path, "--epochs", 1)
    assert seen["weight"].std().item() == pytest.approx(0.01, rel=0.2) and not seen["bias"].any()
    assert not seen["training"] and not seen["grad"]


def test_main_lincls__resumed_probe_is_the_unbroken_probe(images, trained, tmp_path, monkeypatch):
    whole = probe(images, trained, tmp_path / "whole", "--epochs", 3)
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(main_lincls, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        probe(images, trained, tmp_path / "part", "--epochs", 3)
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "part" / checkpoint.LATEST, "x")["epoch"] == 1
    part = probe(images, trained, tmp_path / "part", "--epochs", 3, "--resume", "auto")
    assert (part["best"], part["last"]) == (whole["best"], whole["last"])
    saved = [checkpoint.read(tmp_path / name / checkpoint.LATEST, "x")["state_dict"] for name in ("whole", "part")]
    assert torch.equal(*(state["module.fc.6.weight"] for state in saved))
    again = probe(images, trained, tmp_path / "part", "--epochs", 3, "--resume", "auto")  # nothing left to do
    assert again["last"] == whole["last"]


def test_main_lincls__auto_does_not_continue_another_probe(images, trained, tmp_path, capsys):
    probe(images, trained, tmp_path, "--epochs", 1)
    result = probe(images, trained, tmp_path, "--epochs", 2, "--resume", "auto")
    assert "another probe (different: epochs)" in capsys.readouterr().out and result["last"]["epoch"] == 1


def test_main_lincls__random_trunk(images, tmp_path):
    result = probe(images, "random", tmp_path, "--epochs", 1, "--arch", "tiny_resnet")
    assert result["checkpoint_sha256"] is None


def broken(trained, tmp_path):
    saved = checkpoint.read(trained / checkpoint.LATEST, "x")
    del saved["state_dict"]["module.encoder_q.layer1.0.conv1.weight"]
    torch.save(saved, tmp_path / "broken.pth.tar")
    return tmp_path / "broken.pth.tar"


BAD = {
    "missing checkpoint": (["--pretrained", "/nowhere"], "--pretrained /nowhere/?.*: no such file"),
    "another arch": (["--arch", "resnet18"], "does not fit the trunk .* pass the --arch"),
    "no labels": (["--val-shards", "{images}/plain"], "--val-shards .*plain: .*needs labels"),
    "no shards": (["--train-shards", "/nowhere"], "--train-shards /nowhere: "),
    "large batch": (["--batch-size", "64"], "--batch-size 64: larger than the data set of 40"),
    "small resize": (["--resize", "32"], "--resize 32: must lie in"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_lincls__bad_input_is_one_line(images, trained, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        probe(images, trained, tmp_path / "out", *[f.format(images=images) for f in flags])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("main_lincls.py: error: ") and re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_main_lincls__a_trunk_that_does_not_match_is_never_probed(images, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        probe(images, broken(trained, tmp_path), tmp_path / "out")
    assert "1 missing: layer1.0.conv1.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()
