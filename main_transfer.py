"""Linear transfer: logistic regression on the features of a frozen trunk, on one or several data sets.

    python main_transfer.py --pretrained RUN --sets /data/sets/CIFAR10 /data/sets/DTD     one process
    torchrun --nproc_per_node 8 main_transfer.py --pretrained RUN --sets ...              eight GPUs compute the features
    python main_transfer.py --pretrained pixels --sets ...                                the baseline on resized pixels

RUN is a checkpoint or the folder of a run; `random` is an untrained trunk. A set is a folder of labelled shards, as
imagenet2wds.py writes it: train/ and test/, and val/ for the choice of l2. Without test/, val/ is the test, and l2 is chosen on
a part of train/. The result of each set is kept: the same command again measures only the other sets.
transfer.sh names the sets of MosRep's table.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils.run import signals

    signals.start()

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from methods import METHODS
from utils.data.index import Index, load_index_together
from utils.evaluation import features, logistic, pixels, session
from utils.evaluation.frozen import Frozen, Source, add_weights_flags, read_source
from utils.run import dist, flags, lock, signals, streams
from utils.run.files import write_json
from utils.run.log import say
from utils.run.text import shown_flags

PROG = "main_transfer.py"
PER_CLASS = ("OxfordIIITPet", "Flowers102", "FGVCAircraft", "Caltech101")  # whose figure is the mean per class
Splits = dict[str, Index]  # train, test and perhaps val


def get_args(argv: list[str] | None = None, source: Source | None = None) -> flags.Flags:
    """Parse the flags. source: the result of read_source, for defaults; without it no file is read."""
    source = source or read_source(PROG, METHODS, argv, opened=False)
    parser = flags.Parser(prog=PROG, usage="%(prog)s --pretrained RUN --sets DIR [DIR ...] [flags]", description=__doc__)
    add_weights_flags(parser, METHODS, source)
    data = parser.group("data")
    add = data.add_argument
    add("--sets", required=True, nargs="+", identity=False, metavar="DIR",
        help="folders of shards: train/, test/ and val/; --features takes one folder")  # fmt: skip
    features.add_flags(data, whole=True)
    add = parser.group("logistic regression", identity=False).add_argument  # they do not decide the features
    add("--metric", choices=["auto", *logistic.METRICS], default="auto",
        help=f"metric of the choice and the result; auto: mean-per-class for {', '.join(PER_CLASS)}, else top1")  # fmt: skip
    add("--val-fraction", type=float, default=0.2, metavar="F",
        help="share of the training images for the choice of l2, if a set has no validation part")  # fmt: skip
    flags.add_evaluation_flags(parser, None, "folder of results; default: `transfer` in the run's folder, or transfer-FILE")
    parser.set_defaults(amp="fp32", **({"size": 32} if source.arch == pixels.NAME else {}))
    args = parser.parse_args(argv)
    if args.resize is None:
        args.resize = args.size
    if args.output_dir is None:
        args.output_dir = session.default_folder(args.pretrained, "transfer")
    return args


def check(args: Namespace) -> None:
    """Raise ValueError for flags that cannot work."""
    features.check(args)
    flags.in_range("--val-fraction", args.val_fraction, 0.01, 0.99)
    if args.features and len(args.sets) > 1:
        raise ValueError(f"--features {args.features}: holds one set, --sets has {len(args.sets)}; pass one, or leave it out")


def find_sets(args: Namespace) -> dict[str, dict[str, str]]:
    """name -> split -> its shards, of each of --sets. The name is that of the folder. Raises ValueError."""
    sets: dict[str, dict[str, str]] = {}
    for folder in map(Path, args.sets):
        name = folder.resolve().name
        if name in sets:
            raise ValueError(f"--sets {folder}: a second set with the name {name}; rename one of the folders")
        if not folder.is_dir():
            raise ValueError(f"--sets {folder}: no such folder; pass one that holds the shards of train/ and test/ or val/")
        test = "test" if (folder / "test").is_dir() else "val"
        found = {"train": "train", "test": test} | ({"val": "val"} if test == "test" and (folder / "val").is_dir() else {})
        sets[name] = {split: str(folder / part) for split, part in found.items()}
    return sets


def open_sets(args: Namespace) -> dict[str, Splits]:
    """name -> the splits of each of --sets. All processes call it together. Raises ValueError."""
    opened, sets = flags.shard_flags(args), dict[str, Splits]()
    for name, found in dist.first_process_does(lambda: find_sets(args)).items():
        sets[name] = {split: load_index_together(shards, "--sets", **opened) for split, shards in found.items()}
        session.check_classes(*(("--sets", shards, sets[name][split]) for split, shards in found.items()))
        if "val" not in found and round(args.val_fraction * sets[name]["train"].total) == 0:
            raise ValueError(f"--val-fraction {args.val_fraction}: is no image of {found['train']}; pass a larger one")
    return sets


@lock.released()
def main(argv: list[str] | None = None) -> None:
    with flags.one_line_errors(PROG):
        args, source, device = session.start(PROG, METHODS, argv, get_args)
        check(args)
        sets = open_sets(args)
        frozen, hashes = session.open_trunk(args, METHODS, source, device)
    say(f"linear transfer of {args.pretrained}: {source.facts}")
    results = {}
    try:
        with flags.one_line_ends(PROG, args.batch_size), session.Stop(device) as stop:
            for name, splits in sets.items():
                results[name] = measure(args, name, splits, frozen, hashes, device, stop)
    except signals.Stopped as stopped:
        session.end(stopped)
    say("")
    for name, found in results.items():
        say(f"{name:<20} {found['metric']:<15} {found['score']:6.2f} %")
    say(f"Results: {Path(args.output_dir)}/*/result.json")
    dist.teardown()


def measure(args: flags.Flags, name: str, splits: Splits, frozen: Frozen, hashes: dict[str, Any], device: torch.device,
            stop: session.Stop) -> dict[str, Any]:  # fmt: skip
    """The result of a set, kept in its result.json; one of the same measurement is read instead."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / name)
    path, train = Path(args.output_dir) / "result.json", splits["train"]
    per_class = train.dataset in PER_CLASS
    metric = args.metric if args.metric != "auto" else "mean-per-class" if per_class else "top1"
    images = {split: {"images": index.total, "hash": index.hash} for split, index in splits.items()}
    fraction = {} if "val" in splits else {"val_fraction": args.val_fraction}
    identity = {**flags.meaning(args), "metric": metric, **fraction, **hashes, "data": images}
    with flags.one_line_errors(PROG, (ValueError, OSError)):
        if saved := dist.first_process_does(lambda: read_result(path, identity)):
            say(f"{name}: measured before, see {path}")
            return saved
        dist.first_process_does(lambda: path.parent.mkdir(exist_ok=True))
        parts = features.of_sets(args, splits, frozen, hashes["trunk_sha256"], device, stop)
    say(f"{name}: {', '.join(f'{index.total} {split}' for split, index in splits.items())} images, fitting logistic regression")
    whole = {split: [features.gathered(x) for x in (p.values, p.labels, p.sample_ids)] for split, p in parts.items()}
    if "val" not in whole:
        ids = whole["train"][2]
        held = torch.from_numpy(streams.held_out(args.seed, train.total, args.val_fraction)).to(ids.device)
        mask = torch.isin(ids, held)
        whole |= {"val": [x[mask] for x in whole["train"]], "train": [x[~mask] for x in whole["train"]]}
    (x, y, _), (val_x, val_y, _), (test_x, test_y, _) = (whole[split] for split in ("train", "val", "test"))
    found = logistic.linear_transfer((x, y), (val_x, val_y), (test_x, test_y), len(train.classes or ()), metric, stop)
    used = {split: len(whole[split][1]) for split in ("train", "val", "test")}
    result = {
        **found,
        "used": used,
        "classes": len(train.classes or ()),
        "identity": identity,
        "protocol": shown_flags(vars(args)),
    }
    with flags.one_line_errors(PROG, (OSError,)):
        dist.first_process_does(lambda: write_json(path, result))
    return result


def read_result(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result.json of the same measurement, or None."""
    try:
        saved = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    same = isinstance(saved, dict) and saved.get("identity") == json.loads(json.dumps(identity))
    return saved if same else None


if __name__ == "__main__":
    main()
