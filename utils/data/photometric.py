"""All augmentations except the crop: OPERATIONS, view by view, with parameters of each view.

The formulas are PIL's, which torchvision uses too. They are computed in float32 and rounded once, at the end. Pixels are in
[0, 255]. An operation changes 1 x 3 x H x W in place and takes a value. photometric_batch.py has them for a whole batch on an
accelerator.

To add an augmentation, write its operation, add it to OPERATIONS before the flip, write it for a batch in `colored` of
photometric_batch.py, and add its draw to DRAWS in views.py.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

ORDERS = list(itertools.permutations(range(4)))  # of the color jitter's operations, by order code
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL


def photometric(views: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Apply to each view the operations that its parameters select.

    views: ... x 3 x H x W uint8; parameters: ... x len(COLUMNS) float32, on the CPU. Returns a new uint8 tensor of the shape
    of `views`. A view's result does not depend on the other views.
    """
    x = views.reshape(-1, *views.shape[-3:])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for i, row in enumerate(parameters.reshape(-1, len(COLUMNS)).tolist()):  # one view stays in a core's cache
        part, (*steps, last) = out[i : i + 1], _steps(row)
        pixels = torch.empty_like(part, dtype=torch.float32).copy_(x[i : i + 1])
        _apply_(pixels, steps)
        part.copy_(pixels.round_().to(torch.int16))  # via int16: CPUs have no fast conversion from float32 to uint8
        _apply_(part, [last])  # the flip, which is faster on bytes than on floats
    return out.view(views.shape)


def normalized(views: torch.Tensor) -> torch.Tensor:
    """Normalize ... x 3 x H x W uint8 by ImageNet's mean and deviation, to float32. Float views are returned unchanged."""
    if views.is_floating_point():
        return views
    fake_mode = getattr(views, "fake_mode", None)
    mean, factor = _mean_and_factor(views.device, fake_mode)
    if fake_mode or views.device.type != "cpu":  # fake tensors stand for a GPU
        return (views - mean).mul_(factor)
    out = torch.empty_like(views, dtype=torch.float32)
    _normalize_into(out, views, mean, factor)
    return out


def _normalize_into(out, views, mean, factor):
    if views.ndim > 3:  # one view stays in a core's cache
        for part, view in zip(out, views, strict=True):
            _normalize_into(part, view, mean, factor)
    else:
        out.copy_(views).sub_(mean).mul_(factor)


@functools.cache  # one upload for each device
@torch.inference_mode(False)  # the tensors of a first call in that mode could not be used outside
def _mean_and_factor(device, _):
    """3 x 1 x 1 each. The second argument keeps fake tensors, which belong to a mode, from other calls."""
    mean, std = (255 * torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return mean.to(device, non_blocking=True), (1 / std).to(device, non_blocking=True)


def _steps(row):
    """(operation or None, value) for each of OPERATIONS, in the order in which this view takes them. row: its parameters."""
    order, *values = row
    steps = [(f if value != neutral else None, value) for (f, neutral), value in zip(OPERATIONS.values(), values, strict=True)]
    jitter = steps[JITTER]
    steps[JITTER] = [jitter[i] for i in ORDERS[int(order)]] if order >= 0 else [(None, 0)] * len(jitter)
    return steps


def _apply_(x, steps):
    for operation, value in steps:
        if operation:
            operation(x, value)


def _channels(x):
    return x.unsqueeze(1).unbind(2)  # 3 of n x 1 x H x W


def luma(x: torch.Tensor) -> torch.Tensor:
    """The gray values of n x 3 x H x W: n x 1 x H x W."""
    r, g, b = _channels(x)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def brightness_(x: torch.Tensor, factor: float) -> None:
    x.mul_(factor).clamp_(0, 255)


def contrast_(x: torch.Tensor, factor: float) -> None:
    mean = luma(x.mean((2, 3), keepdim=True))  # luma is linear
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def saturation_(x: torch.Tensor, factor: float) -> None:
    torch.lerp(luma(x), x, factor, out=x).clamp_(0, 255)


def hue_(x: torch.Tensor, shift: float) -> None:
    """Shift the hue of HSV (PIL's hexcone model) by `shift` turns, without divisions and branches.

    With v = max, m = min, c = v - m, hues lie on a ring of length 6c: green at 0, blue at 2c, red at -2c. A pixel lies at
    p = sign(b - r) (r + b - g + v - 2m). A channel with its hue at o c is v up to a distance of c, and m from 2c on. It
    falls linearly in between: clamp(v + c - d, m, v). Around the ring, the shifted pixel has the distance
    d = | |p + a c| - 3c | from that hue, with a = 6 shift - o + 3 wrapped into [-3, 3).
    """
    r, g, b = _channels(x)
    v, m = torch.maximum(r, g), torch.minimum(r, g)
    v, m = torch.maximum(v, b, out=v), torch.minimum(m, b, out=m)
    c = v - m
    place = torch.copysign((c - m).add_(r).add_(b).sub_(g), b - r)
    a = torch.tensor([(6 * shift - o) % 6 - 3 for o in (-2, 0, 2)]).view(3, 1, 1)
    distance = torch.addcmul(place, c, a, out=x).abs_().sub_(c, alpha=3).abs_()
    torch.clamp(torch.sub(c.add_(v), distance, out=x), m, v, out=x)


def gray_(x: torch.Tensor, _: float) -> None:
    x.copy_(luma(x).expand_as(x))


def blur_(x: torch.Tensor, sigma: float) -> None:
    """Separable Gaussian, sigma in pixels. The kernel ends at round(3 sigma) pixels; pixels at the edge are repeated."""
    weights = _half_kernel(sigma)
    radius = len(weights) - 1
    padded = F.pad(x, (radius,) * 4, mode="replicate").contiguous()
    plane, row, _ = padded.stride()[1:]
    out = padded.view(1, 1, 1, -1)  # flat: a shift along rows or columns is a shift in memory; wrapped pixels are cut off
    for step in (1, row):
        near = out.unfold(3, out.shape[3] - 2 * radius * step, step).unbind(3)  # shifted by -radius to radius
        out = near[radius] * weights[0]
        for i in range(1, radius + 1):
            for side in (near[radius - i], near[radius + i]):
                out = out.add_(side, alpha=weights[i])
    x.copy_(out.as_strided(x.shape, (out.stride(0), plane, row, 1)))


def _half_kernel(sigma):
    """The weights of a kernel at 0, 1, ... round(3 sigma)."""
    bell = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(round(3 * sigma) + 1)]
    return [weight / (2 * sum(bell) - bell[0]) for weight in bell]


def solarize_(x: torch.Tensor, _: float) -> None:
    torch.where(x >= 127.5, 255 - x, x, out=x)


def flip_(x: torch.Tensor, _: float) -> None:
    x.copy_(x.flip(3))


OPERATIONS: dict[str, tuple[Callable[[torch.Tensor, float], None], float]] = {
    # parameter: (operation, the value that leaves a view unchanged), in the order of application
    "gray_first": (gray_, 0),
    "brightness": (brightness_, 1),  # factor; the color jitter's four are applied in the order of the order code
    "contrast": (contrast_, 1),  # factor
    "saturation": (saturation_, 1),  # factor
    "hue": (hue_, 0),  # turns, [-0.5, 0.5]
    "gray": (gray_, 0),
    "sigma": (blur_, 0),  # pixels
    "solarize": (solarize_, 0),
    "flip": (flip_, 0),  # must be the last
}
JITTER = slice(1, 5)
COLUMNS = ("order", *OPERATIONS)  # of a view's parameters; order: an index of ORDERS, or -1 for no color jitter
