"""Which pixels of an image file reach the shards."""

import io
import math
import struct

import numpy as np
import pytest
from conversions import convert, draw, samples
from PIL import EpsImagePlugin, Image, features

import imagenet2wds
from utils.data.encoding import EXTENSIONS, encode, extensions

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF's SampleFormat
ORIENTATION, SMIN, SMAX = 274, 340, 341


def tiff(pixels: np.ndarray, order="<", photometric=1, bits=None, data=None, extra=None) -> bytes:
    """A TIFF of one strip. pixels: H x W or H x W x 3. extra: tag -> short int, or a float that is stored as a double."""
    height, width, *channels = pixels.shape
    sample_format = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}[pixels.dtype.kind]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
    tags = {256: width, 257: height, 258: bits or 8 * pixels.dtype.itemsize, 259: 1, 262: 2 if channels else photometric,
            273: 8, 277: 3 if channels else 1, 278: height, 279: len(data), 339: sample_format, **(extra or {})}  # fmt: skip
    at = 8 + len(data) + len(data) % 2
    entries, values = b"", b""  # values that do not fit into an entry
    values_at = at + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        if isinstance(value, float):
            entries += struct.pack(f"{order}HHII", tag, 12, 1, values_at + len(values))
            values += struct.pack(f"{order}d", value)
        elif tag in (258, 339) and channels:
            entries += struct.pack(f"{order}HHII", tag, 3, 3, values_at + len(values))
            values += struct.pack(f"{order}3H2x", value, value, value)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    count = struct.pack(f"{order}H", len(tags))
    return head + data.ljust(at - 8, b"\0") + count + entries + bytes(4) + values


def decoded(data: bytes, extension: str) -> np.ndarray:
    found, encoded = encode(data, extension)
    assert found == "png"
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


DEEP = np.array([[0, 1, 255, 256], [4095, 32768, 65534, 65535]], np.uint16)


@pytest.mark.parametrize("order", "<>")
def test_encode__16_bit_tiff_keeps_its_values(order):
    np.testing.assert_array_equal(decoded(tiff(DEEP, order), "tif"), DEEP)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_encode__compressed_16_bit_tiff_keeps_its_values(order, compression):
    file = io.BytesIO()
    mode = "I;16" if order == "<" else "I;16B"
    Image.frombytes(mode, (4, 2), DEEP.astype(f"{order}u2").tobytes()).save(file, "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file.getvalue(), "tif"), DEEP)


def test_encode__white_is_zero_is_inverted_with_16_bits_as_with_8():
    np.testing.assert_array_equal(decoded(tiff(DEEP, photometric=0), "tif"), 65535 - DEEP)
    shallow = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(decoded(tiff(shallow, photometric=0), "tif"), 255 - shallow)


def test_encode__12_bits_are_scaled_to_white():
    values = np.array([[0, 1, 2048, 4095]])
    packed = int("".join(f"{v:012b}" for v in values[0]), 2).to_bytes(6, "big")
    found = decoded(tiff(values.astype(np.uint16), bits=12, data=packed), "tif")
    np.testing.assert_array_equal(found, np.round(values / 4095 * 65535))


@pytest.mark.parametrize("tag", [SMAX, 281])  # 281: MaxSampleValue, the same rule as in utils/data/decode.py
@pytest.mark.parametrize("order", "<>")
def test_encode__12_bits_within_16_use_the_declared_range(order, tag):
    values = np.array([[0, 1, 2048, 4095]], np.uint16)
    found = decoded(tiff(values, order, extra={tag: 4095}), "tif")
    np.testing.assert_array_equal(found, np.round(values / 4095 * 65535))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-100.0, 300.0)])
def test_encode__float_tiff_uses_the_declared_range(order, low, high):
    values = np.linspace(low, high, 8, dtype=np.float32).reshape(2, 4)
    found = decoded(tiff(values, order, extra={SMIN: low, SMAX: high}), "tif")
    np.testing.assert_array_equal(found.ravel(), np.round(np.linspace(0, 65535, 8)))


@pytest.mark.parametrize("kind", ["u4", "i4", "i2"])
def test_encode__other_integers_use_the_declared_range(kind):
    values = np.array([[10, 20, 30]], kind)
    found = decoded(tiff(values, extra={SMIN: 10, SMAX: 30}), "tif")
    np.testing.assert_array_equal(found, [[0, round(65535 / 2), 65535]])


@pytest.mark.parametrize("values, extra, reason", [
    (np.array([[0, 0.5, 1]], np.float32), {}, "float pixels without SMinSampleValue"),
    (np.array([[0, 0.5, 1]], np.float32), {SMAX: 1.0}, "float pixels without SMinSampleValue"),
    (np.array([[0, math.nan, 1]], np.float32), {SMIN: 0.0, SMAX: 1.0}, "outside of the declared range 0 ... 1"),
    (np.array([[0, 0.5, 1.5]], np.float32), {SMIN: 0.0, SMAX: 1.0}, "outside of the declared range 0 ... 1"),
    (np.array([[0, 5000]], np.uint16), {SMAX: 4095}, "outside of the declared range 0 ... 4095"),
    (np.array([[0, 1]], np.uint16), {SMAX: 0}, "outside of the declared range"),
    (np.array([[0, 5000]], np.uint32), {}, "32-bit or signed pixels without SMinSampleValue"),
    (np.array([[0, 5000]], np.int16), {}, "32-bit or signed pixels without SMinSampleValue"),
    (np.zeros((2, 2, 3), np.uint16), {SMAX: 4095}, "16-bit colours with SMaxSampleValue 4095"),
])  # fmt: skip
def test_encode__unknown_range_is_refused(values, extra, reason):
    with pytest.raises(ValueError, match=reason):
        encode(tiff(values, extra=extra), "tif")


