"""The plain form of each method, as ordinary code. benchmarks/step.py and scale.py compare the default form with it.

fp32 and contiguous tensors. The images of keys (W2SSL: the crops) are gathered from all processes in float32. Each step copies
the queue, and all rows of a memory bank at once. The moving average and the optimizer update one parameter after the other.
Queue and average are updated before backward. RoIAlign is torchvision's.
"""

import torch
from torch.nn.functional import normalize
from torchvision.ops import roi_align

from cmc.base import MemoryBank
from cmc.builder import CMC, InsDis
from moco.builder import MoCo
from mosrep.builder import MosRep
from mosrep.mosaic import compose, shift, tile_boxes, tile_weights
from utils.data.batch import Batch
from utils.data.photometric import normalized
from utils.learning.contrast import info_nce
from utils.learning.key_queue import KeyQueue
from utils.learning.method import Method, Step
from utils.run import dist
from w2ssl.builder import W2SSL


def gathered(x: torch.Tensor, permutation) -> torch.Tensor:
    """This process's slice of the global batch in another order, taken from a copy of the whole batch."""
    mine = torch.from_numpy(permutation.reshape(dist.world(), -1)[dist.rank()]).to(x.device)
    return dist.gather(x)[mine]


@torch.no_grad()
def average_(pairs, momentum: float) -> None:
    for query, key in pairs:
        for p_q, p_k in zip(query.parameters(), key.parameters(), strict=True):
            p_k.data = p_k.data * momentum + p_q.data * (1 - momentum)


class Plain(Method):
    """The base of the plain forms."""

    average = staticmethod(average_)

    def embed(self, network, x, group_size):
        return normalize(network(x.contiguous()), dim=1)


class PlainQueue(Plain, KeyQueue):
    @torch.no_grad()
    def keys(self, network, x_k, step):
        permutation = step.rng.permutation(dist.world() * len(x_k))
        keys = dist.gather(self.embed(network, gathered(x_k, permutation), len(x_k)))
        self.new_keys = keys[torch.argsort(torch.from_numpy(permutation).to(keys.device))]
        return self.new_keys


class PlainMoCo(PlainQueue, MoCo):
    def contrast(self, q, k):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1)
        return self.criterion(logits)


class PlainMosRep(PlainQueue, MosRep):
    def contrast(self, q, keys, places, reduction="mean"):
        logits = torch.cat([q @ keys.T, q @ self.queue.clone()], dim=1)
        return info_nce(logits, places, self.temperature, reduction)

    def embed_tiles(self, crops, offset):
        boxes = tile_boxes(self.size, offset)
        features = self.encoder_q(shift(compose(crops).contiguous(), offset))
        rois = [boxes.to(features.device)] * len(features)
        tiles = roi_align(features, rois, tuple(features.shape[2:]), 1 / self.stride, aligned=True)
        weights = tile_weights(boxes, self.size).to(crops.device).repeat(len(crops))
        return normalize(self.projector_q(tiles), dim=1), weights


class PlainW2SSL(Plain, W2SSL):
    deal = staticmethod(gathered)


class PlainBank(Plain, MemoryBank):
    def scores(self, features, bank, rows):
        return torch.einsum("nc,nmc->nm", features, bank[rows])  # copies n x (1 + K) x C


class PlainCMC(PlainBank, CMC): ...


class PlainInsDis(PlainBank, InsDis): ...


PLAIN: dict[str, type[Method]] = {"moco": PlainMoCo, "mosrep": PlainMosRep, "w2ssl": PlainW2SSL, "cmc": PlainCMC,
                                  "insdis": PlainInsDis}  # fmt: skip


def train_step(method, model, args):
    """A function of (batch, step) that trains the method for one step. model: the method, or DDP around it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = 0 if args.trust else args.weight_decay
    optimizer = torch.optim.SGD(parameters, 0.01, args.momentum, weight_decay=decay, foreach=False)

    def train(batch: Batch, step: Step) -> None:
        views = [normalized(view) for view in batch.views]
        batch = Batch(views, batch.flips, batch.sample_ids, batch.labels, [])
        loss, _ = model(batch, method.targets(batch, step), step)
        method.commit(step)
        optimizer.zero_grad()
        loss.backward()
        if args.trust:
            adapt(parameters, args)
        optimizer.step()

    return train


@torch.no_grad()
def adapt(parameters, args) -> None:
    """LARS, layer by layer."""
    for p in parameters:
        if p.ndim > 1:
            p.grad = p.grad + args.weight_decay * p
            w, g = p.norm(), p.grad.norm()
            p.grad = p.grad * torch.where((w > 0) & (g > 0), args.trust * w / g, 1)
