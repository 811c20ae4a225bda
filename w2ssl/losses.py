"""The two losses of W2SSL: where a crop lay, and which image it is of."""

import torch
import torch.nn.functional as F

from utils.run import dist


def location(scores: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which half a crop was cut from. scores: m x 2; side: m, 0 left, 1 right. -> (cross-entropy, accuracy in %).

    As published, a view is mirrored with probability 1/2 after it was cut, and its side stays. On data with mirror-symmetric
    statistics nothing can learn that. Write m for mirroring, L and R for cutting a crop from the left and from the right part
    of an image X; the parts are each other's mirror images, so R(X) = m L(m X). If X and m X have the same law, R(X) has that
    of m L(X). What the network sees of a left crop then has the law (L + m L) / 2, and of a right one (R + m R) / 2 =
    (m L + L) / 2: the same. The posterior of either side is 1/2 whatever is seen, and no network gets below ln 2.

    With --flip-aware-location a mirrored crop changes its side. Side 0 then has L and m R, which have the law of L; side 1 has
    R and m L, with the law of m L. These differ as soon as half an image does not look like its own mirror image, so that the
    side can be told: it is where the crop lies in the image as shown, mirrored or not.
    """
    return F.cross_entropy(scores, side), (scores.detach().argmax(1) == side).float().mean() * 100


def supervised_contrastive(
    online: torch.Tensor, target: torch.Tensor, image: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """SupCon (arXiv 2004.11362, eq. 2) among the crops of all processes, each once online and once as a target.

    online, target: m x C of this process, normalised; the first with gradient. image: W m, the image of each crop of all W
    processes in rank order. All 2 W m embeddings are anchors, those of the same image their positives. -> (mean loss of this
    process's 2 m anchors, whose mean over processes is the loss of all; % of its online anchors nearest to a positive).

    The gradient that reaches an embedding is the sum over the losses of all processes, so that the mean of gradients which DDP
    makes is that of the loss of all.
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
