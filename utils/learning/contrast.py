"""Parts of contrastive methods: InfoNCE, the key encoder's moving average, shuffle-BN, the queue, BatchNorm groups."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from utils.run import dist


def info_nce(logits: Tensor, target: Tensor, temperature: float, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """InfoNCE (arXiv 1807.03748, eq. 4; 1911.05722, eq. 1): cross-entropy of the right key among all candidates.

    logits: n x M similarities; target: n, the column of the right key. -> (loss, top-1 accuracy in %).
    """
    top1 = (logits.detach().argmax(1) == target).mean(dtype=torch.float32) * 100
    return nn.functional.cross_entropy(logits / temperature, target, reduction=reduction), top1


@torch.no_grad()
def ema_(pairs: list[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """key = momentum key + (1 - momentum) query, for the parameters of every (query, key) pair of modules."""
    queries: list[Tensor] = [p for query, _ in pairs for p in query.parameters()]
    keys: list[Tensor] = [p for _, key in pairs for p in key.parameters()]
    torch._foreach_lerp_(keys, queries, 1 - momentum)


def key_copy(query: nn.Module, key: nn.Module) -> nn.Module:
    """Make `key` start as a copy of `query`, without gradient."""
    key.load_state_dict(query.state_dict())
    return key.requires_grad_(False)


@torch.no_grad()
def shuffled_keys(key_forward: Callable, x_k: Tensor, rng: np.random.Generator) -> Tensor:
    """Shuffle-BN (arXiv 1911.05722, section 3.3): keys of the whole global batch, N x C, in its order, on every process.

    x_k: n x ..., the key views of this process. One random permutation sends them to the processes, so a key gets its batch
    statistics from other images than its query. The keys are gathered and put back in order. Each view is sent once, in its
    own dtype: uint8 from the loader.
    """
    permutation = rng.permutation(dist.world() * len(x_k))
    dealt = dist.permute(x_k, permutation)
    with torch.inference_mode():
        keys = key_forward(dealt)
    keys = dist.gather(keys)
    # a loss cannot use tensors of inference mode, but the copy that the index makes
    return keys[dist.on_device(np.argsort(permutation), keys.device)]


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """The keys of the whole batch (N x C) replace the oldest N columns of `queue` (C x K); `pointer` (1,) advances.

    A key that is not finite replaces no column: on CUDA the failure is known one step later, and --replay reads this queue.
    """
    columns = (pointer + torch.arange(len(keys), device=queue.device)) % queue.shape[1]
    finite = keys.norm(dim=1, keepdim=True) < torch.inf  # fewer launches than isfinite().all()
    keys = torch.where(finite, keys, queue[:, columns].T)
    queue.index_copy_(1, columns, keys.T.to(queue.dtype))
    pointer.add_(len(keys)).remainder_(queue.shape[1])


def in_groups(network: nn.Module, x: Tensor, group_size: int) -> Tensor:
    """Apply `network` to slices of `group_size` rows, as separate processes would: BatchNorm sees one slice at a time.

    The running statistics follow the first slice, as those of a checkpoint follow the first process.
    """
    if group_size >= len(x):
        return network(x)
    first, *others = x.split(group_size)
    out = [network(first)]
    with statistics_kept(network):
        out += [network(part) for part in others]
    return torch.cat(out)


def counters_on_host_(network: nn.Module) -> None:
    """Keep the number of batches of each BatchNorm in CPU memory: on a GPU each addition to it would be a launch.

    Only checkpoints need it. Call it when the network is on its device.
    """
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.cpu()


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalizes as ever, but leaves its running statistics as they are."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
