"""Mosaics of local crops (MosRep, ICLR 2023, section 3.2): compose and shift them, and cut their tiles from a feature map."""

import numpy as np
import torch
from torchvision.ops import roi_align

from utils.learning.drawing import as_uint8, boxed
from utils.run import dist


def compose(crops: torch.Tensor) -> torch.Tensor:
    """n x 4 x 3 x s x s local crops -> n x 3 x 2s x 2s mosaics of four different images (n >= 4).

    Slot i (0 top-left, 1 top-right, 2 bottom-left, 3 bottom-right) of mosaic j holds crop i of image (j - i) mod n.
    """
    n, _, channels, height, width = crops.shape
    taken = dist.on_device((4 * sources(n) + np.arange(4)).flatten(), crops.device)  # 4n, of all crops
    x = crops.flatten(0, 1)[taken].view(n, 2, 2, channels, height, width)  # n x row x column x C x s x s
    x = x.permute(0, 1, 4, 2, 5, 3).reshape(n, 2 * height, 2 * width, channels)
    return x.permute(0, 3, 1, 2)  # channels-last in memory


def sources(n: int) -> np.ndarray:
    """n x 4: the image in each slot of each mosaic."""
    return (np.arange(n)[:, None] - np.arange(4)) % n


def draw_offset(rng: np.random.Generator, enable: float, reach: int, beta: float) -> tuple[int, int]:
    """(x, y) in pixels. With probability `enable` each is int((2 Beta(beta, beta) - 1) * reach), else 0."""
    enabled, (x, y) = rng.random() < enable, 2 * rng.beta(beta, beta, 2) - 1
    return (int(x * reach), int(y * reach)) if enabled else (0, 0)


def shift(mosaics: torch.Tensor, offset: tuple[int, int]) -> torch.Tensor:
    """Move the content left by offset[0] and up by offset[1] pixels. Uncovered pixels are 0."""
    x, y = offset
    height, width = mosaics.shape[2:]
    out = torch.zeros_like(mosaics)
    kept = mosaics[:, :, max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)]
    out[:, :, max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)] = kept
    return out


def tile_boxes(size: int, offset: tuple[int, int]) -> torch.Tensor:
    """4 x (x1, y1, x2, y2) in pixels of the visible part of each slot of a shifted size x size mosaic.

    Corners are inclusive: the boxes are one pixel short of the continuous extent, as published.
    """
    half = size // 2
    columns, rows = (((max(0, -o), half - 1 - o), (half - o, min(size - o, size) - 1)) for o in offset)  # (from, to), twice
    return torch.tensor([(x[0], y[0], x[1], y[1]) for y in rows for x in columns], dtype=torch.float32)


def drawn(mosaics: torch.Tensor, offset: tuple[int, int]) -> torch.Tensor:
    """Mosaics, m x 3 x H x W normalized and shifted, as a picture with the boxes of their tiles; m x 3 x .. x .. uint8."""
    names = [["tile"] * 4] * len(mosaics)
    return boxed(as_uint8(mosaics), tile_boxes(mosaics.shape[-1], offset), names, {"tile": "yellow"})


def tile_weights(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """4 weights: sqrt(visible area / tile area), the area counted with both corners."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return ((x2 - x1 + 1) * (y2 - y1 + 1)).sqrt() / (size // 2)


def cut_tiles(features: torch.Tensor, boxes: torch.Tensor, stride: int) -> torch.Tensor:
    """RoIAlign (arXiv 1703.06870), aligned: n x C x h x w maps of mosaics -> 4n x C x h x w of their tiles, mosaic by mosaic.

    boxes: 4 x 4 on the CPU, in pixels, the same for all mosaics; stride: pixels per cell.

    RoIAlign averages bilinear samples, and bilinear weights are products of a weight by row and one by column. So a tile is

        tile[p, q] = sum over y, x of R[p, y] map[y, x] C[q, x],    or    tile = R map C^T,

    with R (h x h) from the vertical and C (w x w) from the horizontal extent of its box. The tiles lie in two rows and two
    columns. So two stacked matrices R, 2h x h, and two C, 2w x w, give all four tiles in two matrix products.
    """
    n, channels, h, w = features.shape
    rows, columns = roi_weights(boxes, h, w, stride, features.device)  # 2h x h, 2w x w
    x = features.float().permute(0, 2, 3, 1)  # n x h x w x C, as a channels-last tensor lies in memory
    x = (rows @ x.reshape(n, h, w * channels)).view(n * 2 * h, w, channels)
    x = (columns @ x).view(n, 2, h, 2, w, channels)
    return x.transpose(2, 3).reshape(4 * n, h, w, channels).permute(0, 3, 1, 2)


def roi_weights(boxes: torch.Tensor, h: int, w: int, stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """R of the upper and the lower tiles, 2h x h, and C of the left and the right ones, 2w x w.

    roi_align gives them: from a map with 1 in row y and 0 elsewhere it makes tiles with R[:, y] in every column.
    """
    one_row, one_column = torch.eye(h).view(1, h, h, 1).expand(1, h, h, w), torch.eye(w).view(1, w, 1, w).expand(1, w, h, w)
    upper_left, lower_right = boxes[:1], boxes[3:]
    r, c = (
        torch.cat([roi_align(x.contiguous(), [box], (h, w), 1 / stride, aligned=True) for box in (upper_left, lower_right)])
        for x in (one_row, one_column)
    )  # 2 x h x h x w, 2 x w x h x w: channel y or x, then the tile's rows and columns
    rows, columns = r[..., 0].transpose(1, 2).reshape(2 * h, h), c[..., 0, :].transpose(1, 2).reshape(2 * w, w)
    both = dist.on_device(torch.cat([rows.flatten(), columns.flatten()]), device)
    return both[: rows.numel()].view(rows.shape), both[rows.numel() :].view(columns.shape)
