"""A guarded update, agreement between processes, and a failed step that is computed again."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import spawn, tiny

import main_pretrain
from methods import METHODS
from utils.learning import amp
from utils.learning.method import Step
from utils.run import dist
from utils.run.engine import MOST_SKIPS, Engine, NotFinite, StepInputs, Votes

CPU = torch.device("cpu")
FLAGS = ["--device", "cpu", "--amp", "fp32", "--workers", "0", "--print-freq", "1", "--save-steps", "2"]


def engine_of(optimizer, folder="none", scaler=None, **flags):
    args = Namespace(**{"output_dir": str(folder), "save_steps": 0, "save_minutes": 0, "keep": 3} | flags)
    return Engine(args, 10, optimizer, scaler or amp.scaler("fp32"), None, CPU, None)


def updated(engine, loss, inputs):
    engine.backward(loss)
    return engine.update(loss, inputs)


def one_weight(value=2.0):
    weight = torch.nn.Parameter(torch.tensor([value]))
    return weight, torch.optim.SGD([weight], lr=0.5, fused=True)


def test_update__is_the_optimizers_and_returns_the_gradients_norm():
    weight, optimizer = one_weight()
    stats = updated(engine_of(optimizer), (3 * weight).sum(), StepInputs(0, 0))
    assert weight.item() == 2 - 0.5 * 3 and weight.grad is None
    assert stats.keys() == {"grad_norm"} and stats["grad_norm"].item() == 3


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_update__is_not_made_if_loss_or_gradient_is_not_finite(where, factor):
    weight, optimizer = one_weight(0.0 if where == "gradient" else 2.0)
    # the square root of 0 is finite, its gradient is not
    loss = weight.sqrt().sum() if where == "gradient" else (weight.detach() * factor + 0 * weight).sum()
    with pytest.raises(NotFinite, match="epoch 3, step 7") as error:
        updated(engine_of(optimizer), loss, StepInputs(3, 7, "the batch"))
    assert error.value.inputs == (3, 7, "the batch")
    assert weight.item() in (0.0, 2.0)


def test_update__an_overflow_of_fp16s_scaler_is_skipped_and_reported():
    weight, optimizer = one_weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine, skipped = engine_of(optimizer, scaler=scaler), []
    for step in range(3):  # 8 x 2^127 and 8 x 2^126 are infinite in float32
        loss = (8 * weight).sum() if step < 2 else (2 * weight).sum()
        skipped.append(updated(engine, loss, StepInputs(0, step))["skipped"].item())
    assert skipped == [1, 1, 0] and weight.item() == 2 - 0.5 * 2
    with pytest.raises(NotFinite):  # a loss that is not finite is still a failure
        updated(engine, (weight * float("inf")).sum(), StepInputs(0, 3))


def test_update__lasting_skips_of_fp16s_scaler_are_a_failure():
    """The loss is finite, its gradient is not at any scale. Without a limit, the run would reach its end without an update."""
    weight, optimizer = one_weight(0.0)
    engine = engine_of(optimizer, scaler=torch.amp.GradScaler("cpu"))
    losses = [
        *[weight.sqrt] * (MOST_SKIPS - 1),
        weight.square,
        *[weight.sqrt] * MOST_SKIPS,
    ]  # the good step counts from 0 again
    with pytest.raises(NotFinite, match=f"not finite in {MOST_SKIPS} steps in a row, up to epoch 0, step 63,"):
        for step, loss in enumerate(losses):
            assert updated(engine, loss().sum(), StepInputs(0, step))["skipped"].item() == (step != MOST_SKIPS - 1)
    assert weight.item() == 0 and engine.scaler.get_scale() == 2.0**-46


def vote(rank_bad, wishes):
    votes, outcomes = Votes(CPU, late=False), []
    for step in range(len(wishes)):
        try:
            bad, outcome = votes(
                StepInputs(0, step), torch.tensor(dist.rank() == 1 and step == rank_bad), *wishes[step][dist.rank()]
            )
            outcomes.append((bad.item(), outcome))
        except NotFinite as error:
            outcomes.append(error.inputs.step_in_epoch)
    return outcomes


def test_votes__every_process_learns_what_one_wishes_at_the_same_step():
    wishes = [((0, 0), (0, 0)), ((0, 1), (0, 0)), ((0, 0), (15, 0)), ((10, 0), (15, 1)), ((0, 0), (0, 0))]
    wanted = [(0, [0, 0]), (0, [0, 1]), (0, [15, 0]), (0, [15, 1]), 4]
    assert spawn(vote, 4, wishes) == [wanted, wanted]


class Event:
    """Stands for a CUDA event."""

    def __init__(self):
        self.waited = False

    def synchronize(self):
        self.waited = True


def test_votes__late_ones_are_read_a_step_later_and_settled_before_a_save(monkeypatch):
    """As on CUDA, with stand-ins for its events and its pinned memory."""
    events = []

    class Stream:
        def record_event(self):
            events.append(Event())
            return events[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("tensor", "empty"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, pin_memory=False, **k: real(*a, **k))
    votes, fine, bad = Votes(CPU, late=True), torch.tensor(False), torch.tensor(True)
    assert votes(StepInputs(0, 0), fine, 15, 0)[1] == [0, 0] and not events[0].waited
    assert votes(StepInputs(0, 1), fine, 0, 1)[1] == [15, 0] and events[0].waited and not events[1].waited
    assert votes(StepInputs(0, 2), bad, 0, 0)[0].item() == 1  # the device knows at once
    with pytest.raises(NotFinite, match="step 2"):
        votes(StepInputs(0, 3), fine, 0, 0)
    votes.open = None
    votes(StepInputs(0, 4), bad, 0, 0)
    with pytest.raises(NotFinite, match="step 4"):
        votes.settle()


def test_update__a_fused_optimizer_leaves_it_out_by_itself():
    """On CUDA the device skips the update before the host knows. `found_inf` is the interface of torch's loss scaler."""
    weight, optimizer = one_weight()
    weight.grad = torch.tensor([3.0])
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert weight.item() == 2
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert weight.item() == 0.5


