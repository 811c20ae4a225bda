"""The output of a run: means over steps and processes, rates, chance level, TensorBoard, config.json."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import spawn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.data.bad_samples import BadSamples
from utils.run import dist, log
from utils.run.curves import charts
from utils.run.files import write_json
from utils.run.flags import RunError
from utils.run.summary import closing

LOSSES = [4.0, 2.0, 1.0, 7.0, 5.0]
CHANCE = math.log(33)


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def logger(folder, steps, print_freq, chance=0, start=(0, 0)):
    return log.Log(folder, start, steps, print_freq, 8, BadSamples(folder, 40, 0.1), chance)


def epoch(folder, number=0, losses=LOSSES, print_freq=2, clock=None, chance=CHANCE, bad=()):
    """An epoch of steps of 3 seconds, 1 of them waiting for data, 8 images each. bad: (step, key) of unusable samples."""
    with logger(folder, len(losses), print_freq, chance, (number, 0)) as writer:
        for step in writer.epoch(number):
            with writer.waiting():
                if clock:
                    clock.now += 1
            if clock:
                clock.now += 2
            loss = torch.tensor(losses[step], requires_grad=True)
            met = [{"shard": "a.tar", "key": key, "error": "why"} for at, key in bad if at == step]
            writer.add(step, loss, {"top1": torch.tensor(10.0 * step)}, 0.5, met)
        writer.scalars(number, {"val_top1": 50.0})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def test_log__means_rates_and_waits_of_each_window(tmp_path, clock, capsys):
    *lines, last = epoch(tmp_path, clock=clock)
    assert [(x["epoch"], x["step"]) for x in lines] == [(0, 1), (0, 3), (0, 4)]  # the short window at the end is not lost
    assert [x["loss"] for x in lines] == [3.0, 4.0, 5.0]
    assert [x["top1"] for x in lines] == [5.0, 25.0, 40.0]
    assert all(x["lr"] == 0.5 for x in lines)
    assert [x["images_per_s"] for x in lines] == pytest.approx([8 / 3] * 3)
    assert [x["data_wait"] for x in lines] == pytest.approx([1 / 3] * 3)
    assert last == {"epoch": 0, "val_top1": 50.0}
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "loss 3.0000 (chance 3.497)" in out[0] and "data wait 33%" in out[0]
    for word in ("epoch 0", "2/5", "top1 5.000", "lr 0.5", "3 images/s"):
        assert word in out[0]


def test_log__unusable_samples_are_counted_once_and_written_down(tmp_path, capsys):
    lines = epoch(tmp_path, bad=[(0, "x"), (2, "y"), (4, "x")])
    assert [line["bad"] for line in lines[:3]] == [1, 2, 2]
    more = epoch(tmp_path, number=1, bad=[(0, "y"), (4, "z")])[4:]  # a new start counts from 0
    assert [line["bad"] for line in more[:3]] == [1, 1, 2]
    found = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert found == [{"shard": "a.tar", "key": key, "error": "why"} for key in "xyz"]
    out = capsys.readouterr().out.splitlines()
    assert "unusable images 1" in out[0] and "unusable images 2" in out[-1]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("bad")] == [1, 2, 2, 1, 1, 2]


def test_log__without_unusable_samples_none_are_printed(tmp_path, capsys):
    assert [line["bad"] for line in epoch(tmp_path)[:3]] == [0, 0, 0]
    assert "unusable" not in capsys.readouterr().out and not (tmp_path / "bad_samples.jsonl").exists()


def test_log__too_many_unusable_samples_end_the_run(tmp_path):
    with pytest.raises(RunError, match="--max-bad 0.1: 5 of 40 images cannot be used, see .*bad_samples.jsonl"):
        epoch(tmp_path, bad=[(step, str(step)) for step in range(5)])
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # the line after the fourth step


def test_log__an_epoch_begun_in_the_middle_has_its_last_steps(tmp_path):
    with logger(tmp_path, 5, 2, start=(0, 3)) as writer:
        steps = list(writer.epoch(0, first_step=3))
        for step in steps:
            writer.add(step, torch.tensor(float(step)), {}, 0.1, [])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4] and [(line["step"], line["loss"]) for line in lines] == [(3, 3.0), (4, 4.0)]


def test_log__without_a_chance_level_none_is_printed(tmp_path, capsys):
    epoch(tmp_path, chance=0)
    assert "chance" not in capsys.readouterr().out


def test_log__an_epoch_starts_its_clock_anew(tmp_path, clock):
    """The time between two epochs, such as validation, is not training time."""
    with logger(tmp_path, 1, 1) as writer:
        for number in range(2):
            for step in writer.epoch(number):
                clock.now += 2
                writer.add(step, torch.tensor(1.0), {}, 0.1, [])
            clock.now += 1000
    rates = [json.loads(line)["images_per_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == [4.0, 4.0]


def test_log__continues_its_file(tmp_path):
    epoch(tmp_path)
    assert [x["epoch"] for x in epoch(tmp_path, number=1)] == [0] * 4 + [1] * 4


def test_log__tensorboard_has_every_number_at_its_step(tmp_path):
    epoch(tmp_path, number=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "top1", "lr", "images_per_s", "data_wait", "val_top1"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 3.0), (9, 4.0), (10, 5.0)]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_log__a_flush_ends_a_window_and_each_line_says_how_many_steps_it_has(tmp_path):
    with logger(tmp_path, 9, 4) as writer:
        for step in writer.epoch(0):
            writer.add(step, torch.tensor(float(step)), {}, 0.1, [])
            if step in (1, 2, 3):
                writer.flush()
    assert [(x["step"], x["steps"], x["loss"]) for x in lines_of(tmp_path)] == [
        (1, 2, 0.5), (2, 1, 2.0), (3, 1, 3.0), (7, 4, 5.5), (8, 1, 8.0)
    ]  # fmt: skip


@pytest.mark.parametrize("half", [b"", b'{"epoch": 1, "st'])
@pytest.mark.parametrize("start, kept", [((0, 0), 0), ((0, 2), 1), ((0, 5), 3), ((1, 0), 4), ((1, 4), 6), ((2, 0), 8)])
def test_log__repeated_steps_have_one_line(tmp_path, start, kept, half):
    """A killed run has logged steps after its checkpoint. The result of an epoch stays only if the epoch is complete."""
    epoch(tmp_path)
    epoch(tmp_path, number=1)
    before = lines_of(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(half)
    with logger(tmp_path, len(LOSSES), 2, start=start):
        assert lines_of(tmp_path) == before[:kept]


def strictly(line):
    """Parsed as other programs do it: Python's json alone takes NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} in {line}")

    return json.loads(line, parse_constant=refuse)


