"""Draw the pictures of a run again, from its folder: views.png, neighbours.png, pca.png, curves.png and report.html.

    python pictures.py RUN
    python pictures.py RUN --shards DIR --eval-shards DIR        if the shards have moved

RUN is the folder of a pre-training. The weights are those of its newest checkpoint. One process and small batches are enough.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from methods import METHODS
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.shards import training_plan
from utils.evaluation import monitor, pictures
from utils.evaluation.frozen import Live
from utils.evaluation.monitor import Monitor
from utils.learning.drawing import SHOWN
from utils.learning.method import Step
from utils.run import checkpoint, flags, report
from utils.run.log import say

PROG = "pictures.py"
IMAGES = 16  # of a BatchNorm group


def get_args(argv: list[str] | None = None) -> flags.Flags:
    parser = flags.Parser(prog=PROG, description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a pre-training")
    add = parser.group("data").add_argument
    add("--shards", metavar="DIR", help="training shards; default: those of the run")
    add("--eval-shards", metavar="DIR", help="held-out shards of neighbours.png and pca.png; default: those of the run, if any")
    add("--batch-size", type=int, default=256, help="images in a step of the features")
    add("--workers", type=int, default=flags.default_workers(), help="loader workers")
    flags.add_shard_flags(parser)
    return parser.parse_args(argv)


def of_run(given: flags.Flags, saved: dict[str, Any]) -> flags.Flags:
    """The flags of a run that `saved` is a checkpoint of; those of later versions of this code have their defaults."""
    parser = flags.Parser(prog=PROG)
    monitor.add_flags(parser.group("monitor"))
    flags.add_run_flags(parser, None, "")
    METHODS[saved["method"]].add_flags(parser.group("method"))
    args = parser.parse_args([])
    vars(args).update(saved["flags"])
    here = {name: value for name, value in vars(given).items() if name not in ("run", "batch_size") and value is not None}
    vars(args).update(here)
    args.output_dir, args.amp, args.photometric = given.run, "fp32", "auto"
    return args


@torch.no_grad()
def draw_views(args: Namespace, method: Any, index: Any, device: torch.device) -> torch.Tensor:
    """views.png, of a batch of IMAGES for each BatchNorm group. Returns the first views."""
    size = min(args.batch_size, IMAGES * METHODS[args.method].bn_groups(args))
    plan = training_plan(index, size, args.seed, range(1))
    batch = next(load_batches(index, method.views(args), plan, args.seed, 0, device))
    step = Step(0, 1, args.seed)
    step.seed_torch()
    pictures.write_views(Path(args.output_dir), method, batch, method.targets(batch, step))
    return batch.views[0][:SHOWN]


def main(argv: list[str] | None = None) -> None:
    with flags.one_line_errors(PROG):
        given, device = get_args(argv), torch.device("cpu")
        folder = Path(given.run)
        found = checkpoint.newest(folder, "RUN")
        if not found:
            raise ValueError(f"{folder}: has no checkpoint; pass the folder of a pre-training")
        saved = found.content
        if saved.get("method") not in METHODS:
            raise ValueError(f"{folder}: is not the folder of a pre-training; pass one")
        args = of_run(given, saved)
        opened = flags.shard_flags(args)
        index = load_index(args.shards, **opened)
        torch.manual_seed(args.seed)
        method = METHODS[args.method](args, index.total)
        method.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
        views, live = draw_views(args, method.train(), index, device), Live(args, METHODS[args.method], device)
        if args.eval_shards:
            held_out = load_index(args.eval_shards, "--eval-shards", **opened)
            args.batch_size = given.batch_size
            monitor.check(args, index, held_out)
            watch = Monitor(live, index, held_out, device)
            watch.live.load(method.eval())
            watch.measure(lambda: None)
        else:
            pictures.write_own_pca(folder, live, method.eval(), views)
        pictures.write_curves(folder)
    say(f"Pictures: {folder}/*.png")
    report.main([str(folder)])


if __name__ == "__main__":
    main()
