"""--init: a new run starts from weights of another training."""

import re
from argparse import Namespace
from collections.abc import Mapping

import torch

from utils.learning import layouts, torchvision_names
from utils.learning.method import Method


def load(method: Method, args: Namespace, state: Mapping[str, torch.Tensor], same: bool, source: str) -> str:
    """Load the trunk of a file into every trunk of a method; from a file of the same method also heads and queue that fit.

    state: the weights of the file. source: flag and path. Returns the loaded and the fresh parts, in words.

    A head is loaded whole or not at all. A queue has keys of the heads, so it is loaded only with all of them. A bank has
    features of the images of one data set: it starts fresh. Raises ValueError if the trunk does not fit.
    """
    probed = method.frozen(args)
    try:
        theirs_trunk = torchvision_names.converted(method.trunk(dict(state), args), probed.trunk, args.arch)
        layouts.load_trunk(probed.trunk, theirs_trunk, probed.classifier, source, state)
    except ValueError:
        if (arch := layouts.arch_of(state)) not in (None, args.arch):
            raise ValueError(f"{source}: its trunk is {arch}, not {args.arch}; pass --arch {arch}") from None
        raise
    trunk, own = probed.trunk.state_dict(), method.state_dict()
    first = next(iter(trunk))
    starts = [name.removesuffix(first) for name in own if name.endswith(first)]
    starts = [start for start in starts if all(start + name in own for name in trunk)]  # of the method's trunks: encoder_q. ...
    theirs = {re.sub(r"^module\.|(?<=^encoder\.)module\.", "", name): value for name, value in state.items()} if same else {}
    theirs |= {n.removeprefix(starts[0]): v for n, v in theirs.items() if n.removeprefix(starts[0]) not in theirs}

    def fits(name):
        return name.endswith("num_batches_tracked") or getattr(theirs.get(name), "shape", None) == own[name].shape

    new: dict[str, torch.Tensor] = {}
    for start in starts:
        its_own = all(fits(start + name) for name in trunk)  # a key encoder
        new |= {start + name: theirs.get(start + name, value) if its_own else value for name, value in trunk.items()}
    groups: dict[str, list[str]] = {}
    for name in own.keys() - new.keys():
        inside = next((name.removeprefix(start) for start in starts if name.startswith(start)), name)
        groups.setdefault(re.sub("_(q|k|ptr)$", "", inside.partition(".")[0]), []).append(name)
    learned = {name for name, _ in method.named_parameters()}
    heads = {group for group, names in groups.items() if not learned.isdisjoint(names)}
    loaded = [group for group in sorted(heads) if all(map(fits, groups[group]))]
    if len(loaded) == len(heads) and not method.PER_IMAGE:
        loaded += [group for group in sorted(groups.keys() - heads) if all(map(fits, groups[group]))]
    for group in loaded:
        new |= {name: theirs[name] for name in groups[group] if name in theirs}
    method.load_state_dict(own | new)
    fresh = sorted(groups.keys() - set(loaded))
    return f"loaded: {', '.join([f'trunk ({len(starts)} x)', *loaded])}; fresh: {', '.join([*fresh, 'optimizer'])}"
