import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from launches import Launches
from PIL import ImageFilter
from shards_helpers import PHOTOGRAPHS, photograph
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.data import photometric as unit
from utils.data import photometric_batch as batch
from utils.data.photometric import COLUMNS, OPERATIONS, normalized, photometric
from utils.data.photometric_batch import colored, photometric_batch

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
NEUTRAL = {"order": -1} | {name: neutral for name, (_, neutral) in OPERATIONS.items()}
COLOR_JITTER = ("brightness", "contrast", "saturation", "hue")


def row(**values):
    assert not values.keys() - set(COLUMNS)
    return torch.tensor([{**NEUTRAL, **values}[name] for name in COLUMNS], dtype=torch.float32)


def photo(name, size=(128, 128)):
    return photograph(name).crop((60, 30, 330, 300)).resize(size)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seen(views, parameters):
    """The result of photometric for uint8 views, as float."""
    out = photometric(views, parameters)
    assert out.dtype == torch.uint8 and out.shape == views.shape
    return out.float()


def exact(views, parameters):
    """The same before the rounding."""
    x = views.float().contiguous()
    for view, values in zip(x.split(1), parameters.tolist(), strict=True):
        unit._apply_(view, unit._steps(values))
    return x


def apart(ours, theirs):
    return (ours - theirs.float()).abs().mean().item()


def random_rows(n, seed=0, strong=False):
    """n rows of all operations mixed, as in training; with `strong`, far from neutral."""
    rng = np.random.default_rng(seed)
    low, high, turn = (0.2, 1.8, 0.5) if strong else (0.6, 1.4, 0.1)
    values = dict(zip(COLOR_JITTER, [*rng.uniform(low, high, (3, n)), rng.uniform(-turn, turn, n)], strict=True))
    values |= {"order": rng.integers(-1, 24, n), "gray": rng.random(n) < 0.3, "gray_first": np.zeros(n)}
    values |= {
        "sigma": rng.uniform(0.1, 2, n) * (rng.random(n) < 0.6),
        "solarize": rng.random(n) < 0.4,
        "flip": rng.random(n) < 0.5,
    }
    return torch.tensor(
        np.stack([values.get(name, np.full(n, NEUTRAL[name])) for name in COLUMNS], axis=1), dtype=torch.float32
    )


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
    order = {"order": 5} if operation in COLOR_JITTER else {}
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
        torch.testing.assert_close(exact(views[None], row(hue=shift, order=0)[None])[0].double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_photometric__blur_is_gaussian(sigma):
    """One bright pixel becomes exp(-r^2 / 2 sigma^2), normalised; a plain image stays as it is up to its borders."""
    image = torch.zeros(3, 31, 31, dtype=torch.uint8)
    image[1, 15, 15] = 255
    out = exact(image[None], row(sigma=sigma)[None])[0] / 255
    at = torch.arange(31.0) - 15
    bell = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))
    assert (out[1] - bell / bell.sum()).abs().max() < 2e-3 and abs(out[1].sum() - 1) < 1e-4
    assert out[0].abs().max() < 1e-5 and out[2].abs().max() < 1e-5
    plain = torch.full((1, 3, 9, 5), 200, dtype=torch.uint8)
    assert torch.equal(photometric(plain, row(sigma=sigma)[None]), plain)


def test_photometric__solarize_turns_128_and_above():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    values = seen(image, row(solarize=1)[None])[0, 0].flatten()
    expected = torch.tensor([v if v < 128 else 255 - v for v in range(256)]).float()
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)


