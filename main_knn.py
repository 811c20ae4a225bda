"""Weighted nearest neighbours on the features of a frozen trunk, without any training.

    python main_knn.py --pretrained RUN --train-shards DIR --val-shards DIR               one process
    torchrun --nproc_per_node 8 main_knn.py --pretrained RUN ...                          eight GPUs: each has its part
    python main_knn.py --pretrained pixels --size 32 ...                                  the baseline on resized pixels

RUN is a checkpoint or the folder of a run; `random` is an untrained trunk. Every k of --k is measured in one pass. With
--features FILE the features are kept: other k or temperatures then need no image.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils.run import signals

    signals.start()

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from methods import METHODS
from utils.data.index import Index
from utils.data.views import side_before_crop
from utils.evaluation import features, knn, neighbours, pixels, session
from utils.evaluation.frozen import Frozen, Source, add_weights_flags, read_source
from utils.run import dist, flags, lock, signals
from utils.run.files import write_json
from utils.run.log import say
from utils.run.text import shown_flags

PROG = "main_knn.py"


def get_args(argv: list[str] | None = None, source: Source | None = None) -> flags.Flags:
    """Parse the flags. source: the result of read_source, for defaults; without it no file is read."""
    source = source or read_source(PROG, METHODS, argv, opened=False)
    usage = "%(prog)s --pretrained RUN --train-shards DIR --val-shards DIR [flags]"
    parser = flags.Parser(prog=PROG, usage=usage, description=__doc__)
    add_weights_flags(parser, METHODS, source)
    data = parser.group("data")
    add = data.add_argument
    add("--train-shards", required=True, identity=False, metavar="DIR", help="labelled shards: the neighbours")
    add("--val-shards", required=True, identity=False, metavar="DIR", help="labelled test shards; each image counts once")
    features.add_flags(data)
    add = parser.group("neighbours", identity=False).add_argument  # they decide nothing in a file of features
    add("--k", type=int, nargs="+", help="numbers of neighbours that vote; default: those of 1 10 20 100 200 that exist")
    add("--temperature", type=float, default=0.07, help="a neighbour votes with exp(similarity / temperature)")
    add("--centre", action="store_true", help="subtract the mean of the training features first")
    add("--memory", type=float, default=1024, metavar="MIB", help="memory of a process for similarities, beside the features")
    add("--neighbours", type=int, default=0, metavar="N", help="draw neighbours.png: N test images, N neighbours of each")
    flags.add_evaluation_flags(parser, None, "folder of results; default: `knn` in the run's folder, or knn-FILE beside a FILE")
    parser.set_defaults(amp="fp32", **({"size": 32} if source.arch == pixels.NAME else {}))
    args = parser.parse_args(argv)
    if args.resize is None:
        args.resize = args.size if args.pretrained == pixels.NAME else side_before_crop(args.size)
    if args.output_dir is None:
        args.output_dir = session.default_folder(args.pretrained, "knn")
    return args


def check(args: Namespace, train: Index, val: Index) -> None:
    """Raise ValueError for flags and data that cannot work."""
    features.check(args)
    flags.positive(["--temperature", "--memory"], args)
    flags.in_range("--neighbours", args.neighbours, 0, 50)
    for k in args.k or ():
        flags.in_range("--k", k, 1, train.total)
    session.check_classes(("--train-shards", args.train_shards, train), ("--val-shards", args.val_shards, val))


@lock.released()
def main(argv: list[str] | None = None) -> None:
    with flags.one_line_errors(PROG):
        args, source, device = session.start(PROG, METHODS, argv, get_args)
        train, val = session.load_splits(args)
        check(args, train, val)
        args.k = sorted(set(args.k or [k for k in knn.K if k <= train.total]))
        frozen, hashes = session.open_trunk(args, METHODS, source, device)
        say(f"kNN of {args.pretrained}: {source.facts}; {train.total} training and {val.total} test images")
    try:
        with flags.one_line_ends(PROG, args.batch_size), session.Stop(device) as stop:
            result = measure(args, train, val, frozen, hashes, device, stop)
    except signals.Stopped as stopped:
        session.end(stopped)
    with flags.one_line_errors(PROG, (OSError,)):
        path = Path(args.output_dir) / "result.json"
        if dist.rank() == 0:
            write_json(path, result)
        for k, found in result["knn"].items():
            say(f"{k}-NN: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
        say(f"Results: {path}")
    dist.teardown()


def measure(args: flags.Flags, train: Index, val: Index, frozen: Frozen, hashes: dict[str, Any], device: torch.device,
            stop: session.Stop) -> dict[str, Any]:  # fmt: skip
    """The content of result.json."""
    with flags.one_line_errors(PROG, (ValueError, OSError)):
        sets = features.of_sets(args, {"train": train, "val": val}, frozen, hashes["trunk_sha256"], device, stop)
    knn.to_unit_length_(sets["train"], sets["val"], args.centre)
    near = knn.neighbours(sets["train"], sets["val"], max([*args.k, args.neighbours]), int(args.memory * 2**20), stop)
    found = knn.accuracy(sets["train"], sets["val"], near, len(train.classes or ()), train.total, args.k, args.temperature)
    if args.neighbours:
        rows = neighbours.rows_of(sets["val"], near[1], args.neighbours)
        if dist.rank() == 0:
            view = features.test_view(args)
            neighbours.write_picture(Path(args.output_dir) / "neighbours.png", args, view, train, val, rows)
    images = {name: {"images": index.total, "unusable": sets[name].unusable, "hash": index.hash}
              for name, index in (("train", train), ("val", val))}  # fmt: skip
    return {"knn": found, **images, "protocol": shown_flags(vars(args)), **hashes}


if __name__ == "__main__":
    main()
