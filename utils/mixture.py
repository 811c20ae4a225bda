"""Image mixtures of a batch, on its device (arXiv 2003.05438; cutout 1708.04552; random erasing 1708.04896), and Un-Mix's."""

import math

import numpy as np
import torch

from utils import dist
from utils.flags import in_range, positive
from utils.photometric import normalized

TYPES = ("IM", "global", "region", "cutout", "random-erasing")
CUTOUT_SIDE = 50  # pixels
PROBABILITY = 0.1  # of cutout and of random erasing
ERASED_AREA, ERASED_RATIO = (0.02, 0.4), 0.3  # share of the image; height / width lies in [0.3, 1 / 0.3]
OF_GLOBAL = {"g_alpha": 1.0, "g_num": 2, "g_prob": 0.1}  # defaults, which count where --im-type has a use for them
OF_REGION = {"r_beta": 1.0, "r_num": 2, "r_prob": 0.1, "r_pixel_decay": 1.0}


def add_flags(group) -> None:
    add = group.add_argument
    add("--im-type", choices=TYPES, help="mix each image with others of its batch, or blot out a part; IM: global, then region")
    helps = {
        "g_alpha": "global: both parameters of the Beta law of the image's share",
        "g_num": "global: how often it is tried",
        "g_prob": "global: probability of each try",
        "r_beta": "region: both parameters of the Beta law of what stays of the image",
        "r_num": "region: how often it is tried",
        "r_prob": "region: probability of each try",
        "r_pixel_decay": "region: factor of the image before the first paste",
    }
    for name, default in (OF_GLOBAL | OF_REGION).items():  # None tells that a flag was not given
        add(f"--{name.replace('_', '-')}", type=type(default), help=f"{helps[name]} (default: {default:g})")


def check(args) -> None:
    """Raise ValueError for values that cannot work, and for flags that --im-type leaves without effect."""
    for names, types in ((OF_GLOBAL, ("IM", "global")), (OF_REGION, ("IM", "region"))):
        for name in names:
            flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
            if value is None:
                continue
            if args.im_type not in types:
                raise ValueError(f"{flag} {value}: does nothing without --im-type {' or '.join(types)}; leave it out")
            if name.endswith("prob") or name == "r_pixel_decay":
                in_range(flag, value, 0, 1)
            else:
                positive([flag], args)
    if args.im_type and args.batch_size // dist.world() // args.bn_splits < 2:
        raise ValueError(f"--batch-size {args.batch_size}: leaves one image for each process and BatchNorm group, and "
                         f"--im-type mixes two; {2 * dist.world() * args.bn_splits} would do")  # fmt: skip


