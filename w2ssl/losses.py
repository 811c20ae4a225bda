"""The crop loss of W2SSL."""

import torch

from utils import dist


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
