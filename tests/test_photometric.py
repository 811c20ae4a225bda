import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from PIL import ImageFilter
from shards_helpers import PHOTOGRAPHS, photograph

from utils.photometric import COLUMNS, photometric

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
NEUTRAL = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "order": -1, "gray": 0, "sigma": 0, "solarize": 0}


def row(**values):
    assert list(NEUTRAL) == list(COLUMNS)
    return torch.tensor([{**NEUTRAL, **values}[name] for name in COLUMNS], dtype=torch.float32)


def photo(name, size=(128, 128)):
    return photograph(name).crop((60, 30, 330, 300)).resize(size)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seen(views, parameters):
    """What photometric makes of uint8 views, with the normalisation undone: in [0, 255]."""
    return (photometric(views, parameters) * STD + MEAN) * 255


def apart(ours, theirs):
    return (ours - theirs.float()).abs().mean().item()


def random_rows(n, seed=0, strong=False):
    """n rows as they occur in training, all operations mixed; with `strong`, far from neutral."""
    rng = np.random.default_rng(seed)
    low, high, turn = (0.2, 1.8, 0.5) if strong else (0.6, 1.4, 0.1)
    return torch.tensor(np.stack([
        *rng.uniform(low, high, (3, n)), rng.uniform(-turn, turn, n), rng.integers(-1, 24, n), rng.random(n) < 0.3,
        rng.uniform(0.1, 2, n) * (rng.random(n) < 0.6), rng.random(n) < 0.4,
    ], axis=1), dtype=torch.float32)  # fmt: skip


# one operation at a time, against torchvision on PIL images

ALONE = {  # name: (torchvision's operation, values, bound in 1/255)
    "brightness": (T.adjust_brightness, (0.0, 0.6, 0.87, 1.4), 1.5),
    "contrast": (T.adjust_contrast, (0.0, 0.6, 0.87, 1.4), 1.5),
    "saturation": (T.adjust_saturation, (0.0, 0.6, 0.87, 1.4), 1.5),
    "hue": (T.adjust_hue, (-0.5, -0.1, 0.03, 0.1, 0.3, 0.5), 3),
    "gray": (lambda image, _: T.rgb_to_grayscale(image, 3), (1,), 1.5),
    "solarize": (lambda image, _: T.solarize(image, 128), (1,), 1.5),
    "sigma": (lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)), (0.1, 0.5, 1.0, 1.5, 2.0), 3),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("operation", ALONE)
def test_photometric__operation_agrees_with_pil_on_photographs(operation, name):
    apply, values, bound = ALONE[operation]
    image = photo(name)
    order = {"order": 5} if operation in COLUMNS[:4] else {}
    ours = seen(to_tensor(image).repeat(len(values), 1, 1, 1), torch.stack([row(**{operation: v}, **order) for v in values]))
    for view, value in zip(ours, values, strict=True):
        theirs = to_tensor(apply(image, value))
        assert apart(view, theirs) < bound / (1 if bound == 3 else 2), value
        if value not in (0.03, 0.87, 0.1, 0.5) or operation == "hue":  # from the others the test can tell a no-op
            assert apart(to_tensor(image).float(), theirs) > (1 if operation in ("hue", "sigma") else bound), value


def test_photometric__hue_is_the_hsv_wheel():
    """Against colorsys, pixel by pixel, with greys, pure colours, black and white among them."""
    rng = np.random.default_rng(0)
    pure = np.array(list(itertools.product((0, 128, 255), repeat=3)))
    pixels = np.concatenate([pure, rng.integers(0, 256, (101, 3))]).astype(np.uint8)  # 128
    views = torch.from_numpy(pixels.T.reshape(3, 8, 16).copy())
    for shift in (-0.5, -0.1, 0.07, 1 / 3, 0.5):
        expected = []
        for pixel in pixels:
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
            expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
        expected = torch.tensor(np.array(expected).T.reshape(3, 8, 16)) * 255
        torch.testing.assert_close(seen(views[None], row(hue=shift, order=0)[None])[0].double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_photometric__blur_is_gaussian(sigma):
    """One bright pixel becomes exp(-r^2 / 2 sigma^2), normalised; a plain image stays as it is up to its borders."""
    image = torch.zeros(3, 31, 31, dtype=torch.uint8)
    image[1, 15, 15] = 255
    out = seen(image[None], row(sigma=sigma)[None])[0] / 255
    at = torch.arange(31.0) - 15
    bell = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))
    assert (out[1] - bell / bell.sum()).abs().max() < 2e-3 and abs(out[1].sum() - 1) < 1e-4
    assert out[0].abs().max() < 1e-5 and out[2].abs().max() < 1e-5
    plain = torch.full((1, 3, 9, 5), 200, dtype=torch.uint8)
    assert (seen(plain, row(sigma=sigma)[None]) - 200).abs().max() < 1e-3


