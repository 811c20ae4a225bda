"""Common parts of all training loops: guarded update, votes of the processes, checkpoints, signals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.run import dist
from utils.run.checkpoint import saved_in
from utils.run.flags import RunError
from utils.run.log import Log
from utils.run.saver import Saver
from utils.run.signals import Signals

# Steps in a row without an update, until the run stops. In each of them, fp16's scaler halves its scale. It starts at 2^16, so
# 17 lead below 1, where no scale is to blame. The others are for a scale that has grown.
MOST_SKIPS = 32


class StepInputs(NamedTuple):
    """The position of a step, and its batch; a failed step saves them."""

    epoch: int
    step_in_epoch: int
    batch: Any = None


class NotFinite(RunError):
    """The loss or the gradient of a step is not finite on some process. Raised on all processes before the update.

    skips: under fp16's scaler, the gradient was not finite in MOST_SKIPS steps, up to this one.
    """

    def __init__(self, inputs: StepInputs, skips: bool = False):
        where = f"epoch {inputs.epoch}, step {inputs.step_in_epoch}"
        if skips:
            super().__init__(f"the gradient was not finite in {MOST_SKIPS} steps in a row, up to {where}, although fp16 used a "
                             "smaller scale each time; try a lower --lr or --amp fp32")  # fmt: skip
        else:
            super().__init__(f"the loss or its gradient is not finite in {where}; try a lower --lr or --amp fp32")
        self.inputs = inputs


class Votes:
    """The decisions that processes take together at each step, by one all-reduce of a few numbers, their maximum.

    late: the host reads the outcome one step later, while the device (CUDA) computes the next step, so that neither waits.
    """

    def __init__(self, device: torch.device, late: bool):
        self.device, self.late = device, late
        self.open: tuple[StepInputs, torch.Tensor, torch.cuda.Event] | None = None

    def __call__(self, inputs: StepInputs, bad: torch.Tensor, *wishes: float) -> tuple[torch.Tensor, list[int]]:
        """bad: on the device, 0 or 1, or 2 for too many skips. Returns its maximum, on the device, and that of each wish.

        If late, the wishes are those of the step before. Raises NotFinite.
        """
        own = torch.tensor(wishes, dtype=torch.float32, pin_memory=self.late).to(self.device, non_blocking=True)
        ballot = dist.largest(torch.cat([bad.float().view(1), own]))
        if not self.late:
            return ballot[0], self._outcome(inputs, ballot)
        host = torch.empty(len(ballot), pin_memory=True).copy_(ballot, non_blocking=True)
        before, self.open = self.open, (inputs, host, torch.cuda.current_stream().record_event())
        return ballot[0], self._outcome(*before) if before else [0] * len(wishes)

    def settle(self) -> None:
        """Wait for an outcome that was not read yet. Raises NotFinite."""
        if self.open:
            self._outcome(*self.open)
            self.open = None

    def _outcome(self, inputs, ballot, event=None):
        if event:
            event.synchronize()
        bad, *wishes = map(int, ballot.tolist())
        if bad:
            raise NotFinite(inputs, skips=bad == 2)
        return wishes


class Engine:
    """A context around training, on every process. content: (epoch, step of the next epoch) -> a checkpoint's content."""

    def __init__(self, args, steps: int, optimizer, scaler, log: Log, device: torch.device, content: Callable, keep_epochs=0):
        self.steps, self.save_steps, self.optimizer, self.scaler = steps, args.save_steps, optimizer, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # a fused optimizer can skip an update by itself, on the device; for others the host must know before
        late = device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.log, self.content, self.votes, self.signals = log, content, Votes(device, late), Signals()
        self.saver = Saver(Path(args.output_dir), args.keep, args.save_minutes, keep_epochs)
        self.none_bad = self.skips = torch.zeros((), device=device)  # skips: in a row
        self.stopped_by = self.wish_to_save = 0

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *_):
        self.saver.wait()
        self.signals.__exit__()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those that the next update takes."""
        self.scaler.scale(loss).backward()

    def update(self, loss: torch.Tensor, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """The optimizer's step, if loss and gradient are finite on every process; otherwise raises NotFinite.

        An overflow under fp16's scaler is no failure: the scaler skips the step and tries a smaller scale, MOST_SKIPS times at
        most. Returns stats.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite, scaled = norm.isfinite(), self.scaler.is_enabled()
        bad, stats = ~loss.detach().isfinite(), {"grad_norm": norm}
        if scaled:
            stats = {"grad_norm": torch.where(finite, norm, 0), "skipped": (~finite).float()}
            self.skips = torch.where(finite, 0, self.skips + 1)
            bad = torch.where(bad, 1, 2 * (self.skips >= MOST_SKIPS))
        else:
            bad = bad | ~finite
        bad = self._vote(inputs, bad)
        if self.votes.late and not scaled:
            self.optimizer.found_inf = bad
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return stats

    def done(self, epoch: int, step: int) -> bool:
        """After `step` steps of an epoch: save if it is due. Returns True if a signal to any process asks the run to stop."""
        on_plan = self.save_steps and (epoch * self.steps + step) % self.save_steps == 0
        inside = step < self.steps  # the end of the epoch has a save of its own
        if (inside and (on_plan or self.wish_to_save)) or self.stopped_by:
            self.save(epoch, step)
        return self.stopped_by > 0

    def asked_to_stop(self, epoch: int) -> bool:
        """Between the steps of an evaluation after an epoch: save and return True if a signal asks the run to stop."""
        self._vote(StepInputs(epoch, self.steps), self.none_bad)
        return self.done(epoch, self.steps) if self.stopped_by else False

    def save(self, epoch: int, step: int) -> None:
        """Write a checkpoint in the background. If the run stops here, wait for it."""
        self.votes.settle()
        self.log.flush()
        if dist.rank() == 0:
            self.saver.save(self.content(epoch, step))
            if self.stopped_by:
                self.finish()

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises RunError if it could not be written."""
        if failure := self.saver.wait():
            there = saved_in(self.saver.folder)
            then = f"resume from {there[0].name} with --resume auto" if there else "start again: there is none before"
            folder = self.saver.folder
            raise RunError(f"--output-dir {folder}: the last checkpoint could not be written ({failure}); make room and {then}")

    def _vote(self, inputs, bad):
        due = dist.rank() == 0 and self.saver.due()
        bad, (self.stopped_by, self.wish_to_save) = self.votes(inputs, bad, self.signals.received, due)
        return bad
