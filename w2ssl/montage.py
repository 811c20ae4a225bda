"""Montages: crops of all images in random order, tiled two by two, and separated again on the feature map.

A crop's number is 2 i + h for half h (0 left, 1 right) of the global batch's image i, 2N crops in all. They make N / 2 montages
of four slots (top-left, top-right, bottom-left, bottom-right), which are dealt to the processes in order.
"""

import numpy as np
import torch
import torch.nn.functional as F

SLOTS = 4


def deal(images: int, rng: np.random.Generator) -> np.ndarray:
    """Which crop lies where: 2N crop numbers, montage after montage, slot after slot. `images`, N, is even.

    With one random permutation of all crops, slot s of montage j takes the one at place s N / 2 + j (METHODS: "W2SSL", 2).
    """
    return rng.permutation(2 * images).reshape(SLOTS, images // 2).T.reshape(-1)


def compose(crops: torch.Tensor) -> torch.Tensor:
    """4m x C x h x w, four after four -> m x C x 2h x 2w."""
    x = crops.unflatten(0, (-1, 2, 2))  # m x row x column x C x h x w
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def separate(features: torch.Tensor) -> torch.Tensor:
    """Feature maps of montages, m x C x h x w of any size -> 4m x C, a vector for each crop in the order of `compose`.

    The map is first resized to 8 x 8, so that four equal quarters can be averaged whatever its size.
    """
    x = F.interpolate(features, (8, 8), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2).flatten(0, 1)
