"""Mosaics against docs/methods.md, "MosRep", points 1 and 2, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from mosrep.mosaic import compose, cut_tiles, draw_offset, shift, sources, tile_boxes, tile_weights

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # (row, column) of slot 0 top-left, 1 top-right, 2 bottom-left, 3 bottom-right
OFFSETS = [(0, 0), (5, 3), (-5, 3), (5, -3), (-5, -3), (7, 0), (0, -7), (1, -1)]


def numbered_crops(n, s):
    """n x 4 x 3 x s x s, every value different."""
    return torch.arange(n * 4 * 3 * s * s, dtype=torch.float64).view(n, 4, 3, s, s)


@pytest.mark.parametrize("n, s", [(4, 2), (5, 3), (8, 1)])
def test_compose__slot_i_of_mosaic_j_is_crop_i_of_image_j_minus_i(n, s):
    crops = numbered_crops(n, s)
    wanted = torch.full((n, 3, 2 * s, 2 * s), -1.0, dtype=torch.float64)
    for j in range(n):
        for i, (row, column) in enumerate(CORNERS):
            for c in range(3):
                for y in range(s):
                    for x in range(s):
                        wanted[j, c, row * s + y, column * s + x] = crops[(j - i) % n, i, c, y, x]
    assert torch.equal(compose(crops), wanted)


@pytest.mark.parametrize("n", [4, 5, 8])
def test_sources__are_the_images_one_finds_in_the_slots(n):
    crops = torch.arange(n).view(n, 1, 1, 1, 1).expand(n, 4, 3, 2, 2)  # the colour of a crop is its image
    mosaics = compose(crops)
    for j in range(n):
        found = [int(mosaics[j, 0, 2 * row, 2 * column]) for row, column in CORNERS]
        assert sources(n)[j].tolist() == found
        assert len(set(found)) == 4


def test_sources__every_crop_is_shown_once():
    for n in (4, 5, 8):
        shown = sorted((image, slot) for row in sources(n).tolist() for slot, image in enumerate(row))
        assert shown == [(image, slot) for image in range(n) for slot in range(4)]


@pytest.mark.parametrize("offset", OFFSETS)
def test_shift__pixel_by_pixel(offset):
    x = torch.arange(1.0, 2 * 3 * 10 * 10 + 1).view(2, 3, 10, 10)
    wanted = torch.zeros_like(x)
    for row in range(10):
        for column in range(10):
            from_row, from_column = row + offset[1], column + offset[0]  # positive moves the content left and up
            if 0 <= from_row < 10 and 0 <= from_column < 10:
                wanted[:, :, row, column] = x[:, :, from_row, from_column]
    kept = x.clone()
    assert torch.equal(shift(x, offset), wanted)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("size, scale", [(16, 1), (20, 1), (64, 4), (224, 9)])
@pytest.mark.parametrize("offset", [o for o in OFFSETS if max(map(abs, o)) < 7])
def test_tile_boxes__are_where_the_slots_lie_on_a_shifted_canvas(size, scale, offset):
    offset = tuple(scale * o for o in offset)
    half = size // 2
    canvas = torch.zeros(1, 1, size, size)
    for slot, (row, column) in enumerate(CORNERS):
        canvas[:, :, row * half : (row + 1) * half, column * half : (column + 1) * half] = slot + 1
    shifted = shift(canvas, offset)[0, 0]
    for slot, box in enumerate(tile_boxes(size, offset).tolist()):
        ys, xs = np.nonzero((shifted == slot + 1).numpy())
        assert box == [xs.min(), ys.min(), xs.max(), ys.max()]  # both corners are pixels of the tile
        weight = tile_weights(tile_boxes(size, offset), size)[slot].item()
        assert weight == pytest.approx(math.sqrt(len(xs) / half**2), abs=1e-6)


@pytest.mark.parametrize("o", [-48, -47, -1, 0, 1, 30, 48])
def test_tile_boxes__formulas_of_the_paper_at_224(o):
    low, high = (max(0, -o), 111 - o), (112 - o, min(224 - o, 224) - 1)
    wanted = [[low[0], 0, low[1], 111], [high[0], 0, high[1], 111], [low[0], 112, low[1], 223], [high[0], 112, high[1], 223]]
    assert tile_boxes(224, (o, 0)).tolist() == wanted
    assert tile_boxes(224, (0, o))[:, [1, 0, 3, 2]].tolist() == [wanted[i] for i in (0, 2, 1, 3)]
    visible = (112 - abs(o)) / 112
    row = [math.sqrt(visible), 1] if o > 0 else [1, math.sqrt(visible)]  # content moves left: the left tiles lose
    assert tile_weights(tile_boxes(224, (o, 0)), 224).tolist() == pytest.approx(row * 2)


def beta_cdf(b, x):
    """Of Beta(b, b), in closed form."""
    return {0.5: lambda: 2 / math.pi * math.asin(math.sqrt(x)), 1: lambda: x, 2: lambda: 3 * x**2 - 2 * x**3}[b]()


@pytest.mark.parametrize("b, reach", [(0.5, 48), (0.5, 5), (1, 6), (2, 10)])
def test_draw_offset__follows_its_law(b, reach):
    rng, draws = np.random.default_rng(0), 20_000
    drawn = np.array([draw_offset(rng, 1.0, reach, b) for _ in range(draws)])
    assert np.issubdtype(drawn.dtype, np.integer)
    assert abs(drawn).max() <= reach
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 5 / math.sqrt(draws)  # both axes, one pair, independent
    for axis in range(2):
        for o in range(-reach + 1, reach):
            # int() cuts towards 0: o stands for [o, o + 1) above 0, for (o - 1, o] below, and 0 for (-1, 1)
            low, high = (o, o + 1) if o > 0 else (o - 1, o) if o < 0 else (-1, 1)
            p = beta_cdf(b, (high / reach + 1) / 2) - beta_cdf(b, (low / reach + 1) / 2)
            spread = math.sqrt(p * (1 - p) / draws)
            assert abs((drawn[:, axis] == o).mean() - p) < 5 * spread, (axis, o)


@pytest.mark.parametrize("enable", [0.0, 0.3, 1.0])
def test_draw_offset__shifts_with_probability_enable(enable):
    rng, draws = np.random.default_rng(1), 4000
    drawn = [draw_offset(rng, enable, 10**9, 1) for _ in range(draws)]  # with such a reach 0 is not drawn by chance
    assert all((x == 0) == (y == 0) for x, y in drawn)  # both axes or none
    moved = np.mean([o != (0, 0) for o in drawn])
    assert abs(moved - enable) <= 5 * math.sqrt(enable * (1 - enable) / draws)


def test_draw_offset__takes_as_many_numbers_when_it_does_not_shift():
    """What comes after it in a step does not depend on the switch."""
    off, on = np.random.default_rng(2), np.random.default_rng(2)
    draw_offset(off, 0.0, 48, 0.5), draw_offset(on, 1.0, 48, 0.5)
    assert off.random() == on.random()


@pytest.mark.parametrize(
    "size, stride, cells", [(224, 32, 7), (64, 32, 2), (64, 16, 4), (72, 16, 5), (72, 18, 4), (224, 16, 14)]
)
@pytest.mark.parametrize("offset", [(0, 0), (9, -14), (-11, 5), (30, -30)])
def test_cut_tiles__is_torchvisions_roi_align_and_has_its_gradient(size, stride, cells, offset):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, cells, cells, generator=rng, requires_grad=True)
    boxes = tile_boxes(size, offset)
    tiles = cut_tiles(features, boxes, stride)
    wanted = roi_align(features, [boxes] * 3, (cells, cells), 1 / stride, aligned=True)
    assert tiles.shape == (12, 5, cells, cells) and torch.allclose(tiles, wanted, atol=1e-5)
    weight = torch.randn(tiles.shape, generator=rng)
    ours, theirs = (torch.autograd.grad(x, features, weight)[0] for x in (tiles, wanted))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_cut_tiles__takes_maps_of_lower_precision_and_stays_in_float32():
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    tiles = cut_tiles(features, tile_boxes(64, (3, 5)), 16)
    assert tiles.dtype == torch.float32 and torch.equal(tiles, cut_tiles(features.float(), tile_boxes(64, (3, 5)), 16))
