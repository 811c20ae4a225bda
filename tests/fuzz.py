"""Damaged tars, images and indexes: nothing hangs, nothing ends a process, and only damaged samples are lost.

    python tests/fuzz.py                                           1,000 tars, 5,000 images, 5,000 indexes
    python tests/fuzz.py --seconds 30 --seed 7 --tars 99999        as many as this time allows

Prints the first case that fails with its seed, and keeps its file. The counts are printed at the end.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.data import remote  # noqa: E402
from utils.data.index import Index, cache_path, load_index  # noqa: E402
from utils.data.reader import BadSample, Reader  # noqa: E402
from utils.data.views import ViewSpec, cut_views, draw  # noqa: E402
from utils.run.flags import RunError  # noqa: E402

LIMIT = 20  # seconds of a case, after which it hangs
LONGEST = 300  # characters of a message
SECRET = "b7Gq"  # in the content of files, and in no message
SPECS = [ViewSpec("view", 16, count=2), ViewSpec("test", 16, resize=18)]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


class Hang(BaseException):
    """A case took longer than LIMIT. No `except Exception` hides it."""


def hang(*_):
    raise Hang(f"it hangs: not done after {LIMIT} seconds")


def short(error: Exception, *places: object) -> None:
    """A message is one short line without the bytes of a file. places: long paths in it that a user has typed."""
    text = str(error)
    for place in places:
        text = text.replace(str(place), "X")
    assert "\n" not in text and len(text) <= LONGEST and SECRET not in text, text


# ---------------------------------------------------------------- tars


def shard_of(path: Path, rng: random.Random) -> list[tuple[str, bytes, int, int]]:
    """Write a tar. Returns key, image, start and end of each sample's part of the tar."""
    label_first, long_names = rng.random() < 0.3, rng.random() < 0.3
    samples = []
    with tarfile.open(path, "w", format=rng.choice(FORMATS)) as tar:
        for number in range(rng.randint(1, 12)):
            key = f"{'d' * 60}/{'k' * 70}{number:03d}" if long_names else f"{number:03d}"
            image, start = rng.choice([b"", SECRET.encode(), rng.randbytes(600), SECRET.encode() * 512]), tar.offset
            members = [("jpg", image), ("cls", b"%d" % (number % 3)), ("txt", b"other" * 200)][: rng.randint(2, 3)]
            for extension, data in sorted(members, reverse=False) if label_first else members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            samples.append((key, image, start, tar.offset))
    return samples


