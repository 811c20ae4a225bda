"""The weights of an evaluation, and the facts that their checkpoint tells: method, architecture and flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.learning import layouts
from utils.learning.method import Method
from utils.run import checkpoint
from utils.run.flags import Parser

FLAG = "--pretrained"
Methods = Mapping[str, type[Method]]


@dataclass(frozen=True)
class Source:
    """Weights to evaluate. method, arch: from a flag, else from the checkpoint, else a default; `facts` says which."""

    method: str
    arch: str
    facts: str
    path: Path | None  # None: the trunk is untrained
    state: dict[str, torch.Tensor]  # all weights of the checkpoint
    flags: dict[str, Any]  # of the run that saved it; empty if the checkpoint does not tell

    @property
    def sha256(self) -> str | None:
        return checkpoint.file_hash(self.path) if self.path else None


def add_weights_flags(parser: Parser, methods: Methods, source: Source | None = None) -> None:
    """The flags that every evaluation has. With a source: the method's own too, and the defaults that its checkpoint tells."""
    group = parser.group("weights")
    add = group.add_argument
    add(FLAG, required=bool(source), identity=False, metavar="PATH",
        help="checkpoint, folder of a run, or `random` for an untrained trunk")  # fmt: skip
    add("--method", choices=methods, help="method that trained the trunk; its published protocol gives the defaults")
    add("-a", "--arch", help="trunk: a timm model, or one of CMC's")
    if source:
        method, own, trained = methods[source.method], Parser(add_help=False), Parser(add_help=False)
        for probed in (group, own.group("own")):
            method.add_probe_flags(probed)
        method.add_flags(trained.group("trained"))
        told = {"method": source.method, "arch": source.arch}
        for name in vars(own.parse_args([])):  # a file that does not tell its identity leaves that open
            if name in source.flags or name not in method.IDENTITY or source.path is None:
                told[name] = source.flags.get(name, trained.get_default(name))
        parser.set_defaults(**told)


def read_source(prog: str, methods: Methods, argv: list[str] | None = None, opened: bool = True) -> Source:
    """Find the weights of --pretrained, and decide method and arch. opened: False reads no file, as if it told nothing.

    Raises ValueError or OSError that names the flag, also if --method contradicts the checkpoint.
    """
    parser = Parser(prog=prog, add_help=False)
    add_weights_flags(parser, methods)
    given = parser.parse_known_args(argv)[0]
    path, saved, state = None, {}, {}
    if opened and given.pretrained not in (None, "random"):
        path = Path(given.pretrained)
        if path.is_dir():
            path = checkpoint.newest(path, FLAG) or path / checkpoint.LATEST
        saved = checkpoint.read(path, FLAG)
        state = layouts.weights_of(saved, f"{FLAG} {path}")
    found, sure = layouts.recognize(saved, state)
    if found and found not in methods:
        raise ValueError(f"{FLAG} {path}: is of method {found}, not one of {', '.join(methods)}; pass another file")
    if given.method and sure and given.method != found:
        raise ValueError(f"--method {given.method}: {path} is a checkpoint of {found}; leave it out, or pass --method {found}")
    method, by = found or next(iter(methods)), "checkpoint" if "method" in saved else "weights' names" if found else "default"
    method, by = (given.method, "flag") if given.method else (method, by)
    named = layouts.arch_of(saved)
    arch, arch_by = given.arch or named or methods[method].ARCH, "flag" if given.arch else "checkpoint" if named else "default"
    return Source(method, arch, f"method {method} ({by}), arch {arch} ({arch_by})", path, state, saved.get("flags", {}))
