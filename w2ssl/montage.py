"""Montages: crops of all images in random order, joined two by two, and separated again on the feature map.

The crop of half h (0 left, 1 right) of image i in the global batch has number 2 i + h. The 2N crops make N / 2 montages of four
slots (top-left, top-right, bottom-left, bottom-right). Each process gets an equal range of the montages.
"""

import numpy as np
import torch
import torch.nn.functional as F

SLOTS = 4


def deal(images: int, rng: np.random.Generator) -> np.ndarray:
    """The crop numbers of all slots, 2N, montage by montage. `images`, N, is even.

    Slot s of montage j takes the crop at place s N / 2 + j of one random permutation (docs/methods.md, "W2SSL", 2).
    """
    return rng.permutation(2 * images).reshape(SLOTS, images // 2).T.reshape(-1)


def compose(crops: torch.Tensor) -> torch.Tensor:
    """4m x C x h x w, four consecutive crops for each montage -> m x C x 2h x 2w."""
    x = crops.unflatten(0, (-1, 2, 2))  # m x row x column x C x h x w
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def separate(features: torch.Tensor) -> torch.Tensor:
    """Feature maps of montages, m x C x h x w -> 4m x C, a vector for each crop in the order of `compose`.

    The map is resized to 8 x 8 first, so four equal quarters exist for any h and w.
    """
    x = F.interpolate(features, (8, 8), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2).flatten(0, 1)
