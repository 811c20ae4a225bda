"""Resuming a run: its output folder, its newest checkpoint, and every reason why --resume is refused."""

import tempfile
from pathlib import Path

from utils.run import checkpoint, dist, lock, mirror
from utils.run.files import second_name
from utils.run.flags import Flags, meaning, typed
from utils.run.log import say, write_config
from utils.run.text import shown

ELSEWHERE = "pass that, or another --output-dir"
OR_END = "pass that, or --resume the checkpoint of an epoch's end"
TYPES = {"flags": dict, "index": str, "method": str, "arch": str, "state_dict": dict, "optimizer": dict, "scaler": dict,
         "epoch": int, "step": int}  # fmt: skip
ORDER = ("batch_size", "lanes", "seed")  # flags that decide the order of the images in an epoch


def open_folder(folder: Path | str, dry: bool = False) -> Path:
    """Make and lock a folder of results. Raises as `open_run` does. Call on process 0."""
    folder = Path(folder)
    try:
        if not dry:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
        (lock.check if dry else lock.take)(folder)
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: {error.strerror}; pass a folder you may write to") from None
    return folder


def open_run(folder: Path | str, resume: str | None, dry: bool = False, mirrored: str | None = None) -> Path | None:
    """Make and lock the output folder of a run. Returns the checkpoint to resume, None for a new run. Call on process 0.

    resume: the value of --resume. dry: only check. mirrored: the value of --mirror. Raises ValueError if the folder cannot be
    written, holds another run, or another process runs in it.
    """
    folder = open_folder(folder, dry)
    used = bool(checkpoint.saved_in(folder)) or (folder / checkpoint.LATEST).exists()
    if resume is None and used:
        raise ValueError(f"--output-dir {folder}: holds a run already; pass --resume auto to resume it, or another folder")
    if resume not in (None, "auto") and used and Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"--output-dir {folder}: holds another run, which --resume {resume} would overwrite; pass another")
    for left in [] if dry else folder.glob(".checkpoint_*.tmp"):  # of a save that was killed
        left.unlink(missing_ok=True)
    if mirrored:
        mirror.attach(folder, mirrored, resume, dry)
    if resume == "auto":
        return found.path if (found := checkpoint.newest(folder, "--resume auto")) else None
    return Path(resume) if resume else None


def begin(folder: Path, args: Flags, resumed: Path | None, start: tuple[int, int], **facts) -> None:
    """Record a start of a run in its folder, when all checks have passed. Call on the first process.

    The checkpoints after `start` are renamed, so that the folder continues from the one that was resumed.
    """
    write_config(folder, args, start, resumed=str(resumed) if resumed else None, **facts)
    later = [path for path in checkpoint.saved_in(folder) if checkpoint.place_of(path) > start]
    if resumed and later and resumed.name != checkpoint.LATEST:
        second_name(resumed, checkpoint.LATEST)
    for path in later:
        path.rename(path.with_name(f"abandoned_{path.name}"))
        say(f"warning: {path} is later than the checkpoint that is resumed; renamed to abandoned_{path.name}")


def restore(path: Path, args: Flags, index_hash: str, steps: int, method, optimizer,
            scaler) -> tuple[tuple[int, int], dict | None]:  # fmt: skip
    """Load a checkpoint of the same run. method: a Method, not wrapped in DDP.

    Returns the epoch and the step to resume at, and the record of the run's --init.

    steps: of an epoch. Weights and moments are those of the checkpoint; the optimizer's settings are those of the flags.
    Raises ValueError for a checkpoint of another run.
    """
    saved = read_together(path, "--resume")
    changed = _check_same_run(saved, path, args, index_hash, steps, method)
    for name in changed:
        say(f"warning: --{name.replace('_', '-')} was {saved['flags'][name]} in {path.name}, is now {getattr(args, name)}")
    if saved["index"] != index_hash:
        say(f"warning: --shards {shown(args.shards)} differ from the shards of {path.name}")
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    part = "weights"
    try:
        method.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
        part = "optimizer or loss scaler"
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(saved["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        flags = ", ".join(typed(name, saved["flags"][name]) for name in changed) or "another version of this code"
        wrong = f"its {part} have other names or shapes, those of a run with {flags}"
        raise ValueError(f"--resume {path}: {wrong}; {ELSEWHERE}") from None
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    return (saved["epoch"], saved["step"]), saved.get("init")


def read_together(path: Path, flag: str) -> dict:
    """A checkpoint, on every process. A node that has not the first process's file gets its content from there."""
    same = dist.gather_objects(checkpoint.fingerprint(path))
    saved = checkpoint.read(path, flag) if same[dist.rank()] == same[0] else {}
    return saved if len(set(same)) == 1 else dist.broadcast_object(saved)


def _check_same_run(saved, path, args, index_hash, steps, method):
    """Raise ValueError if flags and data would make another run of the checkpoint; returns the flags that have changed."""
    checkpoint.check_types(saved, TYPES, f"--resume {path}: is not a checkpoint of main_pretrain.py")
    for name in ("method", "arch"):
        if saved[name] != getattr(args, name):
            raise ValueError(f"--resume {path}: is a run with --{name} {saved[name]}, not {getattr(args, name)}; {ELSEWHERE}")
    init = saved.get("init")
    if args.init and (not isinstance(init, dict) or init["source"] != shown(args.init)):
        started = f"--init {init['source']}" if isinstance(init, dict) else "random weights"
        raise ValueError(f"--init {shown(args.init)}: {path} is of a run that started from {started}; leave it out, or pass "
                         "another --output-dir")  # fmt: skip
    before, done, inside = saved["flags"], saved["epoch"] >= args.epochs, saved["step"] > 0
    changed = [name for name, value in meaning(args).items() if before.get(name, value) != value]
    for name in changed:
        now, was = typed(name, getattr(args, name)), typed(name, before[name])
        if inside and name in ORDER:
            raise ValueError(f"{now}: was {before[name]} in {path}, inside an epoch; the flag decides its order; {OR_END}")
        if done and name != "amp":  # auto is the machine's choice
            raise ValueError(f"{now}: was {was} in {path}, and its {saved['epoch']} epochs are done; {ELSEWHERE}")
        if name in method.IDENTITY:
            raise ValueError(f"{now}: {path} was trained with {was}; {ELSEWHERE}")
    if "trust" in changed and not (args.trust and before["trust"]):
        raise ValueError(f"--trust {args.trust:g}: was {before['trust']:g} in {path}, and 0 has another optimizer; {ELSEWHERE}")
    if saved["index"] != index_hash and (done or inside or method.PER_IMAGE):
        if inside:
            why = f" is inside an epoch of other images; {OR_END}"
        else:
            why = " was trained on other images, and its epochs are done" if done else " holds features of other images"
            why += "; pass these images, or another --output-dir"
        raise ValueError(f"--shards {shown(args.shards)}: {path}{why}")
    if saved["step"] > steps:
        raise ValueError(f"--resume {path}: is at step {saved['step']} of an epoch of {steps}; pass another checkpoint")
    return changed
