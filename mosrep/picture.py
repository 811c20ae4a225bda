"""Draw the mosaics that MosRep makes of your images, with the boxes of their tiles.

python -m mosrep.picture --shards output/sample-shards/train --size 64 --shift-range 14 mosaics.png
"""

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from mosrep.builder import MosRep
from mosrep.mosaic import compose, draw_offset, drawn, shift
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.photometric import normalized
from utils.data.shards import training_plan
from utils.run.flags import Parser, add_shard_flags, one_line_errors, shard_flags


def get_args(argv=None):
    parser = Parser(prog="mosrep.picture", description=__doc__.split("\n\n")[0])
    parser.add_argument("picture", help="the file to write, PNG or JPEG")
    parser.add_argument("--shards", required=True, metavar="DIR", help="folder of shards, a glob, or a brace pattern of tars")
    parser.add_argument("--mosaics", type=int, default=8, help="number of mosaics, at least 4")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images, views and shifts")
    add_shard_flags(parser)
    MosRep.add_flags(parser.add_argument_group("method"))
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("mosrep.picture"):
        index = load_index(args.shards, **shard_flags(args))
        if not 4 <= args.mosaics <= index.total:
            raise ValueError(f"--mosaics {args.mosaics}: must lie in [4, {index.total}], the number of images")
    plan = training_plan(index, args.mosaics, args.seed, range(1))
    batch = next(load_batches(index, MosRep.views(args)[-1:], plan, args.seed, 0, torch.device("cpu")))
    rng = np.random.default_rng(args.seed)
    pictures: list[torch.Tensor] = []
    for j, mosaic in enumerate(normalized(compose(batch.views[0]))):
        # each mosaic has its own shift, to show several; training has one for each step and BatchNorm group
        offset = draw_offset(rng, args.shift_enable, args.shift_range, args.shift_beta) if j % 4 else (0, 0)
        pictures += drawn(shift(mosaic[None], offset), offset)
    grid = make_grid(pictures, nrow=4, padding=8, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(args.picture)


if __name__ == "__main__":
    main()
