"""A copy of a data set in which each image is mirrored with probability 1/2. Its statistics are mirror-symmetric.

    python -m w2ssl.mirror --shards output/sample-shards/train output/mirrored-shards/train

On this copy the location loss learns only with --flip-aware-location. w2ssl/losses.py has the proof.
"""

import argparse
import io
import os
from pathlib import Path

import webdataset
from PIL import ImageOps

from utils.data.encoding import as_png, deep_to_16_bits, open_image
from utils.data.index import load_index
from utils.data.index_file import describe, write_index
from utils.data.tars import LABEL_EXTENSION, local_samples
from utils.run.files import atomic
from utils.run.flags import Parser, in_range, one_line_errors
from utils.run.streams import mirrored_copy


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="w2ssl.mirror", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", help="output folder: empty or new")
    parser.add_argument("--shards", required=True, metavar="DIR", help="local shards: a folder, a glob, or a brace pattern")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of mirrored images")
    return parser.parse_args(argv)


def mirrored(data: bytes) -> bytes:
    """The mirror image of an encoded image, as PNG."""
    with open_image(io.BytesIO(data), "") as image:
        return as_png(ImageOps.mirror(deep_to_16_bits(image)))


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    folder = Path(args.folder)
    with one_line_errors("w2ssl.mirror"):
        in_range("--seed", args.seed, 0, 2**63)
        index = load_index(args.shards)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"folder {folder}: is not empty; pass another folder")
        folder.mkdir(parents=True, exist_ok=True)
        rng, entries = mirrored_copy(args.seed), []
        for shard in index.shards:
            path = folder / shard.name
            with open(shard.path, "rb") as source, atomic(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
                for sample in local_samples(shard.path):
                    kept = [name for name in (str(sample.image), LABEL_EXTENSION) if name in sample.members]
                    parts = {name: os.pread(source.fileno(), *reversed(sample.members[name])) for name in kept}
                    if rng.random() < 0.5:
                        parts["png"] = mirrored(parts.pop(kept[0]))
                    tar.write({"__key__": sample.key, **parts})
            entries.append(describe(path, shard.samples))
        write_index(folder, entries, index.classes)
    print(f"{folder}: {index.total} images, each mirrored with probability 1/2")


if __name__ == "__main__":
    main()
