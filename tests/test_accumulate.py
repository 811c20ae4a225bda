"""Slices of a batch, one after another, are as many processes."""

import functools
from argparse import Namespace

import pytest
import torch
from helpers import METHODS, build, method_args, own_part, spawn, uint8_batch
from runs import TWO, Run, metrics, pretrain, steps

from utils.learning import amp, optim
from utils.learning.accumulate import accumulate
from utils.learning.method import Step
from utils.run import checkpoint, dist
from utils.run.engine import Engine, StepInputs

CPU = torch.device("cpu")
LR = 2e-5  # small, so that a step hardly magnifies the rounding of the step before
CASES = {name: (name,) for name in METHODS if "bn_splits" in method_args(name)} | {
    "multi-crop": ("moco", "--local-crops", "2"),
    "un-mix": ("moco", "--unmix-prob", "0.5"),
    "mixture": ("moco", "--im-type", "IM", "--g-prob", "0.5", "--r-prob", "0.5"),
    "moco nce": ("moco", "--loss", "nce"),
    "cmc softmax": ("cmc", "--loss", "softmax"),
}
MORE = {"cmc": ["--size", "64"]}  # of 32 pixels BatchNorm's groups would have one value for each image


def three_steps(name, flags, splits, slices):
    """The losses and the whole state of a method after three steps, on this process's part of three batches."""
    method = build(name, "--bn-splits", str(splits), *flags)
    model = dist.data_parallel(method, CPU)
    optimizer = optim.sgd(method.parameters(), LR, 0.9, 1e-4)
    saves = Namespace(output_dir="none", save_steps=0, save_minutes=0, keep=1)
    engine = Engine(saves, 9, optimizer, amp.scaler("fp32"), None, CPU, None)
    found = []
    for number in range(3):
        batch = own_part(uint8_batch(method_args(name, *flags), seed=number))
        step = Step(number, 9, 5)
        loss, stats = accumulate(model, batch, method.targets(batch, step), step, slices, engine.backward)
        engine.update(loss, StepInputs(0, number))
        method.commit(step)
        means = torch.stack([loss, *stats.values()]) / dist.world()
        found.append(dist.total(means.float()))
    return found, dict(method.state_dict())


@pytest.mark.parametrize(("processes", "slices"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_accumulate__slices_equal_processes(case, processes, slices):
    losses, state = of_all(4, 1)[case]  # each process has a batch of its own
    sliced_losses, sliced = of_all(processes, slices)[case]
    for a, b in zip(losses, sliced_losses, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    start = build(*flags_of(case)[:1], *flags_of(case)[1]).state_dict()
    for key, value in state.items():
        change = (value - start[key]).abs().max().item()
        assert (value - sliced[key]).abs().max().item() <= 2e-6 + 0.01 * change, key


@functools.cache
def of_all(processes, slices):
    """case -> the result of the first of these processes."""
    return all_cases(slices) if processes == 1 else spawn(all_cases, slices, processes=processes)[0]


def all_cases(slices):
    return {case: three_steps(*flags_of(case), slices, slices) for case in CASES}


def flags_of(case):
    name, *flags = CASES[case]
    return name, [*flags, "--batch-size", "16", *MORE.get(name, [])]


STOPPED = """
import os
real = main_pretrain.optim.lr_at
main_pretrain.optim.lr_at = lambda lr, at, *more: (1.3 < at < 1.5 and os.kill(os.getpid(), 15)) or real(lr, at, *more)
"""  # a signal in the third step of the second epoch


def test_main_pretrain__slices_resume_as_processes(images, tmp_path):
    """One process with two slices stops in the middle of an epoch; two processes resume it, as if they had trained it all."""
    flags = ["--epochs", "2", "--lr", "0.0006"]
    sliced, whole = tmp_path / "sliced", tmp_path / "whole"
    with Run(tmp_path, pretrain(images, sliced, *flags, "--bn-splits", 2, "--accumulate", 2), before=STOPPED) as first:
        assert first.end() == 0 and steps(sliced)[-1] == (1, 2), first.said()
    with (
        Run(tmp_path, pretrain(images, sliced, *flags), TWO) as second,
        Run(tmp_path, pretrain(images, whole, *flags), TWO) as other,
    ):
        assert second.end() == other.end() == 0, second.said() + other.said()
    assert "epochs 1 (from its step 3) to 2" in second.said() and "--bn-splits was 2" in second.said()
    assert steps(sliced) == steps(whole)
    for a, b in zip(metrics(sliced), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    a, b = (checkpoint.find(folder, "").content["state_dict"] for folder in (sliced, whole))
    for key, value in b.items():
        assert torch.allclose(a[key].float(), value.float(), rtol=1e-4, atol=1e-6), key
