"""Image mixtures of a batch: IM and Un-Mix (arXiv 2003.05438), cutout (1708.04552), random erasing (1708.04896)."""

import math
from argparse import Namespace

import numpy as np
import torch

from utils.data.photometric import normalized
from utils.run import dist, flags, streams

GLOBAL, REGION, HOLES = ("IM", "global"), ("IM", "region"), ("cutout", "random-erasing")  # of --im-type; HOLES mix no images
CUTOUT_SIDE = 50  # pixels
PROBABILITY = 0.1  # of cutout and of random erasing
ERASED_AREA, ERASED_RATIO = (0.02, 0.4), (0.3, 3.3)  # share of the image; height / width
FLAGS = {  # flag: (types that use it, default, help)
    "--g-alpha": (GLOBAL, 1.0, "global: both parameters of the Beta distribution of the image's own share"),
    "--g-num": (GLOBAL, 2, "global: number of tries"),
    "--g-prob": (GLOBAL, 0.1, "global: probability of each try"),
    "--r-beta": (REGION, 1.0, "region: both parameters of the Beta distribution of the area that stays"),
    "--r-num": (REGION, 2, "region: number of tries"),
    "--r-prob": (REGION, 0.1, "region: probability of each try"),
    "--r-pixel-decay": (REGION, 1.0, "region: factor of all pixels, with the first try, whether or not that pastes"),
}


def add_flags(group) -> None:
    group.add_argument("--im-type", choices=("IM", "global", "region", *HOLES),
                       help="mix each image with others of its batch, or erase a part; IM: global, then region")  # fmt: skip
    for flag, (_, default, text) in FLAGS.items():
        group.add_argument(flag, type=type(default), default=default, help=text)


def check(args: Namespace) -> None:
    """Raise ValueError for values that cannot work, and for flags that have no effect with this --im-type."""
    for flag, (types, default, _) in FLAGS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value != default and args.im_type not in types:
            raise ValueError(f"{flag} {value}: does nothing without --im-type {' or '.join(types)}; leave it out")
        if flag in ("--g-prob", "--r-prob", "--r-pixel-decay"):
            flags.in_range(flag, value, 0, 1)
        else:
            flags.positive([flag], args)
    if args.im_type not in (None, *HOLES):
        check_group(args, 2, f"--im-type {args.im_type} mixes two")


def check_group(args: Namespace, least: int, why: str) -> None:
    """Raise ValueError if a BatchNorm group has fewer images than `least`."""
    groups = dist.world() * args.bn_splits
    if (n := args.batch_size // groups) < least:
        images = "one image" if n == 1 else f"{n} images"
        raise ValueError(f"--batch-size {args.batch_size}: leaves {images} for each process and BatchNorm group, and {why}; "
                         f"pass {least * groups}")  # fmt: skip


class Mixture:
    """The mixture of --im-type. Images are mixed within each of the `groups` BatchNorm groups of a process's batch."""

    def __init__(self, args: Namespace):
        self.type, self.groups, self.decay = args.im_type, args.bn_splits, args.r_pixel_decay
        self.of_global = args.g_num, args.g_prob, args.g_alpha
        self.of_region = args.r_num, args.r_prob, args.r_beta

    def __call__(self, views: list[torch.Tensor], rng: np.random.Generator) -> list[torch.Tensor]:
        """Views of the same n images, n x channels x H x W each -> normalized floats; all views of an image are mixed alike.

        A partner is another image of the process's batch, in the state before this kind of mixture. So the region mixture of IM
        pastes from images that the global mixture has changed. Without --im-type the views are returned as they are.
        rng: equal on all processes. The draws do not depend on the number of processes or on the images that are hit.
        """
        if self.type is None:
            return views
        n, _, *size = views[0].shape
        views = [view.clone() if view.is_floating_point() else normalized(view) for view in views]  # edited in place
        if self.type in GLOBAL:
            edit_(views, self._tries(rng, n, *self.of_global), lambda x, y, share: torch.lerp(y, x, on(share, x)))
        if self.type in REGION:
            edit_(views, self._pastes(rng, n), lambda x, y, box: torch.where(inside(box, x), y, x), self.decay)
        if self.type in HOLES:
            fill = noise if self.type == "random-erasing" else lambda seeds, x: 0.0  # 0 is the mean
            edit_(views, self._holes(rng, n, size), lambda x, _, box, seeds: torch.where(inside(box, x), fill(seeds, x), x))
        return views

    def _tries(self, rng, n, times, probability, beta):
        """For each try: (places of the images that are hit, places of their partners, shares of the images), h each."""
        size, whole = n // self.groups, dist.world() * n
        for _ in range(times):
            made, share, step = rng.random(whole) < probability, rng.beta(beta, beta, whole), rng.integers(1, size, whole)
            made, share, step = (dist.own(x, n) for x in (made, share, step))
            hit = np.flatnonzero(made)
            yield hit, hit // size * size + (hit + step[hit]) % size, share[hit]

    def _pastes(self, rng, n):
        """For each try: (places, places of partners, boxes). Sides are sqrt(1 - share)."""
        for hit, partner, share in self._tries(rng, n, *self.of_region):
            centre, half = dist.own(rng.random((dist.world() * n, 2)), n)[hit], np.sqrt(1 - share)[:, None] / 2
            yield hit, partner, np.concatenate([centre - half, centre + half], 1)

    def _holes(self, rng, n, size):
        """Once: (places, no partners, boxes, seeds of noise). A box: (top, left, bottom, right) in shares of the sides."""
        whole = dist.world() * n
        made, centre = rng.random(whole) < PROBABILITY, rng.random((whole, 2))
        area, ratio = rng.uniform(*ERASED_AREA, whole), rng.uniform(*ERASED_RATIO, whole)
        if self.type == "cutout":
            sides = np.full((whole, 2), CUTOUT_SIDE) / np.array(size)
            low, seeds = centre - sides / 2, np.zeros(whole)  # may lie across the border
        else:
            sides = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], 1)), 1)
            low, seeds = centre * (1 - sides), rng.integers(2**63, size=whole)
        hit = np.flatnonzero(dist.own(made, n))
        yield hit, hit[:0], dist.own(np.concatenate([low, low + sides], 1), n)[hit], dist.own(seeds, n)[hit]


