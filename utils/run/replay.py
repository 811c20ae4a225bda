"""A failed step, with a loss or gradient that was not finite: saved with all its inputs, and computed again by --replay."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from utils.run import checkpoint, dist
from utils.run.engine import NotFinite
from utils.run.files import atomic
from utils.run.flags import RunError
from utils.run.log import say
from utils.run.text import shown_flags

KEYS = {
    "flags", "processes", "views", "flips", "samples", "images", "epoch", "step", "steps", "state_dict", "scaler",
}  # fmt: skip


def write(failure: NotFinite, folder: Path, args, method: torch.nn.Module, scaler, steps: int, images: int) -> NoReturn:
    """Gather the inputs of a failed step from all processes, and save them on the first. Called by all. Raises RunError.

    Random numbers need no saving: they are functions of the seed, the number of the step and the process. On CUDA the host
    learns of the failure one step late. Weights and batch are the failed step's; queue, banks and key encoder are one update
    newer, without the values that are not finite.
    """
    inputs, batch = failure.inputs, failure.inputs.batch
    ids = batch.sample_ids
    views, flips = ([dist.gather(x.to(ids.device)).cpu() for x in part] for part in (batch.views, batch.flips))
    content = {
        "flags": shown_flags(vars(args)), "processes": dist.world(), "epoch": inputs.epoch, "step": inputs.step_in_epoch,
        "steps": steps, "views": views, "flips": flips, "samples": dist.gather(ids).cpu(), "images": images,
        "state_dict": checkpoint.prefixed(method), "scaler": scaler.state_dict(),
    }  # fmt: skip
    path = folder / f"failed_step_{inputs.epoch:04d}_{inputs.step_in_epoch:06d}.pth.tar"
    if dist.rank() == 0:
        try:
            with atomic(path) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch turns some of the first into the second
            raise RunError(f"{failure}; {path}, with all its inputs, could not be written ({error})") from None
    raise RunError(f"{failure}, and see --replay {path}")


def read_failed_step(path: str) -> dict:
    """A file of `write`. Raises FileNotFoundError or ValueError in one line that names --replay and the path."""
    saved = checkpoint.read(path, "--replay")
    if not saved.keys() >= KEYS:
        raise ValueError(f"--replay {path}: is not a failed step; pass a failed_step_*.pth.tar from the folder of a run")
    return saved


def run(method: torch.nn.Module, saved: dict, scaler: torch.amp.GradScaler,
        loss_of: Callable[[dict, Callable[[torch.Tensor], None]], torch.Tensor]) -> bool:  # fmt: skip
    """Compute the step in one process, with the run's processes as BatchNorm groups; print where numbers are not finite.

    method: has `bn_splits` times as many groups as the run. loss_of: computes the loss of `saved` by `method`, and gives each
    part of it to a function that goes backward. Returns whether the step failed again.
    """
    method.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
    strange: list[str] = []
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])

    def look(name, module, inputs, output):
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            strange.append(name)

    for name, module in method.named_modules():
        module.register_forward_hook(partial(look, name or "the method"))
    method.train()
    loss = loss_of(saved, lambda part: scaler.scale(part).backward())
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    weights = [name for name, value in method.named_parameters() if not value.isfinite().all()]
    again = not loss.isfinite().item() or bool(bad)
    say(f"epoch {saved['epoch']}, step {saved['step']}, {len(saved['samples'])} images of {saved['processes']} processes: "
        f"loss {loss.item()}")  # fmt: skip
    say(f"weights that are not finite: {_list(weights)}")
    say(f"modules with an output that is not finite, in the order of their calls: {_list(list(dict.fromkeys(strange)))}")
    say(f"parameters with a gradient that is not finite: {len(bad)} of {len(gradients)}")
    say("the step fails again" if again else "the step does not fail here; try the run's --device and --amp")
    return again


def _list(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
