"""main_pretrain.py: the content of a checkpoint, several processes, corrupt data, and whether suggested fixes work."""

import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import build, file_hash, in_two, opened, spawn, tiny
from PIL import Image
from runs import TWO, Run

import main_lincls
import main_pretrain
from methods import METHODS
from utils.learning import amp
from utils.run import checkpoint, dist

ROOT = Path(__file__).parent.parent
COMMON = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "1"]


def flags_of(method):
    return [*tiny(method), *COMMON]


def run(images, out, *flags, method="moco"):
    main_pretrain.main(
        [*flags_of(method), "--shards", f"{images}/train", "--epochs", "1", "--output-dir", str(out), *map(str, flags)]
    )
    return torch.load(Path(out) / checkpoint.LATEST, weights_only=True)


def fails(capsys, *argv, main=main_pretrain):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code not in (0, None) and err.count("\n") == 1 and " error: " in err and "Traceback" not in err
    return err


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    """method -> the folder and the checkpoint of a run of one epoch."""

    @functools.cache
    def train(method):
        folder = tmp_path_factory.mktemp(method)
        return folder, run(images, folder, method=method)

    return train


def copied(folder, there):
    return shutil.copytree(folder, there, dirs_exist_ok=True)


# ---------------------------------------------------------------- the learning rate


def test_main_pretrain__learning_rate_is_scaled_once_in_the_optimizer_too(images, tmp_path, capsys):
    saved = run(images, tmp_path, "--lr", "0.32", "--epochs", "2")
    groups = saved["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.32 * 8 / 256 * 0.5 * (1 + math.cos(math.pi / 2))])  # of epoch 1
    assert all((g["momentum"], g["weight_decay"], g["nesterov"]) == (0.9, 1e-4, False) for g in groups)
    lines = metrics(tmp_path)
    assert [m["lr"] for m in lines[:5]] == pytest.approx([0.01] * 5)
    assert len(re.findall(r"learning rate", capsys.readouterr().out)) == 1


def test_main_pretrain__first_update_is_lr_times_gradient(images, tmp_path, monkeypatch):
    """One step by hand: w - lr (g + wd w), with lr = 0.03 x 40 / 256 and the gradient that backward left."""
    before, grads = {}, {}
    real = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        before.update({i: p.detach().clone() for i, p in enumerate(self.param_groups[0]["params"])})
        grads.update({i: p.grad.clone() for i, p in enumerate(self.param_groups[0]["params"])})
        real(self, *args, **kwargs)
        for i, p in enumerate(self.param_groups[0]["params"]):
            torch.testing.assert_close(p.detach(), before[i] - 0.03 * 40 / 256 * (grads[i] + 1e-4 * before[i]))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(images, tmp_path, "--batch-size", 40, "--moco-k", 40)
    assert len(before) > 10 and any(g.abs().max() > 0 for g in grads.values())


# ---------------------------------------------------------------- the content of a checkpoint


@pytest.fixture
def fp16(monkeypatch):
    """fp16's loss scaler, which works on a CPU too, starting from a scale that fp32 does not overflow with."""
    monkeypatch.setattr(amp, "scaler", lambda _: torch.amp.GradScaler("cpu", init_scale=2.0**20))


def test_main_pretrain__scaler_and_queue_pointer_travel(images, tmp_path, fp16):
    first = run(images, tmp_path, "--epochs", "1")
    assert (first["scaler"]["scale"], first["scaler"]["_growth_tracker"]) == (2.0**20, 5)
    assert first["state_dict"]["module.queue_ptr"].tolist() == [40 % 32]
    second = run(images, tmp_path, "--epochs", "2", "--resume", "auto")
    assert second["scaler"]["_growth_tracker"] == 10
    assert second["state_dict"]["module.queue_ptr"].tolist() == [80 % 32]
    assert second["epoch"] == 2 and second["optimizer"]["state"]


def test_main_pretrain__scaling_changes_no_result(images, tmp_path, fp16, monkeypatch, one_epoch):
    scaled = run(images, tmp_path / "scaled")
    monkeypatch.undo()
    plain = one_epoch("moco")[1]
    assert all(torch.equal(value, plain["state_dict"][name]) for name, value in scaled["state_dict"].items())


def test_main_pretrain__an_overflow_is_skipped_and_counted(images, tmp_path, fp16):
    """The gradient of one step overflows under the scale: the scaler leaves that step out and halves its scale."""

    class Overflows(torch.amp.GradScaler):
        def scale(self, loss):
            steps.append(1)
            return super().scale(loss) * (float("inf") if len(steps) == 2 else 1)

    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "scaler", lambda _: Overflows("cpu", init_scale=2.0**20))
        saved = run(images, tmp_path)
    assert [m["skipped"] for m in metrics(tmp_path)] == [0, 1, 0, 0, 0]
    assert saved["scaler"]["scale"] == 2.0**19 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_main_pretrain__resume_auto_in_an_empty_folder_starts(images, tmp_path):
    assert run(images, tmp_path / "new", "--resume", "auto")["epoch"] == 1


