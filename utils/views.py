"""What a view is: its specification, the random draws it takes, and how it is cut from an encoded image.

Everything random about a view is a function of (seed, epoch, sample, number of the view) alone. The worker decodes once, cuts
and mirrors each view as uint8, and hands the colour parameters on; utils/photometric.py applies them to a whole batch.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

DRAWS = 40  # random numbers reserved for each view; the columns below say which is which
TRIES = 10  # of a random resized crop, as in torchvision
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
    blur: tuple[float, float] = (0.1, 2.0)  # sigma in pixels
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5
    resize: int | None = None


def moco_v2_view(name: str, size: int, scale: tuple[float, float], count: int = 1) -> ViewSpec:
    """The view of MoCo-v2 and MosRep; global and local views differ in size and scale only."""
    return ViewSpec(name, size, scale, count, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)


def draw(seed: int, epoch: int, sample: int, views: int) -> np.ndarray:
    """views x DRAWS numbers, uniform in [0, 1). Counter-based: row v depends on (seed, epoch, sample, v) and nothing else."""
    bits = np.random.Philox(key=[seed, epoch], counter=[0, sample, 0, 0])
    return np.random.Generator(bits).random((views, DRAWS))


def crop_box(spec: ViewSpec, u: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: torchvision's rule, with ten tries and its central fallback.

    u: one row of `draw`.
    """
    area = height * width * (spec.scale[0] + u[AREA] * (spec.scale[1] - spec.scale[0]))
    low, high = np.log(spec.ratio)
    ratio = np.exp(low + u[RATIO] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w >= 1) & (w <= width) & (h >= 1) & (h <= height))
    if len(fits):
        h, w = int(h[fits[0]]), int(w[fits[0]])
        return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < spec.ratio[0]:
        h = round(width / spec.ratio[0])
    elif width / height > spec.ratio[1]:
        w = round(height * spec.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def color_parameters(spec: ViewSpec, u: np.ndarray) -> np.ndarray:
    """What photometric needs of each view. u: ... x DRAWS -> ... x 8 float32, columns as in photometric.COLUMNS."""
    b, c, s, h = spec.jitter
    out = np.empty((*u.shape[:-1], 8), np.float32)
    out[..., 0] = max(0, 1 - b) + u[..., BRIGHTNESS] * (1 + b - max(0, 1 - b))
    out[..., 1] = max(0, 1 - c) + u[..., CONTRAST] * (1 + c - max(0, 1 - c))
    out[..., 2] = max(0, 1 - s) + u[..., SATURATION] * (1 + s - max(0, 1 - s))
    out[..., 3] = h * (2 * u[..., HUE] - 1)
    out[..., 4] = np.where(u[..., JITTER] < spec.jitter_p, np.floor(24 * u[..., ORDER]), -1)
    out[..., 5] = u[..., GRAY] < spec.gray_p
    out[..., 6] = np.where(u[..., BLUR] < spec.blur_p, spec.blur[0] + u[..., SIGMA] * (spec.blur[1] - spec.blur[0]), 0)
    out[..., 7] = u[..., SOLARIZE] < spec.solarize_p
    return out


def decode(data: bytes) -> torch.Tensor:
    """Encoded image -> 3 x H x W uint8 RGB, channels last in memory. EXIF orientation is ignored, as ImageNet training does.

    PIL, because torchvision's decoders are deprecated since 0.29; both use libjpeg-turbo and give the same pixels.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("I", "I;16"):  # 16-bit PNG: PIL would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode == "P":  # PIL warns of some transparent palettes unless asked for alpha
            image = image.convert("RGBA")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """C x h x w uint8 -> C x height x width uint8, bilinear with antialiasing."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def cut(image: torch.Tensor, spec: ViewSpec, u: np.ndarray) -> torch.Tensor:
    """One view of a decoded image, colours untouched: 3 x size x size uint8. u: one row of `draw`."""
    height, width = image.shape[1:]
    if spec.resize:
        short = min(height, width)
        image = resize(image, spec.resize * height // short, spec.resize * width // short)
        top, left = round((image.shape[1] - spec.size) / 2), round((image.shape[2] - spec.size) / 2)
        return image[:, top : top + spec.size, left : left + spec.size]
    top, left, h, w = crop_box(spec, u, height, width)
    view = resize(image[:, top : top + h, left : left + w], spec.size, spec.size)
    return view.flip(2) if u[FLIP] < spec.flip_p else view
