"""The frozen trunk of an evaluation: its weights, method and arch; eval mode, no gradient, float32 features."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.evaluation import pixels
from utils.learning import amp, layouts, torchvision_names
from utils.learning.backbones import Probed
from utils.learning.contrast import counters_on_host_
from utils.learning.method import Method
from utils.run import checkpoint, dist, weights
from utils.run.flags import Flags, Parser, typed

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
    layout: str = ""  # of the file, in words
    flag: str = FLAG  # that named the weights


def add_weights_flags(parser: Parser, methods: Methods, source: Source | None = None, flag: str = FLAG) -> None:
    """Add the flags of every evaluation. With a source: also the method's own flags, and defaults from its checkpoint.

    flag: --pretrained, or the name of a positional argument in its place; with a source, that of the source.
    """
    group, flag = parser.group("weights"), source.flag if source else flag
    add = group.add_argument
    text = "checkpoint, run, name of weights.json, https://, hf://"
    if flag == FLAG:
        text += ", `random` (untrained) or `pixels` (no trunk)"
        add(FLAG, required=bool(source), identity=False, metavar="PATH", help=text)
    else:
        add("pretrained", nargs=None if source else "?", identity=False, metavar=flag, help=text)
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


class Weights(NamedTuple):
    """A file of weights that was read."""

    path: Path | None
    stated: dict[str, Any]  # method, arch and flags, as far as the file has them
    state: dict[str, torch.Tensor]  # all its weights
    sha256: str | None
    layout: str  # in words
    method: str | None
    only: bool  # whether no other method can read it


def open_weights(spec: str, flag: str) -> Weights:
    """Read a checkpoint, the newest of a run, or weights of a name or URL. Raises ValueError or OSError that names the flag."""
    path, saved, sha256 = checkpoint.find(weights.fetch(spec, flag), flag)
    if "probe" in saved:
        raise ValueError(f"{flag} {path}: is a checkpoint of a linear probe; pass the one that it probed")
    if "finetune" in saved:
        raise ValueError(f"{flag} {path}: is a checkpoint of a fine-tuning; pass the one that it started from")
    stated = {name: saved.pop(name) for name in ("method", "arch", "flags") if name in saved}
    stated = {name: value for name, value in stated.items() if isinstance(value, dict if name == "flags" else str)}
    state, container = layouts.weights_of(saved | stated, f"{flag} {path}"), layouts.container_of(saved)
    layout = layouts.layout_of(state, container).title + (f" ({container})" if container in ("teacher", "student") else "")
    layout = f"{stated['method']} of this code" if "method" in stated else layout
    return Weights(path, stated, state, sha256, layout, *layouts.recognize(saved | stated, state))


def read_source(prog: str, methods: Methods, argv: list[str] | None = None, opened: bool = True, flag: str = FLAG) -> Source:
    """Find the weights of --pretrained, and decide method and arch. opened: whether to read the file. flag: see above.

    The first process reads, once, and sends the others what it has read: a training may write more meanwhile.
    Raises ValueError or OSError that names the flag, also if --method contradicts the checkpoint.
    """
    parser = Parser(prog=prog, add_help=False)
    add_weights_flags(parser, methods, flag=flag)
    given = parser.parse_known_args(argv)[0]
    if given.pretrained == pixels.NAME:
        return Source(given.method or next(iter(methods)), pixels.NAME, "pixels of the views", None, {}, {}, None, flag=flag)
    found = Weights(None, {}, {}, None, "", None, False)
    if opened and given.pretrained not in (None, "random"):
        found = dist.first_process_does(lambda: open_weights(given.pretrained, flag))
    if found.method and found.method not in methods:
        known = ", ".join(methods)
        raise ValueError(f"{flag} {found.path}: is of method {found.method}, not one of {known}; pass another file")
    if given.method and found.only and given.method != found.method:
        raise ValueError(f"--method {given.method}: {found.path} is a checkpoint of {found.method}; leave it out, or pass "
                         f"--method {found.method}")  # fmt: skip
    method, by = found.method or next(iter(methods)), "checkpoint" if "method" in found.stated else "weights' names"
    method, by = (given.method, "flag") if given.method else (method, by if found.method else "default")
    flags = found.stated.get("flags", {})
    stated = flags.get("arch") or found.stated.get("arch")
    named = layouts.arch_of(found.state, stated)
    arch_by = "flag" if given.arch else "checkpoint" if stated else "weights' shapes" if named else "default"
    arch = given.arch or named or methods[method].ARCH
    facts = f"method {method} ({by}), arch {arch} ({arch_by})"
    return Source(method, arch, facts, found.path, found.state, flags, found.sha256, found.layout, flag)


class Frozen(nn.Module):
    """A trunk in eval mode without gradient. layers: numbers of the layers that `features` returns."""

    def __init__(self, probed: Probed):
        super().__init__()
        self.trunk, self.layers = probed.trunk.eval().requires_grad_(False), probed.layers
        self.features_of, self.maps_of = probed.features, probed.maps

    @torch.no_grad()
    def features(self, x: torch.Tensor, amp_name: str) -> dict[int, torch.Tensor]:
        """n x 3 x H x W of the loader -> layer -> n x C in float32."""
        with amp.autocast(x.device, amp_name):
            return {layer: f.float() for layer, f in self.features_of(x, self.layers).items()}

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


def trunk_identity(method: type[Method]) -> list[str]:
    """The flags of a method's IDENTITY that decide the meaning of its trunk: evaluations have them too."""
    method.add_probe_flags((parser := Parser(add_help=False)).group("own"))
    return [name for name in method.IDENTITY if name in parser.parse_args([])]


