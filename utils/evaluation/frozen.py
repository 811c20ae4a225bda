"""A frozen trunk: eval mode, no gradient, autocast inside, float32 features outside."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import nn

from utils.evaluation.source import Source
from utils.learning import amp, layouts
from utils.learning.method import Method, Probed
from utils.run.flags import typed


class Frozen(nn.Module):
    """The trunk of a method as evaluations use it. layers: the numbers of the layers whose features it gives."""

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
        """Keep these layers only, in rising order; None keeps the last. Raises ValueError for a layer that does not exist."""
        chosen = sorted(set(layers or self.layers[-1:]))
        if unknown := [layer for layer in chosen if layer not in self.layers]:
            raise ValueError(f"--layer {unknown[0]}: {arch} has {' '.join(map(str, self.layers))}; pass some of them")
        self.layers = tuple(chosen)
        return chosen


def build_trunk(args: Namespace, method: type[Method], source: Source) -> Frozen:
    """The trunk of --arch with the weights of --pretrained, or random ones. Raises ValueError if they do not fit."""
    for name in method.IDENTITY:
        value, trained = vars(args)[name], source.flags.get(name)
        if value is None:
            raise ValueError(f"--{name.replace('_', '-')}: {source.path} does not tell it; pass the value of its training")
        if trained not in (None, value):
            raise ValueError(f"{typed(name, value)}: {source.path} was trained with {trained}; leave it out")
    probed = method.frozen(args)
    if source.path:
        state = method.trunk(source.state, args)
        layouts.load_trunk(probed.trunk, state, probed.classifier, f"--pretrained {source.path}", source.state)
    return Frozen(probed)
