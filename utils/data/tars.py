"""What is inside a tar of samples, as WebDataset lays them out."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "webp", "tif", "tiff", "gif")
LABEL_EXTENSION = "cls"


@dataclass
class TarSample:
    """The members of one key: extension -> what was taken of it."""

    key: str
    members: dict[str, Any]

    @property
    def image(self) -> str | None:
        """The extension of its image."""
        return next((e for e in self.members if e in IMAGE_EXTENSIONS), None)


def tar_samples(
    tar: tarfile.TarFile, take: Callable[[tarfile.TarInfo, int], Any], count: int = 0, imageless: list[str] | None = None
) -> Iterator[TarSample]:
    """The samples of an open tar, which may be a stream, in order; `count` of them, if that is known.

    As in WebDataset, a key is the member's path up to the first dot of its name, the extension is the rest in lower case, and
    consecutive members of one key are one sample; an extension that comes again opens the next one, so that none is lost. A
    group without an image is not a sample; its key goes to `imageless`. Of an image and of a label, take(member, number of the
    sample) is kept; nothing else is read. Raises tarfile.TarError for a tar that is damaged or has another number of samples.
    """
    sample, number, imageless = TarSample("", {}), 0, [] if imageless is None else imageless
    while member := tar.next():
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if member.isfile() and stem and extension:
            key = f"{folder}/{stem}" if folder else stem
            extension = extension.lower()
            if sample.key != key or extension in sample.members:
                if sample.image:
                    yield sample
                    number += 1
                elif sample.key:
                    imageless.append(sample.key)
                sample = TarSample(key, {})
            known = extension == LABEL_EXTENSION or extension in IMAGE_EXTENSIONS
            sample.members[extension] = take(member, number) if known else None
        tar.members.clear()  # it would keep every header of the archive
    found = number + bool(sample.image)
    if count not in (0, found):
        raise tarfile.ReadError(f"it ends after {found} of {count} samples")
    if sample.image:
        yield sample
    elif sample.key:
        imageless.append(sample.key)


def local_samples(path: str, imageless: list[str] | None = None) -> Iterator[TarSample]:
    """The samples of a local tar, from its headers alone: extension -> (offset of the data, size in bytes).

    Raises tarfile.TarError, behind the last whole sample, for a tar that is damaged or cut short.
    """
    with tarfile.open(path, "r:") as tar:
        yield from tar_samples(tar, lambda member, _: (member.offset_data, member.size), imageless=imageless)
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes it for the end all the same
            raise tarfile.ReadError(f"no valid header and no end at byte {tar.offset}")
