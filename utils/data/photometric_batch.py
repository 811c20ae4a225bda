"""The operations of photometric.py for all views of a batch at once, for an accelerator: at most 40 launches and copies.

An operation takes every view, with a value that leaves a view unchanged if it does not have the operation. All values reach the
device in one copy. The results differ from those of photometric.py by the rounding of float32.
"""

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.photometric import COLUMNS, LUMA, OPERATIONS, ORDERS
from utils.run import dist

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in ORDERS
# contains contrast, saturation and hue in each of their orders; the hue, which costs most, is there once
SEQUENCE = (None, SATURATION, CONTRAST, SATURATION, HUE, SATURATION, CONTRAST, SATURATION)
HUE_SUMS = (  # of red, green, blue, their maximum v and their minimum m; see hue_ of photometric.py
    (0, 0, 0, 1, -1),  # c
    (1, -1, 1, 1, -2),  # |p|
    (-1, 0, 1, 0, 0),  # with the sign of p
    (0, 0, 0, 2, -1),  # v + c
)


def photometric_batch(views: torch.Tensor, parameters: torch.Tensor | np.ndarray) -> torch.Tensor:
    """As `photometric`. The parameters stay on the CPU, so the host does not wait for the device."""
    x = views.reshape(-1, *views.shape[-3:])
    out = torch.empty_like(x)
    return out.copy_(colored(x, np.asarray(parameters).reshape(-1, len(COLUMNS))).round_()).view(views.shape)


