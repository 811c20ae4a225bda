"""kNN and health beside pre-training: the measures, and a training that stays bit for bit as it is."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import spawn, tiny
from runs import FLAGS, TWO, Run, metrics, pretrain, same, without_clock
from safetensors.numpy import load_file

import main_knn
import main_pretrain
from methods import METHODS
from utils.evaluation import health
from utils.run import checkpoint, dist

EPOCHS = ["--epochs", "2"]


def trained(images, out, method, *flags):
    argv = [*tiny(method), *FLAGS, *EPOCHS, "--shards", f"{images}/train", "--output-dir", str(out), *map(str, flags)]
    main_pretrain.main(argv)
    saved = torch.load(out / checkpoint.LATEST, weights_only=True)
    return saved, metrics(out)


def of_eval(lines):
    return [line for line in lines if "eval_rankme" in line]


@pytest.mark.parametrize("method", METHODS)
def test_monitor__changes_nothing_and_measures_what_main_knn_does(images, tmp_path, method):
    plain, alone = trained(images, tmp_path / "plain", method)
    saved, lines = trained(images, tmp_path / "run", method, "--eval-shards", images / "val")
    assert without_clock([line for line in lines if line not in of_eval(lines)]) == without_clock(alone)
    assert all(same(saved[name], plain[name]) for name in ("state_dict", "optimizer", "scaler", "epoch", "step"))
    assert [line["epoch"] for line in of_eval(lines)] == [0, 1]
    file, size = tmp_path / "f.safetensors", saved["flags"]["size"]
    shards = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val", "--k", "1", "20", "--features", str(file)]
    where = ["--pretrained", str(tmp_path / "run"), "--output-dir", str(tmp_path / "knn"), "--workers", "0", "--device", "cpu"]
    main_knn.main([*where, *shards, "--size", str(size), "--batch-size", "8"])
    wanted = json.loads((tmp_path / "knn/result.json").read_text())["knn"]
    found = of_eval(lines)[-1]
    assert {k: found[f"eval_knn{k}"] for k in (1, 20)} == {int(k): v["top1"] for k, v in wanted.items()}
    values = load_file(file)["val.values"].astype(np.float64)
    sigma = np.linalg.svd(values, compute_uv=False)
    share = sigma / sigma.sum()
    assert found["eval_rankme"] == pytest.approx(np.exp(-(share * np.log(share + 1e-300)).sum()), rel=1e-4)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    assert found["eval_spread"] == pytest.approx(unit.std(0).mean(), rel=1e-6)
    assert found["eval_full_spread"] == pytest.approx(values.shape[1] ** -0.5)


@pytest.mark.parametrize("flags, epochs, names", [
    (["--eval-shards", "plain"], [0, 1, 2], {"rankme", "spread", "full_spread"}),
    (["--eval-shards", "val", "--eval-every", "2", "--eval-neighbours", "7", "--eval-images", "5"], [1, 2],
     {"knn1", "rankme", "spread", "full_spread"}),
])  # fmt: skip
def test_monitor__every_so_many_epochs_on_so_many_images(images, tmp_path, capsys, monkeypatch, flags, epochs, names):
    flags = [images / word if word in ("plain", "val") else word for word in flags]
    _, lines = trained(images, tmp_path, "moco", *flags, "--epochs", "3")
    assert [line["epoch"] for line in of_eval(lines)] == epochs  # and after the last
    assert {name.removeprefix("eval_") for name in of_eval(lines)[0]} - {"epoch"} == names
    printed = [line for line in capsys.readouterr().out.splitlines() if ": held-out " in line]
    assert len(printed) == len(epochs) and all("% of the time so far)" in line for line in printed)


@pytest.mark.parametrize("flags, message", [
    (["--eval-every", "2"], "--eval-every 2: measures nothing without --eval-shards"),
    (["--eval-shards", "{images}/val", "--eval-every", "0"], "--eval-every 0: must be above 0"),
    (["--eval-shards", "/nowhere"], "--eval-shards /nowhere: no such file or folder"),
])  # fmt: skip
def test_main_pretrain__bad_flags_of_the_monitor_are_one_line(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        trained(images, tmp_path, "moco", *[flag.format(images=images) for flag in flags])
    line = capsys.readouterr().err.splitlines()[-1]  # before it may stand the bar of an index that is made first
    assert message in line


def measures_of(part):
    return health.measures(torch.tensor(np.array_split(features_of(), 2)[part] if part is not None else features_of()))


def features_of():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 4)) @ rng.normal(size=(4, 10)) + 1


def in_two():
    return measures_of(dist.rank())


def test_measures__have_known_values_and_are_those_of_all_processes():
    assert health.rankme(torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    one = torch.zeros(7, 7, dtype=torch.float64)
    one[0, 0] = 5
    assert health.rankme(one) == pytest.approx(1)
    assert 1 < measures_of(None)["rankme"] < 5.0001
    for found in spawn(in_two):
        assert found == pytest.approx(measures_of(None))
    torch.manual_seed(0)
    uniform = health.measures(torch.randn(5000, 16))
    assert uniform["spread"] == pytest.approx(uniform["full_spread"], rel=0.02) and uniform["rankme"] == pytest.approx(
        16, rel=0.01
    )
    assert health.measures(torch.ones(9, 4))["spread"] < 1e-8
    assert health.measures(torch.tensor([[1.0, float("nan")]])) == {}


SLOW = """
import time
from utils.evaluation import features, health
real, measures = features.evaluation_plan, health.measures
features.evaluation_plan = lambda *args: (print("measuring", flush=True), time.sleep(0.4), real(*args))[2]
"""


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    with Run(folder, command(images, folder / "run"), TWO) as run:
        assert run.end() == 0, run.said()
    return folder / "run"


def command(images, out):
    return pretrain(images, out, *EPOCHS, "--save-steps", "2", "--eval-shards", f"{images}/val", method="moco")


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGKILL"])
def test_main_pretrain__stopped_during_a_measurement_it_is_the_unbroken_run(images, tmp_path, unbroken, name):
    """A signal ends the measurement and saves; the run that resumes measures again."""
    out = tmp_path / "run"
    with Run(tmp_path, command(images, out), TWO, before=SLOW) as run:
        run.until(lambda: "measuring" in run.said())
        if name == "SIGKILL":
            run.kill()
        else:
            start = time.monotonic()
            os.kill(run.workers()[1], getattr(signal, name))
            assert run.end(20) == 0 and time.monotonic() - start < 10, run.said()
            assert f"Stopped by {name}, and saved." in run.said() and not of_eval(metrics(out))
            assert checkpoint.place_of(checkpoint.saved_in(out)[0]) == (0, 5)
    with Run(tmp_path, command(images, out), TWO) as run:
        assert run.end() == 0, run.said()
    assert without_clock(metrics(out)) == without_clock(metrics(unbroken))
    assert len(of_eval(metrics(out))) == 2
    saved, whole = (torch.load(folder / checkpoint.LATEST, weights_only=True) for folder in (out, unbroken))
    assert same(saved["state_dict"], whole["state_dict"])
