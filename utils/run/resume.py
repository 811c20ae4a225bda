"""Resuming a run: its output folder, its newest checkpoint, and every reason why --resume is refused."""

import tempfile
from pathlib import Path

from utils.run import checkpoint
from utils.run.flags import Flags, meaning, typed
from utils.run.log import say

ELSEWHERE = "pass that, or another --output-dir"
KEYS = {"flags", "index", "method", "arch", "state_dict", "optimizer", "scaler", "epoch", "step"}
ORDER = ("batch_size", "lanes", "seed")  # flags that decide the order of the images in an epoch


def open_run(folder: Path | str, resume: str | None) -> Path | None:
    """Make the output folder of a run and find the checkpoint to resume, None for a new run. Call on the first process.

    resume: the value of --resume. Raises ValueError if the folder cannot be written, or holds another run.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: {error.strerror}; pass a folder you may write to") from None
    used = bool(checkpoint.saved_in(folder)) or (folder / checkpoint.LATEST).exists()
    if resume is None and used:
        raise ValueError(f"--output-dir {folder}: holds a run already; pass --resume auto to resume it, or another folder")
    if resume not in (None, "auto") and used and Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"--output-dir {folder}: holds another run, which --resume {resume} would overwrite; pass another")
    for left in folder.glob(".checkpoint_*.tmp"):  # of a save that was killed
        left.unlink(missing_ok=True)
    return checkpoint.newest(folder, "--resume auto") if resume == "auto" else Path(resume) if resume else None


def restore(path: Path, args: Flags, index_hash: str, method, optimizer, scaler) -> tuple[int, int]:
    """Load a checkpoint of the same run; returns the epoch and the step to resume at. method: a Method, not wrapped in DDP.

    Raises ValueError for a checkpoint of another run.
    """
    saved = checkpoint.read(path, "--resume")
    changed = _check_same_run(saved, path, args, index_hash, method)
    for name in changed:
        say(f"warning: --{name.replace('_', '-')} was {saved['flags'][name]} in {path.name}, is now {getattr(args, name)}")
    if saved["index"] != index_hash:
        say(f"warning: --shards {args.shards} are not the ones {path.name} was trained on")
    try:
        method.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
    except RuntimeError:
        flags = ", ".join(typed(name, saved["flags"][name]) for name in changed) or "another version of this code"
        wrong = f"its weights have other names or shapes, those of a run with {flags}"
        raise ValueError(f"--resume {path}: {wrong}; {ELSEWHERE}") from None
    optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:  # empty unless the run was in fp16
        scaler.load_state_dict(saved["scaler"])
    return saved["epoch"], saved["step"]


def _check_same_run(saved, path, args, index_hash, method):
    """Raise ValueError if flags and data would make another run of the checkpoint; returns the flags that have changed."""
    if not saved.keys() >= KEYS:
        raise ValueError(f"--resume {path}: is not a checkpoint of main_pretrain.py; pass one of the same run")
    for name in ("method", "arch"):
        if saved[name] != getattr(args, name):
            raise ValueError(f"--resume {path}: is a run with --{name} {saved[name]}, not {getattr(args, name)}; {ELSEWHERE}")
    before, done = saved["flags"], saved["epoch"] >= args.epochs
    changed = [name for name, value in meaning(args).items() if before.get(name, value) != value]
    for name in changed:
        now, was = typed(name, getattr(args, name)), typed(name, before[name])
        if saved["step"] and name in ORDER:
            raise ValueError(f"{now}: was {before[name]}, and {path} lies inside an epoch, whose order depends on it; "
                             "pass that, or --resume the checkpoint of an epoch's end")  # fmt: skip
        if done and name != "amp":  # auto is the machine's choice
            raise ValueError(f"{now}: was {was} in {path}, whose {saved['epoch']} epochs are done; {ELSEWHERE}")
        if name in method.IDENTITY:
            raise ValueError(f"{now}: {path} was trained with {was}; {ELSEWHERE}")
    if saved["index"] != index_hash and (done or method.PER_IMAGE):
        why = ", whose epochs are done, was trained on other images" if done else " holds features of other images"
        raise ValueError(f"--shards {args.shards}: {path}{why}; pass those, or another --output-dir")
    return changed
