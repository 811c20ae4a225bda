"""An encoded image -> its pixels.

EXIF orientation is ignored in every format, as usual for ImageNet. The type or the tags of a file declare the range of its
numbers, which is scaled to 8 bits. An image without a declared range is refused: a guess could give black or white pixels.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

try:
    from simplejpeg import decode_jpeg
except ImportError:  # torch.hub needs no decoder
    decode_jpeg = None

Image.init()
# No others: PIL would run Ghostscript for PostScript, and TGA has no signature, so damaged files could be read as TGA.
FORMATS: list[str] = [f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000") if f in Image.OPEN]
WIDTH, HEIGHT = 256, 257  # tags of TIFF
TAGS = BITS, WHITE_IS_ZERO, ORIENTATION, MOST, FORMAT, LOW, HIGH = 258, 262, 274, 281, 339, 340, 341
UNDO = {  # orientation -> the transposition that undoes it, because PIL applies the orientation of a TIFF
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@contextlib.contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """An encoded image of FORMATS. Raises PIL's errors, of many types, and ValueError above Image.MAX_IMAGE_PIXELS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as odd metadata, which does not change the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more pixels than --max-pixels {Image.MAX_IMAGE_PIXELS}") from None
        with image:
            yield image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the pixels as they are stored."""
    return (image.tag_v2[WIDTH], image.tag_v2[HEIGHT]) if isinstance(image, TiffImageFile) else image.size


def decode(image: Image.Image, data: bytes, reduction: int = 1) -> torch.Tensor:
    """The H x W x 3 uint8 pixels of an opened image; data: its encoded bytes. Raises PIL's errors, and ValueError (see above).

    Only JPEGs are reduced. simplejpeg decodes an ordinary JPEG in half of PIL's time, to the same pixels. PIL decodes the rest,
    also damaged ones, so that each is usable at all reductions or at none.
    """
    if image.format == "JPEG" and image.mode in ("RGB", "L") and reduction == 1 and decode_jpeg:
        with contextlib.suppress(ValueError):
            return torch.from_numpy(decode_jpeg(data))
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    tags = {tag: image.tag_v2[tag] for tag in TAGS if tag in image.tag_v2} if isinstance(image, TiffImageFile) else {}
    bits = max(np.atleast_1d(tags.get(BITS, 8)))
    if image.mode.startswith(("I", "F")):
        plain = Image.fromarray(_eight_bits(np.asarray(image), _declared(image, tags, bits), tags.get(WHITE_IS_ZERO) == 0))
    elif bits > 8 and _declared(image, tags, bits) != (0, 65535):
        raise ValueError(f"colors of {_declared(image, tags, bits)[1]} in {bits} bits; convert it to 8 bits a color")
    else:  # a palette may have a transparent color
        plain = image.convert("RGBA") if image.mode == "P" else image
    plain = plain.convert("RGB")
    if isinstance(image, TiffImageFile) and (turned := tags.get(ORIENTATION)) in UNDO and ORIENTATION not in image.tag_v2:
        plain = plain.transpose(UNDO[turned])
    return torch.from_numpy(np.array(plain))


def _declared(image, tags, bits):
    """(black, white): the declared range of the numbers of an image. Raises ValueError if the file declares none."""
    if LOW in tags and HIGH in tags:  # of any type
        return tuple(float(np.atleast_1d(tags[name])[0]) for name in (LOW, HIGH))
    if image.mode == "F" or (tags and (bits > 16 or max(np.atleast_1d(tags.get(FORMAT, 1))) != 1)):
        raise ValueError("floats or wide integers without a declared range; convert it to 8 bits a color")
    return (0, white_of(tags, bits)) if tags else (0, 65535)  # without tags: PNG, and formats that PIL scales


def white_of(tags: Mapping[int, Any], bits: int) -> int:
    """The white of unsigned integers. If MaxSampleValue is 2^n - 1, they use n of their bits; else it is only a statistic."""
    most = int(max(np.atleast_1d(tags.get(MOST, 0))))
    return most if most > 255 and most & (most + 1) == 0 else 2**bits - 1


def _eight_bits(pixels, declared, inverted):
    low, high = declared
    if not np.isfinite(pixels).all() or not high > low:
        raise ValueError(f"numbers that are not finite, or an empty range of {low} to {high}")
    if low == 0 and (high + 1) % 256 == 0:  # the high byte
        scaled = np.clip(pixels, 0, high) // ((int(high) + 1) // 256)
    else:
        scaled = np.rint((np.clip(pixels, low, high).astype(float) - low) * (255 / (high - low)))
    return (255 - scaled if inverted else scaled).astype(np.uint8)
