"""The samples in a tar, in WebDataset's layout."""

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

FIRST_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "webp", "tif", "tiff", "gif")
IMAGE_EXTENSIONS = (*FIRST_EXTENSIONS, "jpe", "jfif", "pgm", "pbm", "pnm")  # the others: only if none of the first occurs
LABEL_EXTENSION = "cls"
HEADER = 1 << 20  # bytes of the longest header
DAMAGES = 100  # number of damaged parts in a tar; after them the rest is skipped
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# errors of tarfile for bad headers, besides its own classes
MALFORMED = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


class UnsupportedTar(tarfile.TarError):
    """A tar that is not corrupt, but cannot be read."""


class _Header(tarfile.TarInfo):
    """A header with a plausible size. tarfile moves back for a negative size, and reads any size into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > HEADER and header.type in (b"L", b"K", b"x", b"g", b"X")):
            raise tarfile.HeaderError("impossible size")
        return header


@dataclass
class TarSample:
    """A key and its members: extension -> the result of `take`, or None for other extensions than images and labels."""

    key: str
    members: dict[str, Any]

    @property
    def image(self) -> str | None:
        """The extension of the image: the first one in FIRST_EXTENSIONS, or else the first one that is an image's."""
        first = next((e for e in self.members if e in FIRST_EXTENSIONS), None)
        return first or next((e for e in self.members if _is_image(e)), None)


def _is_image(extension):
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS  # input.jpg too


def open_tar(file: Any, mode: str, **options: Any) -> tarfile.TarFile:
    """A tar in an open file or stream, from its current position. Raises tarfile.TarError."""
    try:
        return tarfile.open(fileobj=file, mode=mode, tarinfo=_Header, **options)  # type: ignore[call-overload] # mode: any str
    except MALFORMED:
        raise tarfile.ReadError("no valid header at its start") from None


def read_members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar, which ends at byte `end`. Raises tarfile.TarError for an impossible header."""
    while True:
        at = tar.offset
        try:
            member = tar.next()
        except MALFORMED:
            raise tarfile.ReadError(f"no valid header at byte {at}") from None
        if member is None:
            return
        padding = -member.size % tarfile.BLOCKSIZE if member.isreg() else 0
        if member.size < 0 or not member.offset_data <= tar.offset <= end + padding:
            raise tarfile.ReadError(f"impossible size of the member at byte {member.offset}")
        if member.issparse():
            raise UnsupportedTar("has a sparse file; pack it again without --sparse")
        tar.members.clear()  # type: ignore[attr-defined] # else it keeps every header; mypy does not know it
        yield member


def tar_samples(
    members: Iterator[tarfile.TarInfo | tarfile.TarError],
    take: Callable[[tarfile.TarInfo, int], Any],
    count: int = 0,
    note: Callable[[str, str], None] = lambda why, name: None,
    damages: list[tuple[int, str]] | None = None,
) -> Iterator[TarSample]:
    """The samples of a tar with these members, in order. count: their number, or 0 if it is not known.

    As in WebDataset, a key is the member's path up to the first dot of its name. The rest, in lower case, is the extension.
    Consecutive members with one key are a sample; a repeated extension starts the next sample. A group without an image
    is no sample. take(member, position of the sample) is called for images and labels; nothing else is read.
    note(why, name) is called for each left-out key or file. Raises tarfile.TarError if the tar is corrupt or has another
    number of samples. With `damages`, an error among the members is added there: (number of samples before it, its text).
    """
    sample, position = TarSample("", {}), 0
    for member in members:
        if isinstance(member, tarfile.TarError):
            if damages is None:
                if sample.image:
                    yield sample
                raise member
            damages.append((position + bool(sample.image), str(member)))
            continue
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        known = extension == LABEL_EXTENSION or _is_image(extension)
        if member.isfile() and stem and extension:
            key = f"{folder}/{stem}" if folder else stem
            if sample.key != key or extension in sample.members:
                if sample.image:
                    yield sample
                    position += 1
                _note_rest(sample, note)
                sample = TarSample(key, {})
            sample.members[extension] = take(member, position) if known else None
        elif member.isfile():
            note("files without a key or an extension", member.name)
        elif known and not member.isdir():
            note("links", member.name)
    found = position + bool(sample.image)
    if count not in (0, found):
        raise tarfile.ReadError(f"it ends after {found} of {count} samples")
    if sample.image:
        yield sample
    _note_rest(sample, note)


def _note_rest(sample, note):
    """Note a key without an image, or the images beside the one that is used."""
    if sample.key and not sample.image:
        note(f"keys without an image (.{' .'.join(sorted(sample.members))})", sample.key)
    for extension in sample.members:
        if _is_image(extension) and extension != sample.image:
            note(f"images beside the .{sample.image} of their key", f"{sample.key}.{extension}")


def local_samples(
    path: str, note: Callable[[str, str], None] = lambda why, name: None, damages: list[tuple[int, str]] | None = None
) -> Iterator[TarSample]:
    """The samples of a local tar, from its headers alone: extension -> (offset of the data, size), in bytes.

    If the tar is corrupt or cut short, raises tarfile.TarError after the last whole sample before the damage. With `damages`
    (see tar_samples) it continues after the damage.
    """
    with open(path, "rb") as file:
        yield from tar_samples(_local_members(file), lambda m, _: (m.offset_data, m.size), note=note, damages=damages)


def _local_members(file: BinaryIO) -> Iterator[tarfile.TarInfo | tarfile.TarError]:
    """The members of a local tar. An error stands for a damaged part; members after it follow."""
    end, at = file.seek(0, os.SEEK_END), 0
    for _ in range(DAMAGES):
        file.seek(at)
        try:
            tar = open_tar(file, "r:")
            for member in read_members(tar, end):
                at = tar.offset
                yield member
            file.seek(at)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # which tarfile accepts as the end
                raise tarfile.ReadError(f"neither a valid header nor the end of the tar at byte {at}")
            if not any(rest.strip(tarfile.NUL) for rest in iter(lambda: file.read(1 << 20), b"")):
                return
            raise UnsupportedTar(f"has data after its end at byte {at}, such as a second tar; pack its files again as one tar")
        except tarfile.TarError as error:
            file.seek(0)
            start = file.read(6)
            how = next((name for magic, name in COMPRESSED.items() if at == 0 and start.startswith(magic)), None)
            yield UnsupportedTar(f"is compressed with {how}; unpack it, shards are plain tars") if how else error
        next_at = _next_header(file, at + tarfile.BLOCKSIZE)
        if next_at is None:
            return
        at = next_at


def _next_header(file, at):
    """The position of the first valid header from byte `at` on, or None."""
    file.seek(at)
    while block := file.read(tarfile.BLOCKSIZE):
        if block[257:262] == b"ustar":
            with contextlib.suppress(tarfile.HeaderError, *MALFORMED):
                _Header.frombuf(block, tarfile.ENCODING, "surrogateescape")
                return at
        at += tarfile.BLOCKSIZE
    return None
