"""The samples in a tar, in WebDataset's layout."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "webp", "tif", "tiff", "gif")
LABEL_EXTENSION = "cls"


@dataclass
class TarSample:
    """A key and its members: extension -> the result of `take`, or None for other extensions than images and labels."""

    key: str
    members: dict[str, Any]

    @property
    def image(self) -> str | None:
        """The extension of its image, the first one if there are several."""
        return next((e for e in self.members if e in IMAGE_EXTENSIONS), None)


def tar_samples(
    tar: tarfile.TarFile, take: Callable[[tarfile.TarInfo, int], Any], count: int = 0, imageless: list[str] | None = None
) -> Iterator[TarSample]:
    """The samples of an open tar, which may be a stream, in order. count: their number, or 0 if it is not known.

    As in WebDataset, a key is the member's path up to the first dot of its name. The rest, in lower case, is the extension.
    Consecutive members with one key are a sample; an extension that comes again starts the next one. A group without an image
    is no sample, and its key is added to `imageless`. take(member, position of the sample) is called for images and labels;
    nothing else is read. Raises tarfile.TarError for a tar that is corrupt or has another number of samples.
    """
    sample, position, imageless = TarSample("", {}), 0, [] if imageless is None else imageless
    while member := tar.next():
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if member.isfile() and stem and extension:
            key = f"{folder}/{stem}" if folder else stem
            extension = extension.lower()
            if sample.key != key or extension in sample.members:
                if sample.image:
                    yield sample
                    position += 1
                elif sample.key:
                    imageless.append(sample.key)
                sample = TarSample(key, {})
            known = extension == LABEL_EXTENSION or extension in IMAGE_EXTENSIONS
            sample.members[extension] = take(member, position) if known else None
        tar.members.clear()  # type: ignore[attr-defined] # else it keeps every header; mypy does not know it
    found = position + bool(sample.image)
    if count not in (0, found):
        raise tarfile.ReadError(f"it ends after {found} of {count} samples")
    if sample.image:
        yield sample
    elif sample.key:
        imageless.append(sample.key)


def local_samples(path: str, imageless: list[str] | None = None) -> Iterator[TarSample]:
    """The samples of a local tar, from its headers alone: extension -> (offset of the data, size), in bytes.

    Raises tarfile.TarError, after the last whole sample, for a tar that is corrupt or cut short.
    """
    with tarfile.open(path, "r:") as tar:
        yield from tar_samples(tar, lambda member, _: (member.offset_data, member.size), imageless=imageless)
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # which tarfile accepts as the end
            raise tarfile.ReadError(f"no valid header and no end at byte {tar.offset}")