def test_photometric__solarize_turns_128_and_above():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    values = seen(image, row(solarize=1)[None])[0, 0].flatten()
    expected = torch.tensor([v if v < 128 else 255 - v for v in range(256)]).float()
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)


def test_photometric__neutral_is_plain_normalisation():
    views = torch.stack([to_tensor(photo(name)) for name in PHOTOGRAPHS])
    expected = T.normalize(views.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for order in (-1, 0, 11, 23):
        out = photometric(views, row(order=order).expand(3, 8))
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    no_jitter = row(brightness=0.2, contrast=1.9, saturation=0.1, hue=0.4, order=-1)  # drawn, but not applied
    torch.testing.assert_close(photometric(views, no_jitter.expand(3, 8)), expected, atol=2e-6, rtol=0)


# several operations

JITTER = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)


def test_photometric__each_sample_has_its_own_order():
    """The 24 codes are the 24 orders: each agrees with one loop over torchvision's operations, and with no other."""
    image = photo("astronaut", (40, 40))
    factors = (1.6, 0.4, 1.9, 0.2)
    as_float = to_tensor(image).float() / 255
    loops = {}
    for order in itertools.permutations(range(4)):
        x = as_float
        for operation in order:
            x = JITTER[operation](x, factors[operation])
        loops[order] = x * 255
    rows = [row(order=code, **dict(zip(COLUMNS, factors, strict=False))) for code in range(24)]
    ours = seen(to_tensor(image).repeat(24, 1, 1, 1), torch.stack(rows))
    found = []
    for view in ours:
        distance = {order: apart(view, loop) for order, loop in loops.items()}
        best, second = sorted(distance, key=distance.get)[:2]
        assert distance[best] < 0.25 and distance[second] > 2 * distance[best]
        found.append(best)
    assert set(found) == set(loops)


def order_of(code):
    """The order that a code stands for, from the outside: which of all loops agrees with it."""
    image = photo("astronaut", (24, 24))
    values = {"brightness": 1.6, "contrast": 0.4, "saturation": 1.9, "hue": 0.2}
    ours = seen(to_tensor(image)[None], row(order=code, **values)[None])[0]
    distance = {}
    for order in itertools.permutations(range(4)):
        x = to_tensor(image).float() / 255
        for operation in order:
            x = JITTER[operation](x, list(values.values())[operation])
        distance[order] = apart(ours, x * 255)
    return min(distance, key=distance.get)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photometric__chain_agrees_with_a_loop_over_pil_images(name):
    """Jitter in the drawn order, then gray, blur, solarize, each only if drawn: as the released transforms do."""
    image = photo(name)
    codes = (3, 8, 14, 21)
    rows = random_rows(8, seed=4)
    rows[:, 4] = torch.tensor([*codes, *codes])
    rows[:, 5] = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1])
    rows[:, 6] = torch.tensor([0, 1.2, 0, 0.8, 2, 0, 0.6, 0])
    rows[:, 7] = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0])
    ours = seen(to_tensor(image).repeat(8, 1, 1, 1), rows)
    orders = {code: order_of(code) for code in codes}
    for view, values in zip(ours, rows.tolist(), strict=True):
        x = image
        for operation in orders[values[4]]:
            x = JITTER[operation](x, values[operation])
        x = T.rgb_to_grayscale(x, 3) if values[5] else x
        x = x.filter(ImageFilter.GaussianBlur(values[6])) if values[6] else x
        x = T.solarize(x, 128) if values[7] else x
        assert apart(view, to_tensor(x)) < 3


