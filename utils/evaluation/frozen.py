"""The frozen trunk of an evaluation: its weights, method and arch; eval mode, no gradient, float32 features."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.evaluation import pixels
from utils.learning import amp, layouts
from utils.learning.backbones import Probed
from utils.learning.method import Method
from utils.run import checkpoint, dist
from utils.run.flags import Parser, typed

FLAG = "--pretrained"
Methods = Mapping[str, type[Method]]


@dataclass(frozen=True)
class Source:
    """Weights to evaluate. method, arch: from a flag, else from the checkpoint, else a default; `facts` names these sources."""

    method: str
    arch: str
    facts: str
    path: Path | None  # None: the trunk is untrained
    state: dict[str, torch.Tensor]  # all weights of the checkpoint
    flags: dict[str, Any]  # of the run that saved it; empty if the checkpoint has none
    sha256: str | None  # of the file


def add_weights_flags(parser: Parser, methods: Methods, source: Source | None = None) -> None:
    """Add the flags of every evaluation. With a source: also the method's own flags, and defaults from its checkpoint."""
    group = parser.group("weights")
    add = group.add_argument
    add(FLAG, required=bool(source), identity=False, metavar="PATH",
        help="checkpoint, run folder, `random` (untrained trunk) or `pixels` (no trunk)")  # fmt: skip
    add("--method", choices=methods, help="method that trained the trunk; default: the checkpoint's, else %(default)s")
    add("-a", "--arch", help="trunk: a timm model, or CMC's; default: the checkpoint's, else %(default)s")
    if source:
        method, own, trained = methods[source.method], Parser(add_help=False), Parser(add_help=False)
        for probed in (group, own.group("own")):
            method.add_probe_flags(probed)
        method.add_flags(trained.group("trained"))
        defaults = {"method": source.method, "arch": source.arch}
        for name in vars(own.parse_args([])):  # no default for an identity flag that the file lacks
            if name in source.flags or name not in method.IDENTITY or source.path is None:
                defaults[name] = source.flags.get(name, trained.get_default(name))
        parser.set_defaults(**defaults)


def read_source(prog: str, methods: Methods, argv: list[str] | None = None, opened: bool = True) -> Source:
    """Find the weights of --pretrained, and decide method and arch. opened: whether to read the file.

    The first process reads, once, and sends the others what it has read: a training may write more meanwhile.
    Raises ValueError or OSError that names the flag, also if --method contradicts the checkpoint.
    """
    parser = Parser(prog=prog, add_help=False)
    add_weights_flags(parser, methods)
    given = parser.parse_known_args(argv)[0]
    if given.pretrained == pixels.NAME:
        return Source(given.method or next(iter(methods)), pixels.NAME, "pixels of the views", None, {}, {}, None)
    path, saved, state, sha256, found, sure = None, {}, {}, None, None, False
    if opened and given.pretrained not in (None, "random"):
        path, saved, state, sha256, found, sure = dist.first_process_does(lambda: _weights(given.pretrained))
    if found and found not in methods:
        raise ValueError(f"{FLAG} {path}: is of method {found}, not one of {', '.join(methods)}; pass another file")
    if given.method and sure and given.method != found:
        raise ValueError(f"--method {given.method}: {path} is a checkpoint of {found}; leave it out, or pass --method {found}")
    method, by = found or next(iter(methods)), "checkpoint" if "method" in saved else "weights' names" if found else "default"
    method, by = (given.method, "flag") if given.method else (method, by)
    named = saved.get("flags", {}).get("arch") or saved.get("arch")
    arch, arch_by = given.arch or named or methods[method].ARCH, "flag" if given.arch else "checkpoint" if named else "default"
    return Source(method, arch, f"method {method} ({by}), arch {arch} ({arch_by})", path, state, saved.get("flags", {}), sha256)


def _weights(pretrained):
    """(path, method, arch and flags as far as it tells them, weights, sha256, *recognize()) of a checkpoint."""
    path, saved, sha256 = checkpoint.find(pretrained, FLAG)
    if "probe" in saved:
        raise ValueError(f"{FLAG} {path}: is a checkpoint of a linear probe; pass the one that it probed")
    stated = {name: saved.pop(name) for name in ("method", "arch", "flags") if name in saved}
    stated = {name: value for name, value in stated.items() if isinstance(value, dict if name == "flags" else str)}
    state = layouts.weights_of(saved | stated, f"{FLAG} {path}")
    return path, stated, state, sha256, *layouts.recognize(saved | stated, state)


class Frozen(nn.Module):
    """A trunk in eval mode without gradient. layers: numbers of the layers that `features` returns."""

    def __init__(self, probed: Probed):
        super().__init__()
        self.trunk, self.layers = probed.trunk.eval().requires_grad_(False), probed.layers
        self._features = probed.features

    @torch.no_grad()
    def features(self, x: torch.Tensor, amp_name: str) -> dict[int, torch.Tensor]:
        """n x 3 x H x W of the loader -> layer -> n x C in float32."""
        with amp.autocast(x.device, amp_name):
            return {layer: f.float() for layer, f in self._features(x, self.layers).items()}

    def widths(self, size: int) -> dict[int, int]:
        """layer -> C, for views of this size. Raises ValueError if the trunk cannot take them."""
        view = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        return {layer: f.shape[1] for layer, f in self.features(view, "fp32").items()}

    def choose(self, layers: Sequence[int] | None, arch: str) -> list[int]:
        """Keep only these layers, in ascending order; None keeps the last. Raises ValueError for an unknown layer."""
        chosen = sorted(set(layers or self.layers[-1:]))
        if unknown := [layer for layer in chosen if layer not in self.layers]:
            raise ValueError(f"--layer {unknown[0]}: {arch} has {' '.join(map(str, self.layers))}; pass some of them")
        self.layers = tuple(chosen)
        return chosen


def build_trunk(args: Namespace, method: type[Method], source: Source) -> Frozen:
    """The trunk of --arch with weights of --pretrained or random ones, or `pixels`. Raises ValueError if they do not fit."""
    if args.pretrained == pixels.NAME:
        return Frozen(pixels.probed())
    for name in method.IDENTITY:
        value, trained = vars(args)[name], source.flags.get(name)
        if value is None:
            raise ValueError(f"--{name.replace('_', '-')}: {source.path} does not contain it; pass the value of its training")
        if trained not in (None, value):
            raise ValueError(f"{typed(name, value)}: {source.path} was trained with {trained}; leave it out")
    probed = method.frozen(args)
    if source.path:
        state = method.trunk(source.state, args)
        layouts.load_trunk(probed.trunk, state, probed.classifier, f"--pretrained {source.path}", source.state)
    return Frozen(probed)
