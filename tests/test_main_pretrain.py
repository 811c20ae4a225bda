"""main_pretrain.py as a user sees it: the files of a run, exact resuming, and messages for bad input."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, tiny
from runs import TWO, Run, metrics, same, without_clock

import main_pretrain
from methods import METHODS
from utils.run import checkpoint

ROOT = Path(__file__).parent.parent
COMMON = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "2"]
FLAGS = [*TINY, *COMMON]


def run(images, out, *flags, method="moco"):
    main_pretrain.main([*tiny(method), "--shards", f"{images}/train", "--output-dir", str(out), *COMMON, *map(str, flags)])
    return checkpoint.read(out / checkpoint.LATEST, "--resume")


def weights(saved):
    return {k: saved[k] for k in ("epoch", "state_dict", "optimizer", "scaler")}


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """method -> the folder and the last checkpoint of a run of two epochs that saved every two steps and every epoch."""

    @functools.cache
    def train(method):
        folder = tmp_path_factory.mktemp(method)
        flags = ["--epochs", 2, "--save-freq", 1, "--save-steps", 2, "--keep", 9, "--print-freq", 1]
        return folder, run(images, folder, *flags, method=method)

    return train


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    """method -> the folder and the checkpoint of a run of one epoch that saved every two steps."""

    @functools.cache
    def train(method):
        folder = tmp_path_factory.mktemp(method)
        return folder, run(images, folder, "--epochs", 1, "--save-steps", 2, method=method)

    return train


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__what_a_run_writes(images, tmp_path, method, capsys):
    saved = run(images, tmp_path, "--epochs", 2, "--save-freq", 1, "--lr", 0.32, method=method)
    out = capsys.readouterr().out
    assert "learning rate 0.32 x 8 / 256 = 0.01" in out
    guess = math.log(1 + 24) + 24 * math.log(1 + 1 / 24)
    known = {
        "moco": [math.log(1 + 32)] * 2,
        "mosrep": (math.log(8 + 32), 2 * math.log(8 + 32)),  # the query's loss, and that of tiles which count with their weight
        "cmc": [2 * guess] * 2,
        "insdis": [guess] * 2,
        "w2ssl": [math.log(2) + 2 * math.log(4 * 8 - 1) * 0.3 / 0.07] * 2,
    }
    if method in known:
        (low, high), chance = known[method], float(re.search(r"\(chance ([0-9.]+)\)", out)[1])
        assert low - 1e-3 < chance < high + 1e-3
    assert f"{tmp_path}/" in out and f"bash linear_{method}.sh" in out

    names = {p.name for p in tmp_path.iterdir()}
    assert {"checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", "checkpoint_latest.pth.tar", "config.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["epoch"], m["step"]) for m in lines] == [(0, 1), (0, 3), (0, 4), (1, 1), (1, 3), (1, 4)]
    assert {"loss", "lr", "images_per_s", "data_wait", *(["top1"] if method in known else [])} <= lines[0].keys()
    if method != "w2ssl":  # its rate changes at every step
        second = 0.1 if method in ("cmc", "insdis") else 0.5 * (1 + math.cos(math.pi / 2))  # --lr-steps 1, or half a cosine
        assert [m["lr"] for m in lines] == pytest.approx([0.01] * 3 + [0.01 * second] * 3)
    config = json.loads((tmp_path / "config.json").read_text())
    dim = "nce_dim" if method in ("cmc", "insdis") else "moco_dim"
    assert config["flags"][dim if method in known else "batch_size"] == (16 if method in known else 8)
    assert len(config["index"]) == 64
    assert torch.__version__.startswith(config["versions"]["torch"])

    assert (saved["epoch"], saved["method"]) == (2, method)
    assert saved["arch"] == ("tiny_resnetv0" if method == "cmc" else "tiny_resnet")
    assert all(name.startswith("module.") for name in saved["state_dict"])
    if method in ("moco", "mosrep"):
        assert saved["state_dict"]["module.queue"].shape == (16, 32)
        assert saved["state_dict"]["module.queue_ptr"].tolist() == [2 * 40 % 32]


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__resumed_run_is_the_unbroken_run(images, tmp_path, unbroken, method):
    """From the folder's only checkpoint, with any name."""
    folder, whole = unbroken(method)
    shutil.copy(folder / "checkpoint_0000.pth.tar", tmp_path / checkpoint.LATEST)
    torch.manual_seed(12345)  # the global random state decides nothing
    assert same(weights(run(images, tmp_path, "--epochs", 2, "--resume", "auto", method=method)), weights(whole))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_main_pretrain__resume_from_a_numbered_checkpoint_elsewhere(images, tmp_path, unbroken, method):
    """--resume PATH into another folder gives the weights of the unbroken run, with and without workers."""
    folder, whole = unbroken(method)
    path = folder / "checkpoint_0000.pth.tar"
    assert torch.load(path, weights_only=True)["epoch"] == 1
    torch.manual_seed(4321)
    flags = ["--epochs", 2, "--save-freq", 1, "--print-freq", 1, "--resume", path, "--workers", 2]
    again = run(images, tmp_path, *flags, method=method)
    for name in ("state_dict", "optimizer"):
        old, new = (torch.utils._pytree.tree_flatten_with_path(x[name])[0] for x in (whole, again))
        assert len(old) == len(new)
        for (place, a), (_, b) in zip(old, new, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, place
    assert [(m["epoch"], m["step"]) for m in metrics(tmp_path)] == [(1, step) for step in range(5)]
    losses = [[m["loss"] for m in metrics(x) if m["epoch"] == 1] for x in (folder, tmp_path)]
    assert losses[0] == losses[1]


def test_main_pretrain__workers_and_global_random_state_change_nothing(images, tmp_path, one_epoch):
    one = one_epoch("moco")[1]
    torch.manual_seed(999)
    two = run(images, tmp_path / "b", "--epochs", 1, "--workers", 2)
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(run(images, tmp_path / "c", "--epochs", 1, "--seed", 1)))