def test_main_pretrain__a_finished_run_resumed_is_left_as_it_is(images, tmp_path, one_epoch):
    copied(one_epoch("moco")[0], tmp_path)
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    run(images, tmp_path, "--resume", "auto")
    assert (tmp_path / checkpoint.LATEST).read_bytes() == before


def test_main_pretrain__config_describes_the_run(images, tmp_path):
    run(images, tmp_path, "--seed", "5")
    config = json.loads((tmp_path / "config.json").read_text())
    args = main_pretrain.get_args([*flags_of("moco"), "--shards", "x"])
    assert config["flags"].keys() == vars(args).keys() and config["flags"]["seed"] == 5
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (config["commit"] or "").startswith(head)  # None outside a clone
    index = main_pretrain.load_index_together(f"{images}/train").hash
    assert config["index"] == index and config["versions"].keys() >= {"python", "torch", "torchvision", "timm"}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler itself
@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__compiled_encoders_are_the_same_encoders(images, tmp_path, monkeypatch, one_epoch, method):
    """Names in checkpoints stay, and so does the result, with the compiler's tracing but not its slow code generation."""
    plain, compiled, real = one_epoch(method)[1], [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append(how) or real(self, backend="eager", **how)
    )
    torch.compiler.reset()  # the graphs of other tests count too
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # each size of views has graphs of its own: not too many
        traced = run(images, tmp_path / "compiled", "--compile", method=method)
    encoders = {"mosrep": 4, "moco": 2, "w2ssl": 2, "cmc": 2, "insdis": 1}
    assert compiled == [{"dynamic": False}] * encoders.get(method, len(build(method).encoders()))
    assert traced["state_dict"].keys() == plain["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        assert torch.allclose(traced["state_dict"][name].float(), value.float(), rtol=1e-3, atol=1e-4), name


# ---------------------------------------------------------------- several processes


def train_two(images, out, method, flags):
    main_pretrain.main([*flags_of(method), "--shards", f"{images}/train", "--epochs", "1", "--output-dir", str(out), *flags])


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__two_processes_write_what_one_writes(images, tmp_path, method):
    """One process with two BatchNorm groups is the same run: losses equal, names equal, every line and file once."""
    flags = ["--save-freq", "1", *(["--fill-banks"] if method == "cmc" else ())]
    one = run(images, tmp_path / "one", *in_two(method), *flags, method=method)
    spawn(train_two, images, tmp_path / "two", method, flags)
    two = torch.load(tmp_path / "two" / checkpoint.LATEST, weights_only=True)
    assert two["state_dict"].keys() == one["state_dict"].keys()
    assert all(re.match(r"module\.(?!module\.)", name) for name in two["state_dict"])
    assert (two["epoch"], two["arch"], two["method"]) == (one["epoch"], one["arch"], one["method"])
    if method in ("moco", "mosrep"):
        assert torch.equal(two["state_dict"]["module.queue_ptr"], one["state_dict"]["module.queue_ptr"])
    lines = [metrics(tmp_path / x) for x in ("one", "two")]
    assert [(m["epoch"], m["step"]) for m in lines[1]] == [(0, step) for step in range(5)]
    assert lines[1][0]["loss"] == pytest.approx(lines[0][0]["loss"], rel=1e-5)  # before rounding errors grow
    assert lines[1][0]["lr"] == lines[0][0]["lr"]
    assert len(list((tmp_path / "two").glob("events*"))) == 1 and (tmp_path / "two/checkpoint_0000.pth.tar").is_file()
    opened("--pretrained", tmp_path / "two", "--train-shards", "x", "--val-shards", "x")


# ---------------------------------------------------------------- suggested fixes


@pytest.mark.parametrize("k", [1, 7, 12, 30, 33, 65537])
@pytest.mark.parametrize("method", ["moco", "mosrep"])
def test_check__the_queue_in_the_message_works(method, k):
    args = main_pretrain.get_args([*flags_of(method), "--shards", "x", "--moco-k", str(k)])
    with pytest.raises(ValueError, match=f"--moco-k {k}: ") as error:
        main_pretrain.check(args, 100000)
    offered = re.findall(r"\d+", re.search(r"pass (\d+(?: or \d+)?)$", str(error.value))[1])
    assert offered
    for value in offered:
        args.moco_k = int(value)
        main_pretrain.check(args, 100000)


@pytest.mark.parametrize("method", ["moco", "mosrep"])
@pytest.mark.parametrize("world, splits, batch", [(2, 1, 9), (3, 1, 8), (8, 2, 100), (8, 1, 3), (2, 4, 8)])
def test_check__the_batch_in_the_message_works(monkeypatch, method, world, splits, batch):
    monkeypatch.setattr(dist, "world", lambda: world)
    argv = [*flags_of(method), "--shards", "x", "--bn-splits", str(splits), "--moco-k", "1"]
    args = main_pretrain.get_args([*argv, "--batch-size", str(batch)])
    for attempt in range(3):
        args.moco_k = args.batch_size
        try:
            main_pretrain.check(args, 100000)
        except ValueError as error:
            assert f"--batch-size {args.batch_size}: " in str(error)
            args.batch_size = int(re.search(r"; pass (\d+)$", str(error))[1])
        else:
            assert attempt or (method == "moco" and not batch % (world * splits))
            break
    else:
        pytest.fail("the batch sizes in the messages do not work")


@pytest.mark.parametrize("method, size", [("moco", "48"), ("mosrep", "16"), ("moco", "31")])
def test_main_pretrain__small_views_name_the_size_that_was_given(images, tmp_path, capsys, method, size):
    """Local crops have half of --size: 24 pixels, less than the stride of 32. The message names 48, the flag's value."""
    local = ["--local-crops", "2"] if method == "moco" else ["--shift-range", "3"]
    argv = [*flags_of(method), *local, "--shards", f"{images}/train", "--output-dir", tmp_path / "o", "--size", size]
    err = fails(capsys, *argv)
    assert f"--size {size}: " in err and "32" in err


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("pattern", ["{0}", "{0}/*.tar", "{0}/train-{{0000..0003}}.tar", "{0}/nowhere/*.tar"])
def test_main_pretrain__nothing_there_leaves_nothing(tmp_path, capsys, pattern):
    (tmp_path / "empty").mkdir()
    spec = pattern.format(tmp_path / "empty")
    err = fails(capsys, *flags_of("moco"), "--shards", spec, "--output-dir", tmp_path / "run")
    assert f"--shards {spec}: " in err
    assert [p for p in tmp_path.rglob("*") if not p.is_dir()] == []


@pytest.mark.parametrize("place", ["/proc/version/run", "/proc/run", "/dev/null", "/sys/kernel/run"])
def test_main_pretrain__folder_not_writable(images, capsys, place):
    err = fails(capsys, *flags_of("moco"), "--shards", f"{images}/train", "--output-dir", place)
    assert f"--output-dir {place}: " in err


FOREIGN = {
    "published MoCo": {"epoch": 200, "arch": "tiny_resnet", "state_dict": {}, "optimizer": {}},
    "torchvision": {"conv1.weight": torch.zeros(1)},
    "only names": {"method": "moco", "arch": "tiny_resnet"},
    "empty": {},
    "list": [1, 2],
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_main_pretrain__checkpoint_of_something_else(images, tmp_path, capsys, content):
    torch.save(content, tmp_path / "foreign.pth.tar")
    argv = ["--shards", f"{images}/train", "--output-dir", tmp_path / "o", "--resume", tmp_path / "foreign.pth.tar"]
    assert f"--resume {tmp_path / 'foreign.pth.tar'}: " in fails(capsys, *flags_of("moco"), *argv)
    assert not list(tmp_path.glob("o/*"))


def test_main_pretrain__a_folder_is_no_checkpoint(images, tmp_path, capsys):
    argv = ["--shards", f"{images}/train", "--output-dir", tmp_path / "o", "--resume", tmp_path]
    assert f"--resume {tmp_path}: " in fails(capsys, *flags_of("moco"), *argv)


def test_main_pretrain__resume_by_name_does_not_overwrite_another_run(tmp_path, images, capsys, one_epoch):
    """To resume run a in the folder of run b would overwrite b's checkpoints."""
    for name in "ab":
        copied(one_epoch("moco")[0], tmp_path / name)
    before = (tmp_path / "b" / checkpoint.LATEST).read_bytes()
    argv = ["--shards", f"{images}/train", "--epochs", "2", "--seed", "9", "--resume", tmp_path / "a" / checkpoint.LATEST]
    assert "--output-dir" in fails(capsys, *flags_of("moco"), *argv, "--output-dir", tmp_path / "b")
    assert (tmp_path / "b" / checkpoint.LATEST).read_bytes() == before


# ---------------------------------------------------------------- resuming


def again(images, folder, *flags, capsys=None, **options):
    """Resume the run of a folder; with capsys: the line that refuses it."""
    if capsys is None:
        return run(images, folder, "--resume", "auto", *flags, **options)
    argv = ["--shards", f"{images}/train", "--output-dir", folder, "--resume", "auto", "--epochs", "2", *flags]
    return fails(capsys, *flags_of(options.get("method", "moco")), *argv)


def test_main_pretrain__no_file_of_a_run_has_a_password(images, tmp_path, capsys):
    main_pretrain.load_index_together(f"{images}/train")
    spec = ["--allow-pipe", "--shards", f"pipe:cat {images}/train/train-{{000000..000002}}.tar # token=geheim"]
    run(images, tmp_path, *spec, "--save-steps", "2")
    again(images, tmp_path, *spec[:2], spec[2].replace("000002", "000001"), "--epochs", "2")  # other shards: a warning
    assert not [path for path in tmp_path.iterdir() if b"geheim" in path.read_bytes()]
    assert "geheim" not in "".join(capsys.readouterr())


POWER_CUT = {
    "zeros": bytes(4096), "zeros and a line": bytes(64) + b'{"epoch": 0, "step": 9}\n', "half a line": b'{"epoch": 0, "st',
    "half a line and zeros": b'{"epo' + bytes(999), "no JSON": b"\xff\xfe\n[1]\n3\n",
}  # fmt: skip


@pytest.mark.parametrize("damage", POWER_CUT.values(), ids=POWER_CUT)
def test_main_pretrain__lines_that_a_power_cut_left_do_not_end_a_resume(images, tmp_path, one_epoch, damage):
    copied(one_epoch("moco")[0], tmp_path)
    before = metrics(tmp_path)
    record = {"shard": "a.tar", "key": "x", "error": "why"}
    (tmp_path / "bad_samples.jsonl").write_text(json.dumps(record) + "\n")
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(damage)
    again(images, tmp_path, "--epochs", "2")
    lines = [line for line in metrics(tmp_path) if line["step"] != 9]
    assert lines[:5] == before and [(m["epoch"], m["step"]) for m in lines[5:]] == [(1, step) for step in range(5)]
    assert json.loads((tmp_path / "bad_samples.jsonl").read_bytes().splitlines()[0]) == record


def test_main_pretrain__every_start_is_recorded_and_one_that_does_nothing_leaves_the_configuration(images, tmp_path, one_epoch):
    copied(one_epoch("moco")[0], tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    again(images, tmp_path, "--workers", "1")  # its epochs are done
    assert (tmp_path / "config.json").read_bytes() == before
    again(images, tmp_path, "--epochs", "2", "--lr", "0.2")
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["lr"] == 0.2
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["step"], x["flags"]["workers"], x["flags"]["lr"]) for x in starts] == [
        (0, 0, 0, 0.03), (1, 0, 1, 0.03), (1, 0, 0, 0.2)
    ]  # fmt: skip
    assert [x["resumed"] for x in starts] == [None, *[str(tmp_path / "checkpoint_0000.pth.tar")] * 2]
    assert all(x.keys() >= {"time", "versions", "commit", "processes", "index", "samples"} for x in starts)


ABSURD = {
    "flags": None, "epoch": "one", "step": -1, "optimizer": {}, "state_dict": {3: 4}, "scaler": None, "index": 7,
    "method": ["moco"],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [*ABSURD.items(), ("step", 99), ("optimizer", "gone")])
def test_main_pretrain__a_checkpoint_with_absurd_contents_is_one_line(images, tmp_path, capsys, one_epoch, name, value):
    saved = dict(one_epoch("moco")[1]) | {name: value}
    if value == "gone":
        del saved[name]
    path = tmp_path / checkpoint.LATEST
    torch.save(saved, path)
    line = again(images, tmp_path, capsys=capsys)
    assert f"error: --resume {path}: " in line and "pass " in line and len(line) < 400
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.LATEST}


