"""Weighted nearest neighbours of features (arXiv 1805.01978, section 3.4): each process keeps its part of the training set.

The test features go round in chunks; each process finds its nearest training images, and these are merged. Similarities are
computed in float64 and then rounded to float32. So the number of processes, the size of a chunk and the device's order of
additions change no neighbour. Of equal similarities, that with the smaller sample id comes first.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from utils.evaluation.features import Features, gathered, padded
from utils.run import dist

K = (1, 10, 20, 100, 200)
QUERIES, ROWS = 1024, 16384  # the most test and training images of a chunk
PAIR = 48  # bytes that a pair of a chunk takes at most: its similarity in float64 and float32, its key, and copies
NONE = torch.iinfo(torch.int64).min  # the key of no image
LOW = 2**32 - 1


def to_unit_length_(train: Features, test: Features, centre: bool) -> None:
    """Normalize features to length 1, in place; with `centre` after the mean of the training set was subtracted."""
    mean = torch.zeros((), device=train.values.device)
    if centre:
        sums = sum((part.double().sum(0) for part in train.values.split(ROWS)), torch.zeros(train.values.shape[1],
                   dtype=torch.float64, device=mean.device))  # fmt: skip
        count = torch.tensor(len(train), device=mean.device)
        mean = (dist.total(sums) / dist.total(count)).float()  # from float64: the same for any number of processes
    for found in (train, test):
        for part in found.values.split(ROWS):
            part.copy_(F.normalize(part.float() - mean, dim=1))


def chunk_sizes(memory: int, width: int) -> tuple[int, int]:
    """(test images, training images) of a chunk that needs at most so many bytes beside the features."""
    queries, rows = QUERIES, ROWS
    while max(queries, rows) > 1 and PAIR * queries * rows + 8 * width * (queries + rows) > memory:
        queries, rows = (queries // 2, rows) if queries > rows else (queries, rows // 2)
    return queries, rows


@torch.no_grad()
def neighbours(train: Features, test: Features, k: int, memory: int,
               ask: Callable[[], None] = lambda: None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The k nearest training images of all processes for each of this process's test images, the nearest first.

    Both have features of length 1. Returns n x k similarities in float32 and n x k sample ids, -1 where there are fewer than k
    images. ask: called before each chunk, equally often on all processes. memory: see `chunk_sizes`.
    """
    world, rank = dist.world(), dist.rank()
    queries, rows = chunk_sizes(memory, train.values.shape[1])
    n = max(1, queries // world)
    steps, found = -(-max(dist.gather_objects(len(test))) // n), []
    for step in range(steps):
        ask()
        own = test.values[step * n : (step + 1) * n]
        x = dist.gather(padded(own.float(), n)).double()  # world * n x C
        best = torch.full((len(x), k), NONE, device=x.device)
        for values, ids in zip(train.values.split(rows), train.sample_ids.split(rows), strict=True):
            keys = _keys((x @ values.double().T).float(), ids)
            best = _largest(torch.cat([best, _largest(keys, k)], 1), k)
        if world > 1:
            of_all = dist.gather(best).view(world, world * n, k)  # the candidates of each process
            best = _largest(of_all[:, rank * n : (rank + 1) * n].transpose(0, 1).reshape(n, world * k), k)
        found.append(best[: len(own)])
    return _parts(torch.cat(found))


def _keys(similarities, ids):
    """m x n similarities, n sample ids -> m x n int64 in the order of the similarities; if equal, the smaller id is larger."""
    bits = (similarities + 0.0).view(torch.int32)  # + 0: -0 becomes 0
    return (_ordered(bits).long() << 32).bitwise_or_(LOW - ids)


def _ordered(bits):
    """The bits of float32 as integers in the same order; twice gives the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest(keys, k):
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def _parts(keys):
    there = keys != NONE
    similarities = _ordered((keys >> 32).int()).view(torch.float32)
    return torch.where(there, similarities, 0), torch.where(there, LOW - (keys & LOW), -1)


def labels_of(train: Features, images: int) -> torch.Tensor:
    """The labels of the training set of all processes by sample id, below `images`."""
    table = train.labels.new_full((images,), -1)
    table[gathered(train.sample_ids)] = gathered(train.labels)
    return table


def votes_right(similarities: torch.Tensor, near: torch.Tensor, truth: torch.Tensor, classes: int, ks: Sequence[int],
                temperature: float) -> dict[int, tuple[int, int]]:  # fmt: skip
    """k -> how many test images have their class first, and among the first five, by votes of exp(similarity / temperature).

    similarities: n x max(ks), sorted. near: the labels of these neighbours, -1 for none. truth: n labels. A class without a
    vote is not among the first five; of classes with equal votes the smaller number comes first.
    """
    right = dict.fromkeys(ks, (0, 0))
    for s, labels, own in zip(similarities.split(QUERIES), near.split(QUERIES), truth.split(QUERIES), strict=True):
        weights = ((s.double() - s[:, :1].double()) / temperature).exp() * (labels >= 0)  # relative: exp cannot overflow
        votes = torch.zeros(len(s), classes, dtype=torch.float64, device=s.device)
        image, smaller = torch.arange(len(s), device=s.device), torch.arange(classes, device=s.device) < own.unsqueeze(1)
        for j in range(s.shape[1]):  # one neighbour of each image at a time: the order of additions is fixed
            votes[image, labels[:, j].clamp(min=0)] += weights[:, j]
            if j + 1 in right:
                mine = votes[image, own].unsqueeze(1)
                before = ((votes > mine) | ((votes == mine) & smaller)).sum(1)  # classes that come first
                top1, top5 = ((before < first) & (mine[:, 0] > 0) for first in (1, 5))
                right[j + 1] = right[j + 1][0] + int(top1.sum()), right[j + 1][1] + int(top5.sum())
    return right


def accuracy(train: Features, test: Features, near: tuple[torch.Tensor, torch.Tensor], classes: int, images: int,
             ks: Sequence[int], temperature: float) -> dict[int, dict[str, float]]:  # fmt: skip
    """k -> top1 and top5 in % over the test images of all processes. near: of `neighbours`; images: of the training index."""
    similarities, ids = near
    table = labels_of(train, images)
    labels = torch.where(ids < 0, -1, table[ids.clamp(min=0)])
    right = votes_right(similarities, labels, test.labels, classes, ks, temperature)
    counts = torch.tensor([*sum(right.values(), ()), len(test)], device=ids.device)
    *hits, count = dist.total(counts).tolist()
    return {k: {"top1": 100 * hits[2 * i] / count, "top5": 100 * hits[2 * i + 1] / count} for i, k in enumerate(right)}
