"""Linear classifiers on the layers of a frozen trunk, and their accuracy over a data set."""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn

from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.loader import load_batches
from utils.data.shards import evaluation_plan
from utils.data.views import ViewSpec
from utils.evaluation.frozen import Frozen
from utils.learning import amp
from utils.run import dist, streams
from utils.run.flags import RunError

Head = int | str  # the name of a classifier


class Classifiers(nn.Module):
    """Linear classifiers on layers: heads. Weights are N(0, 0.01) and depend on seed and layer only; biases are 0.

    copies: heads of each layer, which learn with different rates. heads: name -> (layer, number of the copy). The first copy
    has the layer's number as its name.
    """

    def __init__(self, widths: dict[int, int], classes: int, seed: int, copies: int = 1):
        super().__init__()
        self.fc = nn.ModuleDict()
        self.heads: dict[Head, tuple[int, int]] = {}
        for layer, width in widths.items():
            for copy in range(copies):
                head: Head = f"{layer}_{copy}" if copy else layer
                self.heads[head] = layer, copy
                self.fc[str(head)] = fc = nn.Linear(width, classes)
                rng = torch.Generator().manual_seed(streams.classifier_seed(seed, layer))
                nn.init.normal_(fc.weight, std=0.01, generator=rng)
                nn.init.zeros_(fc.bias)

    def forward(self, features: dict[int, torch.Tensor]) -> dict[Head, torch.Tensor]:  # n x C each -> n x classes each
        return {head: self.fc[str(head)](features[layer]) for head, (layer, _) in self.heads.items()}


class Tuned(nn.Module):
    """A trunk that learns together with its classifier. Its running statistics of BatchNorm are those of each process."""

    def __init__(self, frozen: Frozen, fc: Classifiers, amp_name: str):
        super().__init__()
        self.trunk, self.fc, self.amp = frozen.trunk.requires_grad_(True), fc, amp_name
        self._features, self.layers = frozen.features_of, frozen.layers

    def features(self, x: torch.Tensor, amp_name: str) -> dict[int, torch.Tensor]:
        """n x 3 x H x W of the loader -> layer -> n x C in float32, with gradient."""
        with amp.autocast(x.device, amp_name):
            return {layer: f.float() for layer, f in self._features(x, self.layers).items()}

    def forward(self, x: torch.Tensor) -> dict[Head, torch.Tensor]:  # n x 3 x H x W -> head -> n x classes
        return self.fc(self.features(x, self.amp))


def largest_change(trust: float, momentum: float, lrs: float) -> float:
    """R such that layer-wise rates change no weight by more than a factor exp(R). lrs: sum of the learning rates of all steps.

    A step adds at most trust x |w| x lr, and momentum repeats it 1 / (1 - momentum) times. Below 1 a classifier stays
    near its random start: on synthetic features R = 0.02 learned nothing, 0.3 a part, 1 nearly all.
    """
    return trust * lrs / max(1 - momentum, 1e-9)


@torch.no_grad()
def evaluate(args: Namespace, index: Index, frozen: Frozen | Tuned, fc: Classifiers, device: torch.device, bad: BadSamples,
             asked_to_stop: Callable[[], bool] = lambda: False) -> dict[Head, dict[str, float]] | None:  # fmt: skip
    """head -> top1 and top5 in % over the whole index, and the number of `unusable` images.

    Each image counts once over all processes. None if `asked_to_stop()` is true. All processes call it equally often.
    """
    spec = ViewSpec("test", args.size, resize=args.resize)
    right = torch.zeros(len(fc.fc), 2, dtype=torch.long, device=device)  # heads x (top-1, top-5)
    seen = torch.zeros((), dtype=torch.long, device=device)
    met, plan = [], evaluation_plan(index, args.batch_size)
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
    count, totals = dist.total(seen).item(), dist.total(right).tolist()
    if count + unusable != index.total:
        raise RuntimeError(f"validation counted {count} + {unusable} images, the index has {index.total}")
    if not count:
        raise RunError(f"--val-shards {args.val_shards}: none of its {unusable} images can be used; pass others")
    return {
        head: {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "unusable": unusable}
        for head, (top1, top5) in zip(fc.heads, totals, strict=True)
    }