@pytest.mark.parametrize("later", [{"sigma": 1.5}, {"solarize": 1}])
def test_photometric__gray_comes_before(later):
    """Three equal channels stay equal, and a solarize after a blur sees the blurred values."""
    image = to_tensor(photo("coffee", (32, 32)))[None]
    out = seen(image, row(gray=1, **later)[None])[0]
    assert (out[0] - out[1]).abs().max() < 1e-3 and (out[0] - out[2]).abs().max() < 1e-3
    blurred = seen(image, row(sigma=1.5)[None])
    expected = torch.where(blurred >= 128, 255 - blurred, blurred)
    near = (blurred - 128).abs() < 0.01
    both = seen(image, row(sigma=1.5, solarize=1)[None])
    assert ((both - expected).abs() < 1e-2)[~near].all()


# batches


def test_photometric__batch_is_its_samples_one_by_one():
    views = torch.stack([to_tensor(photo(name, (48, 40))) for name in PHOTOGRAPHS]).repeat(10, 1, 1, 1)
    rows = random_rows(30, strong=True)
    together = photometric(views, rows)
    for i in range(30):
        torch.testing.assert_close(together[i : i + 1], photometric(views[i : i + 1], rows[i : i + 1]), atol=1e-5, rtol=0)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(photometric(views[shuffled], rows[shuffled]), together[shuffled], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(5, 2), (1, 6), (10, 1), (0, 4), (0,)])
def test_photometric__any_leading_dimensions(shape):
    n = math.prod(shape)
    views = torch.stack([to_tensor(photo("chelsea", (20, 30)))] * max(n, 1))[:n]
    rows = random_rows(n)
    out = photometric(views.view(*shape, 3, 30, 20), rows.view(*shape, 8))
    assert out.shape == (*shape, 3, 30, 20) and out.dtype == torch.float32
    assert torch.equal(out.view(n, 3, 30, 20), photometric(views, rows))


@pytest.mark.parametrize("layout", ["channels last", "strided", "transposed", "expanded"])
def test_photometric__non_contiguous_views_are_left_unchanged(layout):
    views = torch.stack([to_tensor(photo(name, (32, 32))) for name in PHOTOGRAPHS])  # channels last by construction
    views = {
        "channels last": lambda: views.contiguous(memory_format=torch.channels_last),
        "strided": lambda: views.contiguous()[..., ::2, 1::2],
        "transposed": lambda: views.contiguous().transpose(2, 3),
        "expanded": lambda: views[:1].expand(3, -1, -1, -1),
    }[layout]()
    rows = random_rows(3, seed=2)
    before, rows_before = views.clone(), rows.clone()
    out = photometric(views, rows)
    assert torch.equal(views, before) and torch.equal(rows, rows_before)
    torch.testing.assert_close(out, photometric(before.contiguous(), rows), atol=1e-5, rtol=0)


def test_photometric__contiguous_views_are_left_unchanged():
    views = torch.randint(256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    before, rows = views.clone(), random_rows(8, strong=True).view(4, 2, 8)
    rows_before = rows.clone()
    out = photometric(views, rows)
    assert torch.equal(views, before) and torch.equal(rows, rows_before)
    assert out.isfinite().all()


@pytest.mark.parametrize("value", [0, 255])
def test_photometric__plain_extremes_stay_within_range(value):
    views = torch.full((60, 3, 8, 8), value, dtype=torch.uint8)
    out = seen(views, random_rows(60, strong=True))
    assert out.isfinite().all() and out.min() > -1e-2 and out.max() < 255.01


def test_photometric__rows_do_not_leak_into_other_samples():
    """Only the sample whose row is changed changes."""
    views = torch.stack([to_tensor(photo("astronaut", (24, 24)))] * 5)
    plain = photometric(views, row().expand(5, 8))
    changes = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.1, "hue": 0.2, "gray": 1, "sigma": 2, "solarize": 1}
    for name, value in changes.items():
        rows = row().repeat(5, 1)
        rows[3] = row(**{"order": 1 if name in COLUMNS[:4] else -1, name: value})
        out = photometric(views, rows)
        same = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
        assert same == [True, True, True, False, True], name
