import dataclasses
import io
import itertools
import math
import struct
import subprocess
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from shards_helpers import PHOTOGRAPHS, chi_square, encode, ks_distance, photograph
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.v2 import functional as F

import main_pretrain
from methods import METHODS
from utils.data import decode as decoding
from utils.data import views
from utils.data.photometric import COLUMNS, OPERATIONS
from utils.data.views import DRAWS, NUMBERS, SPARE, ViewSpec, crop_box, cut_views, draw, parameters_of

ROWS = 20_000
LAST = 1 - 2**-53  # the largest number of `draw`


def rows(n=ROWS, seed=0):
    """n rows of draw(): 4 views of n / 4 samples."""
    return np.concatenate([draw(seed, 3, sample, 4) for sample in range(n // 4)])


@pytest.fixture(scope="module")
def many():
    return rows()


def parameters(spec, u):
    """{name: its value in each of these rows}"""
    found = parameters_of(spec, u)
    assert found.dtype == np.float32 and found.shape == (len(u), len(COLUMNS))
    return dict(zip(COLUMNS, found.T, strict=True))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def apart(a, b):
    """Mean absolute difference of two uint8 images, in 1/255."""
    return (a.float() - b.float()).abs().mean().item()


def cut(image, spec, u):
    """One view of an image, which may be a tensor or encoded."""
    data = image if isinstance(image, bytes) else encode(Image.fromarray(image.permute(1, 2, 0).numpy()), "PNG")
    return cut_views(data, [spec], u[None])[0]


def decode(data):
    """3 x H x W uint8. No warning escapes."""
    with decoding.open_image(data) as image:
        return decoding.decode(image, data).permute(2, 0, 1)


# draw


def test_draw__row_is_a_function_of_seed_epoch_sample_and_view_alone():
    once = {key: draw(*key, 6) for key in itertools.product((0, 1, 2**31), (0, 1, 199), (0, 1, 1_281_166))}
    for (seed, epoch, sample), expected in reversed(once.items()):
        np.random.seed(sample % 7)
        torch.manual_seed(sample)
        assert np.array_equal(draw(seed, epoch, sample, 6), expected)
        for count in (1, 2, 5):
            assert np.array_equal(draw(seed, epoch, sample, count), expected[:count])


def test_draw__no_number_comes_twice():
    """A number has 53 random bits, so two streams that overlapped would show."""
    keys = itertools.product((0, 1, 2), (0, 1, 2), [*range(40), 10**6])
    numbers = np.concatenate([draw(*key, 6).ravel() for key in keys])
    assert len(np.unique(numbers)) == len(numbers) == 9 * 41 * 6 * 40


def test_draw__columns_are_uniform(many):
    assert many.min() >= 0 and many.max() < 1
    for column in many.T:
        assert chi_square(np.histogram(column, 25, (0, 1))[0], [ROWS / 25] * 25) < 5


@pytest.mark.parametrize("neighbour", ["sample", "view", "epoch", "seed", "column"])
def test_draw__neighbours_are_uncorrelated(neighbour):
    n = 1500
    step = {"seed": (1, 0, 0), "epoch": (0, 1, 0), "sample": (0, 0, 1)}.get(neighbour, (0, 0, 0))
    a = np.stack([draw(1, 1, sample, 2) for sample in range(n)])
    b = np.stack([draw(1 + step[0], 1 + step[1], sample + step[2], 2) for sample in range(n)])
    if neighbour == "view":
        a, b = a[:, :1], a[:, 1:]
    if neighbour == "column":
        a, b = a[..., :-1], a[..., 1:]
    a, b = a.reshape(n, -1), b.reshape(n, -1)
    for bend in (lambda x: x, lambda x: (x - 0.5) ** 2):
        x, y = bend(a) - bend(a).mean(0), bend(b) - bend(b).mean(0)
        correlation = (x * y).mean(0) / (x.std(0) * y.std(0))
        assert np.abs(correlation).max() < 4.5 / math.sqrt(n)


# crop_box

SHAPES = [(375, 500), (500, 333), (100, 400), (28, 28), (3, 5), (1, 1), (2, 2), (1, 500), (500, 1), (40, 500), (64, 48)]
GLOBAL, LOCAL = ViewSpec("global", 224, (0.2, 1.0)), ViewSpec("local", 112, (0.1, 0.6))


def slow_crop_box(spec, u, height, width):
    """Torchvision's get_params with given random numbers: ten tries, one by one, then the centre."""
    for attempt in range(10):
        area = height * width * (spec.scale[0] + (spec.scale[1] - spec.scale[0]) * u[attempt])
        ratio = math.exp(math.log(spec.ratio[0]) + (math.log(spec.ratio[1]) - math.log(spec.ratio[0])) * u[10 + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1)), h, w
    torch.manual_seed(0)
    return RandomResizedCrop.get_params(torch.empty(3, height, width), (2.0, 2.0), spec.ratio)  # no area fits: its centre


@pytest.mark.parametrize("spec", [GLOBAL, LOCAL, ViewSpec("probe", 224, (0.08, 1.0))], ids=lambda s: s.name)
def test_crop_box__takes_the_first_of_ten_tries_that_fits(many, spec):
    for height, width in SHAPES:
        for u in many[:150]:
            assert crop_box(spec, u, height, width) == slow_crop_box(spec, u, height, width)


@pytest.mark.parametrize("spec", [GLOBAL, LOCAL], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(375, 500), (100, 260), (28, 28)])
def test_crop_box__has_torchvisions_distribution(many, spec, shape):
    """Of area, ratio and both positions, on a plain image, an extreme one and a tiny one."""
    n = 2500
    ours = np.array([crop_box(spec, u, *shape) for u in many[:n]], float)
    torch.manual_seed(0)
    empty = torch.empty(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(empty, spec.scale, spec.ratio) for _ in range(n)], float)
    for name, of in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "place": lambda b: b[:, 0] / np.maximum(shape[0] - b[:, 2], 1) + b[:, 1] / np.maximum(shape[1] - b[:, 3], 1),
    }.items():
        assert ks_distance(of(ours), of(theirs)) < 1.95, name


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (3, 400), (400, 3), (20, 500), (500, 20), (10, 10**5)])
def test_crop_box__extreme_images_take_torchvisions_central_fallback(many, shape):
    expected = RandomResizedCrop.get_params(torch.empty(3, *shape, device="meta"), GLOBAL.scale, GLOBAL.ratio)
    assert {crop_box(GLOBAL, u, *shape) for u in many[:50]} == {expected}


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_box__lies_within_the_image(many, shape):
    corners = [np.full(40, 0.0), np.full(40, LAST), np.r_[np.zeros(20), np.full(20, LAST)]]
    for spec in (GLOBAL, LOCAL, ViewSpec("whole", 8, (1.0, 1.0)), ViewSpec("crumb", 8, (1e-6, 1e-3))):
        for u in [*many[:60], *corners]:
            top, left, height, width = crop_box(spec, u, *shape)
            assert height >= 1 and width >= 1
            assert 0 <= top <= top + height <= shape[0] and 0 <= left <= left + width <= shape[1]


