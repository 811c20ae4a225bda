"""The base of CMC and InsDis: embeddings of an encoder, contrasted with the rows of memory banks."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from cmc.memory import Bank, DrawnAhead, Scores, last_places
from utils.learning import health, mixture
from utils.learning.contrast import statistics_kept
from utils.learning.criterion import criterion
from utils.learning.drawing import SHOWN, as_uint8
from utils.learning.method import Batch, Method, Stats, Step, Targets
from utils.run import dist, flags


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


class MemoryBank(Method):
    """Embeddings of an encoder, contrasted with the rows of memory banks: the base of CMC and InsDis."""

    scores = staticmethod(Scores.apply)
    PER_IMAGE = True

    @staticmethod
    def add_flags(group) -> None:
        add = group.add_argument
        add("--bn-splits", type=int, default=1, help="BatchNorm groups of a process's batch; each has its own statistics")
        add("--size", type=int, default=224, help="side of a view in pixels")
        add("--crop-min", type=float, default=0.08, help="smallest area of a crop, as a share of the image")
        add("--nce-dim", type=int, default=128, help="dimensions of an embedding")
        add("--nce-k", type=int, default=16384, help="number of negatives: random rows of a bank")
        add("--nce-t", type=float, default=0.07, help="temperature of the scores")
        add("--nce-m", type=float, default=0.5, help="momentum of a bank's row: share of the old row in the new row")
        add("--fill-banks", action="store_true",
            help="write features of the untrained encoders into the banks, in a pass before the first epoch")  # fmt: skip
        add("--loss", choices=["nce", "softmax"], default="nce", help="loss: noise-contrastive estimation, or cross-entropy")
        mixture.add_flags(group)
        group.set_defaults(batch_size=128, lr=0.06, epochs=240, lr_steps=[120, 160, 200])  # 0.06 is 0.03 for a batch of 128
        group.set_defaults(amp="fp32")  # its authors lost 0.5 to 1 % of accuracy in fp16

    @staticmethod
    def check(args: Namespace, samples: int) -> None:
        mixture.check(args)
        flags.positive(["--size", "--nce-dim", "--nce-k", "--nce-t"], args)
        flags.in_range("--crop-min", args.crop_min, 1e-8, 1)
        flags.in_range("--nce-m", args.nce_m, 0, 1)

    @staticmethod
    def bn_groups(args: Namespace) -> int:
        return args.bn_splits

    def __init__(self, args: Namespace, samples: int, encoder: Any, banks: list[str], pairs: dict[str, tuple[int, int]]):
        """banks: one for each encoder. pairs: name of a criterion -> (number of the encoder, number of its queries' bank)."""
        super().__init__(args, samples)
        self.bn_splits, self.samples, self.negatives = args.bn_splits, samples, args.nce_k
        self.momentum, self.temperature, self.prepares = args.nce_m, args.nce_t, args.fill_banks
        self.mixture = mixture.Mixture(args)
        self.encoder = encoder
        self.banks: Any = nn.ModuleDict({name: Bank(samples, args.nce_dim) for name in banks})
        self.pairs, self.drawn = pairs, DrawnAhead()
        self.criteria: Any = nn.ModuleDict({name: criterion(args.loss, args.nce_t, samples) for name in pairs})

    def chance(self, batch_size: int) -> float:
        return sum(c.chance(1 + self.negatives) for c in self.criteria.values())

    def facts(self, batch_size: int) -> dict[str, Any]:
        """negatives: rows of a bank for each image."""
        dim = next(iter(self.banks.values())).memory.shape[1]
        return {"dim": dim, "candidates": 1 + self.negatives, "temperature": self.temperature, "temperature_flag": "--nce-t",
                "negatives": self.negatives}  # fmt: skip

    def health(self, features: list[torch.Tensor], targets: Targets) -> Stats:
        """Of the first of `pairs`, where a bank's row is the positive; of the bank; of the views after --space."""
        query, bank = next(iter(self.pairs.values()))
        memory = list(self.banks.values())[bank].memory
        found = health.of_pairs(features[query].detach(), memory[targets.rows[:, 0]]) | health.of_bank(memory)
        names = zip(self.banks, targets.views, strict=True)
        return found | ({f"health_flat_{name}": health.flat(view) for name, view in names} if len(targets.views) > 1 else {})

    def inputs(self, batch: Batch, rng: np.random.Generator) -> list[torch.Tensor]:
        """The encoders' inputs, n x channels x H x W each, mixed by --im-type."""
        return self.mixture(batch.views, rng)

    @torch.no_grad()
    def targets(self, batch: Batch, step: Step) -> Targets:
        """group_size: images in a BatchNorm group; rows: of the banks, first of the image itself, then of its negatives."""
        n, ids = len(batch), batch.sample_ids
        views = tuple(self.inputs(batch, step.rng))
        places = range(dist.rank() * n, (dist.rank() + 1) * n)
        negatives = dist.on_device(self.drawn(step.seed, step.number, places, self.samples, self.negatives), ids.device)
        rows = torch.cat([ids.unsqueeze(1).to(negatives.dtype), negatives], 1)  # n x (1 + K)
        targets = Targets({"group_size": n // self.bn_splits}, views=views, rows=rows)
        self.sample_ids = ids
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in self.banks}
        if not all(c.ready for c in self.criteria.values()):  # the first step of NCE
            with statistics_kept(self.encoder):
                for pair, _, scores in self.scored(self.features(targets), rows):
                    self.criteria[pair].start(scores)
        return targets

    @torch.no_grad()
    def prepare(self, batch: Batch, step: Step) -> None:
        """Replace the rows of the images by their features. Z of NCE is that of the random rows, as without this pass."""
        targets = self.targets(batch, step)
        with statistics_kept(self.encoder):
            self.keep(self.features(targets))
        self.write(0)

    def features(self, targets: Targets) -> list[torch.Tensor]:
        """n x C of each encoder."""
        return [self.embed(e, x, targets.group_size) for e, x in zip(self.encoders(), targets.views, strict=True)]

    def pictures(self, batch: Batch, targets: Targets) -> list[tuple[str, torch.Tensor]]:
        """Also the mixed crops."""
        mixed = [("crop, mixed", as_uint8(targets.views[0][:SHOWN]))] if self.mixture.type else []
        return [*super().pictures(batch, targets), *mixed]

    def scored(self, features: list[torch.Tensor], rows: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(pair, name of its bank, scores n x (1 + K)) for each of `pairs`."""
        names = list(self.banks)
        for pair, (query, bank) in self.pairs.items():
            yield pair, names[bank], self.scores(features[query], self.banks[names[bank]].memory, rows)

    def forward(self, batch: Batch, targets: Targets, step: Step) -> tuple[torch.Tensor, Stats]:
        """The features of each encoder go into its own bank, and are contrasted with the banks of `pairs`."""
        features = self.features(targets)
        self.keep(features)
        losses, top1 = [], dict[str, list[torch.Tensor]]()
        for pair, name, scores in self.scored(features, targets.rows):
            loss, right = self.criteria[pair](scores)
            losses.append(loss)
            top1.setdefault(name, []).append(right)
        stats: Stats = {f"top1_{name}": mean(found) for name, found in top1.items()} if len(losses) > 1 else {}
        stats |= {"top1": mean([x for found in top1.values() for x in found])}
        return sum(losses), stats | (self.health(features, targets) if step.watched else {})

    def keep(self, features: list[torch.Tensor]) -> None:
        """Keep the features of a step, or of a slice of it, for `write`."""
        for name, f in zip(self.banks, features, strict=True):
            self.seen[name].append(f.detach())

    def commit(self, step: Step) -> None:
        """Update the rows of the step's images and, after the first step, keep Z."""
        self.write(self.momentum)

    @torch.no_grad()
    def write(self, momentum: float) -> None:
        """Write the features of all processes into the rows of their images. momentum: the share of the old row."""
        sample_ids = dist.gather(self.sample_ids)
        last = last_places(sample_ids, self.samples)
        for name, bank in self.banks.items():
            bank.update(dist.gather(torch.cat(self.seen[name]))[last], sample_ids, momentum)
        for c in self.criteria.values():
            c.commit()
