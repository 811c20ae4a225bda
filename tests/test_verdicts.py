"""Verdicts: each sick run gets its own in its first epoch, and a healthy one gets none."""

import json
import re
import time

import numpy as np
import pytest
from helpers import method_args, method_of, spawn, tiny
from PIL import Image
from shards_helpers import encode, one_color, write_shards
from test_launchers import PRETRAIN, dry_run, project  # noqa: F401

import main_pretrain
from methods import METHODS
from utils.evaluation.watch import Watch
from utils.learning import health
from utils.run import dist, verdicts
from utils.run.verdicts import TABLE, Numbers, Verdicts, derived

FLAGS = ["--workers", "0", "--device", "cpu", "--amp", "fp32", "--epochs", "1", "--print-freq", "10"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """320 images of nine colours each."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    tiles = rng.integers(0, 256, (320, 3, 3, 3), dtype=np.uint8)
    write_shards(
        folder / "train", (320,), lambda number: encode(Image.fromarray(tiles[number].repeat(8, 0).repeat(8, 1)), "PNG")
    )
    return folder / "train"


def said(shards, out, method, *flags):
    """The verdicts of a run of one epoch: name -> text."""
    momentum = ["--moco-m", "0.7"] if method in ("moco", "mosrep") else []
    main_pretrain.main([*tiny(method), *FLAGS, *momentum, "--shards", str(shards), "--output-dir", str(out), *flags])
    return verdicts_of(out)


def verdicts_of(out):
    found = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert all(entry.keys() == {"epoch", "step", "name", "kind", "text"} for entry in found)
    assert all(entry["epoch"] == (2 if entry["name"] == "stale_rows" else 0) for entry in found)
    assert len({entry["name"] for entry in found}) == len(found)
    return {entry["name"]: entry["text"] for entry in found}


@pytest.mark.parametrize("method, flags, name, words", [
    ("moco", ["--moco-m", "0"], "stale_keys", "The oldest are 4 steps old, and 100% of the key encoder's weights"),
    ("moco", ["--moco-m", "0.999"], "keys_stay_random", "after all 40 steps, 96% of the key encoder's weights"),
    ("moco", ["--moco-k", "512"], "queue_exceeds_data", "--moco-k 512 is larger than the data set (320 images)"),
    ("moco", ["--moco-k", "512"], "queue_never_full", "full after 64 steps, and the run has 40"),
    ("insdis", ["--nce-k", "400"], "negatives_exceed_data", "--nce-k 400 is larger than the data set (320 images), so rows"),
    ("insdis", ["--nce-t", "10"], "temperature_too_high", "--nce-t 10: similarities from -1 to 1 make hardly a difference"),
    ("mosrep", ["--crop-min", "1", "--local-scale", "1", "1"], "no_crop", "each view shows nearly the whole image"),
])  # fmt: skip
def test_verdicts__sick_flags_are_told_at_the_start(many, tmp_path, monkeypatch, capsys, method, flags, name, words):
    monkeypatch.setattr(main_pretrain, "train", lambda args, index, model, *_: tell(args, index, model))
    found = said(many, tmp_path, method, *flags)
    assert words in found[name] and f"warning: {found[name]}" in capsys.readouterr().out


def tell(args, index, method):
    Verdicts(main_pretrain.Path(args.output_dir), (0, 0), main_pretrain.numbers_of(args, method, index.total, 40))
    return 0


@pytest.mark.parametrize("launcher", PRETRAIN)
def test_verdicts__recipes_of_the_sample_have_none_at_the_start(project, capsys, launcher):  # noqa: F811
    """Neither the whole recipe nor one epoch of it."""
    for flags in ([], ["--epochs", "1"]):
        args = dry_run(project, launcher, *flags)
        samples = 1128 if args.method == "cmc" else 6000
        known = main_pretrain.numbers_of(args, method_of(args, samples), samples, samples // args.batch_size)
        assert not Verdicts(None, (0, 0), known).said, capsys.readouterr().out


def test_verdicts__leak_of_batchnorm(many, tmp_path):
    leak = said(many, tmp_path, "moco", "--size", "32", "--lr", "1", "--moco-m", "0.9", "--moco-k", "64", "--bn-splits", "1")
    assert "query and key see the same BatchNorm statistics" in leak["bn_leak"] and "collapse" not in leak
    assert "by itself no failure" in leak["loss_rises"]


def test_verdicts__collapse(many, tmp_path):
    sick = ["--lr", "10", "--weight-decay", "1", "--moco-m", "0.9"]
    found = said(many, tmp_path, "moco", "--size", "32", "--moco-k", "64", "--bn-splits", "2", *sick)
    assert "the features collapse" in found["collapse"] and found.keys() <= {"collapse", "loss_rises"}


@pytest.mark.parametrize("flags, sick", [(["--lr", "0.3"], True), (["--lr", "0.1", "--nce-t", "0.2", "--fill-banks"], False)])
def test_verdicts__rows_of_a_bank_that_the_encoder_leaves_behind(many, tmp_path, flags, sick):
    found = said(many, tmp_path, "insdis", "--size", "32", "--loss", "softmax", "--epochs", "3", "--lr-steps", *flags)
    assert found.keys() == ({"stale_rows"} if sick else set())
    assert not sick or re.search(r"the loss, \d+\.\d\d, is far above that of guessing, 3\.22", found["stale_rows"])


def test_verdicts__a_healthy_run_has_none(many, tmp_path):
    assert said(many, tmp_path, "moco", "--size", "32", "--bn-splits", "2", "--lr", "0.001").keys() <= {"loss_rises"}


def test_verdicts__grey_view(tmp_path):
    """Of images of one grey each, CMC's ab is flat; of images of one colour, each view is."""
    write_shards(tmp_path / "grey", (8,), lambda number: encode(Image.effect_noise((32, 32), 100).convert("RGB"), "PNG"))
    assert "view `ab` is one colour for 100%" in said(tmp_path / "grey", tmp_path / "a", "cmc", "--nce-k", "8")["flat_view"]
    write_shards(tmp_path / "flat", (8,), one_color)
    assert "is one colour for 100%" in said(tmp_path / "flat", tmp_path / "b", "moco")["flat_view"]


@pytest.mark.parametrize("workers, name, words", [
    (0, "no_workers", "--workers 0 loads and trains in turns"), (2, "loader_limits", "workers would do, here are 2"),
])  # fmt: skip
def test_verdicts__the_loader_limits(many, tmp_path, monkeypatch, workers, name, words):
    real = main_pretrain.load_batches

    def slow(index, specs, plan, seed, count, *rest):
        for batch in real(index, specs, plan, seed, 0, *rest):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(main_pretrain, "load_batches", slow)
    monkeypatch.setattr(verdicts, "LEAST_SECONDS", 0.1)
    flags = ["--workers", str(workers), "--size", "32", "--bn-splits", "2", "--batch-size", "32"]
    assert words in said(many, tmp_path, "moco", *flags, "--print-freq", "5")[name]


def slow_second(shards, out):
    """A run on two processes. The second one has a slow disk, and says that it computes four times as long."""
    health.WATCH, real, load = 1, Watch.features, main_pretrain.load_batches
    verdicts.LEAST_SECONDS = 1e9  # on a busy machine the first process may wait too
    main_pretrain.load_batches = lambda *args: (time.sleep(0.3 * dist.rank()) or batch for batch in load(*args))
    Watch.features = lambda self, x: (real(self, x)[0], 1.0 + 3 * dist.rank())
    flags = ["--shards", str(shards), "--output-dir", str(out), "--size", "32", "--print-freq", "1"]
    main_pretrain.main([*tiny("moco"), *FLAGS, "--moco-m", "0.7", *flags])


def test_verdicts__a_slow_process(images, tmp_path):
    spawn(slow_second, images / "train", tmp_path)
    found = verdicts_of(tmp_path)
    assert found.keys() == {"slow_process", "slow_loader"} and "process 1 waits" in found["slow_loader"]
    assert found["slow_process"].startswith("process 1 is slow: it needs 4.0 times as long")


def test_verdicts__once_in_a_run_that_resumes(tmp_path, capsys):
    facts = {"chance": 1.0, "queue": 64, "queue_steps": 8, "momentum": 0.0, "images": 9, "all_steps": 100, "epoch_steps": 10}
    Verdicts(tmp_path, (0, 0), facts)
    first = (tmp_path / "verdicts.jsonl").read_bytes()
    assert [json.loads(line)["name"] for line in first.splitlines()] == ["queue_exceeds_data", "stale_keys"]
    assert capsys.readouterr().out.count("warning: ") == 2
    Verdicts(tmp_path, (1, 0), facts)
    assert (tmp_path / "verdicts.jsonl").read_bytes() == first and capsys.readouterr().out == ""


def test_verdicts__waits_and_workers():
    """The first line is warm-up. 8 workers feed 37 % of the speed of the device: 8 / .37 of them feed all."""
    line = {"steps": 50, "images_per_s": 100.0, "loss": 1.0}
    past = [line | {"data_wait": 0.99}, line | {"data_wait": 0.53}, line | {"data_wait": 0.73}]
    found = derived(Numbers({"batch": 64, "workers": 8}), past)
    assert found["wait"] == pytest.approx(0.63) and found["workers_needed"] == 22
    assert "wait" not in derived(Numbers({"batch": 64, "workers": 8}), past[:1])


def test_verdicts__skipped_updates_and_unknown_numbers():
    (verdict,) = (v for v in TABLE if v.name == "skipped_updates")
    past = [{"steps": 50, "images_per_s": 9.0, "loss": 1.0, "data_wait": 0.0, "skipped": 20}]
    numbers = Numbers({"batch": 8, "workers": 1} | past[0])
    assert verdict.condition(Numbers(numbers | derived(numbers, past)))
    assert not any(v.condition(Numbers()) for v in TABLE)


@pytest.mark.parametrize("method", METHODS)
def test_facts__are_those_of_the_loss(method):
    args = method_args(method)
    facts = method_of(args).facts(args.batch_size)
    assert facts["candidates"] > 1 and 0 < facts["temperature"] < 1
    assert vars(args)[facts["temperature_flag"][2:].replace("-", "_")] == facts["temperature"]