def test_main_pretrain__without_labels(images, tmp_path):
    assert run(images, tmp_path, "--epochs", 1, "--shards", f"{images}/plain")["epoch"] == 1


def test_main_pretrain__queue_larger_than_the_data_warns(images, tmp_path, capsys):
    run(images, tmp_path, "--epochs", 1, "--moco-k", 64)
    assert "warning: --moco-k 64 is larger than the data set (40 images)" in capsys.readouterr().out


def fails(capsys, *argv):
    """The one line that the command leaves on stderr, having changed nothing."""
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "indexing" not in line]
    assert stop.value.code == 2 and len(err) == 1 and err[0].startswith("main_pretrain.py: error: ")
    return err[0]


BAD = {
    "missing shards": (["--shards", "/nowhere/train"], "--shards /nowhere/train: "),
    "empty pattern": (["--shards", "/nowhere/train-{0000..0003}.tar"], "--shards /nowhere/train-{0000..0003}.tar: "),
    "unknown arch": (["--arch", "resnet5O"], "--arch resnet5O: .*resnet50"),
    "no feature map": (["--arch", "vit_tiny_patch16_224", "--size", "224"], "--arch vit_tiny_patch16_224: .*feature map"),
    "queue and batch": (["--moco-k", "30"], "--moco-k 30: .*pass 24 or 32"),
    "small queue": (["--moco-k", "5"], "--moco-k 5: .*pass 8"),
    "small views": (["--size", "16"], "--size 16: .*stride of 32"),
    "batch and groups": (["--bn-splits", "3"], "--batch-size 8: .*pass 6"),
    "large batch": (["--batch-size", "64", "--moco-k", "64"], "--batch-size 64: larger than the data set of 40"),
    "lanes": (["--lanes", "3"], "--lanes 3: must divide --batch-size 8"),
    "zero epochs": (["--epochs", "0"], "--epochs 0: must be above 0"),
    "other device": (["--amp", "fp16"], "--amp fp16: .*--amp auto"),
    "missing checkpoint": (["--resume", "/nowhere/c.pth.tar"], "--resume /nowhere/c.pth.tar: no such file"),
    "output below a file": (["--output-dir", "/proc/version/run"], "--output-dir /proc/version/run: "),
    "abbreviation": (["--epoch", "1"], "--epoch: no such flag; did you mean --epochs?"),
    "flag of another method": (["--shift-range", "3"], "--shift-range: no such flag here; --method mosrep has it"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_main_pretrain__bad_input_is_one_line(images, tmp_path, capsys, flags, message):
    line = fails(capsys, "--method", "moco", "--shards", images / "train", "--output-dir", tmp_path / "run", *FLAGS, *flags)
    assert re.search(message, line), line
    assert not list(tmp_path.glob("run/*"))


def test_main_pretrain__mosaic_takes_four_images(images, tmp_path, capsys):
    line = fails(capsys, "--shards", images / "train", "--output-dir", tmp_path, *FLAGS, "--shift-range", 9, "--bn-splits", 4)
    assert "--batch-size 8: leaves 2 images" in line and "pass 16" in line


@pytest.mark.parametrize("method, workers", [*((method, 0) for method in METHODS), ("mosrep", 2)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_main_pretrain__continues_in_the_middle_of_an_epoch(images, tmp_path, unbroken, workers, method):
    """From every step that was saved: the weights of the unbroken run, and the rest of its log."""
    folder, whole = unbroken(method)
    lines = metrics(folder)
    names = {p.name for p in folder.glob("checkpoint*")}
    inside = {"checkpoint_0000_000002.pth.tar", "checkpoint_0000_000004.pth.tar", "checkpoint_0001_000001.pth.tar",
              "checkpoint_0001_000003.pth.tar"}  # fmt: skip
    assert names == inside | {"checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", checkpoint.LATEST}
    for name in inside:
        torch.manual_seed(99)
        out = tmp_path / name.partition(".")[0]
        flags = ["--resume", folder / name, "--workers", workers, "--print-freq", 1]
        part = run(images, out, "--epochs", 2, *flags, method=method)
        assert same(weights(part), weights(whole))
        start = tuple(map(int, re.findall(r"_(\d+)", name)))
        assert without_clock(metrics(out)) == without_clock(x for x in lines if (x["epoch"], x["step"]) >= start)


@pytest.mark.parametrize("flag, value", [("--batch-size", 4), ("--lanes", 4), ("--seed", 5)])
def test_main_pretrain__inside_an_epoch_the_order_must_stay(images, tmp_path, capsys, one_epoch, flag, value):
    folder = one_epoch("moco")[0]
    before = {"--batch-size": 8, "--lanes": None, "--seed": 0}[flag]
    inside = ["--resume", folder / "checkpoint_0000_000002.pth.tar"]
    argv = ["--method", "moco", "--shards", images / "train", *FLAGS, "--output-dir", tmp_path / "b", flag, value]
    capsys.readouterr()
    assert f"error: {flag} {value}: was {before} in " in fails(capsys, *argv, *inside)
    end = ["--resume", folder / "checkpoint_0000.pth.tar"]
    assert run(images, tmp_path / "c", *end, "--epochs", 2, flag, value)["epoch"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__photometric_changes_no_result(images, tmp_path, one_epoch, method):
    """The same holds for every flag of where and how to run. The other run has the defaults: auto, and 0.01."""
    for where, share in (("worker", 0.5), ("device", 0)):
        other = run(images, tmp_path / where, "--epochs", 1, "--photometric", where, "--max-bad", share, method=method)
        assert same(weights(other), weights(one_epoch(method)[1]))


def test_main_pretrain__a_run_is_not_overwritten_by_another(images, tmp_path, capsys, one_epoch):
    shutil.copytree(one_epoch("moco")[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    again = ["--shards", images / "train", "--output-dir", tmp_path, *FLAGS]
    assert "holds a run already" in fails(capsys, "--method", "moco", *again)
    resume = ["--resume", "auto", "--epochs", 2]
    other = fails(capsys, "--method", "mosrep", *again, *resume, "--shift-range", 9)
    assert "is a run with --method moco, not mosrep" in other
    assert "with --arch tiny_resnet, not resnet18" in fails(capsys, "--method", "moco", *again, *resume, "--arch", "resnet18")
    assert "--moco-k 32" in fails(capsys, "--method", "moco", *again, *resume, "--moco-k", 64)
    assert (tmp_path / checkpoint.LATEST).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 and no more"])
def test_main_pretrain__foreign_checkpoint_is_one_line(images, tmp_path, capsys, content):
    path = tmp_path / "foreign.pth.tar"
    path.write_bytes(content)
    paths = ["--shards", images / "train", "--output-dir", tmp_path / "o", "--resume", path]
    line = fails(capsys, "--method", "moco", *FLAGS, *paths)
    assert f"--resume {path}: " in line


@pytest.mark.parametrize("method, flags, message", [
    ("insdis", ["--nce-k", "12"], "--nce-k 12: was --nce-k 24 in .*, and its 1 epochs are done; pass that, or another"),
    ("moco", ["--unmix-prob", "0.5"], "--unmix-prob 0.5: was no --unmix-prob in .* 1 epochs are done"),
    ("cmc", ["--epochs", "2", "--space", "HSV"], "--space HSV: .* was trained with --space Lab; pass that, or another"),
    ("insdis", ["--lr-steps"], "--lr-steps: was --lr-steps 1 in .* 1 epochs are done"),
    ("insdis", ["--epochs", "2", "--nce-dim", "8"], "--resume .* names or shapes, those of .*--nce-dim 16.*; pass that"),
])  # fmt: skip
def test_main_pretrain__resume_refuses_what_would_be_another_run(images, tmp_path, capsys, one_epoch, method, flags, message):
    """Otherwise the complete epochs would look like epochs with these flags."""
    shutil.copytree(one_epoch(method)[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="2"):
        run(images, tmp_path, "--epochs", "1", "--resume", "auto", *flags, method=method)
    assert re.search(f"error: {message}", capsys.readouterr().err)


def test_main_pretrain__a_bank_is_of_its_images(images, tmp_path, capsys, one_epoch):
    """Row i is of image i: other shards, of as many images too, would be contrasted with features of other images."""
    shutil.copytree(one_epoch("insdis")[0], tmp_path, dirs_exist_ok=True)
    run(images, tmp_path, "--epochs", "1", "--amp", "bf16", "--resume", "auto", method="insdis")  # no error: nothing is left
    (tmp_path / "other").mkdir()
    for i, shard in enumerate(sorted((images / "train").glob("*.tar"), reverse=True)):
        (tmp_path / f"other/{i}.tar").symlink_to(shard)
    with pytest.raises(SystemExit, match="2"):
        run(images, tmp_path, "--epochs", "2", "--resume", "auto", "--shards", tmp_path / "other", method="insdis")
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: --shards {tmp_path / 'other'}: {tmp_path}/checkpoint" in line and "holds features of other images" in line
    with pytest.raises(SystemExit, match="2"):
        run(images, tmp_path, "--epochs", "1", "--resume", "auto", "--shards", tmp_path / "other", method="insdis")
    assert "was trained on other images, and its epochs are done; pass these images" in capsys.readouterr().err


def test_main_pretrain__not_finite_loss_stops(images, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(images, tmp_path, "--epochs", 3, "--lr", 1e30)
    assert re.fullmatch(
        "main_pretrain.py: error: the loss or its gradient is not finite in epoch 0, step 1; try a lower --lr .*--replay .*",
        capsys.readouterr().err.splitlines()[-1],
    )


def test_main_pretrain__underscores_are_dashes():
    args = main_pretrain.get_args(["--method", "moco", "--shards", "x", "--moco_k", "64", "--batch_size=32"])
    assert (args.moco_k, args.batch_size) == (64, 32)


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "9", "--moco-k", "36"], "--batch-size 9: must divide evenly over 2 processes"),
    (["--shards", "/nowhere"], "--shards /nowhere: "),
    (["--lr", "1e30", "--epochs", "3"], "main_pretrain.py: error: the loss or its gradient is not finite in epoch 0, step "),
])  # fmt: skip
def test_main_pretrain__failure_on_two_processes_exits_non_zero(images, tmp_path, flags, message):
    command = ["pretrain", *tiny("moco"), *COMMON, "--shards", images / "train", "--output-dir", tmp_path / "run", *flags]
    with Run(tmp_path, command, TWO) as run:
        assert run.end() == 2 and message in run.said(), run.said()
    assert not (tmp_path / "run" / checkpoint.LATEST).exists()
