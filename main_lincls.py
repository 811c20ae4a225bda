"""Linear probe: linear classifiers on layers of the frozen trunk of a checkpoint.

    python main_lincls.py --pretrained RUN --train-shards DIR --val-shards DIR            one process
    torchrun --nproc_per_node 8 main_lincls.py --pretrained RUN ...                       eight GPUs
    python main_lincls.py --pretrained random --arch resnet50 ...                         the same probe on an untrained trunk

RUN is a checkpoint or the folder of a run. Launchers with the published protocol: linear_*.sh.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.shards import steps_per_epoch, training_plan
from utils.data.views import ViewSpec
from utils.evaluation.probe import Classifiers, Frozen, evaluate
from utils.learning import amp, layouts, optim
from utils.run import checkpoint, dist, resume
from utils.run.engine import Engine, StepInputs
from utils.run.files import write_json
from utils.run.flags import (
    Parser,
    add_lr_steps,
    add_run_flags,
    check_batch,
    check_lr_steps,
    check_run_flags,
    in_range,
    meaning,
    one_line_ends,
    one_line_errors,
    positive,
    shard_flags,
)
from utils.run.log import Log, say, write_config
from utils.run.signals import exit_code, stopped

PROG = "main_lincls.py"


def get_args(argv=None):
    first = Parser(prog=PROG, add_help=False)
    first.add_argument("--method", choices=METHODS, default="mosrep", help="whose published protocol to use as defaults")
    parser = Parser(prog=PROG, description=__doc__.split("\n\n")[0], parents=[first])
    add = parser.group("data", identity=False).add_argument
    add("--pretrained", required=True, metavar="PATH", help="checkpoint, folder of a run, or `random` for an untrained trunk")
    add("--train-shards", required=True, metavar="DIR", help="folder of labelled training shards, a glob or a brace pattern")
    add("--val-shards", required=True, metavar="DIR", help="the same for validation; every image counts exactly once")
    optimization = parser.group("optimization")
    add = optimization.add_argument
    add("-a", "--arch", help="timm trunk; default: the checkpoint's")
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--resize", type=int, help="test images: shorter side in pixels before the centre is cut; default: 8/7 of --size")
    add("--crop-min", type=float, default=0.08, help="smallest area of a training crop, as a share of the image")
    add("--epochs", type=int, help="times every training image is shown")
    add("--batch-size", type=int, help="images in a step, over all processes together")
    add("--lr", type=float, help="learning rate for a batch of 256; scaled once by batch size / 256; CMC's follows the arch")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.0, help="of SGD")
    add("--trust", type=float, help="trust coefficient of the layer-wise adaptive rate; 0 is plain SGD")
    add_lr_steps(optimization)
    add("--layer", type=int, nargs="+",
        help="layers to probe, all in one pass: 1 to 5 of AlexNet, 6 for pooled features; default: the last")  # fmt: skip
    add_run_flags(parser, output_dir=None, output_help="default: `linear` in the run's folder, or linear-FILE beside a FILE")
    method = METHODS[first.parse_known_args(argv)[0].method]
    method.add_probe_flags(parser)
    parser.set_defaults(**method.PROBE | ({"lr": None} if method.IDENTITY else {}))
    args = parser.parse_args(argv)
    if args.resize is None:
        args.resize = args.size * 256 // 224
    if args.output_dir is None:
        run = Path(args.pretrained)
        folder = Path("output/random") if args.pretrained == "random" else run if run.is_dir() else run.parent
        ours = args.pretrained == "random" or run.is_dir() or run.name.startswith("checkpoint_")
        args.output_dir = str(folder / ("linear" if ours else f"linear-{run.name.partition('.')[0]}"))
    return args


def check(args, train, val) -> None:
    """Raise ValueError for flags and data that cannot work."""
    check_run_flags(args)
    check_lr_steps(args)
    positive(["--epochs", "--batch-size", "--size", *([] if args.lr is None else ["--lr"])], args)
    in_range("--trust", args.trust, 0, 1)
    in_range("--crop-min", args.crop_min, 1e-8, 1)
    in_range("--resize", args.resize, args.size, math.inf)
    check_batch(args, train.total)
    for flag, shards, index in (("--train-shards", args.train_shards, train), ("--val-shards", args.val_shards, val)):
        if not index.labelled:
            raise ValueError(f"{flag} {shards}: a linear probe needs labels and these images have none; pass labelled shards")
    if train.classes[: len(val.classes)] != val.classes:  # of foreign shards only the largest label is known
        raise ValueError(f"--val-shards {args.val_shards}: its classes are not those of --train-shards {args.train_shards}")


def build_trunk(args) -> tuple[Frozen, str | None]:
    """The frozen trunk, and the sha256 of the checkpoint it comes from. What flags leave open is as the checkpoint says."""
    method, path, saved = METHODS[args.method], Path(args.pretrained), None
    known = {"arch": getattr(method, "ARCH", "resnet50"), "output_stride": 0}
    if args.pretrained != "random":
        path = checkpoint.newest(path, "--pretrained") or path / checkpoint.LATEST if path.is_dir() else path
        saved = checkpoint.read(path, "--pretrained")
        known |= {"arch": saved.get("arch", known["arch"])} | saved.get("flags", {})
    for name in ("arch", "output_stride", "space"):
        if getattr(args, name, "") is None:
            setattr(args, name, known.get(name))
    if "space" in known and "space" in args and args.space != known["space"]:
        raise ValueError(f"--space {args.space}: {path} was trained with {known['space']}; leave it out")
    if "space" in args and args.space is None:
        if args.pretrained != "random":
            raise ValueError(f"--space: {args.pretrained} does not tell the colour space of its views; pass it, such as Lab")
        args.space = "Lab"
    if args.lr is None:
        args.lr = method.probe(args.arch)["lr"]
    frozen = Frozen(method.frozen(args))
    if saved is None:
        return frozen, None
    state = method.trunk(layouts.weights_of(saved, f"--pretrained {path}"), args)
    layouts.load_trunk(frozen.trunk, state, frozen.classifier, f"--pretrained {path}")
    return frozen, checkpoint.file_hash(path)


def choose_layers(args, frozen: Frozen) -> None:
    """Keep the layers of --layer."""
    chosen = args.layer or [frozen.layers[-1]]
    if strangers := [layer for layer in chosen if layer not in frozen.layers]:
        have = " ".join(map(str, frozen.layers))
        raise ValueError(f"--layer {strangers[0]}: {args.arch} has {have}; pass some of them")
    frozen.layers = args.layer = sorted(set(chosen))


def main(argv=None):
    with one_line_errors(PROG):
        args = get_args(argv)
        device = dist.setup(args.device, args.dist_timeout)
        args.amp = amp.resolve(args.amp, device)
        train_index = dist.first_process_does(lambda: load_index(args.train_shards, "--train-shards", **shard_flags(args)))
        val_index = dist.first_process_does(lambda: load_index(args.val_shards, "--val-shards", **shard_flags(args)))
        check(args, train_index, val_index)
        torch.manual_seed(args.seed)
        frozen, source_hash = build_trunk(args)
        choose_layers(args, frozen)
        fc = Classifiers(frozen.widths(args.size), len(train_index.classes), args.seed)
        resume_from = dist.first_process_does(lambda: resume.open_run(args.output_dir, args.resume))
        frozen.to(device, memory_format=torch.channels_last)
        fc.to(device)
        lr = optim.scaled_lr(args.lr, args.batch_size)
        optimizer = optim.sgd(fc.parameters(), lr, args.momentum, args.weight_decay, args.trust)
        identity = meaning(args) | {"weights": source_hash, "train": train_index.hash, "val": val_index.hash}
        progress = {"epoch": 0, "step": 0, "best": {layer: {"top1": -1.0} for layer in args.layer}, "last": None}
        if resume_from:
            progress |= restore(resume_from, args, identity, fc, optimizer)

    trunk_hash, folder = checkpoint.weights_hash(frozen.trunk), Path(args.output_dir)
    if dist.rank() == 0:
        write_config(folder, args, train_index=train_index.hash, val_index=val_index.hash, device=str(device))
    say(f"linear probe of {args.arch} from {args.pretrained}: {train_index.total} training and {val_index.total} validation "
        f"images, batch {args.batch_size}, learning rate {args.lr} x {args.batch_size} / 256 = {lr:.4g}, "
        f"epochs {progress['epoch']} to {args.epochs}")  # fmt: skip
    with one_line_ends(PROG):
        stopped_by = train(args, train_index, val_index, frozen, fc, optimizer, progress, identity, lr, device)
    if checkpoint.weights_hash(frozen.trunk) != trunk_hash:
        raise RuntimeError("the frozen trunk changed during the probe; its result would be wrong and is not written")
    if not stopped_by:
        layers = {layer: {name: progress[name][layer] for name in ("best", "last")} for layer in args.layer}
        if dist.rank() == 0:
            write_json(folder / "result.json", {
                **layers[args.layer[-1]], **({"layers": layers} if len(layers) > 1 else {}), "protocol": vars(args),
                "checkpoint_sha256": source_hash, "trunk_sha256": trunk_hash,
            })  # fmt: skip
        say("")
        for layer, found in layers.items():
            best, last, at = found["best"], found["last"], f"Layer {layer}: top-1" if len(layers) > 1 else "Top-1"
            say(f"{at} {last['top1']:.2f} %, top-5 {last['top5']:.2f} % (best {best['top1']:.2f} %, epoch {best['epoch']})")
        say(f"Results: {folder / 'result.json'}")
    if stopped_by:
        say(stopped(stopped_by))
    dist.teardown()
    if stopped_by:
        sys.exit(exit_code(stopped_by))


def train(args, train_index, val_index, frozen, fc, optimizer, progress, identity, lr, device):
    """Carries `progress` on, to the end or until a signal. -> the signal, or 0."""
    steps = steps_per_epoch(train_index.total, args.batch_size)
    folder, start = Path(args.output_dir), (progress["epoch"], progress["step"])
    model = dist.data_parallel(fc, device)
    epochs = range(start[0], args.epochs)
    specs = [ViewSpec("train", args.size, (args.crop_min, 1.0))]
    plan = training_plan(train_index, args.batch_size, args.seed, epochs, first_step=start[1])
    batches = load_batches(train_index, specs, plan, args.seed, args.workers, device, args.photometric)
    bad = BadSamples(folder, train_index.total + val_index.total, args.max_bad)

    def content(epoch, step):
        state = {"state_dict": checkpoint.prefixed(fc), "optimizer": optimizer.state_dict()}
        return {"arch": args.arch, "probe": identity, **progress, "epoch": epoch, "step": step, **state}

    with (
        Log(folder, start, steps, args.print_freq, args.batch_size, bad) as log,
        Engine(args, steps, optimizer, amp.scaler("fp32"), log, device, content) as engine,
    ):
        for epoch in epochs:
            lr_now = optim.lr_at(lr, epoch, args.epochs, drops=args.lr_steps, gamma=args.lr_gamma)
            optim.set_lr(optimizer, lr_now)
            for step in log.epoch(epoch, start[1] if epoch == start[0] else 0):
                with log.waiting():
                    batch = next(batches)
                logits = model(frozen.features(batch.views[0], args.amp))
                loss = sum(F.cross_entropy(x, batch.labels) for x in logits.values())  # no layer's gradient meets another's
                stats = engine.update(loss, StepInputs(epoch, step))
                for layer, x in logits.items():
                    stats[named("top1", layer, logits)] = (x.argmax(1) == batch.labels).float().mean() * 100
                log.add(step, loss, stats, lr_now, batch.bad)
                if engine.done(epoch, step + 1):
                    return engine.stopped_by
            result = evaluate(args, val_index, frozen, fc, device, bad, lambda epoch=epoch: engine.asked_to_stop(epoch))
            if result is None:
                return engine.stopped_by
            for layer, found in result.items():
                at = f"layer {layer} " if len(result) > 1 else ""
                say(f"epoch {epoch}: validation {at}top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
            log.scalars(epoch, {named(f"val_{n}", layer, result): v for layer, r in result.items() for n, v in r.items()})
            progress["last"] = {layer: {"epoch": epoch, **found} for layer, found in result.items()}
            better = {layer: max(progress["best"][layer], r, key=lambda r: r["top1"]) for layer, r in progress["last"].items()}
            progress["best"] = better
            engine.save(epoch + 1, 0)
        engine.finish()
    return 0


def named(name, layer, layers):
    return f"{name}_layer{layer}" if len(layers) > 1 else name


def restore(path: Path, args, identity: dict, fc, optimizer) -> dict:
    """What an unfinished probe has done so far.

    Another probe in the same place is only gone over where `--resume auto` found it; asked for by name, it is an error.
    """
    saved = checkpoint.read(path, "--resume")
    if saved.get("probe") != identity:
        other = [name for name, value in identity.items() if saved.get("probe", {}).get(name) != value]
        if args.resume != "auto":
            raise ValueError(f"--resume {path}: is another probe (different: {', '.join(other)}); pass another --output-dir")
        say(f"{path} is another probe (different: {', '.join(other)}); starting this one from the beginning")
        return {}
    fc.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
    optimizer.load_state_dict(saved["optimizer"])
    return {name: saved[name] for name in ("epoch", "step", "best", "last")}


if __name__ == "__main__":
    main()
