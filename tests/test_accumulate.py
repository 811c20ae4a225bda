"""Slices of a batch, one after another, are as many processes."""

import tempfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import METHODS, build, method_args, own_part, spawn, uint8_batch
from runs import TWO, Run, metrics, pretrain, same, steps, without_clock

from utils.learning import amp, optim
from utils.learning.accumulate import accumulate
from utils.learning.method import Step
from utils.run import checkpoint, dist
from utils.run.engine import Engine, StepInputs

CPU = torch.device("cpu")
LR = 0.05
STEPS, SAVED = 3, 2  # a save after 2 of 3 steps
CASES = {name: (name,) for name in METHODS if "bn_splits" in method_args(name)} | {
    "moco": ("moco", "--size", "32"),
    "insdis": ("insdis", "--size", "32"),
    "multi-crop": ("moco", "--local-crops", "2"),
    "un-mix": ("moco", "--size", "32", "--unmix-prob", "0.5"),
    "mixture": ("moco", "--size", "32", "--im-type", "IM", "--g-prob", "0.5", "--r-prob", "0.5"),
    "moco nce": ("moco", "--size", "32", "--loss", "nce"),
    "cmc softmax": ("cmc", "--loss", "softmax"),
}
EXACT = [case for case in CASES if vars(method_args(*CASES[case])).get("loss") != "nce"]  # its first Z is a sum over the batch


def train(case, groups, slices, saved=None):
    """(number, what a step found, its state) of each step up to STEPS, on this process's part of the batches.

    groups: of BatchNorm, four images each, over all processes. saved: the state of a run to resume after SAVED steps.
    """
    name, *flags = CASES[case]
    flags += ["--batch-size", str(4 * groups)]
    method = build(name, "--bn-splits", str(slices), *flags, seed=1 if saved else 0)
    optimizer = optim.sgd(method.parameters(), LR, 0.9, 1e-4)
    if saved:
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
    model = dist.data_parallel(method, CPU)
    saves = Namespace(output_dir="none", save_steps=0, save_minutes=0, keep=1)
    engine = Engine(saves, 9, optimizer, amp.scaler("fp32"), None, CPU, None)
    for number in range(SAVED if saved else 0, STEPS):
        batch = own_part(uint8_batch(method_args(name, *flags), seed=number))
        step = Step(number, 9, 5)
        loss, stats = accumulate(model, batch, method.targets(batch, step), step, slices, engine.backward)
        engine.update(loss, StepInputs(0, number))
        method.commit(step)
        means = dist.total(torch.stack([loss, *stats.values()])) / dist.world()
        yield {"means": means, "method": method.state_dict(), "optimizer": optimizer.state_dict()}


def values(found):
    """One vector of what `train` gives: losses and statistics, weights, buffers, momentum."""
    momentum = [state["momentum_buffer"] for state in found["optimizer"]["state"].values()]
    return torch.cat([x.flatten() for x in (found["means"], *found["method"].values(), *momentum)])


def end(*run):
    *_, found = train(*run)
    return values(found)


def all_ends():
    return {case: end(case, 2, 1) for case in EXACT}


@pytest.fixture(scope="module")
def of_two():
    return spawn(all_ends)[0]


@pytest.mark.parametrize("case", EXACT)
def test_accumulate__two_slices_are_two_processes_to_the_bit(of_two, case):
    """In float32, because the sum of two gradients has only one order."""
    assert torch.equal(end(case, 2, 2), of_two[case])


def in_layout(folder, slices, before):
    """case -> the largest differences from the first layout, of a whole run and of one that resumes the layout `before`."""
    torch.set_default_dtype(torch.float64)  # and where the code asks for float32
    torch.float32, torch.Tensor.float, np.float32 = torch.float64, torch.Tensor.double, np.float64
    differences = {}
    for case in CASES:
        for number, found in enumerate(train(case, 4, slices), 1):
            if number == SAVED and dist.rank() == 0:
                torch.save(found, f"{folder}/{case} {slices}")
        if not before:
            torch.save(values(found), f"{folder}/{case}")
        else:
            resumed = end(case, 4, slices, torch.load(f"{folder}/{case} {before}"))
            first = torch.load(f"{folder}/{case}")
            differences[case] = [(x - first).abs().max().item() for x in (values(found), resumed)]
    return differences


@pytest.fixture(scope="module")
def differences():
    layouts = [(4, None), (2, 4), (1, 2)]  # 1 process with 4 slices, 2 with 2, 4 with 1; each resumes the one before
    with tempfile.TemporaryDirectory() as folder:
        return [spawn(in_layout, folder, *layout, processes=4 // layout[0])[0] for layout in layouts][1:]


@pytest.mark.parametrize("case", CASES)
def test_accumulate__slices_are_processes_and_resume_as_processes(differences, case):
    """In float64, where rounding is far below the effect of any error."""
    assert max(max(found[case]) for found in differences) < 1e-10


STOPPED = """
import os
real = main_pretrain.optim.lr_at
main_pretrain.optim.lr_at = lambda lr, at, *more: (1.3 < at < 1.5 and os.kill(os.getpid(), 15)) or real(lr, at, *more)
"""  # a signal in the third step of the second epoch


SLICES, PROCESSES = (["--bn-splits", "2", "--accumulate", "2"], ()), ([], TWO)  # flags, and launch


@pytest.mark.parametrize("before, after, splits", [(SLICES, PROCESSES, 2), (PROCESSES, SLICES, 1)], ids=["slices", "processes"])
def test_main_pretrain__slices_and_processes_resume_each_other(images, tmp_path, before, after, splits):
    """A run stops in the middle of an epoch. The other layout resumes it, as if it had trained it all.

    To the bit, as in the test of two processes above.
    """
    moved, whole = tmp_path / "moved", tmp_path / "whole"

    def start(out, layout, stopped=""):
        flags, launch = layout
        argv = pretrain(images, out, "--epochs", "2", "--lr", "0.0006", *flags)
        return Run(tmp_path, argv, launch, before=stopped)

    with start(moved, before, STOPPED) as first:
        assert first.end() == 0 and steps(moved)[-1] == (1, 2), first.said()
    with start(moved, after) as second, start(whole, after) as other:
        assert second.end() == other.end() == 0, second.said() + other.said()
    assert "epochs 1 (from its step 3) to 2" in second.said() and f"--bn-splits was {splits}" in second.said()
    assert without_clock(metrics(moved)) == without_clock(metrics(whole))
    a, b = (checkpoint.find(folder, "").content for folder in (moved, whole))
    assert same([a["state_dict"], a["optimizer"]], [b["state_dict"], b["optimizer"]])
