"""Flip, colour jitter, grayscale, blur, solarize and normalisation of a whole batch on any device, parameters view by view.

The formulas are PIL's (which torchvision's transforms follow), in float with one rounding to uint8 at the end instead of one
after each operation. Pixels lie in [0, 255]. Each operation changes n x 3 x H x W in place and takes n values.
"""

import itertools
import math

import torch
import torch.nn.functional as F

COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize", "flip")
ORDERS = list(itertools.permutations(range(4)))  # by order code; 0 to 3 are brightness, contrast, saturation, hue
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's grey


def photometric(views: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """... x 3 x H x W uint8 on any device, ... x 9 float32 on the CPU -> a new uint8 tensor of the same shape.

    Parameters (see views.parameters_of): factors of brightness, contrast and saturation (1 = as it is); hue shift in turns
    [-0.5, 0.5]; order code 0..23, or -1 for no jitter; gray flag, 2 for gray before the jitter; blur sigma in pixels, or 0;
    solarize flag; flip flag. They stay on the CPU, where which view takes which operation is known without asking the device.
    A view's result does not depend on the views beside it.
    """
    x = views.reshape(-1, *views.shape[-3:])
    steps = [_steps(row) for row in parameters.reshape(-1, len(COLUMNS)).tolist()]
    on_cpu = views.device.type == "cpu"
    out = torch.empty_like(x, memory_format=torch.contiguous_format if on_cpu else torch.preserve_format)
    together = 1 if on_cpu else max(1, len(x))  # one view stays in a core's cache from the first operation to the last
    for i in range(0, len(x), together):
        part = out[i : i + together]
        pixels = torch.empty_like(part, dtype=torch.float32).copy_(x[i : i + together])
        _apply_(pixels, [step[:-1] for step in steps[i : i + together]])
        part.copy_(pixels.round_().to(torch.int16))  # on the way to uint8: CPUs have no fast step there from float32
        _apply_(part, [step[-1:] for step in steps[i : i + together]])  # bytes are turned round faster than floats
    return out.view(views.shape)


def normalized(views: torch.Tensor) -> torch.Tensor:
    """... x 3 x H x W uint8 -> float32, with ImageNet's mean 0 and standard deviation 1. Floats, which are so already, pass."""
    if views.is_floating_point():
        return views
    mean, std = ((255 * torch.tensor(c)).view(3, 1, 1).to(views.device, non_blocking=True) for c in (MEAN, STD))
    return views.float().sub_(mean).mul_(1 / std)


def _steps(row):
    """What is done to a view, in order: nine of (operation or None, value)."""
    order = ORDERS[int(row[4])] if row[4] >= 0 else ()
    jitter = [(ADJUST[i] if row[i] != NEUTRAL[i] else None, row[i]) for i in order] or [(None, 0)] * 4
    gray, *rest = row[5:]
    later = [(operation if value > 0 else None, value) for operation, value in zip(LATER, rest, strict=True)]
    return [(gray_ if gray == 2 else None, 0), *jitter, (gray_ if gray == 1 else None, 0), *later]


def _apply_(x, steps):
    if len(x) == 1:
        for operation, value in steps[0]:
            if operation:
                operation(x, [value])
        return
    for step in zip(*steps, strict=True):  # one for each view
        for operation in dict.fromkeys(operation for operation, _ in step if operation):
            picked = [i for i, (o, _) in enumerate(step) if o is operation]
            there = torch.tensor(picked).to(x.device, non_blocking=True)
            part = x.index_select(0, there)
            operation(part, [step[i][1] for i in picked])
            x.index_copy_(0, there, part)


def _spread(values, x):
    """A value for each view of x: n x 1 x 1 x 1, or the number itself, which CPUs take faster."""
    return values[0] if len(values) == 1 else torch.tensor(values).view(-1, 1, 1, 1).to(x.device, non_blocking=True)


def _channels(x):  # n x 3 x H x W -> 3 of n x 1 x H x W
    return x.unsqueeze(1).unbind(2)


def luma(x: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W -> n x 1 x H x W."""
    r, g, b = _channels(x)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def brightness_(x, factors):
    x.mul_(_spread(factors, x)).clamp_(0, 255)


def contrast_(x, factors):
    factor, mean = _spread(factors, x), luma(x.mean((2, 3), keepdim=True))  # luma is linear
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def saturation_(x, factors):
    torch.lerp(luma(x), x, _spread(factors, x), out=x).clamp_(0, 255)


def hue_(x, shifts):
    """Turn the hue of HSV, the hexcone model that PIL uses, by `shifts` turns; without divisions and without cases.

    With v = max, m = min, c = v - m, the full colours lie on a ring of length 6c: green at 0, blue at 2c, red at -2c, a colour
    at p = sign(b - r) (r + b - g + v - 2m). A channel whose own colour lies at o c is v up to a distance of c, m from 2c on,
    and falls linearly between: clamp(v + c - d, m, v). The distance of the turned colour from it, around the ring, is
    d = | |p + a c| - 3c |, with a = 6 shift - o + 3 brought into [-3, 3).
    """
    r, g, b = _channels(x)
    v, m = torch.maximum(r, g), torch.minimum(r, g)
    v, m = torch.maximum(v, b, out=v), torch.minimum(m, b, out=m)
    c = v - m
    place = torch.copysign((c - m).add_(r).add_(b).sub_(g), b - r)
    a = torch.tensor([[(6 * shift - o) % 6 - 3 for o in (-2, 0, 2)] for shift in shifts]).view(-1, 3, 1, 1)
    distance = torch.addcmul(place, c, a.to(x.device, non_blocking=True), out=x).abs_().sub_(c, alpha=3).abs_()
    torch.clamp(torch.sub(c.add_(v), distance, out=x), m, v, out=x)


def gray_(x, _):
    x.copy_(luma(x).expand_as(x))


def blur_(x, sigmas):
    """Gaussian, separable; each kernel is cut at three of its sigmas, rounded, and edges are repeated."""
    kernels = [_half_kernel(sigma) for sigma in sigmas]
    radius = max(map(len, kernels)) - 1
    weights = [_spread([k[i] if i < len(k) else 0.0 for k in kernels], x) for i in range(radius + 1)]
    padded = F.pad(x, (radius,) * 4, mode="replicate").contiguous()
    plane, row, _ = padded.stride()[1:]
    out = padded.view(
        len(x), 1, 1, -1
    )  # a step along a row or a column is one along the memory; what crosses an edge is not used
    for step in (1, row):
        near = out.unfold(3, out.shape[3] - 2 * radius * step, step).unbind(3)  # shifted by -radius to radius
        out = near[radius] * weights[0]
        for i in range(1, radius + 1):
            for side in (near[radius - i], near[radius + i]):
                out = out.add_(side, alpha=weights[i]) if len(x) == 1 else out.addcmul_(side, weights[i])
    x.copy_(out.as_strided(x.shape, (out.stride(0), plane, row, 1)))


def _half_kernel(sigma):
    """The weights of the middle and of one side."""
    bell = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(round(3 * sigma) + 1)]
    return [weight / (2 * sum(bell) - bell[0]) for weight in bell]


def solarize_(x, _):
    torch.where(x >= 127.5, 255 - x, x, out=x)


def flip_(x, _):
    x.copy_(x.flip(3))


ADJUST, NEUTRAL = (brightness_, contrast_, saturation_, hue_), (1, 1, 1, 0)
LATER = (blur_, solarize_, flip_)
