"""Checkpoints: their names, the newest of a folder, and how they are read without executing code."""

import argparse
import hashlib
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LATEST = "checkpoint_latest.pth.tar"
ALLOWED: list = [argparse.Namespace]  # besides tensors and plain data: CMC's released checkpoints hold their flags


def name_of(epoch: int, step: int) -> str:
    """The name of the checkpoint after `epoch` whole epochs and `step` steps of the next; without steps the published one."""
    return f"checkpoint_{epoch:04d}_{step:06d}.pth.tar" if step else f"checkpoint_{epoch - 1:04d}.pth.tar"


def place_of(path: Path) -> tuple[float, float]:
    """(whole epochs, steps of the next) from a checkpoint's name; infinite for LATEST and other names."""
    if found := re.fullmatch(r"checkpoint_(\d{4,})(?:_(\d{6,}))?\.pth\.tar", path.name):
        return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)
    return math.inf, 0


def saved_in(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, the newest first by (epoch, step). LATEST, another name of the newest, is left out."""
    paths = (path for path in folder.glob("checkpoint_*.pth.tar") if place_of(path)[0] < math.inf)
    return sorted(paths, key=place_of, reverse=True)


def surplus(paths: list[Path], keep: int, keep_epochs: int) -> list[Path]:
    """Those of a run's checkpoints that are neither among the newest `keep` nor of every `keep_epochs`-th epoch (0: none)."""
    places = {path: place_of(path) for path in sorted(paths, key=place_of, reverse=True)}
    return [path for path, (epoch, step) in places.items() if step or not keep_epochs or epoch % keep_epochs][keep:]


class Checkpoint(NamedTuple):
    """A file that was read once. sha256: of the bytes that were read, if asked for; the name may belong to another file now."""

    path: Path
    content: dict
    sha256: str


def find(path: Path | str, flag: str) -> Checkpoint:
    """A checkpoint, or the newest in a folder. Raises as `read` does."""
    return (newest(path, flag, hashed=True) if Path(path).is_dir() else None) or _read(Path(path), flag, hashed=True)


def newest(folder: Path | str, flag: str, hashed: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint in a folder, by the (epoch, step) in its content; None if the folder has no checkpoint.

    A corrupt one is named in a warning, and the one before it is taken. Raises ValueError if all are corrupt.
    """
    there = [path for path in (*saved_in(Path(folder)), Path(folder) / LATEST) if path.exists()]
    corrupt: list[Path] = []
    for path in sorted(there, key=_place_in, reverse=True):
        if any(path.samefile(other) for other in corrupt):
            continue
        try:
            found = _read(path, flag, hashed)
        except FileNotFoundError:  # a running training has deleted it
            continue
        except ValueError as error:
            corrupt.append(path)
            reason = error
        else:
            for bad in corrupt:
                print(f"warning: {bad} is corrupt; using {path}", flush=True)
            return found
    if corrupt:
        raise ValueError(f"{reason}; there is no other checkpoint in {folder}")
    return None


def _place_in(path: Path) -> tuple[float, float]:
    """(epoch, step) in a checkpoint. If its content cannot be read, its name decides; a corrupt LATEST comes first."""
    try:
        content = _unpickled(str(path), mmap=True)  # reads no tensor
        return int(content["epoch"]), int(content.get("step", 0))
    except Exception:  # any error of the unpickler: `read` reports it
        return place_of(path)


def flag_of(path: Path, name: str) -> Any:
    """A flag of the run in its checkpoint, without reading tensors; None if it has none. `read` reports what is wrong."""
    try:
        return _unpickled(str(path), mmap=True)["flags"].get(name)
    except Exception:  # any error of the unpickler
        return None


def _unpickled(file, **how):
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(file, map_location="cpu", weights_only=True, **how)


def read(path: Path | str, flag: str) -> dict:
    """A checkpoint, on the CPU, with verified checksums. Executes no code in it: refuses all but plain data and tensors.

    Raises FileNotFoundError or ValueError, in one line that names flag and path.
    """
    return _read(Path(path), flag).content


def _read(path, flag, hashed=False):
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file; pass a checkpoint such as {LATEST}")
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):  # torch before 1.6 wrote another format, without checksums
                with zipfile.ZipFile(file) as archive:
                    if broken := archive.testzip():  # torch itself does not look at the checksums
                        raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hashed else ""  # a resume does not need it
            file.seek(0)
            content = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(file)
    except FileNotFoundError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag} {path}: needs the package {error.name}; run pip install {error.name}") from None
    except Exception as error:  # torch raises errors of many types for a file of another kind
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = (f"it holds a {code[1]}, which is code and not data; save it again as plain tensors, numbers and strings"
                  if code else f"not a readable checkpoint ({type(error).__name__}); pass a complete one")  # fmt: skip
        raise ValueError(f"{flag} {path}: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary of weights")
    return Checkpoint(path, content, sha256)


def _safetensors(path):
    """{"state_dict": tensors}, and `arch` and `method` if the file's metadata has them."""
    from safetensors import safe_open  # optional

    with safe_open(path, "pt") as file:
        stated = {name: text for name, text in (file.metadata() or {}).items() if name in ("arch", "method")}
        return stated | {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def fingerprint(path: Path) -> tuple:
    """The names, sizes and checksums in the directory of a checkpoint's file; empty if there is none, or of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        return ()


def check_types(saved: dict, types: dict[str, type], refusal: str) -> None:
    """Raise ValueError unless a checkpoint has these entries, of these types, and no negative number among them."""
    for name, kind in types.items():
        value = saved.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            found = f"{name} is {value!r:.40}" if name in saved else f"no {name}"
            raise ValueError(f"{refusal} ({found}); pass one of the same run")


def bare(model: nn.Module) -> Any:  # a Method, for example
    """The module inside DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def prefixed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the published `module.` prefix, whether or not DDP wraps the model."""
    return {f"module.{name}": value for name, value in bare(model).state_dict().items()}


def unprefixed(state_dict: dict) -> dict:
    """The state dict without that prefix."""
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
