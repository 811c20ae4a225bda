"""A picture of test images with their nearest training images."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.data.index import Index
from utils.data.loader import load_batches
from utils.data.shards import BatchPlan
from utils.data.views import ViewSpec
from utils.evaluation.features import Features, gathered
from utils.run import dist
from utils.run.files import atomic
from utils.run.text import brief

SIDE, TEXT, GAP = 96, 14, 4  # pixels: of an image, of the line below it, between two
SAME, OTHER = (0, 110, 0), (190, 0, 0)  # colours of a neighbour's class
Row = tuple[int, int, list[int]]  # sample id and label of a test image; the sample ids of its neighbours


def spread(test: Features, count: int) -> list[int]:
    """The sample ids of `count` images of all processes, at equal distances."""
    usable = gathered(test.sample_ids).sort().values.tolist()
    return [usable[i * len(usable) // count] for i in range(min(count, len(usable)))]


def rows_of(test: Features, ids: torch.Tensor, count: int) -> list[Row]:
    """`count` test images of all processes at equal distances, with as many neighbours each. ids: of knn.neighbours."""
    chosen = set(spread(test, count))
    mine = zip(test.sample_ids.tolist(), test.labels.tolist(), ids[:, :count].tolist(), strict=True)
    own = [(image, label, [i for i in near if i >= 0]) for image, label, near in mine if image in chosen]
    return sorted(row for part in dist.gather_objects(own) for row in part)


def write_picture(path: Path, args: Namespace, view: ViewSpec, train: Index, test: Index, rows: Sequence[Row]) -> None:
    """A PNG with a line for each row: the test image, then its neighbours; the names of their classes are below them."""
    near = images_of(args, view, train, sorted({i for _, _, ids in rows for i in ids}))
    tested = images_of(args, view, test, [image for image, _, _ in rows])
    width, height = 1 + max(len(ids) for _, _, ids in rows), len(rows)
    sheet = Image.new("RGB", (width * (SIDE + GAP) + GAP, height * (SIDE + TEXT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for line, (image, truth, ids) in enumerate(rows):
        cells = [(*tested[image], None), *((*near[i], near[i][1] == truth) for i in ids)]
        for column, (pixels, label, same) in enumerate(cells):
            left, top = GAP + column * (SIDE + GAP), GAP + line * (SIDE + TEXT + GAP)
            sheet.paste(_picture(pixels), (left, top))
            colour = "black" if same is None else SAME if same else OTHER
            draw.text((left, top + SIDE + 1), _name(train.classes or (), label), fill=colour, font=font)
    with atomic(path) as file:
        sheet.save(file, "PNG")


def _name(classes, label):
    """Of a class, or its number: PIL's own font has few letters, so that others become question marks."""
    name = classes[label] if 0 <= label < len(classes) else str(label)
    return brief(name.encode("ascii", "replace").decode(), 16)


def images_of(args: Namespace, view: ViewSpec, index: Index, ids: Sequence[int]) -> dict[int, tuple[torch.Tensor, int]]:
    """sample id -> (3 x H x W uint8, label), of usable images."""
    plan = BatchPlan(partial(iter, [(0, [np.array([i])]) for i in ids]), replace=False)
    batches = load_batches(index, [view], plan, args.seed, 0, torch.device("cpu"))
    return {int(batch.sample_ids): (batch.views[0][0], int(batch.labels)) for batch in batches}


def _picture(pixels):
    """3 x H x W -> an image of SIDE x SIDE."""
    how = Image.Resampling.NEAREST if pixels.shape[-1] < SIDE else Image.Resampling.LANCZOS
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).resize((SIDE, SIDE), how)