@pytest.mark.parametrize("value", [None, 3, {"arch": 7}])
def test_main_lincls__a_checkpoint_with_absurd_flags_is_probed_as_one_without(tmp_path, one_epoch, value):
    torch.save(dict(one_epoch("moco")[1]) | {"flags": value}, tmp_path / "c.pth.tar")
    opened("--pretrained", tmp_path / "c.pth.tar", "--arch", "tiny_resnet", "--train-shards", "x", "--val-shards", "x")


@pytest.mark.parametrize("flag, value, before", [
    ("weight_decay", 0.5, []), ("momentum", 0.25, []), ("trust", 0.5, ["--trust", "0.001"]),
])  # fmt: skip
def test_main_pretrain__settings_of_the_optimizer_change_on_resume(images, tmp_path, capsys, flag, value, before):
    """They are announced, in config.json, and act: the update is another one."""
    run(images, tmp_path / "a", *before)
    copied(tmp_path / "a", tmp_path / "b")
    new = [f"--{flag.replace('_', '-')}", str(value)]
    changed = again(images, tmp_path / "a", "--epochs", "2", *before, *new)
    assert f"warning: {new[0]} was " in capsys.readouterr().out
    plain = again(images, tmp_path / "b", "--epochs", "2", *before)
    assert changed["optimizer"]["param_groups"][0][flag] == value != plain["optimizer"]["param_groups"][0][flag]
    name = next(name for name in changed["state_dict"] if name.startswith("module.encoder_q.") and name.endswith("weight"))
    assert not torch.equal(changed["state_dict"][name], plain["state_dict"][name])


