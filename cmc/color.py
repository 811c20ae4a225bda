"""Colour spaces of CMC's views (docs/methods.md, "CMC"), for a batch on any device, equal to scikit-image's conversions.

Each conversion takes n x 3 x H x W RGB in [0, 1], float32, and returns the three channels of the space in its usual units.
A view is a part of a space: one channel, or two neighbours.
"""

import difflib
import re
from collections import Counter

import numpy as np
import torch

from utils.data.photometric import MEAN, STD

# each row gives one channel. ITU-R BT.601 and related standards; CIE 1931 for sRGB's primaries with white D65
XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = (0.95047, 1.0, 1.08883)
CIE_RGB = np.array([[0.49, 0.31, 0.20], [0.17697, 0.81240, 0.01063], [0.00, 0.01, 0.99]]) / 0.17697  # to XYZ
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # haematoxylin, eosin, DAB (Ruifrok 2001)
LINEAR = {  # space -> (matrix, offset)
    "YCbCr": ([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], (16, 128, 128)),
    "YUV": ([[0.299, 0.587, 0.114], [-0.14714119, -0.28886916, 0.43601035], [0.61497538, -0.51496512, -0.10001026]], (0, 0, 0)),
    "YDbDr": ([[0.299, 0.587, 0.114], [-0.45, -0.883, 1.333], [-1.333, 1.116, 0.217]], (0, 0, 0)),
    "YPbPr": ([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], (0, 0, 0)),
    "YIQ": ([[0.299, 0.587, 0.114], [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]], (0, 0, 0)),
    "RGB-CIE": (np.linalg.inv(CIE_RGB) @ XYZ, (0, 0, 0)),
}
# Middle and half of the range of each channel over all colours. Lab's numbers are the published normalization, YCbCr's the
# published mean and standard deviation. For the other spaces nothing is published; they follow the rule of Lab's numbers.
SCALES = {
    "Lab": ((50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "YCbCr": ((116.151, 121.080, 132.342), (109.5, 111.855, 111.964)),
    "HSV": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "HED": ((0.939, 0.5674, 0.7868), (0.939, 0.5674, 0.7868)),
    "LUV": ((50.0, 45.9683, -13.3491), (50.0, 129.0462, 120.7481)),
    "YUV": ((0.5, 0.0, 0.0), (0.5, 0.436, 0.615)),
    "XYZ": ((0.4752, 0.5, 0.5444), (0.4752, 0.5, 0.5444)),
    "YDbDr": ((0.5, 0.0, 0.0), (0.5, 1.333, 1.333)),
    "YPbPr": ((0.5, 0.0, 0.0), (0.5, 0.5, 0.5)),
    "YIQ": ((0.5, 0.0, 0.0), (0.5, 0.5959, 0.5227)),
    "RGB-CIE": ((0.0744, 0.0914, 0.0964), (0.0891, 0.0914, 0.0964)),
}


def linear(x: torch.Tensor, matrix, offset=(0, 0, 0)) -> torch.Tensor:
    """Multiply the channels of n x 3 x H x W by a 3 x 3 matrix and add an offset."""
    r, g, b = x.unbind(1)
    rows = zip(np.asarray(matrix, float).tolist(), offset, strict=True)
    return torch.stack([0 + i * r + j * g + k * b + float(o) for (i, j, k), o in rows], 1)


def xyz(x: torch.Tensor) -> torch.Tensor:
    """Undo sRGB's gamma (IEC 61966-2-1), then convert to CIE XYZ."""
    return linear(torch.where(x > 0.04045, ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, x / 12.92), XYZ)


def lab(x: torch.Tensor) -> torch.Tensor:
    relative = xyz(x) / per_channel(WHITE, x)
    f = torch.where(relative > 0.008856, relative.clamp(min=0.008856) ** (1 / 3), 7.787 * relative + 16 / 116)
    a, b, c = f.unbind(1)
    return torch.stack([116 * b - 16, 500 * (a - b), 200 * (b - c)], 1)


def luv(x: torch.Tensor) -> torch.Tensor:
    a, b, c = xyz(x).unbind(1)
    light = torch.where(b > 0.008856, 116 * b.clamp(min=0.008856) ** (1 / 3) - 16, 903.3 * b)
    whole = (a + 15 * b + 3 * c).clamp(min=torch.finfo(x.dtype).eps)
    white = WHITE[0] + 15 * WHITE[1] + 3 * WHITE[2]
    un, vn = 4 * WHITE[0] / white, 9 * WHITE[1] / white
    # u = 13 L (4 X / whole - un) and v likewise, with the difference in the numerator: float32 loses less there
    u = 13 * light * ((4 - un) * a - 15 * un * b - 3 * un * c) / whole
    v = 13 * light * (-vn * a + (9 - 15 * vn) * b - 3 * vn * c) / whole
    return torch.stack([light, u, v], 1)


def hsv(x: torch.Tensor) -> torch.Tensor:
    """Hue, saturation and value in [0, 1]. The hue of a grey pixel is 0."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == b, 4 + (r - g) / divisor, torch.where(value == g, 2 + (b - r) / divisor, (g - b) / divisor))
    hue = torch.where(chroma > 0, hue / 6 % 1, 0)
    return torch.stack([hue, torch.where(chroma > 0, chroma / value.clamp(min=1e-12), 0), value], 1)


def hed(x: torch.Tensor) -> torch.Tensor:
    """Optical density of the stains, by colour deconvolution (Ruifrok 2001)."""
    density = x.clamp(min=1e-6).log() / float(np.log(1e-6))
    return linear(density, np.linalg.inv(STAINS).T).clamp(min=0)


CURVED = {"Lab": lab, "HSV": hsv, "HED": hed, "LUV": luv, "XYZ": xyz}
SPACES = tuple(SCALES)
FIRST, OTHERS = slice(0, 1), slice(1, 3)  # the channels of the two views of a space


def per_channel(values, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1).to(x.device, non_blocking=True)


def convert(rgb: torch.Tensor, space: str) -> torch.Tensor:
    """n x 3 x H x W RGB in [0, 1] -> n x 3 x H x W in the units of the space."""
    return linear(rgb, *LINEAR[space]) if space in LINEAR else CURVED[space](rgb)


def _parts() -> dict[str, tuple[str, slice]]:
    """Name of a view -> (space, its channels).

    A name that several spaces have is that of Lab or YCbCr, the published spaces. In the others the space comes first: HSV-H.
    """
    found = []
    for space in SPACES:
        channels = re.findall("[A-Z][br]?|[ab]", space)[:3]
        found += [(space, "".join(channels[part]), part) for part in (FIRST, OTHERS, slice(0, 2), slice(1, 2), slice(2, 3))]
    spaces = Counter(name for _, name, _ in found)

    def short(space, name):
        return space in ("Lab", "YCbCr") or (spaces[name] == 1 and space != "RGB-CIE")  # R alone would be sRGB's

    return {name if short(space, name) else f"{space}-{name}": (space, part) for space, name, part in found}


PARTS = _parts()


def view_names(space: str) -> list[str]:
    """The views of a value of --space: L and ab of `Lab`, the named ones of `L+ab+Y`."""
    two = [name for name, (of, part) in PARTS.items() if of == space and part in (FIRST, OTHERS)]
    return two or space.split("+")


def space_of(views: list[str]) -> str:
    """The value of --space with these views; a name of a space if they are its two. Raises ValueError."""
    for name in views:
        if name not in PARTS:
            near = [part for part in PARTS if part.endswith(f"-{name}")] or difflib.get_close_matches(name, PARTS, 3, 0)
            raise ValueError(f"{name} is no part of a colour space; pass {' or '.join(near)}")
        if views.count(name) > 1:
            raise ValueError(f"{name} is there twice; pass each view once")
    if len(views) < 2:
        raise ValueError("one view has nothing to be contrasted with; pass two, such as L ab")
    return next((space for space in SPACES if view_names(space) == views), "+".join(views))


def channels_of(view: str) -> int:
    part = PARTS[view][1]
    return part.stop - part.start


def color_views(views: torch.Tensor, space: str) -> list[torch.Tensor]:
    """n x 3 x H x W, uint8 or normalized with ImageNet's mean -> the normalized views of --space, n x 1 or 2 x H x W each."""
    if views.is_floating_point():
        rgb = (views * per_channel(STD, views) + per_channel(MEAN, views)).clamp(0, 1)
    else:
        rgb = views.float() / 255
    parts, whole = [PARTS[name] for name in view_names(space)], {}
    for of, _ in parts:
        if of not in whole:
            middle, half = SCALES[of]
            whole[of] = (convert(rgb, of) - per_channel(middle, rgb)) / per_channel(half, rgb)
    return [whole[of][:, part] for of, part in parts]