def edit_(views: list[torch.Tensor], edits, formula, factor: float = 1.0) -> None:
    """Edit images of all views in place.

    edits: (places of h images, places of their partners, parameters of h rows ...), drawn on the host. So nothing waits for the
    device. An image becomes formula(x, y, parameters): x: its pixels; y: its partner's before all edits; h x channels x H x W.
    factor: of all pixels, before the first edit.
    """
    edits = [edit for edit in edits if len(edit[0])]
    for x in views:
        others = [x.index_select(0, dist.on_device(edit[1], x.device)) for edit in edits]
        if factor != 1:
            x.mul_(factor)
        for (hit, _, *parameters), other in zip(edits, others, strict=True):
            there = dist.on_device(hit, x.device)
            x.index_copy_(0, there, formula(x.index_select(0, there), other, *parameters))


def on(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """One number for each view of x: n x 1 x 1 x 1."""
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1).to(x.device, non_blocking=True)


def noise(seeds: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) for each pixel and channel of x, n x channels x H x W. A view's depend on its seed alone."""
    numbers = [streams.erased_pixels(int(seed)).random(x.shape[1:], np.float32) for seed in seeds]
    return dist.on_device(np.stack(numbers), x.device)


def inside(boxes: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Whether the centre of each pixel lies in the box of its view (shares of height and width): n x 1 x H x W bool."""
    top, left, bottom, right = on(boxes, x).view(-1, 4, 1, 1, 1).unbind(1)
    rows, columns = ((torch.arange(side, device=x.device) + 0.5) / side for side in x.shape[-2:])
    rows, columns = rows.view(-1, 1), columns.view(1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def un_mix(x: torch.Tensor, probability: float, groups: int, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Un-Mix (arXiv 2003.05438): mix the batch with itself in reverse order. -> (n x 3 x H x W, share of the image itself).

    Mixup with this probability, else CutMix; all images have the same share and the same box. groups: as in Mixture.
    """
    x = normalized(x)
    other, share = reversed_groups(x, groups), rng.beta(1, 1)
    mixup, centre = rng.random() < probability, rng.random(2)
    if mixup:
        return torch.lerp(other, x, share), share
    half = math.sqrt(1 - share) / 2
    box = np.concatenate([centre - half, centre + half]).astype(np.float32)
    pasted = 1.0
    for side, low, high in zip(x.shape[-2:], box[:2], box[2:], strict=True):  # counted as `inside` does
        middles = (np.arange(side, dtype=np.float32) + 0.5) / side
        pasted *= ((middles >= low) & (middles < high)).mean()
    return torch.where(inside(box[None], x), other, x), float(1 - pasted)


def reversed_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Reverse the order within each of `groups` equal parts of the batch."""
    return x.unflatten(0, (groups, -1)).flip(1).flatten(0, 1)
