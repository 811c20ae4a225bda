"""What contrastive methods share: InfoNCE, the key encoder's moving average, shuffle-BN and the queue."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.data.photometric import normalized
from utils.learning import amp
from utils.run import dist


@dataclass
class Step:
    """Where training stands. What is random about a step is drawn from `rng`, which is equal on all processes."""

    number: int  # counted over all epochs
    steps: int  # of the whole training
    seed: int
    rng: np.random.Generator

    @classmethod
    def at(cls, number: int, steps: int, seed: int) -> "Step":
        return cls(number, steps, seed, np.random.default_rng([seed, number, 1]))  # the 1 keeps it apart from epoch plans

    @property
    def progress(self) -> float:
        """In [0, 1), of the whole training."""
        return self.number / self.steps

    def seed_torch(self) -> None:
        """Make what a trunk draws by itself, such as stochastic depth, a function of seed, step and process."""
        torch.manual_seed(int(np.random.default_rng([self.seed, self.number, 2, dist.rank()]).integers(2**63)))


def info_nce(
    logits: torch.Tensor, target: torch.Tensor, temperature: float, reduction: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (arXiv 1807.03748, eq. 4; 1911.05722, eq. 1): cross-entropy of the right key among all candidates.

    logits: n x M similarities; target: n, the column of the right key. -> (loss, top-1 accuracy in %).
    """
    top1 = (logits.detach().argmax(1) == target).float().mean() * 100
    return F.cross_entropy(logits / temperature, target, reduction=reduction), top1


@torch.no_grad()
def ema_(pairs: list[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """key = momentum key + (1 - momentum) query, for the parameters of every (query, key) pair of modules."""
    for query, key in pairs:
        torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)


def key_copy(query: nn.Module, key: nn.Module) -> nn.Module:
    """Make `key` start as a copy of `query`, without gradient."""
    key.load_state_dict(query.state_dict())
    return key.requires_grad_(False)


@torch.no_grad()
def shuffled_keys(key_forward: Callable, x_k: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shuffle-BN (arXiv 1911.05722, section 3.3): keys of the whole global batch, N x C, in its order, on every process.

    The views x_k (n x ..., this process's) are dealt to the processes in one random permutation, so that a key's batch
    statistics come from other images than its query's; the keys are gathered and put back. A view travels once, to where it is
    needed, in the dtype it has: uint8 from the loader.
    """
    permutation = rng.permutation(dist.world() * len(x_k))
    dealt = dist.permute(x_k, permutation)
    with torch.inference_mode():
        keys = key_forward(dealt)
    keys = dist.gather(keys.clone())  # tensors of inference mode cannot take part in a loss
    return keys[dist.on_device(np.argsort(permutation), keys.device)]


@torch.no_grad()
def enqueue_(queue: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor) -> None:
    """The keys of the whole batch (N x C) replace the oldest N columns of `queue` (C x K); `pointer` (1,) moves on.

    A key that is not finite replaces none: on CUDA the run learns of it after this, and --replay needs the queue as it was.
    """
    columns = (pointer + torch.arange(len(keys), device=queue.device)) % queue.shape[1]
    keys = torch.where(keys.isfinite().all(1, keepdim=True), keys, queue[:, columns].T)
    queue.index_copy_(1, columns, keys.T.to(queue.dtype))
    pointer.add_(len(keys)).remainder_(queue.shape[1])


def embed(encoder: nn.Module, x: torch.Tensor, amp_name: str, groups: int) -> torch.Tensor:
    """Views, n x channels x H x W, uint8 or normalised -> their embeddings of length 1: n x C, float32."""
    x = normalized(x.contiguous(memory_format=torch.channels_last))
    with amp.autocast(x.device, amp_name):
        z = in_groups(encoder, groups, x)
    return F.normalize(z.float(), dim=1)


def in_groups(forward: Callable, groups: int, x: torch.Tensor) -> torch.Tensor:
    """Apply `forward` to `groups` equal slices of x, as that many processes would: BatchNorm sees a slice at a time."""
    return torch.cat([forward(part) for part in x.chunk(groups)]) if groups > 1 else forward(x)
