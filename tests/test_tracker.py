"""--tracker: what reaches the tracker, and a run that no tracker ends or changes. Most tests have a stand-in for wandb.

The last one takes the real packages, offline. It is skipped where they are not installed.
"""

import json
import sys
import threading
from argparse import Namespace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from runs import ended, evaluation, metrics, pretrain, same, without_clock

from utils.run import checkpoint, dist, flags, tracker


class StandIn:
    """wandb, as far as it is used. fails: the function that raises an error, or hangs."""

    def __init__(self, monkeypatch, fails="", hangs=False):
        self.started, self.sent, self.ended, self.fails, self.hangs = [], [], [], fails, hangs
        module = ModuleType("wandb")
        module.__spec__ = ModuleSpec("wandb", None, origin="a stand-in")
        module.Settings, module.setup, module.Image, module.init = dict, lambda settings: None, str, self.init
        self.offline, self.url = False, "https://tracker/run"
        monkeypatch.setitem(sys.modules, "wandb", module)

    def maybe_fail(self, name):
        if name == self.fails:
            if self.hangs:
                threading.Event().wait()
            raise ConnectionError("no server at https://me:secret@host/?key=secret")

    def init(self, **options):
        self.maybe_fail("init")
        self.started.append(options)
        self.id = options["id"]
        return self

    def define_metric(self, name, step_metric):
        self.metric = name, step_metric

    def log(self, values):
        self.maybe_fail("log")
        self.sent.append(values)

    def finish(self, code):
        self.maybe_fail("finish")
        self.ended.append(code)

    def numbers(self):
        """The lines that came, without pictures."""
        return [values for values in self.sent if len(values) > 2]

    def pictures(self):
        return [name for values in self.sent if len(values) == 2 for name in values if name != "global_step"]


def lines_of(folder, steps):
    """metrics.jsonl as the tracker gets it. steps: of an epoch."""
    found = []
    for line in metrics(folder):
        step = line["step"] + 1 if "step" in line else steps
        numbers = {name: value for name, value in line.items() if name not in ("epoch", "step", "steps")}
        found.append(numbers | {"global_step": line["epoch"] * steps + step})
    return found


def test_tracker__gets_every_number_and_picture_also_after_a_resume(images, tmp_path, monkeypatch, capsys):
    wandb = StandIn(monkeypatch)
    command = pretrain(images, tmp_path, "--tracker", "wandb", "--eval-shards", f"{images}/val")
    for epochs in ("1", "2"):
        assert ended([*command, "--epochs", epochs]) == 0
    first, second = wandb.started
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert second["config"] == json.loads((tmp_path / "config.json").read_text())["flags"]
    assert wandb.numbers() == lines_of(tmp_path, 5) and wandb.metric == ("*", "global_step")
    assert wandb.pictures() == ["views", "neighbours", "pca"] * 2 and wandb.ended == [0, 0]
    assert capsys.readouterr().out.count("--tracker wandb: https://tracker/run") == 2


@pytest.mark.parametrize("name", ["lincls", "finetune"])
def test_tracker__gets_the_numbers_of_evaluations(images, tmp_path, monkeypatch, name):
    wandb = StandIn(monkeypatch)
    assert ended(evaluation(name, images, tmp_path, "--tracker", "wandb")) == 0
    assert wandb.numbers() == lines_of(tmp_path, 5) and any("val_top1" in values for values in wandb.numbers())


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """A run without tracker: its checkpoint and its lines."""
    out = tmp_path_factory.mktemp("plain")
    return trained(images, out)


def trained(images, out, *flags):
    assert ended(pretrain(images, out, "--epochs", "1", *flags)) == 0
    return torch.load(out / checkpoint.LATEST, weights_only=True), without_clock(metrics(out))


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_tracker__that_fails_ends_no_run_and_changes_nothing(images, tmp_path, monkeypatch, capsys, plain, fails, hangs):
    monkeypatch.setattr(tracker, "PATIENCE", 0.2)
    wandb = StandIn(monkeypatch, fails, hangs)
    saved, lines = trained(images, tmp_path, "--tracker", "wandb")
    assert lines == plain[1] and all(same(saved[name], plain[0][name]) for name in ("state_dict", "optimizer"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: --tracker wandb")]
    assert len(warnings) == 1 and ("has not sent everything" if hangs else "is not written (ConnectionError: no") in warnings[0]
    assert "secret" not in warnings[0] and not wandb.ended


def test_tracker__gets_no_password(tmp_path, monkeypatch):
    wandb = StandIn(monkeypatch)
    args = Namespace(tracker="wandb", shards="https://me:secret@host/a.tar?token=secret", lr=0.1)
    tracker.start(args, tmp_path).close(failed=True)
    (options,) = wandb.started
    assert options["config"]["lr"] == 0.1 and "secret" not in str(options) and wandb.ended == [1]
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"wandb": options["id"]}
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert tracker.start(args, tmp_path) is None


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["missing", "a folder of this name"])
def test_main_pretrain__a_tracker_that_is_not_installed_is_one_line(images, tmp_path, monkeypatch, capsys, spec):
    monkeypatch.setattr(flags, "find_spec", lambda name: spec)
    assert ended(pretrain(images, tmp_path, "--tracker", "wandb")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--tracker wandb: its package is missing; pip install wandb, or leave the flag out")


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("name", flags.TRACKERS)
def test_tracker__real_package(images, tmp_path, monkeypatch, name):
    """Offline: two epochs in two starts are one run with all numbers and pictures, and without the command line's password."""
    if not find_spec(name):
        pytest.skip(f"needs {name}: pip install {name}")
    for variable, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": tmp_path / "trackio", "MLFLOW_TRACKING_URI":
                            f"sqlite:///{tmp_path}/mlflow.db"}.items():  # fmt: skip
        monkeypatch.setenv(variable, str(value))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", "--shards", "https://me:geheim@host/"])
    out = tmp_path / "run"
    for epochs in ("1", "2"):
        assert ended(pretrain(images, out, "--tracker", name, "--epochs", epochs)) == 0
    run = json.loads((out / "tracker.json").read_text())[name]
    losses = [(values["global_step"], values["loss"]) for values in lines_of(out, 5)]
    if name == "wandb":
        files = [path for path in (out / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
        content = b"".join(path.read_bytes() for path in files)
        assert len([path for path in files if path.name == f"run-{run}.wandb"]) == 2
        assert content.count(b"health_rankme") >= 2 and b"geheim" not in content
        assert len(list((out / "wandb").rglob("media/images/views_*.png"))) == 2
    elif name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        found = SQLiteStorage.get_logs(tracker.PROJECT, run)
        assert [(line["step"], line["loss"]) for line in found if "loss" in line] == losses
        assert [line["step"] for line in found if "views" in line] == [0, 5]
        assert SQLiteStorage.get_run_config(tracker.PROJECT, run)["moco_k"] == 32
    else:
        import mlflow

        client = mlflow.MlflowClient()
        assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == losses
        assert client.get_run(run).data.params["moco_k"] == "32" and client.get_run(run).info.status == "FINISHED"
        pictures = [item.path for item in client.list_artifacts(run, "images") if item.path.endswith("png")]
        assert len(pictures) == 2 and all("views" in path for path in pictures)