# cut


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("spec", [GLOBAL, LOCAL, ViewSpec("enlarged", 384, (0.1, 0.3))], ids=lambda s: s.name)
def test_cut__agrees_with_torchvision_and_pil_on_photographs(many, name, spec):
    photo = photograph(name)
    data = encode(photo, "PNG")
    for u in many[100:104]:
        view = cut(data, spec, u)
        assert view.shape == (3, spec.size, spec.size) and view.dtype == torch.uint8
        top, left, height, width = crop_box(spec, u, photo.height, photo.width)
        size = [spec.size, spec.size]
        theirs = F.resized_crop(to_tensor(photo), top, left, height, width, size, antialias=True)
        pil = to_tensor(photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR))
        assert apart(view, theirs) < 0.6 and apart(view, pil) < 0.6  # the bound of the issue is 1.5
        assert apart(view.flip(2), pil) > 5  # the test detects a mirrored view


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (28, 28), (2, 3)])
def test_cut__tiny_images(many, shape):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    for spec in (GLOBAL, ViewSpec("test", 20, resize=24)):
        view = cut(image, spec, many[0])
        assert view.shape == (3, spec.size, spec.size)
        if shape == (1, 1):
            assert torch.equal(view, image.expand_as(view))


def test_parameters_of__flip_is_drawn_with_its_probability(many):
    for p in (0.0, 0.2, 0.5, 0.9, 1.0):
        assert often(parameters(ViewSpec("v", 4, flip_p=p), many)["flip"], p)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (257, 301), (301, 257), (256, 256), (225, 999), (70, 41)])