def test_log__a_number_that_is_not_finite_is_null(tmp_path):
    """On CUDA a bad step is known one step later, so its line is written. An older version wrote NaN."""
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "step": 0, "steps": 1, "loss": NaN, "top1": -Infinity}\n')
    with logger(tmp_path, 4, 1, start=(0, 1)) as writer:
        for step, loss in enumerate([math.nan, math.inf, 2.0], 1):
            writer.epoch(0)
            writer.add(step, torch.tensor(loss), {"top1": torch.tensor(5.0)}, 0.1, [])
        writer.scalars(0, {"val_top1": math.nan})
    lines = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x.get("loss") for x in lines] == [None, None, None, 2.0, None]
    assert [x.get("top1") for x in lines] == [None, 5.0, 5.0, 5.0, None] and lines[-1]["val_top1"] is None
    assert closing(tmp_path, CHANCE) == "1 epochs: loss 2.000 (chance 3.497, first 2.000), top1 5.0 % (first 5.0 %)"
    assert [x.tolist() for x in charts(lines, 4, {})[0].series["loss"]] == [[1.0], [2.0]]


def test_write_json__a_number_that_is_not_finite_is_null(tmp_path):
    write_json(tmp_path / "result.json", {"a": [1, (math.nan, "NaN")], "b": {"c": -math.inf, "d": 1e308}})
    assert strictly((tmp_path / "result.json").read_text()) == {"a": [1, [None, "NaN"]], "b": {"c": None, "d": 1e308}}


def test_log__skipped_steps_are_counted(tmp_path, capsys):
    with logger(tmp_path, 6, 3) as writer:
        for step in writer.epoch(0):
            writer.add(step, torch.tensor(1.0), {"skipped": torch.tensor(float(step in (0, 2)))}, 0.1, [])
    assert [x["skipped"] for x in lines_of(tmp_path)] == [2, 0]
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped 2" in first and "skipped" not in second


def two_processes(folder):
    losses = [x + 10 * dist.rank() for x in LOSSES]
    folder = Path(folder)
    with logger(folder, len(losses), 2) as writer:
        for step in writer.epoch(0):
            met = [{"shard": "a.tar", "key": f"{step} {min(step, 1) * dist.rank()}", "error": "why"}] if step < 2 else []
            writer.add(step, torch.tensor(losses[step]), {"top1": torch.tensor(100.0 * dist.rank())}, 0.5, met)
    bad = BadSamples(folder, 40, 0.1)
    seen = log.Log(folder / "bad", (0, 0), 1, 1, 8, bad) if dist.rank() else None
    assert seen is None or (seen.lines is None and seen.writer is None)


def test_log__means_over_processes_written_once(tmp_path):
    spawn(two_processes, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"], x["top1"]) for x in lines] == [(1, 8.0, 50.0), (3, 9.0, 50.0), (4, 10.0, 50.0)]
    assert [x["bad"] for x in lines] == [3, 3, 3]  # one that both have met, and one of each
    found = [json.loads(line)["key"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(found) == ["0 0", "1 0", "1 1"]
    assert len(list(tmp_path.glob("events.out.tfevents*"))) == 1 and not (tmp_path / "bad").exists()


def test_say__first_process_only(monkeypatch, capsys):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    log.say("no")
    monkeypatch.setattr(dist, "rank", lambda: 0)
    log.say("a", 1)
    assert capsys.readouterr().out == "a 1\n"


def test_write_config__flags_versions_commit_and_facts(tmp_path):
    log.write_config(tmp_path, argparse.Namespace(moco_k=32, local_scale=[0.1, 0.6], resume=None), index="ab", device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"] == {"moco_k": 32, "local_scale": [0.1, 0.6], "resume": None}
    assert (config["index"], config["device"], config["processes"]) == ("ab", "cpu", 1)
    assert config["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(config["versions"]["torch"])  # it may add +cpu or +cu132
    assert {"torchvision", "timm", "webdataset"} <= config["versions"].keys() and "commit" in config


def test_say__a_line_is_in_the_file_at_once(tmp_path):
    """A job's output is followed while it runs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = "import os; from utils.run.log import say; say('a line'); os._exit(0)"  # which flushes nothing
    with open(tmp_path / "out", "w") as out:
        root = Path(log.__file__).parent.parent.parent
        subprocess.run([sys.executable, "-c", program], stdout=out, cwd=root, env=environment, check=True)
    assert (tmp_path / "out").read_text() == "a line\n"
