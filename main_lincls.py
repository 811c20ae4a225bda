"""Linear probe: linear classifiers on layers of the frozen trunk of a checkpoint.

    python main_lincls.py --pretrained RUN --train-shards DIR --val-shards DIR            one process
    torchrun --nproc_per_node 8 main_lincls.py --pretrained RUN ...                       eight GPUs
    python main_lincls.py --pretrained random --arch resnet50 ...                         the same probe on an untrained trunk

RUN is a checkpoint or the folder of a run. Method, arch and protocol are those of the checkpoint unless flags change them.
Launchers with the published protocols: linear_*.sh.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils.run import signals

    signals.start()

import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.loader import load_batches
from utils.data.measure import say_workers
from utils.data.shards import steps_per_epoch, training_plan
from utils.data.views import ViewSpec, moco_v1_view
from utils.evaluation import session, supervised
from utils.evaluation.classifiers import Classifiers, evaluate
from utils.evaluation.frozen import Frozen, Source, add_weights_flags, build_trunk, read_source
from utils.evaluation.probe_rates import choose, lrs_of, optimizer_of, rates, warn_if_slow
from utils.learning import amp
from utils.run import checkpoint, dist, flags, lock, signals, streams, tracker
from utils.run.engine import Engine, StepInputs
from utils.run.log import Log, say

PROG = "main_lincls.py"
KEY = "probe"  # of the identity in a checkpoint
OLDER = {"aug": "crop", "val_fraction": None}  # flags that older probes have not


def get_args(argv: list[str] | None = None, source: Source | None = None) -> flags.Flags:
    """Parse the flags. source: the result of read_source, for defaults; without it no file is read."""
    source = source or read_source(PROG, METHODS, argv, opened=False)
    usage = "%(prog)s --pretrained RUN --train-shards DIR --val-shards DIR [flags]"
    parser = flags.Parser(prog=PROG, usage=usage, description=__doc__)
    add_weights_flags(parser, METHODS, source)
    supervised.add_data_flags(parser)
    add = parser.group("data").add_argument
    add(
        "--aug",
        choices=["crop", "v1"],
        default="crop",
        help="training views: crop and flip; v1: also MoCo-v1's gray and jitter",
    )
    group = parser.group("optimization")
    add = group.add_argument
    add("--epochs", type=int, help="number of epochs")
    add("--batch-size", type=int, help="global batch: images of a step over all processes")
    add("--lr", type=float, nargs="+", metavar="LR",
        help="learning rate for a batch of 256; scaled once by batch size / 256. Several are probed in one pass")  # fmt: skip
    add("--val-fraction", type=float, metavar="F",
        help="share of the training images that choose among several --lr; they are not trained on; default: 0.1")  # fmt: skip
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--weight-decay", type=float, default=0.0, help="weight decay of SGD")
    add("--trust", type=float, help="trust coefficient of layer-wise adaptive rates; 0 is plain SGD")
    flags.add_lr_steps(group)
    add("--layer", type=int, nargs="+",
        help="numbers of the layers to probe in one pass; AlexNet: 1 to 5, pooled: 6; default: the last")  # fmt: skip
    flags.add_run_flags(parser, None, "folder of results; default: `linear` in the run's folder, or linear-FILE beside a FILE")
    parser.set_defaults(amp="fp32", **METHODS[source.method].probe(source.arch, source.flags))
    args = parser.parse_args(argv)
    if isinstance(args.lr, list) and len(args.lr) == 1:
        args.lr = args.lr[0]
    if isinstance(args.lr, list) and args.val_fraction is None:
        args.val_fraction = 0.1
    supervised.fill_in(args, "linear")
    return args


def check(args: Namespace, train: Index, val: Index) -> None:
    """Raise ValueError for flags and data that cannot work."""
    if isinstance(args.lr, list):
        if len(set(args.lr)) < len(args.lr):
            raise ValueError(f"{flags.typed('lr', args.lr)}: has a value twice; pass it once")
        flags.in_range("--val-fraction", args.val_fraction, 1 / train.total, 0.9)
    elif args.val_fraction is not None:
        raise ValueError(f"--val-fraction {args.val_fraction}: is for the choice among several --lr; leave it out")
    supervised.check(args, train, val, specs(args))
    flags.in_range("--trust", args.trust, 0, 1)
    flags.check_batch(args, train.total - len(held_out(args, train)))


def specs(args: Namespace) -> list[ViewSpec]:
    """The views of a training image."""
    view = moco_v1_view if args.aug == "v1" else ViewSpec
    return [view("train", args.size, (args.crop_min, 1.0))]


def held_out(args: Namespace, train: Index) -> np.ndarray:
    """The ids of the training images on which the best of several --lr is chosen; none for a single one."""
    return streams.held_out(args.seed, train.total, args.val_fraction or 0)


@lock.released()
def main(argv: list[str] | None = None) -> None:
    with flags.one_line_errors(PROG):
        args, source, device = session.start(PROG, METHODS, argv, get_args)
        train_index, val_index = session.load_splits(args)
        check(args, train_index, val_index)
        torch.manual_seed(args.seed)
        frozen = build_trunk(args, METHODS[args.method], source)
        args.layer = frozen.choose(args.layer, args.arch)
        classes, copies = len(train_index.classes or ()), len(lrs_of(args))
        fc = Classifiers(frozen.widths(args.size), classes, args.seed, copies).to(device)
        frozen.to(device).to(memory_format=torch.channels_last)
        optimizer = optimizer_of(args, fc)

        def load(saved):
            fc.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
            optimizer.load_state_dict(saved["optimizer"])

        splits = train_index, val_index
        progress, identity = supervised.open_run(args, KEY, source, *splits, fc.heads, device, load, OLDER)
        held = held_out(args, train_index)
        learned = train_index.part(np.setdiff1d(np.arange(train_index.total), held)) if len(held) else train_index
        steps = steps_per_epoch(learned.total, args.batch_size)
        if args.dry_run is not None:
            return say_workers(args, learned, specs(args), steps)
        trunk_hash = checkpoint.weights_hash(frozen.trunk)
    published = METHODS[args.method].probe(args.arch, source.flags)
    other = " ".join(flags.typed(name, vars(args)[name]) for name, value in published.items() if vars(args)[name] != value)
    say(f"linear probe of {args.pretrained}: {source.facts}, protocol of {args.method}{other and f' except {other}'}")
    lrs, scaled = (" ".join(f"{lr:{form}}" for lr in values) for values, form in ((lrs_of(args), ""), (rates(args)[0], ".4g")))
    say(f"{learned.total} training and {val_index.total} validation images, batch {args.batch_size}, learning rate "
        f"{lrs} x {args.batch_size} / 256 = {scaled}, epochs {progress['epoch']} to {args.epochs}")  # fmt: skip
    warn_if_slow(args, steps)
    with flags.one_line_ends(PROG, args.batch_size):
        held_index = train_index.part(held) if len(held) else None
        stopped_by = train(args, learned, val_index, frozen, fc, optimizer, progress, identity, device, held_index)
    if checkpoint.weights_hash(frozen.trunk) != trunk_hash:
        raise RuntimeError("the frozen trunk changed during the probe; its result would be wrong and is not written")
    if not stopped_by:
        with flags.one_line_errors(PROG, (OSError,)):
            chosen, facts = choose(args, fc, progress)
            supervised.report(args, chosen, facts | {"checkpoint_sha256": source.sha256, "trunk_sha256": trunk_hash})
        return dist.teardown()
    say(signals.stopped(stopped_by, args.resume))
    dist.teardown()
    sys.exit(signals.exit_code(stopped_by))


def train(args: Namespace, train_index: Index, val_index: Index, frozen: Frozen, fc: Classifiers,
          optimizer: torch.optim.Optimizer, progress: dict, identity: dict, device: torch.device,
          held: Index | None = None) -> int:  # fmt: skip
    """Train and update `progress`, until the end or a signal. Returns the signal, or 0.

    held: the images on which the best learning rate is chosen; after the last epoch their top-1 is the entry `held_out`.
    """
    steps = steps_per_epoch(train_index.total, args.batch_size)
    folder, start, lrs = Path(args.output_dir), (progress["epoch"], progress["step"]), rates(args)
    model = dist.data_parallel(fc, device)
    epochs = range(start[0], args.epochs)
    plan = training_plan(train_index, args.batch_size, args.seed, epochs, first_step=start[1])
    batches = load_batches(train_index, specs(args), plan, args.seed, args.workers, device, args.photometric)
    bad = BadSamples(folder, train_index.total + val_index.total, args.max_bad)
    ends = dict.fromkeys(fc.heads, "")  # suffixes of the metrics' names
    for head, (layer, copy) in fc.heads.items():
        ends[head] += f"_layer{layer}" if len(args.layer) > 1 else ""
        ends[head] += f"_lr{lrs_of(args)[copy]:g}" if len(lrs_of(args)) > 1 else ""
    chance = len(fc.fc) * math.log(len(train_index.classes or ()))  # the loss is a sum over the heads

    def content(epoch: int, step: int) -> dict[str, Any]:
        state = {"state_dict": checkpoint.prefixed(fc), "optimizer": optimizer.state_dict()}
        return {"arch": args.arch, KEY: identity, **progress, "epoch": epoch, "step": step, **state}

    with (
        Log(folder, start, steps, args.print_freq, args.batch_size, bad, chance, tracker=tracker.start(args, folder)) as log,
        Engine(args, steps, optimizer, amp.scaler("fp32"), log, device, content) as engine,
    ):
        for epoch in epochs:
            for group, lr in zip(optimizer.param_groups, lrs[epoch], strict=True):
                group["lr"] = lr
            for step in log.epoch(epoch, start[1] if epoch == start[0] else 0):
                with log.waiting():
                    batch = next(batches)
                logits = model(frozen.features(batch.views[0], args.amp))
                loss = sum(F.cross_entropy(x, batch.labels) for x in logits.values())  # the heads' gradients are independent
                engine.backward(loss)
                stats = engine.update(loss, StepInputs(epoch, step))
                for head, x in logits.items():
                    stats[f"top1{ends[head]}"] = (x.argmax(1) == batch.labels).float().mean() * 100
                log.add(step, loss, stats, lrs[epoch][0], batch.bad)
                if engine.done(epoch, step + 1):
                    return engine.stopped_by
            stop = partial(engine.asked_to_stop, epoch)
            result = evaluate(args, val_index, frozen, fc, device, bad, stop)
            if result and held and epoch + 1 == args.epochs:
                chosen_on = evaluate(args, held, frozen, fc, device, bad, stop)
                result = chosen_on and {head: {**r, "held_out": chosen_on[head]["top1"]} for head, r in result.items()}
            if result is None:
                return engine.stopped_by
            for head, found in result.items():
                at = ends[head].replace("_layer", "layer ").replace("_lr", " lr ").strip()
                say(f"epoch {epoch}: validation {at}{at and ' '}top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
            log.scalars(epoch, {f"val_{n}{ends[head]}": v for head, r in result.items() for n, v in r.items()})
            supervised.note(progress, epoch, result)
            engine.save(epoch + 1, 0)
        engine.finish()
    return 0


if __name__ == "__main__":
    main()
