"""Measures of a watched step, against slow loops; and the numbers that a run logs beside their references."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import IMAGES, build, forward, method_args, spawn, tiny, uint8_batch
from torch.nn.functional import normalize

import main_pretrain
from methods import METHODS
from utils.evaluation.frozen import Live
from utils.evaluation.watch import Watch
from utils.learning import health
from utils.learning.method import Step
from utils.run import dist, log, summary


def unit(n, dim, seed=0):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_of_pairs__is_the_loop():
    q, k = unit(9, 4), unit(9, 4, 1)
    found = {name: value.item() for name, value in health.of_pairs(q, k).items()}
    near = [sum((a - b) ** 2 for a, b in zip(*rows, strict=True)) for rows in zip(q.tolist(), k.tolist(), strict=True)]
    apart = [math.exp(-2 * math.dist(a, b) ** 2) for a, b in itertools.permutations(q.tolist(), 2)]
    assert found == pytest.approx({
        "health_alignment": np.mean(near), "health_uniformity": math.log(np.mean(apart)),
        "health_spread": q.numpy().std(0, ddof=1).mean(),
    }, rel=1e-5)  # fmt: skip


def test_of_pairs__references():
    """Even features have the values of the references, equal ones the other end; one image alone has no pairs."""
    even = health.of_pairs(q := unit(256, 64), unit(256, 64, 1))
    known = summary.references({"chance": 1.0, "dim": 64})
    assert even["health_spread"].item() == pytest.approx(known["health_spread"], rel=0.02)
    assert even["health_alignment"].item() == pytest.approx(known["health_alignment"], rel=0.05)
    assert even["health_uniformity"].item() == pytest.approx(known["health_uniformity"], abs=0.02)
    same = health.of_pairs(q[:1].repeat(8, 1), q[:1].repeat(8, 1))
    assert max(abs(value.item()) for value in same.values()) < 1e-5
    assert health.of_pairs(q[:1], q[:1]).keys() == {"health_alignment"}


def test_of_queue__oldest_and_newest_parts():
    q, queue = unit(3, 4), unit(16, 4, 1).T  # the oldest key is in column 6, the newest in column 5
    found = health.of_queue(q, queue, torch.tensor([6]), 0.2, 7)
    share = [np.exp(row) / np.exp(row).sum() for row in (q @ queue / 0.2).double().numpy()]
    assert found["health_key_age"] == 7
    assert found["health_mass_oldest"].item() == pytest.approx(np.mean([s[[6, 7]].sum() for s in share]), rel=1e-5)
    assert found["health_mass_newest"].item() == pytest.approx(np.mean([s[[4, 5]].sum() for s in share]), rel=1e-5)


def test_of_bank__counts_the_rows_that_were_never_written():
    method = build("insdis")
    bank = method.banks["image"]
    assert health.of_bank(bank.memory)["health_unwritten"] == 1
    ids = torch.tensor([0, 7, 31])
    bank.update(unit(3, 16), ids, 0.5)
    assert health.of_bank(bank.memory)["health_unwritten"].item() == pytest.approx(1 - 3 / IMAGES)


def test_flat__images_of_one_colour():
    views = torch.randint(0, 256, (4, 2, 3, 8, 8), dtype=torch.uint8)
    assert health.flat(views) == 0
    views[1] = torch.tensor([3, 200, 90], dtype=torch.uint8).view(3, 1, 1)
    assert health.flat(views) == 0.25 and health.flat(torch.zeros(3, 2, 4, 4)) == 1


@pytest.mark.parametrize("freq, steps, wanted", [
    (50, 230, [99, 199, 229]), (30, 250, [119, 239, 249]), (200, 93, [92]), (1, 5, [4]),
])  # fmt: skip
def test_watched__at_log_lines_that_are_far_apart(freq, steps, wanted):
    assert [step for step in range(steps) if health.watched(step, steps, freq)] == wanted


@pytest.mark.parametrize("name", METHODS)
def test_forward__a_watched_step_has_the_same_loss_and_more_statistics(name):
    args = method_args(name)
    found = []
    for watched in (False, True):
        method, step = build(name), Step(0, 10, 0, watched)
        step.seed_torch()
        loss, stats = forward(method, uint8_batch(args), step)
        loss.backward()
        found.append((loss, stats, [p.grad for p in method.parameters() if p.grad is not None]))
    (loss, stats, gradients), (again, more, others) = found
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, others))
    assert all(torch.equal(more[key], stats[key]) for key in stats)
    added = more.keys() - stats.keys()
    assert {"health_alignment", "health_spread", "health_uniformity"} <= added
    assert all(key.startswith("health_") and more[key].shape == () and not more[key].requires_grad for key in added)


def test_mosrep__top1_of_the_tiles_is_their_mean():
    method, args = build("mosrep"), method_args("mosrep")
    _, stats = forward(method, uint8_batch(args), Step(0, 10, 0, True))
    parts = [stats[f"health_top1_{side}"].item() for side in ("upper_left", "upper_right", "lower_left", "lower_right")]
    assert np.mean(parts) == pytest.approx(stats["top1_tile"].item())


def watch_of(part):
    """The measures of the trunk of an untrained model, on a part of a batch."""
    args = method_args("moco")
    batch = uint8_batch(args)
    if part is not None:
        batch = batch.part(slice(4 * part, 4 * part + 4))
    found = Watch(Live(args, METHODS["moco"], torch.device("cpu")))(build("moco"), batch)
    return {name: value.item() for name, value in found.items()}


def in_two():
    return watch_of(dist.rank())


def test_watch__is_of_all_processes():
    one, (first, second) = watch_of(None), spawn(in_two)
    assert 1 < one["health_rankme"] < one["health_full_rankme"] == 8
    norm = math.sqrt(sum(p.square().sum().item() for p in build("moco").encoder_q.parameters()))
    assert one["health_weight_norm"] == pytest.approx(norm, rel=1e-5)
    assert first == second and {name: first[name] for name in one} == pytest.approx(one, rel=1e-4)
    assert first["health_slowest"] in (0, 1) and first["health_slowness"] >= 1


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__logs_health_with_references_and_ends_with_a_sentence(images, tmp_path, capsys, method):
    flags = ["--workers", "0", "--device", "cpu", "--amp", "fp32", "--epochs", "2", "--print-freq", "2"]
    main_pretrain.main([*tiny(method), *flags, "--shards", f"{images}/train", "--output-dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "health_rankme" in line]
    assert [(line["epoch"], line["step"]) for line in watched] == [(0, 4), (1, 4)] and all(x["peak_gb"] > 0 for x in lines)
    known = json.loads((tmp_path / "config.json").read_text())["references"]
    out = capsys.readouterr().out.splitlines()
    healths = [line for line in out if line.startswith(("epoch 0: ", "epoch 1: "))]
    assert len(healths) == 2 and f"spread {watched[0]['health_spread']:.3g} ({known['health_spread']:.3g})" in healths[0]
    assert sum("left: epoch 0:0" in line and ", run 0:0" in line for line in out) == len(lines)
    end = f"2 epochs: loss {lines[-1]['loss']:.3f} (chance {known['loss']:.3f}, first {lines[0]['loss']:.3f})"
    assert any(line.startswith(end) for line in out)


def test_closing__the_last_measurement_beside_the_first(tmp_path):
    assert summary.closing(tmp_path, 2.0) == ""
    step = {"step": 0, "steps": 1, "loss": 3.0, "top1": 1.0}
    lines = [{"epoch": 0, **step}, {"epoch": 0, "eval_rankme": 5.0, "eval_knn20": 40.0}]
    lines += [{"epoch": 1, **step, "loss": 2.5, "top1": 4.0}, {"epoch": 1, "eval_rankme": 9.0, "eval_knn20": 61.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary.closing(tmp_path, 2.0) == (
        "2 epochs: loss 2.500 (chance 2.000, first 3.000), top1 4.0 % (first 1.0 %), "
        "held-out knn20 61.0 % (40.0 % after epoch 0), held-out rankme 9.0 (5.0 after epoch 0)"
    )


def test_clock():
    assert [log.clock(seconds) for seconds in (0.4, 61, 3600 * 30)] == ["0:00:00", "0:01:01", "1 day, 6:00:00"]
