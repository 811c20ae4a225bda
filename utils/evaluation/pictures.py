"""Pictures of a run: views.png at its start, neighbours.png and pca.png at the end of epochs, curves.png at its end.

They change nothing of a training, and an error in them ends none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from utils.data.batch import Batch
from utils.evaluation.frozen import Live
from utils.learning.drawing import SHOWN, SIDE, as_uint8
from utils.learning.method import Method
from utils.run import curves, dist
from utils.run.files import atomic
from utils.run.history import Run
from utils.run.log import Log, harmless
from utils.run.text import brief

TEXT, GAP = 14, 4  # pixels: of the line above a row, between two pictures
Row = tuple[str, torch.Tensor]  # title, m x 3 x H x W uint8


def write_views(folder: Path, method: Method, batch: Batch, targets: Any, log: Log | None = None) -> None:
    """views.png: the first images of this process's batch, as the networks of a method see them. On the first process."""
    if dist.rank() == 0:
        with harmless("views.png"):
            write_rows(folder / "views.png", method.pictures(batch, targets))
            if log:
                log.picture(folder / "views.png")


def write_curves(folder: Path, log: Log | None = None) -> None:
    """curves.png: the numbers of metrics.jsonl. On the first process."""
    if dist.rank() == 0:
        with harmless("curves.png"):
            curves.write_picture(folder / "curves.png", Run(folder).charts)
            if log:
                log.picture(folder / "curves.png")


def write_own_pca(folder: Path, live: Live, model: Method, views: torch.Tensor, log: Log | None = None) -> None:
    """pca.png of views of the training, m x 3 x H x W, for a run without held-out images. All processes call it together."""
    live.load(model)
    if dist.rank() == 0:
        with harmless("pca.png"), torch.no_grad():
            write_pca(folder / "pca.png", as_uint8(views), live.maps_of(views))
            if log:
                log.picture(folder / "pca.png")


def write_pca(path: Path, images: torch.Tensor, maps: torch.Tensor) -> None:
    """pca.png: images, m x 3 x H x W uint8, above their feature maps, m x C x h x w."""
    write_rows(path, [("images", images), (f"features, {maps.shape[2]} x {maps.shape[3]}", colours(maps))])


def colours(maps: torch.Tensor) -> torch.Tensor:
    """m x C x h x w -> m x 3 x h x w uint8: the first three principal components over all places, each from dark to bright."""
    x = maps.detach().cpu().double().permute(0, 2, 3, 1)  # m x h x w x C
    flat = x.flatten(0, 2)
    flat = flat - flat.mean(0)
    basis = torch.linalg.svd(flat, full_matrices=False).Vh[:3]  # at most 3 x C
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()  # the sign of a component is free
    parts = torch.nn.functional.pad(flat @ basis.T, (0, 3 - len(basis)))  # places x 3
    low, high = parts.amin(0), parts.amax(0)
    scaled = (parts - low) / (high - low).clamp(min=1e-12) * 255
    return scaled.round().to(torch.uint8).view(*x.shape[:3], 3).permute(0, 3, 1, 2)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A PNG with a titled line of pictures for each row; all are drawn SIDE pixels high."""
    lines = [(title, [_image(pixels) for pixels in as_uint8(images[:SHOWN])]) for title, images in rows]
    width = max(sum(image.width + GAP for image in images) for _, images in lines) + GAP
    sheet = Image.new("RGB", (width, len(lines) * (SIDE + TEXT + 2 * GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for line, (title, images) in enumerate(lines):
        left, top = GAP, GAP + line * (SIDE + TEXT + 2 * GAP)
        draw.text((left, top), brief(title.encode("ascii", "replace").decode(), 80), fill="black", font=font)
        for image in images:
            sheet.paste(image, (left, top + TEXT))
            left += image.width + GAP
    with atomic(path) as file:
        sheet.save(file, "PNG")


def _image(pixels):
    """3 x H x W uint8 -> an image of SIDE pixels in height; cells of a small one stay sharp."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    how = Image.Resampling.NEAREST if image.height < SIDE else Image.Resampling.LANCZOS
    return image.resize((max(1, image.width * SIDE // image.height), SIDE), how)