class Mixture:
    """What --im-type does to views. groups: parts of a process's batch that are mixed each for itself, as processes are."""

    def __init__(self, args):
        self.type, self.groups = args.im_type, args.bn_splits
        for name, default in (OF_GLOBAL | OF_REGION).items():
            setattr(self, name, default if getattr(args, name) is None else getattr(args, name))

    def __call__(self, views: list[torch.Tensor], rng: np.random.Generator) -> list[torch.Tensor]:
        """n x 3 x H x W each, views of the same images -> normalised floats, all views of an image mixed alike.

        Partners are other images of the process's batch, as they were before. rng: equal on all processes.
        """
        if self.type is None:
            return views
        n, originals = len(views[0]), [normalized(view) for view in views]
        mixed = originals
        if self.type in ("IM", "global"):
            for share, partner in self._tries(rng, n, self.g_num, self.g_prob, self.g_alpha):
                share = on(share, mixed[0])
                there = dist.on_device(partner, mixed[0].device)
                mixed = [torch.lerp(x[there], y, share) for x, y in zip(originals, mixed, strict=True)]
        if self.type in ("IM", "region"):
            pasted = np.zeros(n, bool)
            for partner, boxes, hit in self._pastes(rng, n):
                there = dist.on_device(partner, mixed[0].device)
                decay = on(np.where(hit & ~pasted, self.r_pixel_decay, 1.0), mixed[0])
                pasted |= hit
                mixed = [torch.where(inside(boxes, y), x[there], y * decay) for x, y in zip(originals, mixed, strict=True)]
        if self.type in ("cutout", "random-erasing"):
            boxes = self._holes(rng, n, views[0].shape[-2:])
            mixed = [y.masked_fill(inside(boxes, y), 0) for y in mixed]  # 0 is the mean colour
        return mixed

    def _tries(self, rng, n, times, probability, beta):
        """times x (share of the image itself: 1 where the try is not made; place of the partner), n each."""
        size, place = n // self.groups, np.arange(n)
        for _ in range(times):
            whole = dist.world() * n
            made, share, step = rng.random(whole) < probability, rng.beta(beta, beta, whole), rng.integers(1, size, whole)
            made, share, step = (dist.own(x, n) for x in (made, share, step))
            partner = place // size * size + (place + step) % size
            yield np.where(made, share, 1.0), partner

    def _pastes(self, rng, n):
        """times x (place of the partner, box in shares of height and width, whether it is pasted), n each.

        A box has sides sqrt(1 - share) and its centre anywhere, and is clipped.
        """
        for share, partner in self._tries(rng, n, self.r_num, self.r_prob, self.r_beta):
            centre = dist.own(rng.random((dist.world() * n, 2)), n)
            half = np.sqrt(1 - share)[:, None] / 2
            yield partner, np.concatenate([centre - half, centre + half], 1), share < 1

    def _holes(self, rng, n, size):
        """Boxes in shares of height and width, n x (top, left, bottom, right); empty where nothing is blotted out."""
        whole = dist.world() * n
        made, centre = rng.random(whole) < PROBABILITY, rng.random((whole, 2))
        area, ratio = rng.uniform(*ERASED_AREA, whole), ERASED_RATIO ** rng.uniform(-1, 1, whole)
        if self.type == "cutout":
            sides = np.full((whole, 2), CUTOUT_SIDE) / np.array(size)
            low = centre - sides / 2  # may lie across the border
        else:
            sides = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], 1)), 1)
            low = centre * (1 - sides)
        return dist.own(np.concatenate([low, low + sides * made[:, None]], 1), n)


def on(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """A number for each view of x: n x 1 x 1 x 1."""
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1).to(x.device, non_blocking=True)


def inside(boxes: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Which pixels have their centre in a view's box (shares of height and width): n x 1 x H x W."""
    top, left, bottom, right = on(boxes, x).view(-1, 4, 1, 1, 1).unbind(1)
    rows, columns = ((torch.arange(side, device=x.device) + 0.5) / side for side in x.shape[-2:])
    rows, columns = rows.view(-1, 1), columns.view(1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def un_mix(x: torch.Tensor, probability: float, groups: int, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Un-Mix (arXiv 2003.05438): the batch mixed with itself reversed. -> (n x 3 x H x W, share of the image itself).

    By mixup with that probability, else by CutMix, one share and one box for all. groups: as in Mixture.
    """
    x = normalized(x)
    other, share = backwards(x, groups), rng.beta(1, 1)
    mixup, centre = rng.random() < probability, rng.random(2)
    if mixup:
        return torch.lerp(other, x, share), share
    half = math.sqrt(1 - share) / 2
    box = np.concatenate([centre - half, centre + half]).astype(np.float32)
    pasted = 1.0
    for side, low, high in zip(x.shape[-2:], box[:2], box[2:], strict=True):  # counted here as `inside` does there
        middles = (np.arange(side, dtype=np.float32) + 0.5) / side
        pasted *= ((middles >= low) & (middles < high)).mean()
    return torch.where(inside(box[None], x), other, x), float(1 - pasted)


def backwards(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Each of `groups` equal parts of the batch in reverse order."""
    return x.unflatten(0, (groups, -1)).flip(1).flatten(0, 1)
