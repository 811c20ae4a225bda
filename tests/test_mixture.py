"""Image mixtures against slow loops and by their statistics."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import build, forward, method_args, own_part, spawn, uint8_batch, uint8_views

from methods import METHODS
from utils.learning import mixture
from utils.learning.method import Step
from utils.learning.mixture import Mixture, inside, reversed_groups, un_mix

PUBLISHED = {"g_alpha": 1.0, "g_num": 2, "g_prob": 0.1, "r_beta": 1.0, "r_num": 2, "r_prob": 0.1, "r_pixel_decay": 1.0}
KINDS = ["IM", "global", "region", "cutout", "random-erasing"]


def mixture_of(kind, groups=1, **values):
    return Mixture(Namespace(im_type=kind, bn_splits=groups, **(PUBLISHED | values)))


def mix(kind, views, seed=0, groups=1, **values):
    return mixture_of(kind, groups, **values)(views, np.random.default_rng(seed))


def numbered(n, size=20, views=2):
    """Views in one colour, their image's number; as floats, which are taken for normalised."""
    place = torch.arange(1.0, n + 1).view(n, 1, 1, 1)
    return [place.expand(n, 3, size, size) for _ in range(views)]


@pytest.mark.parametrize("kind", KINDS)
def test_mixture__both_views_of_an_image_are_mixed_alike(kind):
    a, b = mix(kind, numbered(64), g_prob=0.5, r_prob=0.5)
    assert torch.equal(a, b) and not torch.equal(a, numbered(64)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_mixture__no_type_no_change_and_bytes_are_their_floats(kind):
    views = [torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    assert mix(None, views) is views
    found = mix(kind, views, seed=3, g_prob=0.5, r_prob=0.5)
    assert torch.equal(found[0], mix(kind, [mixture.normalized(v) for v in views], seed=3, g_prob=0.5, r_prob=0.5)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_mixture__views_stay_as_they_are_and_draws_do_not_depend_on_hits(monkeypatch, kind):
    views = [torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    given, ends = [view.clone() for view in views], []
    for probability in (0.0, 0.5, 1.0):
        monkeypatch.setattr(mixture, "PROBABILITY", probability)
        rng = np.random.default_rng(0)
        found = mixture_of(kind, g_prob=probability, r_prob=probability)(views, rng)
        assert all(torch.equal(a, b) for a, b in zip(views, given, strict=True))
        assert (probability == 0) == torch.equal(found[0], views[0])
        ends.append(rng.random())
    assert len(set(ends)) == 1


def test_edit__touches_the_images_that_are_hit_alone():
    seen, view = [], numbered(5, 2, 1)[0].clone()

    def swapped(x, y, factor):
        seen.append([v[:, 0, 0, 0].tolist() for v in (x, y)])
        return y * mixture.on(factor, y)

    def at(*places):
        return np.array(places, dtype=np.int64)

    edits = [(at(1, 3), at(0, 1), np.array([10, 20])), (at(), at(), at()), (at(3), at(1), np.array([1]))]
    mixture.edit_([view], iter(edits), swapped)
    assert seen == [[[2, 4], [1, 2]], [[40], [2]]] and view[:, 0, 0, 0].tolist() == [1, 10, 3, 2, 5]


def test_global__shares_and_partners():
    """One try at each of many images: x = share x + (1 - share) x', the share uniform (Beta(1, 1)), x' every other image."""
    n = 4000
    (found,) = mix("global", numbered(n, 1, 1), g_num=1, g_prob=0.3)
    changed = (found[:, 0, 0, 0] - torch.arange(1, n + 1)).abs() > 1e-3
    assert changed.sum().item() == pytest.approx(0.3 * n, abs=4 * math.sqrt(0.21 * n))
    _, partner, share = next(mixture_of("global")._tries(np.random.default_rng(1), n, 1, 1.0, 1.0))
    assert (partner != np.arange(n)).all() and np.bincount(partner, minlength=n).max() < 12
    assert np.histogram(share, 10, (0, 1))[0] == pytest.approx([n / 10] * 10, abs=4 * math.sqrt(n / 10))
    peaked = next(mixture_of("global")._tries(np.random.default_rng(1), n, 1, 1.0, 8.0))[2]
    assert peaked.std() == pytest.approx(math.sqrt(1 / (4 * 17)), rel=0.1)  # of Beta(8, 8)


def test_global__two_tries_by_a_slow_loop():
    n = 8
    (found,) = mix("global", numbered(n, 2, 1), seed=5, g_prob=0.7)
    rng, wanted = np.random.default_rng(5), [float(i + 1) for i in range(n)]
    for _ in range(2):
        made, share, step = rng.random(n) < 0.7, rng.beta(1, 1, n), rng.integers(1, n, n)
        for i in range(n):
            if made[i]:
                wanted[i] = share[i] * wanted[i] + (1 - share[i]) * ((i + step[i]) % n + 1)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor(wanted, dtype=torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_region__boxes_by_a_slow_loop(decay):
    n, side = 12, 30
    (found,) = mix("region", numbered(n, side, 1), seed=2, r_prob=0.6, r_pixel_decay=decay)
    rng, wanted = np.random.default_rng(2), numbered(n, side, 1)[0].clone()
    for k in range(2):
        made, share, step = rng.random(n) < 0.6, rng.beta(1, 1, n), rng.integers(1, n, n)
        centre = rng.random((n, 2))
        for i in range(n):
            if k == 0:  # the decay comes with the first try, also of images that it does not hit
                wanted[i] *= decay
            if not made[i]:
                continue
            half = math.sqrt(1 - share[i]) / 2
            for y in range(side):
                for x in range(side):
                    at = (y + 0.5) / side, (x + 0.5) / side
                    if all(c - half <= p < c + half for c, p in zip(centre[i], at, strict=True)):
                        wanted[i, :, y, x] = (i + step[i]) % n + 1
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_im__global_and_then_region_by_a_slow_loop(groups):
    """Each kind takes its partners from the batch at its own start: region takes images that global has changed."""
    n, side, decay = 8, 12, 0.5
    size = n // groups
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    (found,) = mix("IM", [images], seed=4, groups=groups, g_prob=0.7, r_prob=0.7, r_pixel_decay=decay)
    rng, wanted = np.random.default_rng(4), images.clone()

    def draw():
        made, share, step = rng.random(n) < 0.7, rng.beta(1, 1, n), rng.integers(1, size, n)
        return made, share, [i // size * size + (i % size + step[i]) % size for i in range(n)]

    began = wanted.clone()
    for _ in range(2):
        made, share, partner = draw()
        for i in range(n):
            if made[i]:
                wanted[i] = share[i] * wanted[i] + (1 - share[i]) * began[partner[i]]
    began = wanted.clone()
    wanted *= decay
    for _ in range(2):
        made, share, partner = draw()
        centre = rng.random((n, 2))
        for i in range(n):
            if not made[i]:
                continue
            half = math.sqrt(1 - share[i]) / 2
            for y in range(side):
                for x in range(side):
                    if abs((y + 0.5) / side - centre[i, 0]) < half and abs((x + 0.5) / side - centre[i, 1]) < half:
                        wanted[i, :, y, x] = began[partner[i], :, y, x]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_cutout__a_square_of_fifty_pixels():
    (found,) = mix("cutout", [torch.ones(2000, 1, 112, 112)])
    holes = (found == 0)[:, 0]
    area = holes.flatten(1).sum(1)
    assert (area > 0).sum().item() == pytest.approx(200, abs=4 * math.sqrt(180))
    assert area.max() == 2500 and area[area > 0].min() >= 24 * 24  # clipped at the border: at least a quarter stays
    for hole in holes[area == 2500][:5]:
        assert hole.any(0).sum() == hole.any(1).sum() == 50


def test_random_erasing__areas_ratios_and_fill():
    """Area uniform in .02-.4, height / width in .3-3.3, probability .1; each pixel and channel uniform in 0-1."""
    n, side = 6000, 60
    found = torch.cat([mix("random-erasing", [torch.full((n // 6, 2, side, side), 9.0)], seed)[0] for seed in range(6)])
    holes = found[:, 0] != 9
    assert torch.equal(holes, found[:, 1] != 9)
    heights, widths = holes.any(2).sum(1).double(), holes.any(1).sum(1).double()
    hit = heights > 0
    assert hit.sum().item() == pytest.approx(0.1 * n, abs=4 * math.sqrt(0.09 * n))
    assert torch.equal(holes.flatten(1).sum(1).double(), heights * widths)  # a box
    area, ratio = (heights * widths / side**2)[hit], (heights / widths)[hit]
    fits = (heights < side) & (widths < side)
    assert area.max() < 0.42 and abs(area[fits[hit]].median() - 0.2) < 0.03 and area.min() < 0.05
    # uniform: the median is (.3 + 3.3) / 2 = 1.8; uniform in the logarithm would have 1
    assert ratio.max() < 3.8 and ratio.min() > 0.25 and abs(ratio.median() - 1.8) < 0.25
    fill = found[found != 9].double().numpy()
    assert fill.min() >= 0 and fill.max() < 1 and np.histogram(fill, 10, (0, 1))[0] == pytest.approx(len(fill) / 10, rel=0.02)
    first = found[hit][0]
    assert (first[0][holes[hit][0]] != first[1][holes[hit][0]]).double().mean() > 0.99  # another number for each channel


def test_random_erasing__the_fill_is_the_images_own():
    """An image has the same pixels whichever other images are hit, and others in another step."""
    x = [torch.full((40, 3, 30, 30), 9.0)]
    (whole,), (again,), (other,) = (mix("random-erasing", x, seed) for seed in (0, 0, 1))
    assert torch.equal(whole, again)
    pixels = [set(view[view != 9].tolist()) for view in whole if (view != 9).any()] + [set(other[other != 9].tolist())]
    assert len(pixels) > 3 and all(len(a & b) < 0.01 * len(a) + 5 for a in pixels for b in pixels if a is not b)


def test_inside__the_middle_of_a_pixel_decides():
    box = np.array([[0.25, -1, 0.75, 0.5], [0, 0, 0, 0]])
    assert inside(box, torch.empty(2, 3, 4, 4))[:, 0].int().tolist() == [
        [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], [[0] * 4] * 4,
    ]  # fmt: skip


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_un_mix__batch_reversed_and_the_share_that_is_seen(probability):
    x = numbered(6, 40, 1)[0]
    shares = []
    for seed in range(40):
        mixed, share = un_mix(x, probability, 1, np.random.default_rng(seed))
        wanted = share * x + (1 - share) * x.flip(0)
        shares.append(share)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), wanted.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
        if probability == 0:
            assert ((mixed == x) | (mixed == x.flip(0))).all()
        else:
            torch.testing.assert_close(mixed, wanted)
    assert 0.2 < np.mean(shares) < 0.9 and np.std(shares) > 0.15
    assert reversed_groups(torch.arange(6), 2).tolist() == [2, 1, 0, 5, 4, 3]


def first_loss(name, flags):
    method, args = build(name, *flags), method_args(name, *flags)
    return forward(method, own_part(uint8_batch(args)), Step(2, 10, 0))[0].item()


@pytest.mark.parametrize("name, flags", [
    ("moco", ["--im-type", "IM", "--g-prob", "0.6", "--r-prob", "0.6"]), ("moco", ["--unmix-prob", "0.5"]),
    ("cmc", ["--im-type", "random-erasing"]),
])  # fmt: skip
def test_mixture__two_processes_are_two_groups(name, flags):
    alone = first_loss(name, [*flags, "--bn-splits", "2"])
    assert sum(spawn(first_loss, name, flags)) / 2 == pytest.approx(alone, rel=1e-5)


def test_unmix__loss_is_that_of_its_three_terms(monkeypatch):
    """L(q, k) + share L(q_mix, k) + (1 - share) L(q_mix reversed, k)."""
    method = build("moco", "--unmix-prob", "1").eval()
    views = [torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    monkeypatch.setattr(mixture, "un_mix", lambda x, *_: (0.3 * x + 0.7 * x.flip(0), 0.3))
    with torch.no_grad():
        loss, _ = forward(method, views, Step(0, 10, 0))
        k = method.embed(method.encoder_k, views[1], 8)
        q, q_mix = (method.embed(method.encoder_q, x, 8) for x in (views[0], 0.3 * views[0] + 0.7 * views[0].flip(0)))
        terms = [method.contrast(x, k)[0] for x in (q, q_mix, q_mix.flip(0))]
    assert loss.item() == pytest.approx((terms[0] + 0.3 * terms[1] + 0.7 * terms[2]).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["moco", "cmc", "insdis"])
def test_add_flags__defaults_are_the_published_values(name):
    """In the flags themselves, which config.json and checkpoints record."""
    for flags in ([], ["--im-type", "IM"], ["--g-prob", "0.1", "--r-num", "2"]):  # a default that is typed changes nothing
        args = method_args(name, *flags)
        assert {flag: getattr(args, flag) for flag in PUBLISHED} == PUBLISHED
        METHODS[name].check(args, 40)


@pytest.mark.parametrize("flags, message", [
    (["--g-prob", "0.2"], "--g-prob 0.2: does nothing without --im-type IM or global"),
    (["--im-type", "global", "--r-num", "3"], "--r-num 3: does nothing without --im-type IM or region"),
    (["--im-type", "IM", "--g-prob", "2"], "--g-prob 2.0: "),
    (["--im-type", "IM", "--r-beta", "0"], "--r-beta 0.0: "),
    (["--im-type", "IM", "--local-crops", "4"], "--im-type IM: .*--local-crops 4"),
    (["--unmix-prob", "0.5", "--local-crops", "4"], "--unmix-prob 0.5: .*--local-crops 4"),
    (["--unmix-prob", "0.5", "--loss", "nce"], "--loss nce: .*--unmix-prob 0.5"),
    (["--aug", "v1", "--local-crops", "4"], "--aug v1: .*--local-crops 4"),
    (["--unmix-prob", "2"], "--unmix-prob 2.0: "),
    (["--im-type", "region", "--bn-splits", "8"], "--batch-size 8: leaves one image .* --im-type region mixes .*; pass 16"),
    (["--unmix-prob", "0", "--bn-splits", "8"], "--batch-size 8: leaves one image .* --unmix-prob 0.0 mixes .*; pass 16"),
])  # fmt: skip
def test_check__names_the_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        METHODS["moco"].check(method_args("moco", *flags), 40)


@pytest.mark.parametrize("kind", ["cutout", "random-erasing"])
def test_check__one_image_per_group_is_enough_to_erase(kind):
    METHODS["moco"].check(method_args("moco", "--im-type", kind, "--bn-splits", "8"), 40)
    assert len(mix(kind, uint8_views(method_args("moco")), groups=8)) == 2