def damage(data: bytearray, rng: random.Random) -> tuple[int, int]:
    """Damage one part of a tar in place, or cut it. Returns start and end of the part."""
    kind, at = rng.choice(["flip", "bytes", "zeros", "cut", "header", "size", "type"]), rng.randrange(len(data))
    if kind == "cut":
        end = len(data)
        del data[at:]
        return at, end
    if kind in ("header", "size", "type"):
        at = rng.choice([n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"])
        if kind == "header":
            data[at : at + 512] = rng.randbytes(512)
        else:  # hostile: its checksum is right
            if kind == "type":
                data[at + 156 : at + 157] = rng.choice([b"1", b"2", b"5", b"7", b"L", b"K", b"x", b"g", b"S", b"Z", b"\xff"])
            else:
                sizes = [
                    b"-0000000700\0",
                    b"77777777777\0",
                    b"\xff" + rng.randbytes(11),
                    b"\x80" + rng.randbytes(11),
                    rng.randbytes(12),
                ]
                data[at + 124 : at + 136] = rng.choice(sizes)
            data[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(data[at : at + 512])[0]
        return at, at + (4096 if kind == "type" else 512)  # a long name, for example, changes the member after it
    end = min(len(data), at + (1 if kind == "flip" else rng.choice([8, 100, 512, 1500])))
    data[at:end] = (
        bytes([data[at] ^ (1 << rng.randrange(8))])
        if kind == "flip"
        else bytes(end - at)
        if kind == "zeros"
        else rng.randbytes(end - at)
    )
    return at, end


def check_tar(folder: Path, rng: random.Random, counts: Counter) -> None:
    """A tar that is damaged after it was indexed, read as a local shard and as a stream; and one indexed after its damage."""
    path = folder / "a.tar"
    samples = shard_of(path, rng)
    (folder / "index.json").unlink(missing_ok=True)
    index = load_index(str(folder))
    assert index.total == len(samples)
    data = bytearray(path.read_bytes())
    start, end = damage(data, rng)
    path.write_bytes(data)
    touched = [low < end and start < high for _, _, low, high in samples]
    far = dataclasses.replace(index.shards[0], path=f"pipe:cat {path}" if rng.random() < 0.1 else f"file://{path}")
    for here in (index, dataclasses.replace(index, shards=(far,))):
        read(here, samples, touched, start, counts)
    (folder / "index.json").unlink()
    try:
        load_index(str(folder))
        counts["tars indexed again"] += 1
    except ValueError as error:
        short(error, folder)
        counts["tars refused"] += 1


def read(index: Index, samples, touched, start, counts) -> None:
    """Every sample is right or a BadSample. All without damage are read; of a stream, those before it.

    A stream is compared with its sha256 at its end. So a change may give wrong samples, but then the stream ends with an error.
    """
    place = index.shards[0].path
    reader, local, wrong, error = Reader(index), place[0] == "/", 0, None
    reader.expect(np.arange(len(samples)))
    try:
        for number, (key, image, _, high) in enumerate(samples):
            try:
                found = reader(number)
                wrong += not touched[number] and (found.key, found.image, found.label) != (key, image, number % 3)
                assert not wrong or (not local and high > start), f"sample {number} is wrong"
                counts["samples read"] += 1
            except BadSample as bad:
                error = bad
                counts["samples lost"] += 1
                # in a stream, the next header shows that the sample is whole
                far = not local and (high > start - 2048 or number == len(samples) - 1)
                assert touched[number] or far, f"sample {number} is lost without damage: {error}"
    except RunError as changed:  # the tar has another number of samples, or its content differs
        error = changed
        counts["tars that differ"] += 1
        assert re.search("holds .* samples, its index says|differs from its index", str(error))
    finally:
        reader.close()
    assert error or not wrong, "wrong samples without an error"
    if error:
        short(error, place, place.partition("//")[2] or place, samples[0][0][:-3])


# ---------------------------------------------------------------- images


def images() -> list[bytes]:
    """Small images of all formats."""
    x = np.arange(40 * 30 * 4, dtype=np.uint8).reshape(30, 40, 4)
    found = []
    for format, mode, options in [
        ("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}),
        ("PNG", "1", {}), ("PPM", "RGB", {}), ("BMP", "RGB", {}), ("WEBP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "L", {}), ("GIF", "P", {}),
    ]:  # fmt: skip
        image = Image.fromarray(x, "RGBA" if mode == "RGBA" else None).convert("RGB" if mode != "RGBA" else mode).convert(mode)
        image.save(file := io.BytesIO(), format, **options)
        found.append(file.getvalue())
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or taken from elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at, length = rng.randrange(len(out) + 1), rng.choice([1, 1, 2, 4, 50])
        kind = rng.randrange(6)
        if kind < 2:
            out[at : at + length] = rng.randbytes(min(length, len(out) - at))
        elif kind == 2:
            out[at : at + length] = rng.choice([b"\xff", b"\0", b"\x7f"]) * min(length, len(out) - at)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[at // 2 : at // 2 + length]
        else:
            del out[max(at, 8) :]
    return bytes(out)


def check_image(data: bytes, rng: random.Random, counts: Counter) -> None:
    """It gives views of the right form, or an error that the loader records."""
    try:
        views = cut_views(data, SPECS, draw(0, 0, 0, 3))
        assert [tuple(view.shape) for view in views] == [(3, 16, 16)] * 3
        counts["images decoded"] += 1
    except (MemoryError, AssertionError):
        raise
    except Exception:  # as the loader does: PIL raises errors of many types
        counts["images refused"] += 1


# ---------------------------------------------------------------- indexes

VALUES = ["-1", "0", "1e9", "99999999999999999999", "null", "true", "[]", "{}", '""', '"../../x"', '"/etc/x.tar"', "1.0", "NaN",
          '"a\\u0000b"', '"\\ud800"', '"' + "é" * 200 + '"', "[" * 2000, '"' + "0" * 64 + '"', "9" * 5000,
          '"0.tar"', f'"../{SECRET}"']  # fmt: skip


def check_index(folder: Path, data: bytes, rng: random.Random, counts: Counter) -> None:
    """It is refused in one short line, or every field of it can be used."""
    if rng.random() < 0.5:  # another value in place of a number, a text or a name
        spot = rng.choice(list(re.finditer(rb'"[^"]*"|\d+', data)))
        data = data[: spot.start()] + rng.choice(VALUES).encode() + data[spot.end() :]
    else:
        data = mutated(data, rng)
    (folder / "index.json").write_bytes(data)
    for spec in (str(folder), f"file://{folder}/"):
        try:
            with mock.patch.object(Path, "exists", lambda self: False) if spec[0] == "f" else contextlib.nullcontext():
                index = load_index(spec, cache_dir="/cache")
        except ValueError as error:
            short(error, folder)
            counts["indexes refused"] += 1
            continue
        counts["indexes taken"] += 1
        for shard in index.shards:
            assert cache_path(shard, "/cache").parent == Path("/cache") and os.path.dirname(shard.path).endswith(str(folder))
            assert 0 <= shard.samples <= shard.bytes < 2**50 and re.fullmatch("[0-9a-f]{64}", shard.sha256)
        assert index.classes is None or all(isinstance(name, str) for name in index.classes)


# ---------------------------------------------------------------- all


def main(argv: list[str] | None = None) -> Counter:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="time after which no further case starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--indexes", type=int, default=5000)
    args = parser.parse_args(argv)
    counts, end, known = Counter(), time.monotonic() + args.seconds, images()
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as name, mock.patch.object(remote, "WAIT", 0), mock.patch.object(remote, "TRIES", 2):
        tars, indexes = Path(name, "tars"), Path(name, "indexes")
        tars.mkdir()
        indexes.mkdir()
        for number in range(3):
            shard_of(indexes / f"{number}.tar", random.Random(number))
        load_index(str(indexes))
        index = (indexes / "index.json").read_bytes()
        cases = {
            "tars": lambda rng: check_tar(tars, rng, counts),
            "images": lambda rng: check_image(mutated(rng.choice(known), rng), rng, counts),
            "indexes": lambda rng: check_index(indexes, index, rng, counts),
        }
        most = max(getattr(args, kind) for kind in cases)
        for place in range(most):  # all kinds in turn, so that a short run has cases of each
            for kind, check in cases.items():
                wanted = getattr(args, kind)
                if place * wanted // most == (place + 1) * wanted // most or time.monotonic() > end:
                    continue
                seed = f"{args.seed} {kind} {counts[kind]}"
                signal.setitimer(signal.ITIMER_REAL, LIMIT)
                try:
                    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                        warnings.simplefilter("ignore")
                        check(random.Random(seed))
                except BaseException:
                    kept = shutil.copytree(name, tempfile.mkdtemp(prefix="fuzz-"), dirs_exist_ok=True)
                    print(f"fuzz: {kind}, case '{seed}', its files are in {kept}", flush=True)
                    raise
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                counts[kind] += 1
    print(json.dumps(counts))
    return counts


if __name__ == "__main__":
    try:
        main()
    except (Exception, Hang):
        traceback.print_exc()
        sys.exit(1)
