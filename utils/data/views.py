"""The views of an image: their specification, their random draws, and their crops.

The random numbers of a view are a function of (seed, epoch, sample id, number of the view) only. A worker decodes an image
once, crops each view as uint8, and draws the parameters of the operations in photometric.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.decode import decode, open_image, stored_size
from utils.data.photometric import COLUMNS
from utils.run import streams

NUMBERS = 40  # uniform random numbers of a view: 0 to 21 for its crop, 22 to 39 for DRAWS
TRIES = 10  # number of tries of a random resized crop, as in torchvision
AREA, RATIO, TOP, LEFT = slice(0, TRIES), slice(TRIES, 2 * TRIES), 20, 21
LONGEST = 32  # longer side / shorter side up to which a test view resizes the whole image
SPARE = 2  # a JPEG is decoded at a reduced size only if each crop keeps SPARE times the pixels of its view along a side


@dataclass(frozen=True)
class ViewSpec:
    """A kind of view; `count` of them are cropped from every image. Sizes in pixels, probabilities in [0, 1].

    With `resize` the view is not random: the shorter side of the image is resized to `resize`, and the centre is cropped.
    """

    name: str
    size: int
    scale: tuple[float, float] = (0.2, 1.0)  # area of a crop, as a share of the image
    count: int = 1
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False  # before the jitter, instead of after it
    blur: tuple[float, float] = (0.1, 2.0)  # sigma in pixels
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5
    resize: int | None = None
    bicubic: bool = False  # of a view with `resize`: how it is resized, instead of bilinear
    part: tuple[float, float] = (0.0, 1.0)  # the crop lies in this part of the image's width; pixels are rounded down


def side_before_crop(size: int) -> int:
    """The shorter side to which evaluations resize an image before they cut `size` pixels: 256 for 224."""
    return size * 256 // 224


def moco_v2_view(name: str, size: int, scale: tuple[float, float], count: int = 1) -> ViewSpec:
    """The view of MoCo-v2 (arXiv:2003.04297) and MosRep. Global and local views differ in size and scale only."""
    return ViewSpec(name, size, scale, count, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)


def moco_v1_view(name: str, size: int, scale: tuple[float, float]) -> ViewSpec:
    """The view of InsDis (arXiv:1805.01978) and MoCo-v1: gray before a jitter with probability 1, no blur."""
    return ViewSpec(name, size, scale, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2, gray_first=True)


def draw(seed: int, epoch: int, sample_id: int, views: int) -> np.ndarray:
    """views x NUMBERS, uniform in [0, 1). Row v depends on (seed, epoch, sample_id, v) alone."""
    return streams.view_numbers(seed, epoch, sample_id, (views, NUMBERS))


def _factor(strength, u):
    low = max(0, 1 - strength)
    return low + u * (1 + strength - low)


DRAWS: dict[str, tuple[tuple[int, ...], Callable[..., np.ndarray]]] = {
    # parameter of photometric: (its numbers of `draw`, its values by the spec and arrays of these numbers). 33 to 39 are free.
    # A number never changes its use; otherwise a seed would give other views.
    "order": ((23, 28), lambda spec, chance, u: np.where(chance < spec.jitter_p, np.floor(24 * u), -1)),
    "gray_first": ((29,), lambda spec, chance: spec.gray_first & (chance < spec.gray_p)),
    "brightness": ((24,), lambda spec, u: _factor(spec.jitter[0], u)),
    "contrast": ((25,), lambda spec, u: _factor(spec.jitter[1], u)),
    "saturation": ((26,), lambda spec, u: _factor(spec.jitter[2], u)),
    "hue": ((27,), lambda spec, u: spec.jitter[3] * (2 * u - 1)),
    "gray": ((29,), lambda spec, chance: (not spec.gray_first) & (chance < spec.gray_p)),
    "sigma": ((30, 31), lambda spec, chance, u:
        np.where(chance < spec.blur_p, spec.blur[0] + u * (spec.blur[1] - spec.blur[0]), 0)),
    "solarize": ((32,), lambda spec, chance: chance < spec.solarize_p),
    "flip": ((22,), lambda spec, chance: (not spec.resize) & (chance < spec.flip_p)),
}  # fmt: skip


def parameters_of(spec: ViewSpec, u: np.ndarray) -> np.ndarray:
    """The parameters of views for `photometric`: ... x NUMBERS of `draw` -> ... x len(COLUMNS) float32."""
    out = np.empty((*u.shape[:-1], len(COLUMNS)), np.float32)
    for column, (numbers, values) in enumerate(DRAWS[name] for name in COLUMNS):
        out[..., column] = values(spec, *(u[..., i] for i in numbers))
    return out


def crop_box(spec: ViewSpec, u: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop within spec.part of the image. u: one row of `draw`.

    The rule is torchvision's: ten tries, then the largest central crop with an allowed ratio.
    """
    start, end = (int(share * width) for share in spec.part)
    width = max(1, end - start)
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for area, ratio in zip(u[AREA].tolist(), u[RATIO].tolist(), strict=True):
        area = height * width * (spec.scale[0] + area * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return int(u[TOP] * (height - h + 1)), start + int(u[LEFT] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < spec.ratio[0]:
        h = round(width / spec.ratio[0])
    elif width / height > spec.ratio[1]:
        w = round(height * spec.ratio[1])
    return (height - h) // 2, start + (width - w) // 2, h, w


def cut_views(
    data: bytes, specs: list[ViewSpec], u: np.ndarray, places: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Decode an image once and crop every view, in the order of specs, each 3 x size x size uint8.

    u: a row of `draw` for each view; places: the memory of the views, or else new memory. A JPEG is decoded at 1/2, 1/4 or 1/8
    of its size if no view loses detail: every crop must keep SPARE times the pixels of its view along a side. Raises the errors
    of decode.py, of many types.
    """
    kinds = [spec for spec in specs for _ in range(spec.count)]
    with open_image(data) as image:
        width, height = stored_size(image)
        boxes = [None if spec.resize else crop_box(spec, row, height, width) for spec, row in zip(kinds, u, strict=True)]
        spare = min(min(box[2:]) / spec.size if box else 1 for box, spec in zip(boxes, kinds, strict=True)) / SPARE
        pixels = decode(image, data, max(r for r in (1, 2, 4, 8) if r <= max(spare, 1)))  # H x W x 3
    pixels = pixels.unsqueeze(0).permute(0, 3, 1, 2)  # 1 x 3 x H x W in channels-last memory, the fastest to resize
    reduction = round(width / pixels.shape[3])
    places = places or [torch.empty(spec.size, spec.size, 3, dtype=torch.uint8).permute(2, 0, 1) for spec in kinds]
    for place, box, spec in zip(places, boxes, kinds, strict=True):
        if box:
            _crop(pixels, box, reduction, place)
        else:
            place.copy_(_centre(pixels, spec))
    return places


def resize(image: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """Resize 1 x C x h x w uint8 to 1 x C x height x width with antialiasing; mode: bilinear or bicubic."""
    return F.interpolate(image, (height, width), mode=mode, antialias=True, align_corners=False)


def _crop(image, box, reduction, place):
    """Resize a part of an image decoded at 1 / reduction into `place`. box: (top, left, height, width) at its full size.

    It calls the operation of F.interpolate directly, because F.interpolate always allocates its result.
    """
    top, left, height, width = box
    top, bottom = round(top / reduction), round((top + height) / reduction)
    left, right = round(left / reduction), round((left + width) / reduction)
    part = image[:, :, top:bottom, left:right]
    torch.ops.aten._upsample_bilinear2d_aa.out(part, place.shape[1:], False, None, None, out=place.unsqueeze(0))


def _centre(image, spec):
    """The view for evaluation: the shorter side is resized to spec.resize, and the central spec.size pixels are cropped.

    Of an image that is longer than LONGEST times its shorter side, only the middle is resized.
    """
    short = min(image.shape[2:])
    for side in (2, 3):
        spare = (image.shape[side] - LONGEST * short) // 2  # the same on both ends, so the centre stays
        if spare > 0:
            image = image.narrow(side, spare, image.shape[side] - 2 * spare)
    height, width = image.shape[2:]
    mode = "bicubic" if spec.bicubic else "bilinear"
    image = resize(image, spec.resize * height // short, spec.resize * width // short, mode)
    top, left = round((image.shape[2] - spec.size) / 2), round((image.shape[3] - spec.size) / 2)
    return image[0, :, top : top + spec.size, left : left + spec.size]
