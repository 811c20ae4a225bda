"""The learning rates of a linear probe: one for all classifiers, or several that are compared in one pass."""

import math
from argparse import Namespace
from itertools import chain
from typing import Any

import torch

from utils.evaluation.classifiers import Classifiers, largest_change
from utils.learning import optim
from utils.run.log import say


def lrs_of(args: Namespace) -> list[float]:
    """The values of --lr."""
    return args.lr if isinstance(args.lr, list) else [args.lr]


def rates(args: Namespace) -> list[list[float]]:
    """The learning rates of each epoch, in the order of --lr."""
    lrs = [optim.scaled_lr(lr, args.batch_size) for lr in lrs_of(args)]
    schedule = {"drops": args.lr_steps, "gamma": args.lr_gamma}
    return [[optim.lr_at(lr, epoch, args.epochs, **schedule) for lr in lrs] for epoch in range(args.epochs)]


def optimizer_of(args: Namespace, fc: Classifiers) -> torch.optim.Optimizer:
    """SGD with a group of parameters for each learning rate."""
    optimizer = optim.sgd(fc.parameters(), 0.0, args.momentum, args.weight_decay, args.trust)
    (group,) = optimizer.param_groups
    optimizer.param_groups.clear()
    for copy, lr in enumerate(rates(args)[0]):
        own = [fc.fc[str(head)].parameters() for head, (_, number) in fc.heads.items() if number == copy]
        optimizer.add_param_group({**group, "lr": lr, "params": list(chain(*own))})
    return optimizer


def warn_if_slow(args: Namespace, steps: int) -> None:
    """Warn if layer-wise rates keep the classifiers near their random start. steps: of an epoch."""
    for lr, values in zip(lrs_of(args), zip(*rates(args), strict=True), strict=True):
        change = largest_change(args.trust, args.momentum, steps * sum(values))
        if args.trust and change < 1:
            most = f"{100 * math.expm1(change):.2g} %"
            say(f"warning: --trust {args.trust:g} with --lr {lr:g}: in {steps * args.epochs} steps a weight of the classifier "
                f"changes by at most {most}, too little to learn; pass --trust 0, plain SGD")  # fmt: skip


def choose(args: Namespace, fc: Classifiers, progress: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `best` and `last` of each layer with its best learning rate; and facts about all rates, if there are several."""
    last, lrs = progress["last"], lrs_of(args)
    heads = {layer: [head for head, (own, _) in fc.heads.items() if own == layer] for layer in args.layer}
    chosen = {layer: max(own, key=lambda head: last[head].get("held_out", 0.0)) for layer, own in heads.items()}
    of_layers = {name: {layer: progress[name][head] for layer, head in chosen.items()} for name in ("best", "last")}
    if len(lrs) == 1:
        return of_layers, {}
    every = {layer: {f"{lrs[fc.heads[head][1]]:g}": {name: progress[name][head] for name in ("best", "last")} for head in own}
             for layer, own in heads.items()}  # fmt: skip
    best = {layer: lrs[fc.heads[head][1]] for layer, head in chosen.items()}
    for layer, lr in best.items():
        say(f"Layer {layer}: --lr {lr:g} is the best on {args.val_fraction:g} of the training images")
    return of_layers, {"lr": best, "rates": every}