def test_cut__test_view_is_resize_and_centre_crop(many, shape):
    photo = photograph("astronaut").resize(shape[::-1])
    spec = ViewSpec("test", 224, resize=256)
    view = cut(encode(photo, "PNG"), spec, many[0])
    theirs = CenterCrop(224)(Resize(256, antialias=True)(to_tensor(photo)))
    pil = to_tensor(CenterCrop(224)(Resize(256)(photo)))
    assert view.shape == (3, 224, 224) and apart(view, theirs) < 0.6 and apart(view, pil) < 0.6
    assert max(apart(view.roll(1, dim), pil) for dim in (1, 2)) > 2  # a centre one pixel off would show
    for u in many[1:4]:
        assert torch.equal(cut(to_tensor(photo), spec, u), view)  # nothing random
    neutral = {"order": -1} | {name: value for name, (_, value) in OPERATIONS.items()}
    for name, values in parameters(spec, many[:50]).items():
        assert (values == neutral[name]).all(), name


# parameters_of

JITTER = (0.4, 0.4, 0.4, 0.1)
PUBLISHED = {  # the kinds of views of a method, in order: (count, size, scale)
    "moco": (["--method", "moco"], [(1, 224, (0.2, 1.0))] * 2),
    "moco multi-crop": (["--method", "moco", "--local-crops", "4"],
                        [(1, 224, (0.2, 1.0))] * 2 + [(4, 112, (0.1, 0.6))]),
    "mosrep": (["--method", "mosrep"], [(1, 224, (0.2, 1.0))] * 2 + [(4, 112, (0.1, 0.6))]),
}  # fmt: skip


