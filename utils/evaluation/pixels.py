"""`--pretrained pixels`: the pixels of a view as its features, the baseline that every trunk must beat."""

from torch import nn

from utils.learning.backbones import Probed

NAME = "pixels"
LAYER = 0


def probed() -> Probed:
    """As a trunk: n x 3 x H x W uint8 -> n x (3 H W) in [0, 1]."""
    return Probed(nn.Identity(), (LAYER,), "", lambda x, _: {LAYER: x.flatten(1).float() / 255})
