"""Pixels of what networks see, for pictures that people look at."""

from collections.abc import Sequence

import torch
from torchvision.utils import draw_bounding_boxes

from utils.data.photometric import MEAN, STD

SHOWN = 8  # images of a batch in a picture
SIDE = 128  # pixels to which small images are enlarged
GREY, CONTRAST = 128, 60  # brightness of a normalized value of 0, and of a difference of 1


def as_uint8(x: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W, uint8 or normalized -> uint8 on the CPU."""
    if x.dtype == torch.uint8:
        return x.cpu()
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return ((x.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def grey(x: torch.Tensor) -> torch.Tensor:
    """n x H x W, one normalized channel -> n x 3 x H x W uint8 on the CPU."""
    return (GREY + CONTRAST * x.float().cpu()).round().clamp(0, 255).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)


def boxed(images: torch.Tensor, boxes: torch.Tensor, names: Sequence[Sequence[str]], colours: dict[str, str]) -> torch.Tensor:
    """Draw boxes into images, n x 3 x H x W uint8, after they are enlarged by a whole factor to about SIDE pixels.

    boxes: m x (x1, y1, x2, y2) in pixels, the same for all images. names: of each image's boxes, n x m. colours: of a name.
    """
    factor = max(1, SIDE // images.shape[-1])
    large = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    drawn = [draw_bounding_boxes(image, boxes * factor + factor // 2, colors=[colours[name] for name in own])
             for image, own in zip(large, names, strict=True)]  # fmt: skip
    return torch.stack(drawn)