def build_trunk(args: Namespace, method: type[Method], source: Source) -> Frozen:
    """The trunk of --arch with weights of --pretrained or random ones, or `pixels`. Raises ValueError if they do not fit."""
    if args.pretrained == pixels.NAME:
        return Frozen(pixels.probed())
    for name in trunk_identity(method):
        value, trained = vars(args)[name], source.flags.get(name)
        if value is None:
            raise ValueError(f"--{name.replace('_', '-')}: {source.path} does not contain it; pass the value of its training")
        if trained not in (None, value):
            raise ValueError(f"{typed(name, value)}: {source.path} was trained with {trained}; leave it out")
    probed = method.frozen(args)
    if source.path:
        state = torchvision_names.converted(method.trunk(source.state, args), probed.trunk, args.arch)
        layouts.load_trunk(probed.trunk, state, probed.classifier, f"{source.flag} {source.path}", source.state)
        if dist.rank() == 0:  # not `say`, because torch.hub has no TensorBoard
            tensors = len(probed.trunk.state_dict())
            print(f"{source.path}: {source.layout}, {tensors} tensors, trunk {args.arch}", flush=True)
    return Frozen(probed)


class Live(Frozen):
    """A copy of the trunk of a method in training, as an evaluation of a checkpoint builds it. All processes call `load`."""

    def __init__(self, args: Flags, method: type[Method], device: torch.device):
        probed = method.frozen(args)
        super().__init__(probed)
        self.args, self.method, self.classifier = args, method, probed.classifier
        self.to(device).to(memory_format=torch.channels_last)
        counters_on_host_(self)  # as those of the training, so that `load` copies no number that the host would wait for

    def load(self, model: nn.Module) -> None:
        """Copy the weights of a method, with the first process's statistics of BatchNorm, as a checkpoint has them."""
        state = self.method.trunk(checkpoint.prefixed(model), self.args)
        layouts.load_trunk(self.trunk, state, self.classifier, "the live trunk")
        dist.from_first_([x for x in self.trunk.buffers() if x.is_floating_point()])  # the others are equal on all processes