def uniform(values, low, high):
    assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
    bins = max(5, min(20, len(values) // 50))
    return chi_square(np.histogram(values, bins, (low - 1e-6, high + 1e-6))[0], [len(values) / bins] * bins) < 5


def often(flags, p):
    return abs(flags.mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(flags))


@pytest.mark.parametrize("method", PUBLISHED)
def test_views__of_each_method_are_the_published_ones(many, method):
    flags, expected = PUBLISHED[method]
    args = main_pretrain.get_args([*flags, "--shards", "none"])
    specs = METHODS[args.method].views(args)
    found = [(s.count, s.size, s.scale) for s in specs]
    assert sorted(found) == sorted(expected)
    for spec in specs:
        assert spec.ratio == (3 / 4, 4 / 3) and spec.flip_p == 0.5 and spec.resize is None
        check_parameters(spec, many, JITTER, jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0)


@pytest.mark.parametrize("view, blur_p, solarize_p", [(1, 1.0, 0.0), (2, 0.1, 0.2)])
def test_parameters_of__of_the_w2ssl_views(many, view, blur_p, solarize_p):
    jitter = (0.4, 0.4, 0.2, 0.1)
    spec = ViewSpec(f"view {view}", 112, jitter=jitter, jitter_p=0.8, gray_p=0.2, blur_p=blur_p, solarize_p=solarize_p)
    check_parameters(spec, many, jitter, 0.8, 0.2, blur_p, solarize_p)


def check_parameters(spec, u, jitter, jitter_p, gray_p, blur_p, solarize_p):
    """The frequencies of flags and orders, and the distributions of the values, over these draws."""
    p = parameters(spec, u)
    for name, strength in zip(("brightness", "contrast", "saturation"), jitter, strict=False):
        assert uniform(p[name], 1 - strength, 1 + strength), name
    assert uniform(p["hue"], -jitter[3], jitter[3])
    jittered, blurred = p["order"] >= 0, p["sigma"] > 0
    assert set(p["order"]) == {-1.0, *map(float, range(24))}
    orders = np.unique(p["order"][jittered], return_counts=True)[1]
    assert chi_square(orders, [jittered.sum() / 24] * 24) < 5
    assert often(jittered, jitter_p) and often(blurred, blur_p)
    assert uniform(p["sigma"][blurred], 0.1, 2.0)
    assert set(p["gray"]) <= {0, 1} and often(p["gray"], gray_p)
    assert set(p["solarize"]) <= {0, 1} and often(p["solarize"], solarize_p)
    drawn = np.stack([p[n] for n in ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")])
    assert set(p["flip"]) == {0, 1} and often(p["flip"], 0.5)
    flipped, top, left = p["flip"], u[:, 20], u[:, 21]
    everything = np.stack([*drawn, jittered, flipped, top, left])
    everything = everything[everything.std(1) > 0]
    correlation = np.corrcoef(everything)
    order_row = np.isin(np.arange(len(everything)), (4, len(everything) - 4))  # order and jittered are equivalent
    correlation[np.ix_(order_row, order_row)] = 0
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(u))  # drawn independently of each other


def test_parameters_of__factors_do_not_go_below_zero(many):
    p = parameters(ViewSpec("v", 8, jitter=(1.5, 2.0, 1.0, 0.5), jitter_p=1.0), many)
    for name, high in zip(("brightness", "contrast", "saturation"), (2.5, 3.0, 2.0), strict=True):
        assert uniform(p[name], 0.0, high)  # max(0, 1 - strength) to 1 + strength, as torchvision's ColorJitter
    assert uniform(p["hue"], -0.5, 0.5)


def test_parameters_of__gray_comes_before_or_after_the_jitter(many):
    """Of the same draw, by gray_first."""
    after, before = (parameters(ViewSpec("v", 8, gray_p=0.3, gray_first=first), many) for first in (False, True))
    assert often(after["gray"], 0.3) and not after["gray_first"].any() and not before["gray"].any()
    assert np.array_equal(after["gray"], before["gray_first"])


def test_draws__each_number_has_one_use():
    """Two parameters that shared a number would not be independent. The two grays exclude each other."""
    assert set(DRAWS) == set(COLUMNS)
    used = [number for name, (numbers, _) in DRAWS.items() if name != "gray_first" for number in numbers]
    assert len(set(used)) == len(used) and set(used) <= set(range(22, NUMBERS)) and DRAWS["gray_first"][0] == DRAWS["gray"][0]


def test_draws__numbers_keep_their_use(many):
    """A change would give every seed other views."""
    numbers = {name: numbers for name, (numbers, _) in DRAWS.items()}
    expected = {
        "flip": (22,), "order": (23, 28), "brightness": (24,), "contrast": (25,), "saturation": (26,), "hue": (27,),
        "gray": (29,), "gray_first": (29,), "sigma": (30, 31), "solarize": (32,),
    }  # fmt: skip
    assert expected.items() <= numbers.items()
    p = parameters(ViewSpec("v", 8, jitter=JITTER, jitter_p=0.8, blur_p=0.5), many)
    expected = np.where(many[:, 23] < 0.8, np.floor(24 * many[:, 28]), -1).astype(np.float32)
    assert np.array_equal(p["order"], expected)
    expected = np.where(many[:, 30] < 0.5, 0.1 + many[:, 31] * (2.0 - 0.1), 0).astype(np.float32)
    assert np.array_equal(p["sigma"], expected)
    assert np.array_equal(p["brightness"], (0.6 + many[:, 24] * (1 + 0.4 - 0.6)).astype(np.float32))


def test_cut_views__are_those_of_each_view_alone(many):
    """In the order of the specs. Another sample has others. Given memory, of any layout, takes the same pixels."""
    specs = [LOCAL, ViewSpec("second", 16, count=2), ViewSpec("test", 20, resize=24)]
    data, u = encode(PHOTO, "PNG"), draw(3, 2, 11, 4)
    crops = cut_views(data, specs, u)
    for view, spec, numbers in zip(crops, [specs[0], specs[1], specs[1], specs[2]], u, strict=True):
        assert torch.equal(view, cut(data, dataclasses.replace(spec, count=1), numbers))
    others = cut_views(data, specs, draw(3, 2, 12, 4))
    assert all(not torch.equal(a, b) for a, b in zip(crops[:3], others, strict=False))
    for places in ([torch.empty(v.shape, dtype=torch.uint8) for v in crops], [torch.empty_like(v) for v in crops]):
        assert cut_views(data, specs, u, places) is places
        assert all(torch.equal(a, b) for a, b in zip(crops, places, strict=True))


def test_cut_views__pixels_are_those_of_interpolate(many):
    image = to_tensor(PHOTO)
    for spec, u in itertools.product((LOCAL, ViewSpec("small", 7), ViewSpec("one", 1)), many[:20]):
        top, left, height, width = crop_box(spec, u, *image.shape[1:])
        part = image[None, :, top : top + height, left : left + width]
        resized = torch.nn.functional.interpolate(part, (spec.size, spec.size), mode="bilinear", antialias=True)
        assert torch.equal(cut(image, spec, u), resized[0])


# decode

PHOTO = photograph("chelsea").crop((60, 40, 241, 201))  # 161 x 181


def alpha():
    image = PHOTO.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to display
    return encode(PHOTO, "JPEG", quality=95, exif=exif)


ENCODED = {  # bytes, what they should look like, tolerance in 1/255
    "JPEG": lambda: (encode(PHOTO, "JPEG", quality=95, subsampling=0), PHOTO, 2),
    "progressive JPEG": lambda: (encode(PHOTO, "JPEG", quality=95, subsampling=0, progressive=True), PHOTO, 2),
    "grey JPEG": lambda: (encode(PHOTO.convert("L"), "JPEG", quality=95), PHOTO.convert("L"), 1.5),
    "CMYK JPEG": lambda: (encode(PHOTO.convert("CMYK"), "JPEG", quality=95), PHOTO, 2.5),
    "JPEG rotated by EXIF": lambda: (rotated(), PHOTO, 2.5),
    "PNG": lambda: (encode(PHOTO, "PNG"), PHOTO, 0),
    "grey PNG": lambda: (encode(PHOTO.convert("L"), "PNG"), PHOTO.convert("L"), 0),
    "1-bit PNG": lambda: (encode(PHOTO.convert("1"), "PNG"), PHOTO.convert("1"), 0),
    "PNG with alpha": lambda: (encode(alpha(), "PNG"), PHOTO, 0),
    "grey PNG with alpha": lambda: (encode(alpha().convert("LA"), "PNG"), PHOTO.convert("L"), 0),
    "palette PNG": lambda: (encode(PHOTO.quantize(64), "PNG"), PHOTO.quantize(64), 0),
    "palette PNG, one colour transparent": lambda: (encode(PHOTO.quantize(64), "PNG", transparency=3), PHOTO.quantize(64), 0),
    "palette PNG with alpha": lambda: (
        encode(PHOTO.quantize(64), "PNG", transparency=bytes(range(64))), PHOTO.quantize(64), 0
    ),
    "16-bit PNG": lambda: (
        encode(Image.fromarray(np.array(PHOTO.convert("L")).astype(np.uint16) * 257), "PNG"), PHOTO.convert("L"), 1
    ),
    "WebP": lambda: (encode(PHOTO, "WEBP", quality=95), PHOTO, 2.5),
    "lossless WebP": lambda: (encode(PHOTO, "WEBP", lossless=True), PHOTO, 0),
    "GIF": lambda: (encode(PHOTO.quantize(64), "GIF"), PHOTO.quantize(64), 0),
    "BMP": lambda: (encode(PHOTO, "BMP"), PHOTO, 0),
    "PPM": lambda: (encode(PHOTO, "PPM"), PHOTO, 0),
    "TIFF": lambda: (encode(PHOTO, "TIFF"), PHOTO, 0),
}  # fmt: skip


@pytest.mark.parametrize("format", ENCODED)
def test_decode__every_format_gives_rgb(format):
    """The right pixels, 3 x H x W uint8, without a warning, equal to PIL's."""
    data, looks, tolerance = ENCODED[format]()
    image = decode(data)
    assert image.shape == (3, 161, 181) and image.dtype == torch.uint8
    assert apart(image, to_tensor(looks.convert("RGB"))) <= tolerance
    if format != "16-bit PNG":  # PIL clips where it should scale
        with warnings.catch_warnings(action="ignore"):
            pil = Image.open(io.BytesIO(data)).convert("RGB")
        assert apart(image, to_tensor(pil)) < 0.5


JPEG, PNG, WEBP = (encode(PHOTO, format) for format in ("JPEG", "PNG", "WEBP"))
BAD = {
    "nothing": b"",
    "text": b"no image",
    "JPEG cut short": JPEG[: len(JPEG) // 2],
    "JPEG header": JPEG[:20],
    "PNG cut short": PNG[: len(PNG) // 2],
    "WebP cut short": WEBP[: len(WEBP) // 2],
    "PNG with a changed byte": PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:],
    "pickle": b"\x80\x04\x95\x06\x00\x00\x00\x00\x00\x00\x00\x8c\x02hi\x94.",
}


@pytest.mark.parametrize("case", BAD)
def test_cut_views__undecodable_bytes_raise(many, case):
    with pytest.raises((OSError, SyntaxError, ValueError, RuntimeError)):
        cut(BAD[case], GLOBAL, many[0])


def test_cut_views__no_warning_of_odd_metadata_and_no_bombs(many, monkeypatch):
    assert cut(encode(PHOTO.quantize(64), "PNG", transparency=bytes(range(64))), LOCAL, many[0]).shape == (3, 112, 112)
    for format, limit in itertools.product(("JPEG", "PNG"), (PHOTO.width * PHOTO.height - 1, 100)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"more pixels than --max-pixels {limit}$"):
            cut(encode(PHOTO, format), LOCAL, many[0])


@pytest.mark.parametrize("format", [name for name in ENCODED if "JPEG" in name])
def test_cut_views__simplejpeg_and_pil_give_the_same_pixels(many, monkeypatch, format):
    data = ENCODED[format]()[0]
    specs, u = [GLOBAL, ViewSpec("local", 112, (0.1, 0.6), count=3)], many[:4]
    crops = cut_views(data, specs, u)
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    assert all(map(torch.equal, crops, cut_views(data, specs, u))) and len(crops) == 4


# decoding at a reduced size

LARGE = photograph("astronaut").crop((100, 0, 400, 300)).resize((1504, 1504), Image.Resampling.BICUBIC)


def decoded_sizes(monkeypatch, data, specs, u):
    """The sizes of the images that these views are cropped from, and the views."""
    sizes, real = [], views.decode

    def spy(image, data, reduction):
        pixels = real(image, data, reduction)
        sizes.append(pixels.shape)
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(views, "decode", spy)
        return sizes, cut_views(data, specs, u)


@pytest.mark.parametrize("size, reduction", [(800, 1), (400, 1), (370, 2), (190, 2), (180, 4), (100, 4), (93, 8), (32, 8)])
def test_cut_views__jpegs_are_decoded_no_larger_than_their_crops_need(many, monkeypatch, size, reduction):
    """Crops of the whole: 1504 / reduction pixels for `size` leave SPARE along a side, and twice the reduction would not."""
    spec = ViewSpec("whole", size, (1.0, 1.0), ratio=(1.0, 1.0))
    sizes, (view,) = decoded_sizes(monkeypatch, encode(LARGE, "JPEG", quality=95), [spec], many[:1])
    assert sizes == [(1504 // reduction, 1504 // reduction, 3)]
    assert 1504 / reduction / size >= SPARE or reduction == 1
    assert 1504 / reduction / 2 / size < SPARE or reduction == 8
    whole = LARGE.resize((size, size), Image.Resampling.BILINEAR)
    assert apart(view, to_tensor(whole)) < 1.5


def test_cut_views__the_smallest_crop_of_all_views_decides(many, monkeypatch):
    data = encode(LARGE, "JPEG", quality=95)
    whole, part = ViewSpec("whole", 32, (1.0, 1.0), ratio=(1.0, 1.0)), ViewSpec("part", 32, (0.01, 0.012), count=2)
    assert decoded_sizes(monkeypatch, data, [whole], many[:1])[0][0][0] == 188
    assert decoded_sizes(monkeypatch, data, [whole, part], many[:3])[0][0][0] == 752
    for spec, encoded in ((ViewSpec("test", 32, resize=36), data), (whole, encode(LARGE, "PNG"))):  # never reduced
        assert decoded_sizes(monkeypatch, encoded, [spec], many[:1])[0][0][0] == 1504


def test_cut_views__a_reduced_view_loses_no_detail(many, monkeypatch):
    """Compared with the crop of the full-size image at the same box."""
    data, spec = encode(LARGE, "JPEG", quality=95), ViewSpec("part", 64, (0.02, 0.3))
    full, seen = to_tensor(Image.open(io.BytesIO(data))), set()
    for u in many[:40]:
        sizes, (view,) = decoded_sizes(monkeypatch, data, [spec], u[None])
        reduction = round(1504 / sizes[0][0])
        seen.add(reduction)
        top, left, height, width = crop_box(spec, u, 1504, 1504)
        assert min(height, width) / reduction >= SPARE * 64
        rows, columns = (slice(round(a / reduction) * reduction, round((a + b) / reduction) * reduction)
                         for a, b in ((top, height), (left, width)))  # fmt: skip
        expected = F.resize(full[:, rows, columns], [64, 64], antialias=True)
        assert apart(view, expected) < 1.5
    assert seen >= {2, 4}


# what a file says about its pixels

GRAY = PHOTO.convert("L")
RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)  # to be scaled to the range of a type


def tiff(pixels, **tags):
    """A TIFF of these pixels, with other values for these tags."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        number = {"most": 281, "low": 340, "high": 341, "orientation": 274, "white_is_zero": 262}[tag]
        info.tagtype[number] = 3 if number < 300 else 12
        info[number] = value
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return encode(image, "TIFF", tiffinfo=info)


def big_endian(pixels):
    """A 16-bit TIFF in the other byte order, written by hand."""
    height, width = pixels.shape
    entries = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1),
               (278, 3, height), (279, 4, pixels.size * 2)]  # fmt: skip
    ifd = struct.pack(">H", len(entries))
    for tag, kind, value in entries:
        ifd += struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
    head = b"MM\0*" + struct.pack(">I", 8) + ifd + bytes(4)
    return head.ljust(200, b"\0") + pixels.astype(">u2").tobytes()


DEEP = {  # gray images of more than 8 bits, all of RAMP
    "16-bit PNG": lambda: encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "16-bit PGM": lambda: b"P5 64 64 65535 " + (RAMP * 65535).astype(">u2").tobytes(),
    "12-bit PGM": lambda: b"P5 64 64 4095 " + (RAMP * 4095).astype(">u2").tobytes(),
    "16-bit TIFF": lambda: tiff((RAMP * 65535).astype(np.uint16)),
    "big-endian 16-bit TIFF": lambda: big_endian((RAMP * 65535).astype(np.uint16)),
    "12 bits in a 16-bit TIFF, by MaxSampleValue": lambda: tiff((RAMP * 4095).astype(np.uint16), most=4095),
    "float TIFF with its range, 0 to 1": lambda: tiff(RAMP.astype(np.float32), low=0.0, high=1.0),
    "float TIFF with its range, -500 to 1500": lambda: tiff((RAMP * 2000 - 500).astype(np.float32), low=-500.0, high=1500.0),
    "32-bit TIFF with its range": lambda: tiff((RAMP * 70000).astype(np.int32), low=0.0, high=70000.0),
}  # fmt: skip


@pytest.mark.parametrize("case", DEEP)
def test_decode__deep_pixels_are_scaled_by_the_range_of_their_file(case):
    """To 8 bits, neither clipped nor black."""
    image = decode(DEEP[case]())
    assert image.shape == (3, 64, 64) and (image[0] == image[1]).all() and (image[0] == image[2]).all()
    assert np.abs(image[0].numpy() - RAMP * 255).max() <= 1.01


def test_decode__statistics_of_a_tiff_are_not_its_range():
    """MaxSampleValue is the largest number that occurs, unless it tells a number of bits."""
    assert torch.equal(decode(tiff((RAMP * 3000).astype(np.uint16), most=3000)), decode(tiff((RAMP * 3000).astype(np.uint16))))


NO_RANGE = {
    "float TIFF": lambda: tiff(RAMP.astype(np.float32)),
    "32-bit TIFF": lambda: tiff((RAMP * 70000).astype(np.int32)),
    "float PFM": lambda: b"Pf\n64 64\n-1.0\n" + RAMP.astype("<f4").tobytes(),
    "float TIFF with numbers that are none": lambda: tiff(np.full((8, 8), np.nan, np.float32), low=0.0, high=1.0),
    "an empty range": lambda: tiff(RAMP.astype(np.float32), low=1.0, high=1.0),
}


@pytest.mark.parametrize("case", NO_RANGE)
def test_cut_views__a_range_that_is_not_known_is_an_error(many, case):
    """In one line; it is never guessed."""
    with pytest.raises(ValueError, match="range|finite") as error:
        cut(NO_RANGE[case](), LOCAL, many[0])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


TURNABLE = ["JPEG", "PNG", "WEBP", "TIFF"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", TURNABLE)
def test_cut_views__exif_orientation_is_ignored_in_every_format(many, format, orientation):
    """PIL itself turns TIFFs and no others."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format, {})
    plain = encode(PHOTO, format, **options)
    turned = tiff(PHOTO, orientation=orientation) if format == "TIFF" else encode(PHOTO, format, exif=exif, **options)
    assert turned != plain or orientation == 1
    assert torch.equal(decode(turned), decode(plain))
    for spec in (LOCAL, ViewSpec("test", 20, resize=24)):
        assert torch.equal(cut(turned, spec, many[0]), cut(plain, spec, many[0]))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("case", ["no end marker", "zeros after it", "half"])
def test_cut_views__a_damaged_jpeg_is_usable_at_all_sizes_or_at_none(many, case, reduction):
    """torchvision's decoder is stricter than PIL's, which decodes at reduced sizes."""
    whole = encode(LARGE, "JPEG", quality=90)
    data = {"no end marker": whole[:-2], "zeros after it": whole[:-2] + bytes(100), "half": whole[: len(whole) // 2]}[case]
    spec = ViewSpec("whole", 752 // reduction, (1.0, 1.0), ratio=(1.0, 1.0))
    if case == "zeros after it":
        assert torch.equal(cut(data, spec, many[0]), cut(whole, spec, many[0]))
    else:
        with pytest.raises(OSError, match="truncated"):
            cut(data, spec, many[0])


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 40_001)])
def test_cut_views__a_thin_image_takes_little_memory_as_a_test_view(many, monkeypatch, shape):
    """Only its middle is resized: 4 GB otherwise."""
    sizes, real = [], views.resize
    monkeypatch.setattr(views, "resize", lambda image, *size: sizes.append(size[:2]) or real(image, *size))
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    assert cut(image, ViewSpec("test", 224, resize=256), many[0]).shape == (3, 224, 224)
    assert all(height * width <= 33 * 256**2 for height, width in sizes)


@pytest.mark.parametrize("shape", [(1, 500), (1, 501), (500, 1), (2, 301), (301, 2), (3, 1000), (2, 64)])
def test_cut_views__the_middle_of_a_thin_image_is_that_of_the_whole(many, monkeypatch, shape):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    spec = ViewSpec("test", 24, resize=24)
    ours = cut(image, spec, many[0])
    monkeypatch.setattr(views, "LONGEST", 10**9)
    assert (ours.int() - cut(image, spec, many[0]).int()).abs().max() <= (0 if shape[0] != 3 else 3)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("format", ["EPS", "PDF", "WMF", "XBM", "ICNS", "TGA"])
def test_open_image__knows_image_formats_only(monkeypatch, format):
    """A file named .jpg that is PostScript starts no other program."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    assert format not in decoding.FORMATS
    with pytest.raises(UnidentifiedImageError), decoding.open_image(POSTSCRIPT) as image:
        image.load()
    assert not started
