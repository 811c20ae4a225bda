"""Encode images for imagenet2wds.py: JPEG and PNG files are copied, and all other formats become PNG.

Pixels with more than 8 bits are scaled from the range that the file declares to 0 ... 65535. An image without a declared range
is refused. Orientation tags (EXIF) are ignored in every format, as in training.
"""

import functools
import io
import warnings
from typing import IO

import numpy as np
from PIL import ExifTags, Image, features

from utils.data.decode import white_of

EXTENSIONS = {
    "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "mpo": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF",
    "ppm": "PPM", "pgm": "PPM", "pbm": "PPM", "pnm": "PPM", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
    "jp2": "JPEG2000", "j2k": "JPEG2000", "avif": "AVIF", "tga": "TGA",
}  # fmt: skip
OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # formats that some builds of Pillow lack
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # formats that are copied as bytes; Pillow opens MPO as JPEG
WHITE_IS_ZERO, SIGNED_OR_FLOAT = 0, (2, 3)  # values of the TIFF tags PhotometricInterpretation and SampleFormat
UNDO = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
        8: "ROTATE_270"}  # fmt: skip


@functools.cache
def extensions() -> dict[str, str]:
    """extension -> format, of the formats that this Pillow decodes."""
    Image.init()
    missing = {f for f, feature in OPTIONAL.items() if f not in Image.OPEN or not features.check(feature)}
    return {extension: f for extension, f in EXTENSIONS.items() if f not in missing}


def open_image(file: IO[bytes], extension: str) -> Image.Image:
    """Open an image of these formats only: others, such as PostScript, would start a program.

    A TGA file has no signature, so any file could be one. It is opened as TGA only if its name says so.
    """
    formats = set(extensions().values()) - ({"TGA"} if extension != "tga" else set())
    return Image.open(file, formats=sorted(formats))


def is_image(path: str) -> bool:
    """Whether the content of a file without an extension is an image. Raises OSError if it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file, open_image(file, ""):
            return True
    except Image.DecompressionBombError:  # an image, but too large; its conversion reports that
        return True
    except Exception as error:  # PIL raises many types for other content
        if isinstance(error, OSError) and error.errno:
            raise
        return False


def encode(data: bytes, extension: str) -> tuple[str, bytes]:
    """The content of a file -> (extension, encoded image). Raises PIL's error for an image that does not decode completely."""
    with open_image(io.BytesIO(data), extension) as image:  # Pillow applies the orientation of TIFF files only
        orientation = image.getexif().get(ExifTags.Base.Orientation) if image.format == "TIFF" else None
        image.load()
        return (COPIED[image.format], data) if image.format in COPIED else ("png", as_png(image, orientation))


def deep_to_16_bits(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits a sample -> mode I;16, where 65535 is white. Other images are returned as they are.

    SMinSampleValue and SMaxSampleValue of a TIFF are its range. Without them, unsigned integers of b <= 16 bits have the range
    0 ... `white_of`. Raises ValueError for all others, such as floats, and for pixels outside of the range.
    """
    tags = getattr(image, "tag_v2", {})
    low, high = (None if tags.get(tag) is None else float(np.ravel(tags[tag])[0]) for tag in (340, 341))
    bits, sample_format = (int(np.ravel(tags.get(tag, default))[0]) for tag, default in ((258, 16), (339, 1)))
    if not image.mode.startswith(("I", "F")):
        if bits == 16 and high not in (None, 65535) and tags:
            raise ValueError(f"16-bit colours with SMaxSampleValue {high:g}; save them with 8 bits")
        return image
    if sample_format not in SIGNED_OR_FLOAT and image.mode != "F":
        low = 0 if low is None else low
        if high is None and (image.mode.startswith("I;16") or image.format in ("PPM", "PNG")):
            high = white_of(tags, bits)
    if low is None or high is None:
        kind = "float" if image.mode == "F" else "32-bit or signed"
        raise ValueError(f"{kind} pixels without SMinSampleValue and SMaxSampleValue; save them with 8 or 16 unsigned bits")
    pixels = np.asarray(image)
    if image.mode == "I" and bits == 32 and sample_format == 1:
        pixels = pixels.view(np.uint32)  # Pillow holds them as signed
    if not high > low or not (pixels.min() >= low and pixels.max() <= high):  # nan is refused too
        raise ValueError(f"pixels outside of the declared range {low:g} ... {high:g}")
    if (low, high) != (0, 65535):
        pixels = np.round((pixels - low) * (65535 / (high - low)))
    if tags.get(262) == WHITE_IS_ZERO:  # Pillow inverts only images of 8 bits
        pixels = 65535 - pixels
    return Image.fromarray(pixels.astype(np.uint16))


def as_png(image: Image.Image, applied: int | None = None) -> bytes:
    """The image as PNG, or ValueError if its range is not known. applied: the orientation that Pillow has applied to it."""
    image = deep_to_16_bits(image)
    if applied in UNDO:
        image = image.transpose(Image.Transpose[UNDO[applied]])
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
