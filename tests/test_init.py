"""--init: the first step of a run that starts from weights equals that of a method which was given them by hand."""

import json
import re

import pytest
import timm
import torch
from helpers import build, forward, method_args, spawn, tiny, uint8_batch
from test_weights_in import LAYOUTS, filled

import main_pretrain
from cmc.nets import Branches
from utils.learning.method import Step
from utils.run import checkpoint, dist

TRUNKS = {"moco": ["encoder_q.", "encoder_k."], "mosrep": ["encoder_q.", "encoder_k."],
          "w2ssl": ["base_encoder.", "momentum_encoder."], "insdis": ["encoder."], "cmc": ["encoder."]}  # fmt: skip
COMMON = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "1", "--epochs", "1"]


@pytest.fixture(scope="module")
def resnets():
    return [filled(timm.create_model("tiny_resnet", num_classes=3), seed) for seed in (1, 2)]


def started(path, name, *flags):
    """A method after --init, and what the log says."""
    args = method_args(name, "--init", str(path), *flags)
    method = main_pretrain.build(args, 40, torch.device("cpu"))
    record = main_pretrain.initialize(args, method)
    return method, args, record


def first_loss(method, args):
    return forward(method.train(), uint8_batch(args), Step(0, 10, args.seed))[0].item()


@pytest.mark.parametrize("title", LAYOUTS)
def test_init__from_each_layout_the_trunks_are_those_of_the_file(resnets, tmp_path, title):
    torch.save(LAYOUTS[title](*resnets), tmp_path / "c.pth")
    name = "moco" if title.startswith(("MoCo-v1", "MoCo-v2")) else "insdis" if "InsDis" in title else "mosrep"
    method, args, record = started(tmp_path / "c.pth", name)
    by_hand = main_pretrain.build(method_args(name), 40, torch.device("cpu"))
    own, same = by_hand.state_dict(), title.startswith(("MoCo-v1", "MoCo-v2", "MosRep"))
    trunks = resnets if same else resnets[:1] * 2  # of the same method: the key encoder is that of the file
    for start, trunk in zip(TRUNKS[name], trunks, strict=False):
        own |= {f"{start}{n}": v for n, v in trunk.state_dict().items() if not n.startswith("fc.")}
    by_hand.load_state_dict(own)
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), by_hand.state_dict().values(), strict=True))
    assert first_loss(method, args) == first_loss(by_hand, args)
    assert record["layout"] == title.strip() and len(record["sha256"]) == 64


@pytest.mark.parametrize("name", TRUNKS)
def test_init__from_the_same_method(tmp_path, capsys, name):
    """All weights are those of the file, except banks, which belong to the images of a data set."""
    other = build(name, seed=5)
    torch.save({"method": name, "state_dict": checkpoint.prefixed(other)}, tmp_path / "c.pth")
    method, _, _ = started(tmp_path / "c.pth", name, "--seed", "3")
    said, old = capsys.readouterr().out, other.state_dict()
    for key, value in method.state_dict().items():
        fresh = key.startswith(("banks.", "criteria.", "criterion."))
        assert fresh or torch.equal(value, old[key]), key
        assert not key.endswith(".memory") or not torch.equal(value, old[key])
    heads = {"moco": "fc, queue", "mosrep": "projector, queue", "w2ssl": "fc_crop, fc_loc, predictor", "insdis": "fc",
             "cmc": "encoder"}[name]  # fmt: skip
    heads = heads if name != "cmc" else re.search(r"trunk \(1 x\), ([^;]*);", said)[1]
    fresh = "banks, criteria, optimizer" if name in ("cmc", "insdis") else "optimizer"
    assert f"loaded: trunk ({len(TRUNKS[name])} x), {heads}; fresh: " in said and f"{fresh}\n" in said, said


@pytest.mark.parametrize("source, name", [("moco", "mosrep"), ("mosrep", "moco"), ("w2ssl", "insdis"), ("insdis", "w2ssl")])
def test_init__from_another_method_takes_the_trunk_alone(tmp_path, capsys, source, name):
    other = build(source, seed=5)
    torch.save({"method": source, "state_dict": checkpoint.prefixed(other)}, tmp_path / "c.pth")
    method, args, _ = started(tmp_path / "c.pth", name)
    fresh, old = main_pretrain.build(args, 40, torch.device("cpu")).state_dict(), other.state_dict()
    names = timm.create_model("tiny_resnet", num_classes=0).state_dict()
    for key, value in method.state_dict().items():
        of_trunk = next((key.removeprefix(s) for s in TRUNKS[name] if key.removeprefix(s) in names and key.startswith(s)), None)
        assert torch.equal(value, old[TRUNKS[source][0] + of_trunk] if of_trunk else fresh[key]), key
    assert f"loaded: trunk ({len(TRUNKS[name])} x); fresh: " in capsys.readouterr().out


