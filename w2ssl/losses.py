"""The two losses of W2SSL: the location of a crop, and its image."""

import torch
from torch import Tensor, nn

from utils.run import dist


def location(scores: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """The half that a crop was cut from. scores: m x 2; side: m, 0 left, 1 right. -> (cross-entropy, accuracy in %).

    As published, a crop is mirrored with probability 1/2 after the cut, and its side stays. On data with mirror-symmetric
    statistics no network can learn that side. Proof: write m for mirroring, and L(X) and R(X) for a crop of the left and of
    the right part of an image X. The parts are mirror images of each other, so R(X) = m L(m X). If X and m X have the same
    distribution, R(X) and m L(X) have the same distribution. The network sees (L + m L) / 2 for the left side, and for the
    right side (R + m R) / 2 = (m L + L) / 2. Both are the same mixture, so the posterior is 1/2 and the loss at least ln 2.

    With --flip-aware-location a mirrored crop changes its side. Then side 0 has the distribution of L, and side 1 that of m L.
    They differ unless half an image looks like its own mirror image. So the network can learn the side: it is the crop's
    position in the image as shown, mirrored or not.
    """
    return nn.functional.cross_entropy(scores, side), (scores.detach().argmax(1) == side).float().mean() * 100


def supervised_contrastive(online: Tensor, target: Tensor, image: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """SupCon (arXiv 2004.11362, eq. 2) among the crops of all processes; each crop has an online and a target embedding.

    online, target: m x C of this process, of length 1; only `online` has a gradient. image: W m, the image of each crop of
    all W processes, in rank order. All 2 W m embeddings are anchors; the positives of an anchor are the others of its image.
    -> (mean loss of this process's 2 m anchors, share of its online anchors that are nearest to a positive, in %).

    The mean of the losses over processes is the loss of all anchors. Backward sums the gradients of all processes' losses for
    each embedding, so DDP's mean of gradients is the gradient of that loss.
    """
    every = torch.cat([dist.gather_with_gradient(online), dist.gather(target)])  # 2 W m x C
    logits = torch.cat([online, target]) @ every.T / temperature  # 2 m x 2 W m
    first, crops = dist.rank() * len(online), len(image)
    own = first + torch.arange(len(online), device=online.device)
    itself = torch.cat([own, crops + own])
    logits = logits.scatter(1, itself.unsqueeze(1), -torch.inf)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    positive = image[own].repeat(2).unsqueeze(1) == image.repeat(2)  # 2 m x 2 W m
    positive.scatter_(1, itself.unsqueeze(1), False)
    loss = -log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    nearest = logits[: len(online)].detach().argmax(1, keepdim=True)
    return loss.mean(), positive.gather(1, nearest).float().mean() * 100