@pytest.mark.parametrize("order", "<>")
def test_encode__16_bit_colours_keep_their_high_bytes(order):
    values = np.arange(24, dtype=np.uint16).reshape(2, 4, 3) * 2048
    np.testing.assert_array_equal(decoded(tiff(values, order), "tif"), values >> 8)


def test_imagenet2wds__float_tiff_is_listed_with_its_reason(tmp_path, capsys):
    """A float image used to become black or white."""
    draw(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "1.tif").write_bytes(tiff(np.array([[0, 0.5, 1]], np.float32)))
    convert(tmp_path / "in", tmp_path / "out")
    assert len(samples(tmp_path / "out" / "train")) == 1
    (line,) = (tmp_path / "out" / "train" / "bad_images.txt").read_text().splitlines()
    assert line.startswith("1.tif\tfloat pixels without SMinSampleValue and SMaxSampleValue")
    assert "such as 1.tif: float pixels" in capsys.readouterr().out


def test_encode__pgm_of_12_bits_is_scaled_to_white():
    values = np.array([[0, 1, 2048, 4095]])
    data = b"P5 4 1 4095\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decoded(data, "pgm"), np.round(values / 4095 * 65535))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_encode__orientation_is_ignored_in_tiff_as_in_jpeg(orientation, compression):
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "TIFF", compression=compression, tiffinfo={ORIENTATION: orientation})
    np.testing.assert_array_equal(decoded(file.getvalue(), "tif"), pixels)
    for kind in ("JPEG", "PNG"):  # copied; training ignores the tag
        file = io.BytesIO()
        image.save(file, kind, exif=exif)
        assert encode(file.getvalue(), "jpg")[1] == file.getvalue()


@pytest.mark.parametrize("orientation", [3, 6])
def test_encode__orientation_is_ignored_with_16_bits(orientation):
    np.testing.assert_array_equal(decoded(tiff(DEEP, extra={ORIENTATION: orientation}), "tif"), DEEP)


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_imagenet2wds__every_extension_that_pillow_decodes(tmp_path, extension):
    kind = EXTENSIONS[extension]
    if extension not in extensions():
        pytest.skip(f"this Pillow has no {kind}")
    source = draw(tmp_path / "in" / f"0.{extension.upper()}", format=kind)
    convert(tmp_path / "in", tmp_path / "out", "--strict")
    ((found, data, _),) = samples(tmp_path / "out" / "train")
    assert found == {"JPEG": "jpg"}.get(kind, "png")
    if kind in ("JPEG", "PNG"):
        assert data == source.read_bytes()
    else:
        with Image.open(source) as before, Image.open(io.BytesIO(data)) as after:
            np.testing.assert_array_equal(before.convert("RGB"), after.convert("RGB"))


def test_extensions__without_a_decoder_are_not_converted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: False)
    extensions.cache_clear()
    try:
        draw(tmp_path / "in" / "0.png")
        (tmp_path / "in" / "1.jp2").write_bytes(b"x")
        convert(tmp_path / "in", tmp_path / "out")
        assert "train: 1 files with other extensions were not converted: .jp2 1" in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        extensions.cache_clear()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


def test_imagenet2wds__postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow starts Ghostscript for PostScript, for any name of the file."""
    for i, name in enumerate(("0.png", "1.jpg", "2.tif", "noextension")):
        draw(tmp_path / "in" / "0.png", i) if name == "0.png" else (tmp_path / "in" / name).write_bytes(POSTSCRIPT)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\necho started > {tmp_path}/started\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "started").exists()
    assert len((tmp_path / "out" / "train" / "bad_images.txt").read_text().splitlines()) == 2
    assert len(samples(tmp_path / "out" / "train")) == 1


def test_encode__tga_has_no_signature_and_needs_its_name():
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "TGA")
    assert decoded(file.getvalue(), "tga").shape == (2, 3, 3)
    with pytest.raises(Image.UnidentifiedImageError):
        encode(file.getvalue(), "jpg")


def test_imagenet2wds__max_pixels_decides_what_is_unreadable(tmp_path):
    for i, size in enumerate([(10, 10), (10, 11), (40, 40)]):
        path = tmp_path / "in" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", size).save(path)
    convert(tmp_path / "in", tmp_path / "out", "--max-pixels", 100)
    listed = (tmp_path / "out" / "train" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["1.png", "2.png"]
    convert(tmp_path / "in", tmp_path / "all", "--max-pixels", 1600)
    assert len(samples(tmp_path / "all" / "train")) == 3
    Image.new("1", (10_000, 10_000)).save(tmp_path / "in" / "3.png")
    convert(tmp_path / "in", tmp_path / "more", "--max-pixels", 100_000_000)
    assert len(samples(tmp_path / "more" / "train")) == 4
    assert imagenet2wds.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