def test_init__a_head_or_queue_of_another_shape_starts_fresh(tmp_path, capsys):
    torch.save({"state_dict": checkpoint.prefixed(build("moco", seed=5))}, tmp_path / "c.pth")
    started(tmp_path / "c.pth", "moco", "--moco-k", "64")
    assert "loaded: trunk (2 x), fc; fresh: queue, optimizer" in capsys.readouterr().out
    started(tmp_path / "c.pth", "moco", "--moco-dim", "24")
    assert "loaded: trunk (2 x); fresh: fc, queue, optimizer" in capsys.readouterr().out


def test_init__from_cmcs_release_both_branches(tmp_path):
    torch.manual_seed(8)
    branches = filled(Branches("resnet18v1", {"l_to_ab": 1, "ab_to_l": 2}, 16), 3)
    torch.save({"model": {f"encoder.module.{n}": v for n, v in branches.state_dict().items()}}, tmp_path / "c.pth")
    method, _, _ = started(tmp_path / "c.pth", "cmc", "--arch", "resnet18v1")
    assert all(torch.equal(v, method.state_dict()[f"encoder.{n}"]) for n, v in branches.state_dict().items())
    with pytest.raises(ValueError, match="its trunk is resnet18v1, not resnet50v1; pass --arch resnet18v1"):
        started(tmp_path / "c.pth", "cmc", "--arch", "resnet50v1")
    with pytest.raises(ValueError, match="--init .*c.pth: its trunk is resnet18v1, not tiny_resnet"):
        started(tmp_path / "c.pth", "moco")


def test_init__from_another_colour_space_is_refused(tmp_path, capsys):
    saved = {"method": "cmc", "state_dict": checkpoint.prefixed(build("cmc", seed=5)), "flags": {"space": "YCbCr"}}
    torch.save(saved, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="^--space Lab: .*c.pth of --init was trained with YCbCr; pass --space YCbCr$"):
        started(tmp_path / "c.pth", "cmc")
    started(tmp_path / "c.pth", "cmc", "--space", "YCbCr")
    assert "warning" not in capsys.readouterr().out
    torch.save(saved | {"flags": {}}, tmp_path / "c.pth")
    started(tmp_path / "c.pth", "cmc")
    assert "c.pth does not contain --space; its trunk is taken as one of --space Lab\n" in capsys.readouterr().out


def run(images, out, *flags):
    main_pretrain.main([*tiny("moco"), *COMMON, "--shards", f"{images}/train", "--output-dir", str(out), *map(str, flags)])
    return checkpoint.read(out / checkpoint.LATEST, "--resume")


def test_init__record_and_resume(images, tmp_path, resnets, capsys):
    """A run keeps the record of its start; when it is resumed, another --init is refused and the same one does nothing."""
    torch.save(LAYOUTS["MoCo-v2"](*resnets), tmp_path / "c.pth")
    out, init = tmp_path / "run", ["--init", tmp_path / "c.pth"]
    saved = run(images, out, *init)
    record = saved["init"]
    assert record["source"] == record["path"] == str(tmp_path / "c.pth") and record["layout"] == "MoCo-v2"
    assert json.loads((out / "config.json").read_text())["init"] == record
    (tmp_path / "c.pth").unlink()  # a resumed run does not read it
    longer = ["--epochs", "2", "--resume", "auto"]
    assert run(images, out, *init, *longer)["init"] == record
    assert run(images, out, "--epochs", "3", "--resume", "auto")["init"] == record
    lines = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    assert [line["init"] for line in lines] == [record] * 3
    plain = tmp_path / "plain"
    assert "init" not in run(images, plain)
    for folder, words in ((out, f"started from --init {tmp_path}/c.pth"), (plain, "started from random weights")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run(images, folder, "--init", "other.pth", *longer)
        assert f"error: --init other.pth: {folder}/checkpoint" in (err := capsys.readouterr().err) and words in err


def in_each_process(path):
    method, _, record = started(path, "moco")
    return checkpoint.weights_hash(method), record, dist.rank()


def test_init__all_processes_receive_what_the_first_has_read(tmp_path, resnets):
    torch.save(LAYOUTS["MosRep"](*resnets), tmp_path / "c.pth")
    (one, record, _), (two, other, rank) = spawn(in_each_process, tmp_path / "c.pth")
    assert rank == 1 and one == two == checkpoint.weights_hash(started(tmp_path / "c.pth", "moco")[0]) and record == other
