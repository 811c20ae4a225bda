"""A copy of a data set in which every image is mirrored with probability 1/2, so that its statistics are mirror-symmetric.

python -m w2ssl.mirror --shards output/sample-shards/train output/mirrored-shards/train

To see what the location loss learns there: as published nothing, with --flip-aware-location something. w2ssl/losses.py has the
reason.
"""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset
from PIL import Image, ImageOps

from utils.data.index import describe, load_index, write_index
from utils.data.tars import LABEL_EXTENSION, local_samples
from utils.run.files import atomic
from utils.run.flags import Parser, in_range, one_line_errors


def get_args(argv=None):
    parser = Parser(prog="w2ssl.mirror", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="where to write the copy: a folder that is empty or not there yet")
    parser.add_argument("--shards", required=True, metavar="DIR", help="local shards: a folder, a glob, or a brace pattern")
    parser.add_argument("--seed", type=int, default=0, help="decides which images are mirrored")
    return parser.parse_args(argv)


def mirrored(data: bytes) -> bytes:
    """An encoded image -> a PNG of its mirror image."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        ImageOps.mirror(image).save(out, "png")
    return out.getvalue()


def read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def main(argv=None):
    args = get_args(argv)
    folder = Path(args.folder)
    with one_line_errors("w2ssl.mirror"):
        in_range("--seed", args.seed, 0, 2**63)
        index = load_index(args.shards)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"folder {folder}: is not empty; pass another")
        folder.mkdir(parents=True, exist_ok=True)
        rng, entries = np.random.default_rng(args.seed), []
        for shard in index.shards:
            path = folder / shard.name
            with open(shard.path, "rb") as source, atomic(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
                for sample in local_samples(shard.path):
                    kept = [name for name in (sample.image, LABEL_EXTENSION) if name in sample.members]
                    parts = {name: read(source, *sample.members[name]) for name in kept}
                    if rng.random() < 0.5:
                        parts["png"] = mirrored(parts.pop(sample.image))
                    tar.write({"__key__": sample.key, **parts})
            entries.append(describe(path, shard.samples))
        write_index(folder, entries, index.classes)
    print(f"{folder}: {index.total} images, each mirrored or not")


if __name__ == "__main__":
    main()
