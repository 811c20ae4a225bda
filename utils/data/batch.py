"""A batch on the device."""

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """The part of a global batch that one process trains on: n images.

    A view is n x 3 x H x W uint8, or n x count x 3 x H x W if its ViewSpec has count > 1. It stays uint8, a quarter of the
    memory, until an encoder normalizes it.
    """

    views: list[torch.Tensor]
    flips: list[torch.Tensor]  # for each view, whether it was mirrored: n x count bool, on the CPU
    sample_ids: torch.Tensor  # n, the numbers of the samples in the index
    labels: torch.Tensor  # n, -1 for an image without a label
    bad: list[dict[str, str]]  # the unusable samples of this batch: shard, key, error

    def __len__(self) -> int:
        return len(self.sample_ids)

    def part(self, images: slice) -> "Batch":
        """Some of its images, as views into the same memory. `bad` stays with the whole batch."""
        views, flips = ([x[images] for x in part] for part in (self.views, self.flips))
        return Batch(views, flips, self.sample_ids[images], self.labels[images], [])
