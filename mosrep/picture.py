"""Draw the mosaics that MosRep makes of your images, with the boxes of their tiles.

python -m mosrep.picture --shards output/sample-shards/train --size 64 --shift-range 14 mosaics.png
"""

import numpy as np
import torch
from PIL import Image
from torchvision.utils import draw_bounding_boxes, make_grid

from mosrep.builder import MosRep
from mosrep.mosaic import compose, draw_offset, shift, tile_boxes
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.photometric import MEAN, STD, normalized
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
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    rng = np.random.default_rng(args.seed)
    scale = max(1, 192 // args.size)  # draws small mosaics larger, so that the lines of the boxes are thin
    pictures = []
    for j, mosaic in enumerate(normalized(compose(batch.views[0]))):
        # each mosaic has its own shift, to show several; training has one for each step and BatchNorm group
        offset = draw_offset(rng, args.shift_enable, args.shift_range, args.shift_beta) if j % 4 else (0, 0)
        colours = (shift(mosaic[None], offset)[0] * std + mean).clamp(0, 1)  # uncovered is 0, the mean colour
        picture = (colours * 255).round().to(torch.uint8).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        pictures.append(draw_bounding_boxes(picture, tile_boxes(args.size, offset) * scale + scale // 2, colors="yellow"))
    grid = make_grid(pictures, nrow=4, padding=8, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(args.picture)


if __name__ == "__main__":
    main()
