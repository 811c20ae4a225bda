"""Checkpoint files: published layouts end to end, damaged files, code inside, a save that is killed."""

import argparse
import os
import re

import numpy as np
import pytest
import timm
import torch
from helpers import method_args, method_of, opened  # which registers tiny_resnet too

import main_lincls
from cmc.color import color_views
from methods import METHODS
from utils.evaluation.frozen import read_source
from utils.learning import layouts
from utils.run import checkpoint

PROBE = ["--train-shards", "x", "--val-shards", "x", "--output-dir", "x"]
HEADS = {  # published heads in the place of the classifier
    "v1": {"fc.weight": (128, 512), "fc.bias": (128,)},
    "v2": {"fc.0.weight": (512, 512), "fc.0.bias": (512,), "fc.2.weight": (128, 512), "fc.2.bias": (128,)},
    "v3": {"fc.0.weight": (64, 512), "fc.1.weight": (64,), "fc.1.running_mean": (64,), "fc.1.num_batches_tracked": ()},
    "none": {},
}
QUEUE = {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
MOSREP = {f"module.projector_{s}.{n}": torch.randn(4) for s in "qk" for n in ("conv.0.weight", "conv.1.running_var")}


@pytest.fixture(scope="module")
def resnets():
    """Three different ResNets: the trunk to load, and two others that must not be loaded."""
    torch.manual_seed(11)
    models = [timm.create_model("tiny_resnet", num_classes=0).state_dict() for _ in range(3)]
    for state in models:
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = torch.randn_like(value)  # running statistics too
    return models


def named(prefix, state, head="none"):
    return {prefix + n: v for n, v in state.items()} | {prefix + n: torch.randn(s) for n, s in HEADS[head].items()}


def moco(r, head):
    return {"epoch": 200, "arch": "tiny_resnet", "optimizer": {}, "state_dict":
            named("module.encoder_q.", r[0], head) | named("module.encoder_k.", r[1], head) | QUEUE}  # fmt: skip


LAYOUTS = {
    "MoCo v1": lambda r: moco(r, "v1"),
    "MoCo v2": lambda r: moco(r, "v2"),
    "MosRep": lambda r: moco(r, "none") | {"state_dict": moco(r, "none")["state_dict"] | MOSREP},
    "key encoder first": lambda r: {"state_dict": dict(reversed(moco(r, "v2")["state_dict"].items()))},
    "MoCo-v3": lambda r: {"state_dict": named("module.momentum_encoder.", r[1], "v3")
                          | named("module.base_encoder.", r[0], "v3") | {"module.predictor.0.weight": torch.randn(4, 4)}},
    "MoCo-v3, older": lambda r: {"state_dict": named("module.momentum_encoder.", r[0], "v3")},
    "torchvision": lambda r: named("", r[0], "v1"),
    "timm without classifier": lambda r: named("", r[0]),
    "our export": lambda r: {"arch": "tiny_resnet", "state_dict": named("", r[0])},
}  # fmt: skip


METHOD_OF = {"MoCo v1": "moco", "MoCo v2": "moco", "key encoder first": "moco", "MoCo-v3": "w2ssl", "MoCo-v3, older": "w2ssl"}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_build_trunk__published_layouts(resnets, tmp_path, layout, old_format):
    """From a file to a frozen trunk that gives the same features; MoCo's first releases were saved in torch's old format."""
    torch.save(LAYOUTS[layout](resnets), tmp_path / "c.pth.tar", _use_new_zipfile_serialization=not old_format)
    flags = ["--pretrained", str(tmp_path / "c.pth.tar"), "--arch", "tiny_resnet"]
    trunk, source = opened(*flags, *PROBE)[0].trunk, read_source("p", METHODS, flags)
    assert source.method == METHOD_OF.get(layout, "mosrep") and len(source.sha256) == 64
    loaded = trunk.state_dict()
    assert loaded.keys() == resnets[0].keys() and all(torch.equal(v, resnets[0][n]) for n, v in loaded.items())
    assert not trunk.training and not any(p.requires_grad for p in trunk.parameters())


W2SSL = {"fc_crop.0.weight": (64, 96), "fc_crop.1.running_mean": (64,), "fc_crop.3.weight": (16, 64)}


@pytest.mark.parametrize("head", ["w2ssl", "v3"])
def test_build_trunk__of_w2ssl(resnets, tmp_path, head):
    """Its crop head lies inside the encoder, where MoCo-v3 has its own, and both begin with fc."""
    shapes = W2SSL if head == "w2ssl" else HEADS["v3"]
    heads = {f"module.{e}_encoder.{n}": torch.randn(s) for e in ("base", "momentum") for n, s in shapes.items()}
    rest = {"module.predictor.0.weight": torch.randn(4, 4), "module.fc_loc.weight": torch.randn(2, 96)}
    state = named("module.base_encoder.", resnets[0]) | named("module.momentum_encoder.", resnets[1]) | heads | rest
    torch.save({"epoch": 200, "arch": "tiny_resnet", "state_dict": state, "optimizer": {}}, tmp_path / "c.pth.tar")
    loaded = opened("--method", "w2ssl", "--pretrained", tmp_path / "c.pth.tar", *PROBE)[0].trunk.state_dict()
    assert loaded.keys() == resnets[0].keys() and all(torch.equal(v, resnets[0][n]) for n, v in loaded.items())


def test_build_trunk__the_arch_is_the_checkpoints(resnets, tmp_path):
    torch.save(moco(resnets, "v2"), tmp_path / "c.pth.tar")
    _, args = opened("--pretrained", tmp_path / "c.pth.tar", *PROBE)
    assert args.arch == "tiny_resnet"


def test_load_trunk__counts_of_batches_may_be_absent(resnets):
    """As in checkpoints from before torch 0.4.1."""
    trunk = timm.create_model("tiny_resnet", num_classes=0)
    old = {name: value for name, value in resnets[0].items() if "num_batches_tracked" not in name}
    assert len(old) < len(resnets[0])
    layouts.load_trunk(trunk, old, "fc", "--pretrained x")
    assert all(torch.equal(value, old.get(name, value)) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("names, container, method, sure", [
    (["module.encoder_q.conv1.weight", "module.projector_q.conv.0.weight"], "state_dict", "mosrep", True),
    (["encoder_q.conv1.weight", "encoder_k.conv1.weight"], "state_dict", "moco", True),
    (["module.base_encoder.conv1.weight", "module.base_encoder.fc_crop.0.weight"], "state_dict", "w2ssl", True),
    (["module.base_encoder.patch_embed.proj.weight"], "state_dict", "w2ssl", False),  # MoCo-v3
    (["encoder.module.l_to_ab.conv1.weight", "encoder.module.ab_to_l.conv1.weight"], "model", "cmc", True),
    (["encoder.module.conv1.weight"], "model", "insdis", False),
    (["module.layer1.0.conv1.weight"], "model", "insdis", False),
    (["module.backbone.conv1.weight"], "model", None, False),  # Barlow Twins
    (["module.encoder.conv1.weight"], "state_dict", None, False),  # SimSiam
    (["conv1.weight", "fc.weight"], None, None, False),  # torchvision
    (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "state_dict", None, False),  # timm
])  # fmt: skip
def test_recognize__the_method_by_the_names_of_the_weights(names, container, method, sure):
    state = dict.fromkeys(names)
    saved = {container: state} if container else state
    assert layouts.recognize(saved, state) == (method, sure)
    assert layouts.recognize({"method": "byol", "state_dict": state}, state) == ("byol", True)


def test_read_source__a_flag_that_contradicts_the_names_is_refused(resnets, tmp_path):
    torch.save(moco(resnets, "v2"), tmp_path / "c.pth.tar")
    flags = ["--pretrained", str(tmp_path / "c.pth.tar"), *PROBE]
    for other in METHODS.keys() - {"moco"}:
        with pytest.raises(ValueError, match=f"--method {other}: .*c.pth.tar is a checkpoint of moco; .* pass --method moco"):
            opened("--method", other, *flags)
    torch.save(LAYOUTS["MoCo-v3"](resnets), tmp_path / "c.pth.tar")  # it has the same names as W2SSL
    assert opened("--method", "moco", "--arch", "tiny_resnet", *flags)[1].epochs == 90


@pytest.mark.parametrize("arch, spoil, found", [
    ("resnet50", lambda n: f"module.net.{n}", "module.net. (320)"),
    ("resnet50", lambda n: f"student.{'x' * 300}.{n}", "student.xxx"),
    ("convnext_tiny", lambda n: n, "layer3.0. ("),
])  # fmt: skip
def test_load_trunk__a_failure_is_at_most_400_characters(arch, spoil, found):
    """With all keys it had 17,700 characters."""
    torch.manual_seed(0)
    state = {spoil(n): v for n, v in timm.create_model("resnet50", num_classes=10).state_dict().items()}
    trunk = timm.create_model(arch, num_classes=0)
    with pytest.raises(ValueError) as error:
        layouts.load_trunk(trunk, state, "fc", "--pretrained output/run/checkpoint_latest.pth.tar", state)
    text, wanted = str(error.value), trunk.state_dict()
    needed = {n for n in wanted if not n.endswith(".num_batches_tracked")}
    left = {n for n in state if not n.startswith("fc.")}
    assert len(text) <= 400 and "\n" not in text
    assert f"{len(needed - left)} missing: " in text and f"{len(left - wanted.keys())} left over: " in text
    listed = re.search(r"\((.*)\); prefixes", text)[1]
    assert len(re.findall(r"[:,] ", listed)) == 5 and "pass " in text and found in text, text


SPOILT = {
    "one key too few": (lambda s: s.pop("layer2.0.bn1.running_var"), "1 missing.*layer2.0.bn1.running_var"),
    "one key too many": (lambda s: s.update({"layer5.weight": torch.ones(1)}), "1 .*layer5.weight"),
    "other shape": (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "1 .*shape.*conv1.weight"),
    "not a tensor": (lambda s: s.update({"conv1.weight": 3.0}), "conv1.weight"),
    "other names": (
        lambda s: [s.update({f"net.{n}": s.pop(n)}) for n in list(s)],
        "missing.*conv1.weight.*prefixes found: net. ",
    ),
    "no weights": (lambda s: s.clear(), "missing.*conv1.weight"),
    "names that are numbers": (lambda s: s.update({7: torch.ones(1)}), "weights"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("where", ["bare", "state_dict"])
def test_build_trunk__no_probe_on_a_checkpoint_that_does_not_match(resnets, tmp_path, capsys, images, spoil, message, where):
    state = dict(resnets[0])
    spoil(state)
    torch.save(state if where == "bare" else {"state_dict": state}, tmp_path / "c.pth.tar")
    one_line(capsys, images, tmp_path, message)


@pytest.mark.parametrize("content", [{"state_dict": [1, 2]}, {"state_dict": "x"}, {"model": None}, {"epoch": 3}])
def test_build_trunk__a_dictionary_without_weights(tmp_path, capsys, images, content):
    torch.save(content, tmp_path / "c.pth.tar")
    one_line(capsys, images, tmp_path, "c.pth.tar: ")


def one_line(capsys, images, folder, message):
    argv = ["--pretrained", folder / "c.pth.tar", "--arch", "tiny_resnet", "--output-dir", folder / "out", "--device", "cpu"]
    argv += ["--train-shards", images / "train", "--val-shards", images / "val", "--batch-size", "8", "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main_lincls.main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "indexing" not in line]
    assert stop.value.code == 2 and len(err) == 1 and not list(folder.glob("out/*"))
    assert err[0].startswith(f"main_lincls.py: error: --pretrained {folder / 'c.pth.tar'}: "), err
    assert re.search(message, err[0]), err


class Harmless:
    pass


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


CODE = {
    "numpy number": (lambda: np.float64(3), "numpy"),
    "class": (Harmless, "Harmless"),
    "call": (Executed, "mkdir"),
    "whole model": (lambda: torch.nn.Linear(2, 2), "Linear"),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("make, name", CODE.values(), ids=CODE)
def test_load__names_the_type_that_it_refuses(tmp_path, monkeypatch, make, name, old_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 3, "args": make()}, "c.pth.tar", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=rf"--pretrained c.pth.tar: .*{name}") as error:
        checkpoint.read("c.pth.tar", "--pretrained")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("method, prefixes", [
    ("insdis", ["encoder.module."]), ("insdis", ["module."]),
    ("cmc", ["encoder.module.l_to_ab.", "encoder.module.ab_to_l."]), ("cmc", ["module.l_to_ab.", "module.ab_to_l."]),
])  # fmt: skip
def test_build_trunk__of_cmcs_releases(tmp_path, method, prefixes, old_format):
    """Under `model`, with the flags of the run as a Namespace."""
    torch.manual_seed(3)
    flags = ["--arch", "resnet18v1" if method == "cmc" else "resnet18", "--size", "64"]
    paths = ["--method", method, "--pretrained", str(tmp_path / "c.pth"), *PROBE]
    flags += ["--space", "YCbCr"] if method == "cmc" else ["--output-stride", "0"]
    trained = main_lincls.get_args([*paths, *flags])
    wanted = METHODS[method].frozen(trained).trunk.state_dict()
    state = {}
    for prefix in prefixes:
        branch = prefix.rstrip(".").rpartition(".")[2] + "." if method == "cmc" else ""
        state |= {prefix + n.removeprefix(branch): v for n, v in wanted.items() if n.startswith(branch)}
    state |= {f"{prefix}fc.weight": torch.randn(128, 256) for prefix in prefixes}
    content = {"opt": argparse.Namespace(lr=0.03, n=[1]), "model": state, "epoch": 240, "optimizer": {}}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not old_format)
    loaded = opened(*paths, *flags)[0].trunk.state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(v, wanted[n]) for n, v in loaded.items())


def test_build_trunk__of_cmcs_alexnet(tmp_path):
    """The layers after the convolutions, fc6 to fc8, are left out."""
    torch.manual_seed(3)
    state = {}
    for branch, channels in (("l_to_ab", 1), ("ab_to_l", 2)):
        before = (channels, 48, 128, 192, 192)
        for i, (c, d, k) in enumerate(zip(before, (48, 128, 192, 192, 128), (11, 5, 3, 3, 3), strict=True), 1):
            state[f"{branch}.conv_block_{i}.0.weight"] = torch.randn(d, c, k, k)
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"{branch}.conv_block_{i}.1.{name}"] = torch.rand(d)
            state[f"{branch}.conv_block_{i}.1.num_batches_tracked"] = torch.tensor(9)
        for i, (c, d) in enumerate([(4608, 8), (8, 8), (8, 128)], 6):
            state |= {f"{branch}.fc{i}.0.weight": torch.randn(d, c), f"{branch}.fc{i}.1.running_mean": torch.rand(d)}
    torch.save({"model": {f"encoder.module.{name}": value for name, value in state.items()}}, tmp_path / "c.pth")
    flags = ["--method", "cmc", "--pretrained", str(tmp_path / "c.pth"), *PROBE, "--arch", "alexnet", "--size", "224"]
    loaded = opened(*flags, "--space", "Lab")[0].trunk.state_dict()
    assert loaded.keys() == {name for name in state if ".fc" not in name}
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    with pytest.raises(ValueError, match="--space: .*c.pth does not contain it; pass the value of its training"):
        opened(*flags)


def test_build_trunk__of_our_own_checkpoint_has_its_colour_space(tmp_path):
    args = method_args("cmc", "--space", "HSV")
    method = method_of(args)
    torch.save({"arch": args.arch, "flags": vars(args), "state_dict": checkpoint.prefixed(method)}, tmp_path / "c.pth")
    paths = ["--method", "cmc", "--pretrained", str(tmp_path / "c.pth"), *PROBE, "--size", "64"]
    frozen, probe = opened(*paths)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    wanted = frozen.trunk.features(color_views(x, "HSV"), (6,))[6]
    assert probe.space == "HSV" and torch.equal(frozen.features(x, "fp32")[6], wanted)
    with pytest.raises(ValueError, match="--space YIQ: .*c.pth was trained with HSV; leave it out"):
        opened(*paths, "--space", "YIQ")


def test_get_args__each_foreign_file_has_its_own_probe():
    for path, folder in (("w/a.pth.tar", "w/linear-a"), ("w/b.pth", "w/linear-b"), ("r/checkpoint_0011.pth.tar", "r/linear")):
        args = main_lincls.get_args(["--pretrained", path, "--train-shards", "x", "--val-shards", "x"])
        assert args.output_dir == folder


@pytest.mark.parametrize("old_format", [False, True])
def test_load__a_file_cut_anywhere_is_an_error(tmp_path, old_format):
    path = tmp_path / "c.pth.tar"
    torch.save({"epoch": 3, "state_dict": {"w": torch.randn(50)}}, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"--resume {path}: ") as error:
            checkpoint.read(path, "--resume")
        assert "\n" not in str(error.value), size


def test_load__noise_is_an_error(tmp_path):
    path, rng = tmp_path / "c.pth.tar", np.random.default_rng(2)
    texts = [b"<!DOCTYPE html>", b"{}", b"\x80\x02}q\x00.", b"\x1f\x8b", b"checkpoint\n" * 9, bytes(4096), b"(lp0\n"]
    for content in [*texts, *(rng.integers(0, 256, n, dtype=np.uint8).tobytes() for n in range(1, 300))]:
        path.write_bytes(content)
        try:
            assert isinstance(checkpoint.read(path, "--resume"), dict)
        except ValueError as error:
            assert str(error).startswith(f"--resume {path}: ") and "\n" not in str(error), content


def test_weights_hash__sees_every_number_and_name():
    model = timm.create_model("tiny_resnet", num_classes=0)
    seen = {checkpoint.weights_hash(model)}
    model.bn1.running_mean[3] += 1e-6  # BatchNorm statistics
    seen.add(checkpoint.weights_hash(model))
    model.layer4[0].bn2.num_batches_tracked += 1
    seen.add(checkpoint.weights_hash(model))
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = 0.0
    seen.add(checkpoint.weights_hash(model))
    assert len(seen) == 4 and checkpoint.weights_hash(model) in seen
