"""Measures of features that need no labels."""

import torch
import torch.nn.functional as F

from utils.run import dist


@torch.no_grad()
def measures(values: torch.Tensor) -> dict[str, float]:
    """rankme, spread and full_spread of n x C features, over the n of all processes; empty if a feature is not finite.

    rankme: see `rankme`. spread: the standard deviation of the features of length 1, mean over the C (arXiv 2011.10566,
    section 4.1). It is near full_spread = 1 / sqrt(C) if they fill the sphere, and 0 if they have collapsed.
    """
    x = values.double()
    if dist.largest(x.isfinite().logical_not().any().float().view(1)).item():
        return {}
    unit = F.normalize(x, dim=1)
    count = dist.total(torch.tensor(len(x), device=x.device))
    mean, square = (dist.total(part) / count for part in (unit.sum(0), (unit * unit).sum(0)))
    spread = (square - mean * mean).clamp(min=0).sqrt().mean().item()
    return {"rankme": rankme(dist.total(x.T @ x)), "spread": spread, "full_spread": x.shape[1] ** -0.5}


def rankme(products: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares, arXiv 2210.02885, equation 2: from 1 to the rank of the features.

    products: C x C, the features' transpose times the features.
    """
    sigma = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum().exp().item()