# ---------------------------------------------------------------- --replay


def train(images, out, method, *flags):
    argv = [*tiny(method), *FLAGS, "--shards", f"{images}/train", "--epochs", "2", "--output-dir", str(out)]
    try:
        main_pretrain.main([*argv, *map(str, flags)])
    except SystemExit as stop:
        return stop.code


def poisoned(images, out, method, *flags):
    """A run with a bad update in step 3: one weight becomes so large that step 4 cannot be computed."""
    commit = METHODS[method].commit

    def poison(self, step: Step):
        commit(self, step)
        if step.number == 3:
            with torch.no_grad():
                next(self.encoders()[0].parameters()).fill_(1e38)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS[method], "commit", poison)
        return train(images, out, method, *flags)


def replay(capsys, path, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(["--replay", str(path), "--device", "cpu", *flags])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize("method, processes", [(method, 1 if method == "moco" else 2) for method in METHODS])
def test_replay__fails_again_in_one_process(images, tmp_path, capsys, method, processes):
    run = [poisoned(images, tmp_path, method)] if processes == 1 else spawn(poisoned, images, tmp_path, method)
    assert run == [2] * processes
    path = tmp_path / "failed_step_0000_000004.pth.tar"
    saved = torch.load(path, weights_only=True)
    assert len(saved["samples"]) == len(saved["views"][0]) == 8 and saved["views"][0].dtype == torch.uint8
    assert torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)["step"] == 4  # the state before, as usual
    code, out, _ = replay(capsys, path)
    assert code == 0 and "the step fails again" in out and "loss nan" in out
    assert f"epoch 0, step 4, 8 images of {processes} processes" in out
    first = re.search("in the order of their calls: (.*)", out)[1]
    healthy = torch.load(path, weights_only=True)
    name, weight = next((name, value) for name, value in healthy["state_dict"].items() if (value == 1e38).all())
    encoder = name.removeprefix("module.").rpartition("conv1.weight")[0]
    assert first.startswith(encoder) and "weights that are not finite: none" in out

    weight.normal_(std=0.1)
    torch.save(healthy, tmp_path / "failed_step_repaired.pth.tar")
    code, out, _ = replay(capsys, tmp_path / "failed_step_repaired.pth.tar")
    assert code == 1 and "does not fail here" in out


@pytest.mark.parametrize("method", METHODS)
def test_replay__is_the_step_itself(images, tmp_path, capsys, method):
    """The step is declared bad, although it is good. Its loss is the same to the bit."""
    losses, real = [], Engine.update

    def declare(self, loss, inputs):
        losses.append(loss.item())
        if inputs.step_in_epoch == 3:
            raise NotFinite(inputs)
        return real(self, loss, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "update", declare)
        assert train(images, tmp_path, method, "--momentum", 0.8) == 2
    code, out, _ = replay(capsys, tmp_path / "failed_step_0000_000003.pth.tar")
    assert code == 1 and float(re.search(r"loss (\S+)", out)[1]) == losses[3]


def test_replay__of_a_gradient_that_fp16_skips_at_any_scale(images, tmp_path, capsys, monkeypatch):
    real = METHODS["moco"].forward

    def forward(self, *inputs):
        loss, stats = real(self, *inputs)
        return loss + (0 * next(self.encoder_q.parameters()).sum()).abs().sqrt(), stats  # + 0, whose gradient is nan

    with monkeypatch.context() as patch:
        patch.setattr(amp, "scaler", lambda _: torch.amp.GradScaler("cpu"))
        patch.setattr(METHODS["moco"], "forward", forward)
        patch.setattr("utils.run.engine.MOST_SKIPS", 3)
        assert train(images, tmp_path, "moco") == 2
        path = tmp_path / "failed_step_0000_000002.pth.tar"
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and "not finite in 3 steps in a row" in err and f"see --replay {path}" in err
        code, out, _ = replay(capsys, path)
        assert code == 0 and "the step fails again" in out and "gradient that is not finite: 1 of" in out
    assert replay(capsys, path)[0] == 1


def test_replay__names_what_is_wrong_with_its_file(tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "x.pth.tar")
    code, _, err = replay(capsys, tmp_path / "x.pth.tar")
    assert code == 2 and f"--replay {tmp_path / 'x.pth.tar'}: is not a failed step" in err
    assert "--replay /nowhere: no such file" in replay(capsys, Path("/nowhere"))[2]


def test_main_pretrain__the_log_has_the_gradients_norm(images, tmp_path):
    assert train(images, tmp_path, "moco") is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and all(line["grad_norm"] > 0 for line in lines)