def test_photometric__neutral_changes_nothing():
    views = torch.stack([to_tensor(photo(name)) for name in PHOTOGRAPHS])
    no_jitter = row(brightness=0.2, contrast=1.9, saturation=0.1, hue=0.4, order=-1)  # drawn, but not applied
    for values in (row(order=-1), row(order=0), row(order=11), row(order=23), no_jitter):
        out = photometric(views, values.expand(3, len(COLUMNS)))
        assert torch.equal(out, views) and out.data_ptr() != views.data_ptr()


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (2, 6, 3, 5, 4)])
def test_normalized__is_torchvisions(shape):
    views = torch.randint(256, shape, dtype=torch.uint8)
    before = views.clone()
    out = normalized(views)
    assert out.dtype == torch.float32 and torch.equal(views, before)
    torch.testing.assert_close(out, T.normalize(views.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    last = torch.randint(256, (4, 3, 8, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert normalized(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photometric__flip_is_applied_last(name):
    views, rows = to_tensor(photo(name)).repeat(6, 1, 1, 1), random_rows(6, seed=3)
    plain, flipped = rows.clone(), rows.clone()
    flip = COLUMNS.index("flip")
    plain[:, flip], flipped[:, flip] = 0, 1
    assert torch.equal(photometric(views, flipped), photometric(views, plain).flip(3))


def test_photometric__operations_have_neutral_values_and_the_flip_is_the_last():
    """The four operations of the color jitter, which have a random order, are neighbours."""
    assert {name: neutral for name, (_, neutral) in OPERATIONS.items()} == {name: NEUTRAL[name] for name in OPERATIONS}
    assert list(OPERATIONS)[-1] == "flip" and tuple(list(OPERATIONS)[unit.JITTER]) == COLOR_JITTER


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
    rows = [row(order=code, **dict(zip(COLOR_JITTER, factors, strict=True))) for code in range(24)]
    ours = exact(to_tensor(image).repeat(24, 1, 1, 1), torch.stack(rows))
    found = []
    for view in ours:
        distance = {order: apart(view, loop) for order, loop in loops.items()}
        best, second = sorted(distance, key=distance.get)[:2]
        assert distance[best] < 0.25 and distance[second] > 2 * distance[best]
        found.append(best)
    assert set(found) == set(loops)


def order_of(code):
    """The order of a code, found by the loop that agrees with it."""
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
    """Jitter in the drawn order, gray before it or after it, blur, solarize, flip, each only if drawn."""
    image = photo(name)
    codes = (3, 8, 14, 21)
    rows = random_rows(8, seed=4)
    for name, values in {
        "order": [*codes, *codes], "gray_first": [0, 1, 0, 0, 0, 0, 1, 0], "gray": [0, 0, 0, 1, 0, 0, 0, 1],
        "sigma": [0, 1.2, 0, 0.8, 2, 0, 0.6, 0], "solarize": [0, 0, 0, 0, 0, 1, 0, 0],
    }.items():  # fmt: skip
        rows[:, COLUMNS.index(name)] = torch.tensor(values)
    ours = seen(to_tensor(image).repeat(8, 1, 1, 1), rows)
    orders = {code: order_of(code) for code in codes}
    for view, row_ in zip(ours, rows.tolist(), strict=True):
        values = dict(zip(COLUMNS, row_, strict=True))
        x = T.rgb_to_grayscale(image, 3) if values["gray_first"] else image
        for operation in orders[values["order"]]:
            x = JITTER[operation](x, values[COLOR_JITTER[operation]])
        x = T.rgb_to_grayscale(x, 3) if values["gray"] else x
        x = x.filter(ImageFilter.GaussianBlur(values["sigma"])) if values["sigma"] else x
        x = T.solarize(x, 128) if values["solarize"] else x
        x = T.hflip(x) if values["flip"] else x
        assert apart(view, to_tensor(x)) < 3


@pytest.mark.parametrize("later", [{"sigma": 1.5}, {"solarize": 1}])
def test_photometric__gray_comes_before(later):
    """Three equal channels stay equal, and a solarize after a blur sees the blurred values."""
    image = to_tensor(photo("coffee", (32, 32)))[None]
    out = seen(image, row(gray=1, **later)[None])[0]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    blurred = exact(image, row(sigma=1.5)[None])
    expected = torch.where(blurred >= 127.5, 255 - blurred, blurred)
    near = (blurred - 127.5).abs() < 0.01
    both = exact(image, row(sigma=1.5, solarize=1)[None])
    assert ((both - expected).abs() < 1e-2)[~near].all()


# batches


def test_photometric__batch_is_its_samples_one_by_one():
    views = torch.stack([to_tensor(photo(name, (48, 40))) for name in PHOTOGRAPHS]).repeat(10, 1, 1, 1)
    rows = random_rows(30, strong=True)
    together = photometric(views, rows)
    for i in range(30):
        assert torch.equal(together[i : i + 1], photometric(views[i : i + 1], rows[i : i + 1]))
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(photometric(views[shuffled], rows[shuffled]), together[shuffled])


def of_every_order(n):
    """n rows of all operations: all 24 orders, gray before the jitter and after it, brightness 0 and hues of half a turn."""
    rows = random_rows(n, strong=True)
    rows[:, COLUMNS.index("order")] = torch.arange(n) % 25 - 1
    rows[:, COLUMNS.index("gray_first")] = (torch.arange(n) % 7 == 0).float()
    rows[::11, COLUMNS.index("brightness")] = 0
    rows[::13, COLUMNS.index("hue")] = 0.5
    return rows


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [1, 2, 250])
def test_photometric_batch__is_view_by_view(n, layout):
    """Up to the rounding of float32. A pixel that lies between two integers may then become the other one."""
    views = torch.stack([to_tensor(photo(name, (24, 20))) for name in PHOTOGRAPHS]).repeat(84, 1, 1, 1)[:n]
    rows, given = of_every_order(n), views.contiguous(memory_format=layout)
    torch.testing.assert_close(colored(given, rows.numpy()), exact(views, rows), atol=2e-3, rtol=0)
    out = photometric_batch(given, rows)
    assert torch.equal(out, colored(given, rows.numpy()).round().byte()) and torch.equal(given, views)
    assert (out != photometric(views, rows)).float().mean() < 1e-4


@pytest.mark.parametrize("needed", [(), ("flip",), ("sigma",), ("solarize", "gray"), ("gray_first", "flip"), ("hue", "sigma")])
def test_photometric_batch__leaves_out_operations_that_no_view_has(needed):
    views, rows = torch.stack([to_tensor(photo(name, (24, 20))) for name in PHOTOGRAPHS]), row().repeat(3, 1)
    for name in needed:
        rows[1:, COLUMNS.index(name)] = torch.tensor([0.3 if name == "hue" else 1, NEUTRAL[name]])
        rows[:, 0] = 5
    out = photometric_batch(views, rows)
    assert torch.equal(out[::2], views[::2]) and torch.equal(out, photometric(views, rows))


@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_photometric_batch__any_leading_dimensions(shape):
    n = math.prod(shape)
    views, rows = torch.randint(256, (*shape, 3, 9, 8), dtype=torch.uint8), random_rows(n)
    out = photometric_batch(views, rows.view(*shape, len(COLUMNS)))
    assert torch.equal(out.view(n, 3, 9, 8), photometric_batch(views.view(n, 3, 9, 8), rows))


def test_places__hold_every_order():
    for order in unit.ORDERS:
        places = batch.places_of(order)
        without = [operation for operation in order if operation != batch.BRIGHTNESS]
        assert [batch.SEQUENCE[places[operation]] for operation in without] == without
        assert sorted(without, key=lambda operation: places[operation]) == without
        before = order[order.index(batch.BRIGHTNESS) - 1] if order[0] != batch.BRIGHTNESS else None
        assert places[batch.BRIGHTNESS] == (0 if before is None else places[before])


@pytest.mark.parametrize("shape", [(5, 2), (1, 6), (10, 1), (0, 4), (0,)])
def test_photometric__any_leading_dimensions(shape):
    n = math.prod(shape)
    views = torch.stack([to_tensor(photo("chelsea", (20, 30)))] * max(n, 1))[:n]
    rows = random_rows(n)
    out = photometric(views.view(*shape, 3, 30, 20), rows.view(*shape, len(COLUMNS)))
    assert out.shape == (*shape, 3, 30, 20) and out.dtype == torch.uint8
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
    assert torch.equal(out, photometric(before.contiguous(), rows))


def test_photometric__contiguous_views_are_left_unchanged():
    views = torch.randint(256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    before, rows = views.clone(), random_rows(8, strong=True).view(4, 2, len(COLUMNS))
    rows_before = rows.clone()
    photometric(views, rows)
    assert torch.equal(views, before) and torch.equal(rows, rows_before)


@pytest.mark.parametrize("value", [0, 255])
def test_photometric__plain_extremes_stay_within_range(value):
    views = torch.full((60, 3, 8, 8), value, dtype=torch.uint8)
    out = exact(views, random_rows(60, strong=True))
    assert out.isfinite().all() and out.min() > -1e-2 and out.max() < 255.01


def test_photometric__rows_do_not_leak_into_other_samples():
    """If one row changes, only its sample changes."""
    views = torch.stack([to_tensor(photo("astronaut", (24, 24)))] * 5)
    plain = photometric(views, row().expand(5, len(COLUMNS)))
    changes = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.1, "hue": 0.2}
    changes |= {"gray": 1, "sigma": 2, "solarize": 1, "flip": 1}
    for name, value in changes.items():
        rows = row().repeat(5, 1)
        rows[3] = row(**{"order": 1 if name in COLOR_JITTER else -1, name: value})
        out = photometric(views, rows)
        same = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
        assert same == [True, True, True, False, True], name


@pytest.mark.parametrize("n", [1, 32, 256])
def test_photometric_batch__asks_little_of_a_gpu(n):
    """Every operation at once: 40 launches and copies, one of them pinned, and the host does not wait."""
    rows = of_every_order(n).numpy()
    rows[:, COLUMNS.index("gray_first")], rows[0, 1:] = 0, 1.1
    with FakeTensorMode():
        try:
            views = torch.empty(n, 16, 16, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
            with Launches() as found:
                out = photometric_batch(views, rows)
        except RuntimeError as error:  # torch 2.9 built for CUDA, on a machine without its driver
            pytest.skip(f"this torch has no fake CUDA: {str(error).splitlines()[0]}")
        assert out.device.type == normalized(views).device.type == "cuda"
    assert 30 < found.found.pop("launches") < 40
    assert found.found == {"pinned copies": 1, "pageable copies": 0, "copies back": 0, "waits": 0}
