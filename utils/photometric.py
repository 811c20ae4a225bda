"""Colour jitter, grayscale, blur, solarize and normalisation of a whole batch on any device, parameters view by view.

The formulas are PIL's (which torchvision's transforms follow), in float instead of uint8.
"""

import itertools

import torch
import torch.nn.functional as F

COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")
ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # row = order code; brightness, contrast, saturation, hue
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's grey


def photometric(views: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """... x 3 x H x W uint8 on any device, ... x 8 float32 on the CPU -> the same shape, float32, normalised.

    Parameters (see views.color_parameters): factors of brightness, contrast and saturation (1 = as it is); hue shift in turns
    [-0.5, 0.5]; order code 0..23, or -1 for no jitter; gray flag; blur sigma in pixels, or 0; solarize flag. They stay on the
    CPU, where which view takes which operation is known without asking the device.
    """
    shape = views.shape
    x = views.reshape(-1, *shape[-3:]).float().div_(255)
    p = parameters.reshape(-1, len(COLUMNS))
    jittered = p[:, 4] >= 0
    if jittered.any():
        order = ORDERS[p[:, 4].long().clamp_min(0)]
        for slot in range(4):
            for operation, adjust in enumerate(ADJUST):
                where = jittered & (order[:, slot] == operation) & (p[:, operation] != NEUTRAL[operation])
                _on(x, where, adjust, p[:, operation])
    _on(x, p[:, 5] > 0, lambda x, _: luma(x).expand_as(x), p[:, 5])
    _on(x, p[:, 6] > 0, gaussian_blur, p[:, 6])
    _on(x, p[:, 7] > 0, lambda x, _: torch.where(x >= 128 / 255, 1 - x, x), p[:, 7])
    mean, std = (x.new_tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return x.sub_(mean).div_(std).reshape(shape)


def _on(x, where, operation, values):
    """Apply `operation` in place to the views that `where` (bool, on the CPU) picks, each with its own value."""
    picked = where.nonzero().squeeze(1)
    if len(picked):
        there = picked.to(x.device, non_blocking=True)
        x[there] = operation(x[there], values[picked].to(x.device, non_blocking=True).view(-1, 1, 1, 1))


def luma(x: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W -> n x 1 x H x W."""
    return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def contrast(x, factor):
    mean = luma(x).mean((2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp_(0, 1)


def saturation(x, factor):
    gray = luma(x)
    return (gray + (x - gray) * factor).clamp_(0, 1)


def hue(x, shift):
    """Turn the hue of HSV, the hexcone model that PIL uses, by `shift` turns.

    With value v = max and chroma c = max - min, channel n (5, 3, 1 for R, G, B) is v - c max(0, min(k, 4 - k, 1)),
    k = (n + 6 hue) mod 6.
    """
    r, g, b = x.unbind(1)
    v, low = x.amax(1), x.amin(1)
    c = v - low
    safe = c.clamp_min(1e-12)
    h6 = torch.where(v == r, (g - b) / safe, torch.where(v == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    h6 = h6 + 6 * shift.squeeze(1)
    k = (h6.unsqueeze(1) + x.new_tensor((5, 3, 1)).view(3, 1, 1)) % 6
    return v.unsqueeze(1) - c.unsqueeze(1) * torch.minimum(k, 4 - k).clamp_(0, 1)


ADJUST, NEUTRAL = (brightness, contrast, saturation, hue), (1, 1, 1, 0)


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W, sigma n x 1 x 1 x 1 in pixels. Separable, cut at three of the largest sigmas, edges repeated."""
    n, c, height, width = x.shape
    radius = 6  # three times the largest sigma in use, 2
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (at / sigma.view(n, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # one row a channel
    x = F.pad(x.reshape(1, n * c, height, width), (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(n * c, 1, 1, -1), groups=n * c)
    x = F.conv2d(x, kernel.view(n * c, 1, -1, 1), groups=n * c)
    return x.view(n, c, height, width)
