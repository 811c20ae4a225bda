"""What a linear probe is made of: a frozen trunk that gives features of its layers, and a linear classifier for each."""

import numpy as np
import torch
from torch import nn

from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.loader import load_batches
from utils.data.shards import evaluation_plan
from utils.data.views import ViewSpec
from utils.learning import amp
from utils.learning.method import Probed
from utils.run import dist
from utils.run.flags import RunError


class Frozen(nn.Module):
    """A trunk in eval mode without gradient. layers: numbers of the layers that are probed."""

    def __init__(self, probed: Probed):
        super().__init__()
        self.trunk, self.layers, self.classifier = probed.trunk.eval().requires_grad_(False), probed.layers, probed.classifier
        self._features = probed.features

    @torch.no_grad()
    def features(self, x: torch.Tensor, amp_name: str) -> dict[int, torch.Tensor]:
        with amp.autocast(x.device, amp_name):
            return {layer: f.float() for layer, f in self._features(x, self.layers).items()}

    def widths(self, size: int) -> dict[int, int]:
        """layer -> C, of views of this size. Raises ValueError where the trunk does not take them."""
        view = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        return {layer: f.shape[1] for layer, f in self.features(view, "fp32").items()}


class Classifiers(nn.Module):
    """A linear classifier for each layer. Their weights are N(0, 0.01), a function of seed and layer; their biases are 0."""

    def __init__(self, widths: dict[int, int], classes: int, seed: int):
        super().__init__()
        self.fc = nn.ModuleDict()
        for layer, width in widths.items():
            self.fc[str(layer)] = fc = nn.Linear(width, classes)
            rng = torch.Generator().manual_seed(int(np.random.default_rng([seed, layer]).integers(2**63)))
            nn.init.normal_(fc.weight, std=0.01, generator=rng)
            nn.init.zeros_(fc.bias)

    def forward(self, features: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:  # n x C each -> n x classes each
        return {layer: self.fc[str(layer)](f) for layer, f in features.items()}


@torch.no_grad()
def evaluate(args, index: Index, frozen: Frozen, fc: Classifiers, device, bad: BadSamples, asked_to_stop=lambda: False):
    """layer -> top-1 and top-5 in % over the whole index, each image counted once over all processes; and how many of them
    could not be used.

    None if `asked_to_stop()`, which all processes call equally often, says so.
    """
    spec = ViewSpec("test", args.size, resize=args.resize)
    right = torch.zeros(len(fc.fc), 2, dtype=torch.long, device=device)  # top-1, top-5
    seen = torch.zeros((), dtype=torch.long, device=device)
    met = []
    plan = evaluation_plan(index, args.batch_size)
    for batch in load_batches(index, [spec], plan, args.seed, args.workers, device, args.photometric):
        if asked_to_stop():
            return None
        met += batch.bad
        seen += len(batch.labels)
        for row, logits in zip(right, fc(frozen.features(batch.views[0], args.amp)).values(), strict=True):
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels.unsqueeze(1)  # n x 5
            row += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    bad.add(met)
    unusable = sum(len(part) for part in dist.gather_objects(met))
    seen, right = dist.total(seen).item(), dist.total(right).tolist()
    if seen + unusable != index.total:
        raise RuntimeError(f"validation counted {seen} + {unusable} images, the index has {index.total}")
    if not seen:
        raise RunError(f"--val-shards {args.val_shards}: none of its {unusable} images can be used; pass others")
    return {
        int(layer): {"top1": 100 * top1 / seen, "top5": 100 * top5 / seen, "unusable": unusable}
        for layer, (top1, top5) in zip(fc.fc, right, strict=True)
    }
