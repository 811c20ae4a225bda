"""MosRep's forward against docs/methods.md, "MosRep". (Mosaics: test_mosaic.py; the common part with MoCo: test_moco.py.)"""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import build, forward, method_args, method_of, random_views
from torch.nn.functional import avg_pool2d, normalize

import mosrep.builder
from methods import METHODS
from utils.learning.method import Step

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # (row, column) of slots 0 to 3


def slow_mosaic(crops, j, offset):
    """Mosaic j, shifted, and its tiles: (image, box, weight) of each slot."""
    n, _, _, s, _ = crops.shape
    mosaic, owner = torch.zeros(3, 2 * s, 2 * s), torch.full((2 * s, 2 * s), -1)
    for y in range(2 * s):
        for x in range(2 * s):
            from_y, from_x = y + offset[1], x + offset[0]
            if 0 <= from_y < 2 * s and 0 <= from_x < 2 * s:
                slot = CORNERS.index((from_y // s, from_x // s))
                mosaic[:, y, x] = crops[(j - slot) % n, slot, :, from_y % s, from_x % s]
                owner[y, x] = slot
    tiles = []
    for slot in range(4):
        ys, xs = torch.nonzero(owner == slot, as_tuple=True)
        box = [xs.min().item(), ys.min().item(), xs.max().item(), ys.max().item()]
        tiles.append(((j - slot) % n, box, math.sqrt(len(xs)) / s))
    return mosaic, tiles


def bilinear(features, y, x):
    """The features (C x H x W) at a point, cells being at whole numbers."""
    height, width = features.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(features))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    above = (1 - u) * features[:, top, left] + u * features[:, top, right]
    below = (1 - u) * features[:, bottom, left] + u * features[:, bottom, right]
    return (1 - v) * above + v * below


def slow_roi_align(features, box, scale, out):
    """RoIAlign (arXiv 1703.06870, section 3), aligned, adaptive number of samples: C x H x W -> C x out x out."""
    x1, y1, x2, y2 = (c * scale - 0.5 for c in box)
    bin_y, bin_x = (y2 - y1) / out, (x2 - x1) / out
    samples_y, samples_x = math.ceil(bin_y), math.ceil(bin_x)
    rows = []
    for row in range(out):
        for column in range(out):
            points = [
                bilinear(features, y1 + (row + (i + 0.5) / samples_y) * bin_y, x1 + (column + (k + 0.5) / samples_x) * bin_x)
                for i in range(samples_y)
                for k in range(samples_x)
            ]
            rows.append(sum(points) / len(points))
    return torch.stack(rows, dim=1).view(-1, out, out)


def slow_loss(method, views, offset, stride):
    """docs/methods.md, "MosRep", points 1 to 6, one process, from the key encoder as it is."""
    x_q, x_k, crops = views
    n = len(x_q)

    def head(projector, x):
        x = torch.relu(projector.conv[1](projector.conv[0](x)))
        x = x.flatten(2).sum(2) / x[0, 0].numel()
        return normalize(projector.projector[2](torch.relu(projector.projector[0](x))), dim=1)

    with torch.no_grad():
        keys = head(method.projector_k, method.encoder_k(x_k))
    candidates = torch.cat([keys, method.queue.T])  # the keys of the batch, then the queue

    def loss(query, image):
        exps = [torch.exp(query @ c / 0.2) for c in candidates]
        return -torch.log(exps[image] / sum(exps))

    queries = head(method.projector_q, method.encoder_q(x_q))
    loss_query = sum(loss(queries[i], i) for i in range(n)) / n

    mosaics, tiles = zip(*(slow_mosaic(crops, j, offset) for j in range(n)), strict=True)
    features = method.encoder_q(torch.stack(mosaics))  # as large a map as of a whole view
    described = [tile for four in tiles for tile in four]
    cut = [slow_roi_align(features[t // 4], box, 1 / stride, features.shape[-1]) for t, (_, box, _) in enumerate(described)]
    queries = head(method.projector_q, torch.stack(cut))
    loss_tile = sum(w * loss(q, image) for q, (image, _, w) in zip(queries, described, strict=True)) / (4 * n)
    return loss_query, loss_tile, keys


@pytest.mark.parametrize(
    "arch, size, stride, offset, mode",
    [
        ("tiny_resnet", 64, 32, (0, 0), "train"),
        ("tiny_resnet", 64, 16, (9, -14), "train"),
        ("tiny_resnet", 72, 16, (-11, 5), "eval"),  # 4.5 cells of 16 pixels: a map of 5 x 5
        ("tiny_convnext", 72, 16, (3, 14), "eval"),  # the same views: a map of 4 x 4
    ],
)
def test_mosrep__loss_gradients_and_queue_equal_a_slow_loop(monkeypatch, arch, size, stride, offset, mode):
    monkeypatch.setattr(mosrep.builder, "draw_offset", lambda *args, **kwargs: offset)
    flags = ["--arch", arch, "--size", str(size), "--output-stride", str(stride if stride < 32 else 0)]
    method = build("mosrep", *flags).train(mode == "train")
    reference, views = copy.deepcopy(method), random_views(5, size)
    loss, stats = forward(method, views, Step(0, 10, 0))
    loss.backward()
    loss_query, loss_tile, keys = slow_loss(reference, views, offset, stride)
    (loss_query + loss_tile).backward()
    assert stats["loss_query"].item() == pytest.approx(loss_query.item(), rel=1e-4)
    assert stats["loss_tile"].item() == pytest.approx(loss_tile.item(), rel=1e-4)
    assert loss.item() == pytest.approx((loss_query + loss_tile).item(), rel=1e-4)
    for part in ("encoder_q", "projector_q"):
        wanted = dict(getattr(reference, part).named_parameters())
        largest = max(p.grad.abs().max().item() for p in wanted.values())
        for name, p in getattr(method, part).named_parameters():
            assert torch.allclose(p.grad, wanted[name].grad, rtol=1e-2, atol=1e-4 * largest), (part, name)
    method.commit(Step(0, 10, 0))
    assert torch.allclose(method.queue, torch.cat([keys.T, reference.queue[:, 5:]], dim=1), atol=1e-5)
    assert method.queue_ptr.tolist() == [5]


def watch(method):
    """The inputs of trunk and shared head of the query side in a step; the trunk's features are 16 x 16 pixel means."""
    seen = {"trunk": [], "head": []}

    def trunk(module, args, output):
        seen["trunk"].append(args[0].detach().clone())
        return avg_pool2d(args[0], 16).repeat(1, output.shape[1] // 3, 1, 1)

    method.encoder_q.register_forward_hook(trunk)
    method.projector_q.register_forward_pre_hook(lambda module, args: seen["head"].append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize("offset", [(0, 0), (13, 0), (-13, 13), (8, -14)])
def test_mosrep__each_tile_gets_the_cells_of_its_slot(monkeypatch, offset):
    """Slot numbers as colours: the head sees, for tile i of each mosaic, mostly colour i, and most where the tile is whole."""
    monkeypatch.setattr(mosrep.builder, "draw_offset", lambda *args, **kwargs: offset)
    method = build("mosrep", "--output-stride", "16")
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])  # one for each slot
    seen = watch(method)
    crops = colours.view(1, 4, 3, 1, 1).expand(5, 4, 3, 32, 32)
    forward(method, [*random_views(5, local_crops=0), crops], Step(0, 10, 0))
    whole, tiles = seen["head"]  # one head for both
    assert tiles.shape == (20, whole.shape[1], 4, 4)
    for tile, features in enumerate(tiles[:, :3]):
        mean = features.mean((1, 2))
        distance = (colours - mean).norm(dim=1)
        assert distance.argmin().item() == tile % 4
        if offset == (0, 0):  # from cell -0.5 to 1.44 of the map, of which cells up to 1 are pure
            assert distance[tile % 4] < 0.25 * colours.norm(dim=1).max()


def test_mosrep__shift_is_drawn_for_each_group_and_only_if_enabled():
    views = random_views(8)
    for flags, groups, moved in (([], 1, True), (["--bn-splits", "2"], 2, True), (["--shift-enable", "0"], 1, False)):
        method = build("mosrep", "--output-stride", "16", *flags)
        seen, offsets = watch(method), set()
        for step in range(4):
            seen["trunk"].clear()
            forward(method, views, Step(step, 10, 0))
            mosaics = seen["trunk"][groups:]  # after the whole views
            assert len(mosaics) == groups
            for group, x in enumerate(mosaics):
                crops = views[2].chunk(groups)[group]
                shown = [(o, slow_shift(crops, o)) for o in ([(0, 0)] if not moved else every_offset(14))]
                fits = [o for o, pixels in shown if torch.equal(pixels, x[0])]
                assert len(fits) == 1
                offsets |= {(step, group, fits[0])}
        # each step and group has its own offset (those of the four steps here never coincide by chance)
        assert len({o for _, _, o in offsets}) == (4 * groups if moved else 1)
        assert moved or {o for _, _, o in offsets} == {(0, 0)}


def every_offset(reach):
    return [(x, y) for x in range(-reach, reach + 1) for y in range(-reach, reach + 1)]


def slow_shift(crops, offset):
    """Mosaic 0 of these crops, shifted by means of a padded copy."""
    n, s = len(crops), crops.shape[-1]
    canvas = torch.zeros(3, 6 * s, 6 * s)
    for slot, (row, column) in enumerate(CORNERS):
        canvas[:, (2 + row) * s : (3 + row) * s, (2 + column) * s : (3 + column) * s] = crops[-slot % n, slot]
    return canvas[:, 2 * s + offset[1] :, 2 * s + offset[0] :][:, : 2 * s, : 2 * s]


def test_chance__counts_the_weights_of_shifted_tiles():
    method = method_of(method_args("mosrep", "--size", "224", "--shift-range", "48"))
    o = 48 * (2 * np.random.default_rng(0).beta(0.5, 0.5, (50_000, 2)) - 1).astype(float)
    # along an axis one of two tiles keeps its 112 pixels, the other loses |o|; tiles of a mosaic: all pairs
    weight = ((1 + np.sqrt(1 - np.abs(o.astype(int)) / 112)) / 2).prod(1).mean()
    assert method.chance(8) == pytest.approx((1 + weight) * math.log(8 + 32), rel=0.01)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", "2", "--moco-k", "32"], "--batch-size 2: .*; pass 4"),
        (["--batch-size", "8", "--bn-splits", "4"], "--batch-size 8: .*; pass 16"),
        (["--size", "63"], "--size 63: .*; pass 64"),
        (["--shift-range", "32"], "--shift-range 32: "),
        (["--shift-range", "-1"], "--shift-range -1: "),
        (["--shift-enable", "1.5"], "--shift-enable 1.5: "),
        (["--shift-beta", "0"], "--shift-beta 0"),
    ],
)
def test_check__names_the_flag_and_a_value_that_works(flags, message):
    args = method_args("mosrep", *flags)
    with pytest.raises(ValueError, match=message):
        METHODS["mosrep"].check(args, samples=1000)


@pytest.mark.parametrize(
    "name, flags, size, works",
    [
        ("moco", [], 16, 32),
        ("mosrep", ["--shift-range", "4"], 16, 32),
        ("moco", ["--local-crops", "4"], 32, 64),
    ],
)  # fmt: skip
def test_build__views_smaller_than_the_stride(name, flags, size, works):
    with pytest.raises(ValueError, match=f"--size {size}: .*stride of 32"):
        method_of(method_args(name, "--size", str(size), *flags))
    method_of(method_args(name, "--size", str(works), *flags))
