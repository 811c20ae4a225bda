"""What a view is: its specification, the random draws it takes, and how it is cut from an encoded image.

Everything random about a view is a function of (seed, epoch, sample, number of the view) alone. The worker decodes once, cuts
each view as uint8, and draws the parameters of all that is done to whole batches (utils/data/photometric.py).
"""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils.run import streams

try:
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

DRAWS = 40  # random numbers reserved for each view; the columns below say which is which
TRIES = 10  # of a random resized crop, as in torchvision
SPARE = 2  # pixels of a crop for each pixel of its view, along a side, that decoding at a reduced size must leave
AREA, RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, SIGMA, SOLARIZE = range(20, 33)


@dataclass(frozen=True)
class ViewSpec:
    """A kind of view (METHODS.md, "Shared augmentation vocabulary"). Sizes in pixels, probabilities in [0, 1].

    `count` views of the kind are cut from every image. With `resize` set the view is not random: the shorter side is resized to
    `resize` and the centre cut out.
    """

    name: str
    size: int
    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    count: int = 1
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False  # before the jitter, not after it
    blur: tuple[float, float] = (0.1, 2.0)  # sigma in pixels
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5
    resize: int | None = None
    part: tuple[float, float] = (0.0, 1.0)  # of the image's width, of which the view is cut


def moco_v2_view(name: str, size: int, scale: tuple[float, float], count: int = 1) -> ViewSpec:
    """The view of MoCo-v2 and MosRep; global and local views differ in size and scale only."""
    return ViewSpec(name, size, scale, count, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)


def moco_v1_view(name: str, size: int, scale: tuple[float, float]) -> ViewSpec:
    """The view of MoCo-v1 and InsDis: gray before a jitter that is always made, no blur."""
    return ViewSpec(name, size, scale, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2, gray_first=True)


def draw(seed: int, epoch: int, sample: int, views: int) -> np.ndarray:
    """views x DRAWS numbers, uniform in [0, 1). Counter-based: row v depends on (seed, epoch, sample, v) and nothing else."""
    return streams.view_numbers(seed, epoch, sample, (views, DRAWS))


def crop_box(spec: ViewSpec, u: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: torchvision's rule, with ten tries and its central fallback.

    Of the part of the image that the view may show. u: one row of `draw`.
    """
    start, end = (round(share * width) for share in spec.part)
    start = min(start, width - 1)
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


def parameters_of(spec: ViewSpec, u: np.ndarray) -> np.ndarray:
    """What photometric needs of each view. u: ... x DRAWS -> ... x 9 float32, columns as in photometric.COLUMNS."""
    b, c, s, h = spec.jitter
    out = np.empty((*u.shape[:-1], 9), np.float32)
    out[..., 0] = max(0, 1 - b) + u[..., BRIGHTNESS] * (1 + b - max(0, 1 - b))
    out[..., 1] = max(0, 1 - c) + u[..., CONTRAST] * (1 + c - max(0, 1 - c))
    out[..., 2] = max(0, 1 - s) + u[..., SATURATION] * (1 + s - max(0, 1 - s))
    out[..., 3] = h * (2 * u[..., HUE] - 1)
    out[..., 4] = np.where(u[..., JITTER] < spec.jitter_p, np.floor(24 * u[..., ORDER]), -1)
    out[..., 5] = (u[..., GRAY] < spec.gray_p) * (2 if spec.gray_first else 1)
    out[..., 6] = np.where(u[..., BLUR] < spec.blur_p, spec.blur[0] + u[..., SIGMA] * (spec.blur[1] - spec.blur[0]), 0)
    out[..., 7] = u[..., SOLARIZE] < spec.solarize_p
    out[..., 8] = 0 if spec.resize else u[..., FLIP] < spec.flip_p
    return out


def cut_views(data: bytes, specs: list[ViewSpec], u: np.ndarray) -> list[torch.Tensor]:
    """Decode an image once and cut every view from it, colours untouched and not mirrored: each 3 x size x size uint8.

    u: a row of `draw` for each view, in the order of specs. A JPEG is decoded at a half, a quarter or an eighth of its size
    where every crop still has SPARE times the pixels of its view along a side, so that none loses detail. Raises whatever PIL
    raises for bytes that are no image, and for more pixels than Image.MAX_IMAGE_PIXELS.
    """
    kinds = [spec for spec in specs for _ in range(spec.count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata and the like: the pixels are decoded all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            boxes = [None if spec.resize else crop_box(spec, row, height, width) for spec, row in zip(kinds, u, strict=True)]
            spare = min(min(box[2:]) / spec.size if box else 1 for box, spec in zip(boxes, kinds, strict=True)) / SPARE
            pixels = _pixels(image, data, max(r for r in (1, 2, 4, 8) if r <= max(spare, 1)))  # H x W x 3
    pixels = pixels.unsqueeze(0).permute(0, 3, 1, 2)  # 1 x 3 x H x W, channels last in memory: the fastest to resize
    reduction = round(width / pixels.shape[3])
    return [
        _crop(pixels, box, reduction, spec.size) if box else _centre(pixels, spec)
        for box, spec in zip(boxes, kinds, strict=True)
    ]


def _pixels(image, data, reduction):
    """An opened image, whose bytes are `data` -> H x W x 3 uint8.

    Only JPEGs are reduced. EXIF orientation is ignored, as ImageNet training does. torchvision decodes the ordinary JPEG, a
    quarter faster than PIL and to the same pixels; PIL does all else, and everything once torchvision has lost its decoders,
    which are deprecated since 0.29.
    """
    if image.format == "JPEG" and image.mode in ("RGB", "L") and reduction == 1 and decode_jpeg:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB").permute(1, 2, 0)
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    if image.mode in ("I", "I;16"):  # 16-bit PNG: PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":  # with a transparent colour, perhaps
        image = image.convert("RGBA")
    return torch.from_numpy(np.array(image.convert("RGB")))


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """1 x C x h x w uint8 -> 1 x C x height x width uint8, bilinear with antialiasing."""
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)


def _crop(image, box, reduction, size):
    """The box (top, left, height, width of the whole image) of an image decoded at 1 / reduction: 3 x size x size."""
    top, left, height, width = box
    top, bottom = round(top / reduction), round((top + height) / reduction)
    left, right = round(left / reduction), round((left + width) / reduction)
    return resize(image[:, :, top:bottom, left:right], size, size)[0]


def _centre(image, spec):
    """The test view: shorter side to spec.resize, then the central spec.size."""
    height, width = image.shape[2:]
    short = min(height, width)
    image = resize(image, spec.resize * height // short, spec.resize * width // short)
    top, left = round((image.shape[2] - spec.size) / 2), round((image.shape[3] - spec.size) / 2)
    return image[0, :, top : top + spec.size, left : left + spec.size]