def colored(x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """The finished views before they are rounded. x: n x 3 x H x W uint8; rows: n x len(COLUMNS). -> n x 3 x H x W float32"""
    drawn = dict(zip(COLUMNS, rows.T.astype(np.float64), strict=True))
    has = {name: (drawn[name] != neutral).any() for name, (_, neutral) in OPERATIONS.items()}
    jittered = (drawn["order"] >= 0).any() or has["gray"] or has["gray_first"]
    host = {"solarize": 510 - 255 * drawn["solarize"], "flip": drawn["flip"]}
    host |= (jitter_values(drawn) if jittered else {}) | ({"blur": blur_values(drawn["sigma"])} if has["sigma"] else {})
    whole = dist.on_device(np.concatenate([v.ravel() for v in host.values()]).astype(np.float32), x.device)
    parts = zip(host.items(), whole.split([v.size for v in host.values()]), strict=True)
    values = {name: part.view(v.shape) for (name, v), part in parts}

    pixels = jitter(x, values, has["gray_first"]) if jittered else x.to(torch.float32, memory_format=torch.contiguous_format)
    if has["sigma"]:
        pixels = blur(pixels, values["blur"])
    if has["solarize"]:  # 255 - x from 127.5 on; 510 - x is above all pixels
        torch.minimum(pixels, values["solarize"].view(-1, 1, 1, 1) - pixels, out=pixels)
    if has["flip"]:
        torch.lerp(pixels, pixels.flip(3), values["flip"].view(-1, 1, 1, 1), out=pixels)
    return pixels


def places_of(order: tuple[int, ...]) -> list[int]:
    """The place in SEQUENCE of each of the four operations. Brightness has the place of the operation before it, or 0."""
    found, place = [0] * 4, 0
    for operation in order:
        place = place if operation == BRIGHTNESS else SEQUENCE.index(operation, place + 1)
        found[operation] = place
    return found


PLACES = np.array([places_of(order) for order in ORDERS])


def jitter_values(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of `jitter` for n views.

    Contrast, saturation and hue of f x are f times those of x. So a view is computed without its brightness f, which multiplies
    the result. From its brightness on, its pixels end at 255 / f instead of 255.
    """
    n, jittered = len(drawn["order"]), drawn["order"] >= 0
    place = PLACES[np.where(jittered, drawn["order"], 0).astype(int)]  # n x 4
    brightness, contrast, saturation, hue = (
        np.where(jittered, drawn[name], OPERATIONS[name][1]) for name in ("brightness", "contrast", "saturation", "hue")
    )
    factors, number = np.ones((len(SEQUENCE), n)), np.arange(n)
    factors[place[:, CONTRAST], number], factors[place[:, SATURATION], number] = contrast, saturation
    with np.errstate(divide="ignore"):
        ends = 255 / brightness
    step = np.arange(len(SEQUENCE))[:, None] - place[:, BRIGHTNESS]  # since the brightness
    limits = np.where(step < 0, 255, np.where(step == 0, np.minimum(255, ends), ends))
    turns = (6 * hue[:, None] - np.array([-2, 0, 2])) % 6 - 3  # `a` of hue_
    return {
        "zero": np.zeros((1, 1, 1)), "limits": limits[..., None, None], "factors": factors[..., None, None],
        "saturation": saturation_matrix(factors), "first": saturation_matrix(1 - drawn["gray_first"]), "luma": np.array(LUMA),
        "last": brightness[:, None, None] * saturation_matrix(1 - drawn["gray"]), "turns": turns[..., None],
        "hue": np.tile(HUE_SUMS, (n, 1, 1)),
    }  # fmt: skip


def saturation_matrix(factors: np.ndarray) -> np.ndarray:
    """... factors -> ... x 3 x 3; 0 gives the gray value."""
    factors = factors[..., None, None]
    return factors * np.eye(3) + (1 - factors) * np.array(LUMA)


def jitter(x: torch.Tensor, values: dict[str, torch.Tensor], gray_first: bool) -> torch.Tensor:
    """Gray, color jitter and gray of all views. x: n x 3 x H x W uint8 -> n x 3 x H x W float32

    The matrix products are in full float32, since torch computes no TF32 in them unless it is asked to.
    """
    n, _, height, width = x.shape
    a = torch.empty(n, 5, height * width, device=x.device)  # red, green, blue, and their maximum and minimum
    b = torch.empty(n, 4, height * width, device=x.device)
    pixels, other = a[:, :3], b[:, :3]
    if gray_first:
        torch.bmm(values["first"], other.copy_(x.flatten(2)), out=pixels)
    else:
        pixels.copy_(x.flatten(2))
    for place, operation in enumerate(SEQUENCE):
        factor = values["factors"][place]
        if operation == SATURATION:
            pixels, other = torch.bmm(values["saturation"][place], pixels, out=other), pixels
        elif operation == CONTRAST:
            mean = torch.mv(pixels.mean(2), values["luma"]).view(n, 1, 1)
            torch.lerp(mean, pixels, factor, out=pixels)
        elif operation == HUE:
            hue_(a, b, values["turns"], values["hue"])
        torch.clamp(pixels, values["zero"], values["limits"][place], out=pixels)
    return torch.bmm(values["last"], pixels).view(x.shape)


def hue_(a: torch.Tensor, b: torch.Tensor, turns: torch.Tensor, sums: torch.Tensor) -> None:
    """Shift the hue of the first three rows of `a`, n x 5 x pixels. b: n x 4 x pixels, overwritten."""
    pixels, largest, smallest = a.split([3, 1, 1], 1)
    torch.aminmax(pixels, dim=1, keepdim=True, out=(smallest, largest))
    c, place, sign, top = torch.bmm(sums, a, out=b).split(1, 1)
    place = torch.copysign(place, sign, out=place)
    distance = torch.addcmul(place, c, turns, out=pixels).abs_().sub_(c, alpha=3).abs_()
    torch.clamp(torch.sub(top, distance, out=pixels), smallest, largest, out=pixels)


def blur_values(sigmas: np.ndarray) -> np.ndarray:
    """n sigmas -> the kernel of each channel, 3n x 1 x 1 x (2 radius + 1): that of blur_, with zeros to the largest radius."""
    radii = np.rint(3 * sigmas)
    i = np.abs(np.arange(-radii.max(), radii.max() + 1))
    bells = np.exp(-0.5 * (i / np.where(sigmas > 0, sigmas, 1)[:, None]) ** 2) * (i <= radii[:, None])
    return np.repeat(bells / bells.sum(1, keepdims=True), 3, axis=0)[:, None, None]


def blur(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W float32, contiguous: then torch's own kernel for depthwise convolutions runs, in full float32."""
    n, channels, height, width = x.shape
    side = kernels.shape[3]
    x = F.pad(x, (side // 2,) * 4, mode="replicate").view(1, channels * n, height + side - 1, width + side - 1)
    x = F.conv2d(x, kernels, groups=channels * n)
    return F.conv2d(x, kernels.view(-1, 1, side, 1), groups=channels * n).view(n, channels, height, width)