@pytest.mark.parametrize("before, after", [("0", "0.001"), ("0.001", "0")])
def test_main_pretrain__a_trust_of_none_is_another_optimizer(images, tmp_path, capsys, before, after):
    run(images, tmp_path, "--trust", before)
    assert f"error: --trust {after}: was {before} in " in again(images, tmp_path, "--trust", after, capsys=capsys)


def test_main_pretrain__other_shards_inside_an_epoch_are_refused(images, tmp_path, capsys):
    """At the end of an epoch they are taken, with a warning."""
    run(images, tmp_path / "a", "--save-steps", "2")
    (tmp_path / "other").mkdir()
    for number, shard in enumerate(sorted((images / "train").glob("*.tar"), reverse=True)):
        (tmp_path / f"other/{number}.tar").symlink_to(shard)
    main_pretrain.load_index_together(str(tmp_path / "other"))
    shards = ["--shards", tmp_path / "other", "--epochs", "2"]
    inside = ["--resume", tmp_path / "a/checkpoint_0000_000002.pth.tar", "--output-dir", tmp_path / "b"]
    line = fails(capsys, *flags_of("moco"), *shards, *inside)
    assert f"error: --shards {tmp_path / 'other'}: " in line and "is inside an epoch of other images" in line
    assert again(images, tmp_path / "a", *shards)["epoch"] == 2
    assert "differ from the shards of" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ([], "holds a run already; pass --resume auto"), (["--resume", "auto", "--arch", "resnet18"], "with --arch tiny_resnet"),
    (["--resume", "auto", "--lr", "9"], "--lr 9.0: was --lr 0.03"), (["--resume", "/nowhere"], "which --resume /nowhere would"),
    (["--resume", "auto", "--output-dir", "/proc/version/x"], "--output-dir /proc/version/x: "),
])  # fmt: skip
def test_main_pretrain__a_dry_run_checks_the_resume(images, tmp_path, capsys, one_epoch, flags, message):
    copied(one_epoch("moco")[0], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    argv = ["--shards", f"{images}/train", "--output-dir", tmp_path, "--epochs", "1", "--dry-run", *flags]
    assert message in fails(capsys, *flags_of("moco"), *argv)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def probe(images, weights, out, *flags):
    paths = ["--train-shards", images / "train", "--val-shards", images / "val", "--pretrained", weights, "--output-dir", out]
    return [*map(str, [*paths, "--size", "32", "--batch-size", "20", "--epochs", "1", *COMMON, *flags])]


def test_main_lincls__dry_run_checks_and_writes_nothing(images, tmp_path, capsys, one_epoch):
    argv = probe(images, one_epoch("moco")[0], tmp_path / "probe", "--dry-run")
    main_lincls.main(argv)
    out = capsys.readouterr().out
    assert "dry run: all flags work; 40 images, 2 steps per epoch" in out and "needs --workers" in out
    assert not (tmp_path / "probe").exists()
    for bad, message in ((["--batch-size", "64"], "--batch-size 64: "), (["--resume", "/nowhere"], "--resume /nowhere: ")):
        assert message in fails(capsys, *argv, *bad, main=main_lincls)


def probe_beside_a_training(images, folder, other):
    """The second process reads no checkpoint; when the first has read one, a training writes another."""
    real, read = torch.load, []

    def load(file, **options):
        if isinstance(file, io.BytesIO):  # of a message between the processes
            return real(file, **options)
        assert os.environ["RANK"] == "0"
        content = real(file, **options)
        if not options.get("mmap"):
            read.append(1)
            for path in folder.glob("checkpoint_*"):
                shutil.copyfile(other, f"{path}.new")
                Path(f"{path}.new").replace(path)
        return content

    torch.load = load
    main_lincls.main(probe(images, folder, folder / "probe"))
    assert len(read) == (os.environ["RANK"] == "0")
    return hashlib.sha256(other.read_bytes()).hexdigest()


def test_main_lincls__two_processes_probe_one_checkpoint_of_a_training(images, tmp_path, one_epoch):
    """It is read once, by the first process; the hash in the result is that of the bytes that were probed."""
    copied(one_epoch("moco")[0], tmp_path / "run")
    run(images, tmp_path / "other", "--seed", "3")
    expected = file_hash(tmp_path / "run" / checkpoint.LATEST)
    new = spawn(probe_beside_a_training, images, tmp_path / "run", tmp_path / "other" / checkpoint.LATEST)[0]
    result = json.loads((tmp_path / "run/probe/result.json").read_text())
    assert result["checkpoint_sha256"] == expected != new
    trunk = opened("--pretrained", one_epoch("moco")[0], "--train-shards", "x", "--val-shards", "x")[0].trunk
    assert result["trunk_sha256"] == checkpoint.weights_hash(trunk)


# ---------------------------------------------------------------- failure in the middle


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    """40 images of which one is cut short."""
    folder = tmp_path_factory.mktemp("corrupt")
    rng = np.random.default_rng(1)
    with webdataset.TarWriter(str(folder / "train-000000.tar")) as tar:
        for i in range(40):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
            tar.write({"__key__": str(i), "png": file.getvalue() if i != 23 else file.getvalue()[:200]})
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_main_pretrain__corrupt_image_is_not_skipped_in_silence(corrupt, tmp_path, capsys, workers):
    with pytest.raises(SystemExit, match="2"):
        run(corrupt, tmp_path, "--shards", corrupt, "--workers", workers)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--max-bad 0.01: 1 of " in error and str(tmp_path / "bad_samples.jsonl") in error
    assert not (tmp_path / checkpoint.LATEST).exists() and not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("launch", [(), TWO])
def test_main_pretrain__failure_in_the_middle_exits_non_zero(corrupt, tmp_path, launch):
    """The process with the corrupt image takes the other with it."""
    command = ["pretrain", *flags_of("moco"), "--workers", "1", "--shards", corrupt, "--output-dir", tmp_path]
    with Run(tmp_path, command, launch) as run:
        assert run.end() == 2
    assert not list(tmp_path.glob("checkpoint*"))
    assert "error: --max-bad 0.01: 1 of" in run.said() and "Warning" not in run.said(), run.said()


def test_main_pretrain__a_run_that_diverged_keeps_its_last_good_checkpoint(images, tmp_path, capsys, one_epoch):
    copied(one_epoch("moco")[0], tmp_path)
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run(images, tmp_path, "--resume", "auto", "--epochs", "3", "--lr", "1e30")
    assert "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / checkpoint.LATEST).read_bytes() == before
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path))
