"""--accumulate auto and the measurement of --dry-run: the fewest slices that fit, chosen by all processes, kept by a run."""

import json
import re

import pytest
import torch
from helpers import METHODS, method_args, spawn
from runs import ended, pretrain

import main_pretrain
from utils.evaluation import fit
from utils.run import cpu, dist

CPU, GPU = torch.device("cpu"), torch.device("meta")  # a device that is no CPU: nothing is computed on it


def args_of(*flags):
    return method_args("moco", "--batch-size", "64", "--bn-splits", "8", "--accumulate", "auto", *flags)


@pytest.mark.parametrize("largest, expected", [(64, 1), (63, 2), (32, 2), (9, 8), (8, 8), (7, 8)])
def test_fit__bisects_real_steps_on_a_device(monkeypatch, largest, expected):
    """A device for `largest` images of a slice; the others raise torch's error."""
    tried = []

    class Trial:
        def __init__(self, *_):
            pass

        def step(self, number, slices):
            tried.append(slices)
            if 64 // slices > largest:
                raise torch.OutOfMemoryError

    monkeypatch.setattr(fit, "Trial", Trial)
    monkeypatch.setattr(dist, "largest", lambda x: torch.tensor([float("inf") if 64 // tried[-1] > largest else 0.0, 0.0, 0.0]))
    found = fit.fit(None, args_of(), [], 8, torch.device("mps") if torch.backends.mps.is_available() else GPU)
    assert found.slices == expected and found.fits == (largest >= 8) and len(set(tried)) <= 3


@pytest.mark.parametrize("splits", [1, 8])
def test_fit__extrapolates_on_a_cpu(monkeypatch, splits):
    """need = 1000 + 3 n + 5 n / slices, measured for few images, predicts the need of many."""
    sizes = []

    def measured(build, args, specs, size, slices):
        assert size % args.bn_splits == 0 and args.bn_splits % slices == 0
        sizes.append(size)
        return 1000 + 3 * size + 5 * size / slices, 0.5 * size

    monkeypatch.setattr(fit, "_measured", measured)
    args = method_args("moco", "--batch-size", "1024", "--bn-splits", str(splits), "--size", "224", "--accumulate", "auto")
    specs = METHODS["moco"].views(args)
    for slices in [m for m in (1, 2, 4, 8) if splits % m == 0]:
        need = 1000 + 3 * 1024 + 5 * 1024 / slices
        monkeypatch.setattr(cpu, "free_memory", lambda need=need: need / fit.SHARE["cpu"] + 1)
        found = fit.fit(None, args, specs, splits, CPU)
        assert found == (slices, pytest.approx(need), pytest.approx(need + fit.SHARE["cpu"]), 512)
    assert max(sizes) <= 16
    monkeypatch.setattr(cpu, "free_memory", lambda: 10)
    assert fit.fit(None, args, specs, splits, CPU)[:1] == (splits,)


def test_measured__more_images_need_more_and_slices_less():
    def of(images, slices):
        args = method_args("moco", "--batch-size", str(images), "--size", "64", "--bn-splits", "8")
        return fit._measured(lambda few: main_pretrain.build(few, 512, CPU), args, METHODS["moco"].views(args), images, slices)[
            0
        ]

    of(16, 1)  # what the libraries need once
    small, large, sliced = of(16, 1), of(128, 1), of(128, 8)
    assert small < large and sliced < large


def short_on_one():
    """The error on every process, before any of them waits for the keys of the others."""
    args = method_args("moco", "--batch-size", "8")
    trial = fit.Trial(lambda args: main_pretrain.build(args, 64, CPU), args, METHODS["moco"].views(args), 4, CPU)
    if dist.rank() == 1:
        trial.optimizer.step = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError)
    try:
        trial.step(0, 1)
    except torch.OutOfMemoryError:
        return "short"


def test_trial__all_processes_learn_that_one_is_short_of_memory():
    assert spawn(short_on_one) == ["short", "short"]


AUTO = ["--bn-splits", "4", "--accumulate", "auto", "--epochs", "1"]


def test_main_pretrain__the_number_is_written_down_and_kept(images, tmp_path, monkeypatch, capsys):
    """A run with `auto` equals one with the number that it chose, bit for bit; a resumed one measures nothing."""
    monkeypatch.setattr(fit, "fit", lambda *_: fit.Fit(4, 1e9, 2e9, 1.0))
    assert not ended(pretrain(images, tmp_path / "auto", *AUTO))
    assert "--accumulate 4 (auto): a step in 4 slices needs 1.00 GB of 2.00 GB for a process" in capsys.readouterr().out
    assert not ended(pretrain(images, tmp_path / "four", *AUTO, "--accumulate", "4"))
    config = json.loads((tmp_path / "auto/config.json").read_text())
    assert config["flags"]["accumulate"] == 4
    a, b = (torch.load(tmp_path / name / "checkpoint_0000.pth.tar", weights_only=True) for name in ("auto", "four"))
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())

    monkeypatch.setattr(fit, "fit", lambda *_: pytest.fail("measured again"))
    assert not ended(pretrain(images, tmp_path / "auto", *AUTO, "--epochs", "2"))
    assert "--accumulate 4, as in checkpoint_0000.pth.tar" in capsys.readouterr().out
    monkeypatch.setattr(fit, "fit", lambda *_: fit.Fit(2, 3e9, 2e9, 1.0))
    assert ended(pretrain(images, tmp_path / "auto", *AUTO, "--epochs", "3", "--bn-splits", "2")) == 2  # 4 does not divide 2
    assert (
        "--accumulate auto: a step in 2 slices needs 3.00 GB of 2.00 GB for a process; pass a multiple of --bn-splits 2"
        in capsys.readouterr().err
    )


def test_main_pretrain__dry_run_says_what_a_run_takes(images, tmp_path, capsys):
    assert not ended(pretrain(images, tmp_path / "run", *AUTO, "--dry-run", "--moco-t", "0.1"))
    out = capsys.readouterr().out
    rate, hours = re.search(r"a step on 1 x cpu takes \d+ ms, that is (\d+) images/s: 1 epochs in (\S+) hours\n", out).groups()
    assert int(rate) > 0 and float(hours) >= 0 and re.search(r"this device trains \d+ images/s: --workers \d+\n", out)
    assert re.search(r"--accumulate 1: a step in 1 slices needs \S+ GB of \S+ GB for a process\n", out)
    assert "--moco-t 0.1 (0.2)" in out and "queue: 32 keys of 40 images (80.0%), each for 4 steps\n" in out
    assert "BatchNorm: groups of 2 images; published are 32" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "-1", "half", "3"])
def test_accumulate__other_values_are_one_line(images, tmp_path, value, capsys):
    assert ended(pretrain(images, tmp_path / "run", "--bn-splits", "4", f"--accumulate={value}")) == 2
    assert "--accumulate" in (error := capsys.readouterr().err) and error.count("\n") == 1
