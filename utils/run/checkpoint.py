"""Checkpoints: their names, which one to go on from, read without unpickling code, in the layouts the field uses."""

import argparse
import hashlib
import pickle
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LATEST = "checkpoint_latest.pth.tar"
# where published checkpoints keep the trunk (METHODS.md, last table); the first prefix that occurs decides
PREFIXES = (
    "module.encoder_q.", "encoder_q.", "module.base_encoder.", "module.momentum_encoder.", "module.encoder.", "encoder.module.",
    "module.", "",
)  # fmt: skip
# what a checkpoint may hold beside tensors and plain data: the flags of CMC's released ones
ALLOWED = [argparse.Namespace]


def name_of(epoch: int, step: int) -> str:
    """The name of the checkpoint after `epoch` whole epochs and `step` steps of the next; without steps the published one."""
    return f"checkpoint_{epoch:04d}_{step:06d}.pth.tar" if step else f"checkpoint_{epoch - 1:04d}.pth.tar"


def epoch_at_end(path: Path) -> int | None:
    """How many whole epochs a checkpoint of this name has, None if it lies inside an epoch."""
    found = re.fullmatch(r"checkpoint_(\d{4,})\.pth\.tar", Path(path).name)
    return int(found[1]) + 1 if found else None


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the one that was written last first. LATEST is one more name of that one, and left out."""
    paths = [p for p in Path(folder).glob("checkpoint_*.pth.tar") if re.fullmatch(r"checkpoint_[\d_]+\.pth\.tar", p.name)]
    return sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def open_run(folder: str, resume: str | None) -> Path | None:
    """Make the output folder of a run and find the checkpoint to resume from, None for a new run. Call on the first process."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: {error.strerror}; pass a folder you may write to") from None
    there = [p for p in (folder / LATEST, *saved_in(folder)) if p.exists()]
    there.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)  # a run may have been killed before it moved LATEST on
    if resume is None and there:
        raise ValueError(f"--output-dir {folder}: holds a run already; pass --resume auto to continue it, or another folder")
    if resume not in (None, "auto") and there and Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"--output-dir {folder}: holds another run, which --resume {resume} would go over; pass another")
    for left in folder.glob(".checkpoint_*.tmp"):  # of a save that was killed
        left.unlink(missing_ok=True)
    if resume != "auto":
        return Path(resume) if resume else None
    return _newest_whole(there) if there else None


def _newest_whole(paths):
    damaged = []
    for path in paths:
        if any(path.samefile(other) for other, _ in damaged):
            continue
        fault = _damage(path)
        if fault is None:
            for bad, why in damaged:
                print(f"warning: {bad} is damaged ({why}); going on from {path}", flush=True)
            return path
        damaged.append((path, fault))
    raise ValueError(f"--resume auto: {', '.join(str(path) for path, _ in damaged)}: damaged, and there is no other "
                     "checkpoint; pass --resume PATH of one elsewhere, or another --output-dir")  # fmt: skip


def _damage(path):
    """What is wrong with a file of torch.save, None if nothing: torch itself does not look at the checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        return str(error)
    return f"{broken} in it is" if broken else None


def load(path: Path, flag: str) -> dict:
    """A checkpoint, on the CPU. Nothing in it is executed: what needs more than plain data and tensors is refused by name."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file; pass a checkpoint such as {LATEST}")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds a {named[1]}, which is code and not data" if named else "it is not a readable checkpoint"
        raise ValueError(f"{flag} {path}: {what}; save it again as plain tensors, numbers and strings") from None
    except Exception as error:  # torch passes on whatever its unpickler meets in a file that is none
        raise ValueError(f"{flag} {path}: not a readable checkpoint ({type(error).__name__}); is it complete?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def bare(model: nn.Module) -> nn.Module:
    """The module inside DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def prefixed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the published `module.` prefix, whether or not DDP wraps the model."""
    return {f"module.{name}": value for name, value in bare(model).state_dict().items()}


def unprefixed(state_dict: dict) -> dict:
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def trunk_state(state_dict: dict) -> dict[str, torch.Tensor]:
    """The encoder's part of a state dict, with the names of the timm or torchvision model, its head still on it."""
    prefix = next(p for p in PREFIXES if any(name.startswith(p) for name in state_dict) or not p)
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def weights_of(saved: dict, source: str) -> dict:
    """The state dict in a checkpoint, or the checkpoint itself if it is one. Raises ValueError for anything else."""
    state = saved.get("state_dict", saved.get("model", saved))
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: holds no weights by name; pass a checkpoint of a model")
    return state


def load_trunk(trunk: nn.Module, state: dict, classifier: str, source: str) -> None:
    """Load a trunk whose weights `state` must cover exactly; only what belongs to the classifier is left out.

    Raises ValueError that lists the keys which are missing, left over or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    wanted = trunk.state_dict()
    faults = {
        "missing": wanted.keys() - state.keys(),
        "not in the trunk": state.keys() - wanted.keys(),
        "of another shape": [n for n in wanted.keys() & state.keys() if wanted[n].shape != getattr(state[n], "shape", None)],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(sorted(keys))}" for what, keys in faults.items() if keys)
        raise ValueError(f"{source}: does not cover the trunk exactly ({listed}); pass the --arch it was trained with")
    trunk.load_state_dict(state)


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
