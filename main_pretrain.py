"""Contrastive pre-training.

    python main_pretrain.py --shards DIR                                     MosRep, one process: GPU or CPU
    torchrun --nproc_per_node 8 main_pretrain.py --shards DIR                eight GPUs
    python main_pretrain.py --method moco --local-crops 4 --shards DIR       MoCo-v2 with multi-crop
    python main_pretrain.py --method moco --help                             the flags of that method

DIR holds webdataset shards, as imagenet2wds.py writes them. Launchers with the published settings: pretrain_*.sh.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils.run import signals

    signals.start()

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.batch import Batch
from utils.data.index import load_index_together
from utils.data.limits import check_workers
from utils.data.loader import load_batches
from utils.data.measure import say_workers
from utils.data.shards import lanes_of, steps_per_epoch, training_plan
from utils.data.views import ViewSpec
from utils.evaluation import fit, monitor, pictures
from utils.evaluation.frozen import Live, open_weights, trunk_identity
from utils.evaluation.monitor import Monitor
from utils.evaluation.watch import Watch
from utils.learning import amp, health, initial, optim
from utils.learning.accumulate import accumulate
from utils.learning.contrast import counters_on_host_
from utils.learning.drawing import SHOWN
from utils.learning.method import Method, Step
from utils.run import checkpoint, dist, flags, lock, mirror, replay, report, resume, tracker
from utils.run.engine import Engine, NotFinite, StepInputs
from utils.run.flags import Flags, Parser, in_range, one_line_ends, one_line_errors, positive, typed
from utils.run.log import Log, say
from utils.run.signals import exit_code, stopped
from utils.run.summary import closing, references
from utils.run.text import shown, shown_flags
from utils.run.verdicts import Verdicts

PROG = "main_pretrain.py"


def get_args(argv=None) -> Flags:
    first = Parser(prog=PROG, add_help=False)
    add_first_flags(first)
    known = first.parse_known_args(argv)[0]
    failed = replay.read_failed_step(known.replay) if known.replay else None
    name = failed["flags"]["method"] if failed else known.method

    parser = Parser(lambda flag: other_method(flag, name), prog=PROG, usage="%(prog)s [--method NAME] --shards DIR [flags]",
                    description=__doc__.rpartition("\n\n")[0])  # fmt: skip
    add = parser.group("data", identity=False).add_argument
    add("--shards", required=not failed, metavar="DIR", help="folder of training shards, a glob, or a brace pattern of tars")
    add("--lanes", type=int, identity=True, help="ranges of an epoch; default: largest of 64, 32, .. 1 that divides the batch")
    optimization = parser.group("optimization")
    add = optimization.add_argument
    add("--accumulate", type=number_or_auto, default=1, identity=False, metavar="M|auto",
        help="slices of a process's batch, of whole --bn-splits groups, one at a time in memory; auto: the fewest")  # fmt: skip
    add("--epochs", type=int, default=200, help="number of epochs")
    add("--batch-size", type=int, default=256, help="global batch: images of a step over all processes")
    add("--lr", type=float, default=0.03, help="learning rate for a batch of 256; scaled once by batch size / 256")
    add("--momentum", type=float, default=0.9, help="momentum of SGD and LARS")
    add("--weight-decay", type=float, default=1e-4, help="weight decay; with LARS not for biases and BatchNorm")
    add("--trust", type=float, default=0.0, help="trust coefficient of LARS, layer-wise adaptive rates; 0 is plain SGD")
    add("--warmup-epochs", type=float, default=0.0, help="epochs of linear warm-up from 0, updated at each step")
    add("--lr-per", choices=["epoch", "step"], default="epoch", help="update the cosine at each epoch or each step")
    flags.add_lr_steps(optimization)
    add_first_flags(parser)
    method = parser.group("method")
    method.add_argument("-a", "--arch", default="resnet50", help="timm model with feature maps; CMC: alexnet, resnetNNv1 to v3")
    method.add_argument("--init", identity=False, metavar="PATH",
        help="weights that a new run starts from: checkpoint, run, name of weights.json, https:// or hf://")  # fmt: skip
    flags.add_run_flags(parser, output_dir="output/run", output_help="folder of checkpoints, metrics and configuration")
    METHODS[name].add_flags(method)  # last: a method has its own defaults of the other flags
    add = parser.group("run", identity=False).add_argument
    add("--save-freq", type=int, default=10, help="keep the checkpoint of every Nth epoch")
    add("--mirror", metavar="PLACE",
        help="copy the run to s3://, hf:// or a folder after each save; --resume auto finds it there")  # fmt: skip
    add("--compile", action="store_true", help="compile the encoders with torch.compile")
    monitor.add_flags(parser.group("measured during training", identity=False))
    if failed:  # one process computes it, with the processes of the run as groups of BatchNorm
        groups = failed["processes"] * failed["flags"].get("bn_splits", 1)
        slices = failed["processes"] * failed["flags"].get("accumulate", 1)
        one = {"bn_splits": groups, "accumulate": slices if "bn_splits" in failed["flags"] else 1}
        parser.set_defaults(**(failed["flags"] | one | {"device": "auto", "replay": None}))
    return parser.parse_args(argv)


def number_or_auto(text: str) -> int | str:
    """The value of --accumulate."""
    return text if text == "auto" else int(text)


def add_first_flags(parser: Parser) -> None:
    """Add --method and --replay, which decide the other flags."""
    parser.group("method").add_argument("--method", choices=METHODS, default="mosrep",
        help="method to train; --method NAME --help shows its flags")  # fmt: skip
    parser.group("run").add_argument("--replay", metavar="FILE", identity=False,
        help="compute a failed_step_*.pth.tar again in one process, with the flags of its run, and stop")  # fmt: skip


def other_method(flag: str, method: str) -> str | None:
    """`--method NAME` of another method that has this flag, or None."""
    for name in METHODS:
        METHODS[name].add_flags((parser := Parser(add_help=False)).group("method"))
        if name != method and flag in parser.format_help().replace(",", " ").split():
            return f"--method {name}"
    return None


def check(args: Flags, samples: int, beside: tuple[ViewSpec, ...] = ()) -> None:
    """Raise ValueError for flags that cannot work, before anything slow. It names flag, value and a value that works.

    beside: views whose workers live at the same time.
    """
    method = METHODS[args.method]
    flags.check_run_flags(args)
    flags.check_lr_steps(args)
    if args.lr_steps and args.lr_per == "step":
        raise ValueError("--lr-per step: belongs to the cosine, which --lr-steps replaces; pass --lr-per epoch")
    positive(["--epochs", "--batch-size", "--lr", "--save-freq"], args)
    if method.bn_groups(args) < 1:
        raise ValueError(f"--bn-splits {method.bn_groups(args)}: must be above 0")
    in_range("--trust", args.trust, 0, 1)
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g}: must be at least 0 and less than --epochs {args.epochs}")
    flags.check_batch(args, samples, method.bn_groups(args))
    check_slices(args, method.bn_groups(args))
    lanes_of(args.lanes, args.batch_size)
    check_workers([*method.views(args), *beside], args.batch_size // dist.world(), args.workers)
    method.check(args, samples)


def check_slices(args: Flags, groups: int) -> None:
    """Raise ValueError unless each slice of --accumulate holds whole BatchNorm groups."""
    if args.accumulate != "auto" and (args.accumulate < 1 or groups % args.accumulate):
        if "bn_splits" in args:
            raise ValueError(f"--accumulate {args.accumulate}: a slice holds whole BatchNorm groups; --bn-splits is {groups}; "
                             f"pass a divisor of it, or --bn-splits {max(1, args.accumulate)}")  # fmt: skip
        raise ValueError(f"--accumulate {args.accumulate}: the BatchNorm of {args.method} takes the whole batch of a process; "
                         "leave it out")  # fmt: skip


@lock.released()
def main(argv=None):
    with one_line_errors(PROG):
        args = get_args(argv)
        device = dist.setup(args.device, args.dist_timeout)
        args.amp = amp.resolve(args.amp, device)
        if args.replay:
            return compute_again(args, device)
        index, held_out = load_index_together(args.shards, **flags.shard_flags(args)), None
        if args.eval_shards:
            held_out = load_index_together(args.eval_shards, "--eval-shards", **flags.shard_flags(args))
        monitor.check(args, index, held_out)
        check(args, index.total, (monitor.view_of(args),) if held_out else ())
        dry = args.dry_run is not None
        resume_from = dist.first_process_does(lambda: resume.open_run(args.output_dir, args.resume, dry, args.mirror))
        groups = METHODS[args.method].bn_groups(args)
        fitted = fit.choose(lambda few: build(few, index.total, device), args, METHODS[args.method].views(args), groups, device,
                            resume_from)  # fmt: skip
        method = build(args, index.total, device)
        lr = optim.scaled_lr(args.lr, args.batch_size)
        optimizer = optim.sgd(method.parameters(), lr, args.momentum, args.weight_decay, args.trust, exclude=True)
        scaler = amp.scaler(args.amp)
        steps = steps_per_epoch(index.total, args.batch_size)
        start, init = (0, 0), None
        if resume_from:
            start, init = resume.restore(resume_from, args, index.hash, steps, method, optimizer, scaler)
        elif args.init:
            init = initialize(args, method)
        known = numbers_of(args, method, index.total, steps)
        if dry:
            if dist.rank() == 0:
                Verdicts(None, start, known)
            rate = args.batch_size / dist.world() / fitted.seconds if fitted else 0.0
            say_workers(args, index, method.views(args), steps, rate)
            return say("\n".join(fit.said(fitted, args, device, known) if fitted else ()))
        facts = {"index": index.hash, "samples": index.total, "device": str(device), "init": init,
                 "references": references(known), "published": args.defaults}  # fmt: skip
        live = Live(args, METHODS[args.method], device)
        monitored = Monitor(live, index, held_out, device) if held_out else None
        folder = Path(args.output_dir)
        dist.first_process_does(lambda: resume.begin(folder, args, resume_from, start, **facts))
        model = dist.data_parallel(method, device)
    smaller = "--accumulate auto" if args.accumulate < groups else None
    with one_line_ends(PROG, args.batch_size, smaller), mirror.copied_at_the_end():
        try:
            stopped_by = train(args, index, method, model, optimizer, scaler, start, init, lr, device, live, monitored)
        except NotFinite as failure:
            replay.write(failure, folder, args, method, scaler, steps, index.total)
        report.renew(folder, stopped_by)
    if stopped_by:
        say(stopped(stopped_by, args.resume))
    del model, method, optimizer  # before their process group; in the other order torch 2.9 may hang
    dist.teardown()
    if stopped_by:
        sys.exit(exit_code(stopped_by))


def build(args, samples: int, device: torch.device) -> Method:
    """The method with its initial weights, which depend on --seed only."""
    torch.backends.cudnn.benchmark = True  # on CUDA: the sizes of the views are fixed, so the search for algorithms pays
    torch.manual_seed(args.seed)
    method = METHODS[args.method](args, samples).to(device).to(memory_format=torch.channels_last)
    if args.compile:
        for encoder in method.encoders():
            encoder.compile(dynamic=False)  # a graph for each size of views, not one for any size
    else:  # which the compiler does not expect
        counters_on_host_(method)
    return method


def numbers_of(args, method: Method, images: int, steps: int) -> dict[str, Any]:
    """What is known of a run before its first step, for references and verdicts. steps: of an epoch."""
    crops = [spec.scale[0] for spec in method.views(args) if not spec.resize]
    return method.facts(args.batch_size) | {
        "chance": method.chance(args.batch_size), "images": images, "batch": args.batch_size, "workers": args.workers,
        "epoch_steps": steps, "all_steps": args.epochs * steps, "smallest_crop": min(crops),
    }  # fmt: skip


def initialize(args, method: Method) -> dict[str, str | None]:
    """Load the weights of --init, read by the first process. Returns the record of them."""
    found = dist.first_process_does(lambda: open_weights(args.init, "--init"))
    for name in trunk_identity(METHODS[args.method]) if found.method == args.method else ():
        value, trained = vars(args)[name], found.stated.get("flags", {}).get(name)
        if trained is None:
            say(f"warning: {found.path} does not contain --{name}; its trunk is taken as one of {typed(name, value)}")
        elif trained != value:
            raise ValueError(f"{typed(name, value)}: {found.path} of --init was trained with {trained}; pass "
                             f"{typed(name, trained)}")  # fmt: skip
    loaded = initial.load(method, args, found.state, found.method == args.method, f"--init {found.path}")
    say(f"{found.path}: {found.layout}; {loaded}")
    return {"source": shown(args.init), "path": str(found.path), "layout": found.layout, "sha256": found.sha256}


def train(args, index, method, model, optimizer, scaler, start, init, lr, device, live, monitored: Monitor | None) -> int:
    """Train to the end, or until a signal: then save and return its number. Returns 0 at the end."""
    steps, folder = steps_per_epoch(index.total, args.batch_size), Path(args.output_dir)
    first_epoch, first_step = start
    position = f" (from its step {first_step})" if first_step else ""
    say(f"{args.method} {args.arch} on {dist.world()} x {device.type} {args.amp}: {index.total} images, "
        f"batch {args.batch_size}, {steps} steps per epoch, epochs {first_epoch}{position} to {args.epochs}, learning rate "
        f"{args.lr} x {args.batch_size} / 256 = {lr:.4g}")  # fmt: skip
    if first_epoch >= args.epochs:
        say("This run has ended; a larger --epochs continues it.")
    model.train()
    if method.prepares and start == (0, 0):
        prepare(args, index, method, device)
    epochs = range(first_epoch, args.epochs)
    plan = training_plan(index, args.batch_size, args.seed, epochs, args.lanes, first_step)
    batches = load_batches(index, method.views(args), plan, args.seed, args.workers, device, args.photometric)
    bad = BadSamples(folder, index.total, args.max_bad)
    schedule = args.warmup_epochs, args.lr_per == "step", args.lr_steps, args.lr_gamma

    def content(epoch, step_in_epoch):
        facts = {"method": args.method, "arch": args.arch, "flags": shown_flags(vars(args)), "index": index.hash}
        facts |= {"init": init} if init else {}
        states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return {"epoch": epoch, "step": step_in_epoch, **facts, "state_dict": checkpoint.prefixed(model), **states}

    known = numbers_of(args, method, index.total, steps)
    verdicts = Verdicts(folder, start, known) if dist.rank() == 0 else None
    watch, shown_views = Watch(live), None  # of pca.png, without held-out images

    tracked = tracker.start(args, folder)
    with (
        Log(
            folder, start, steps, args.print_freq, args.batch_size, bad, known["chance"], args.epochs, verdicts, tracked
        ) as log,
        Engine(args, steps, optimizer, scaler, log, device, content, args.save_freq) as engine,
    ):
        for epoch in epochs:
            for step_in_epoch in log.epoch(epoch, first_step if epoch == first_epoch else 0):
                watched = health.watched(step_in_epoch, steps, args.print_freq)
                step = Step(epoch * steps + step_in_epoch, args.epochs * steps, args.seed, watched)
                lr_now = optim.lr_at(lr, epoch + step_in_epoch / steps, args.epochs, *schedule)
                optim.set_lr(optimizer, lr_now)
                with log.waiting():
                    batch = next(batches)
                step.seed_torch()
                targets = method.targets(batch, step)
                if (epoch, step_in_epoch) == start:
                    pictures.write_views(folder, method, batch, targets, log)
                    shown_views = batch.views[0][:SHOWN].clone()
                loss, stats = accumulate(model, batch, targets, step, args.accumulate, engine.backward)
                stats |= engine.update(loss, StepInputs(epoch, step_in_epoch, batch))
                method.commit(step)
                stats |= watch(method, batch) if watched else {}
                log.add(step_in_epoch, loss, stats, lr_now, batch.bad)
                if engine.done(epoch, step_in_epoch + 1):
                    return engine.stopped_by
            if monitored and monitored.due(epoch):
                found = monitored(epoch, method, partial(engine.asked_to_stop, epoch))
                if found is None:
                    return engine.stopped_by
                log.scalars(epoch, found)
                monitored.show(log)
            elif not monitored and shown_views is not None:
                pictures.write_own_pca(folder, live, method, shown_views, log)
            engine.save(epoch + 1, 0)
            report.renew(folder)
        engine.finish()
        pictures.write_curves(folder, log)
    say("\n" + dist.first_process_does(lambda: closing(folder, known["chance"])))
    say(f"Results: {folder}/ (report.html, checkpoints, metrics.jsonl, config.json; curves: tensorboard --logdir {folder})")
    say(f"Next:    bash linear_{args.method}.sh, with the variables of this run (SHARDS, OUTPUT, RECIPE ...) if any were set")
    return 0


def prepare(args, index, method: Method, device: torch.device) -> None:
    """The pass before the first epoch. Its views are those of the epoch after the last, so training never sees them.

    A run that is stopped here starts again, and gets the same values.
    """
    steps, epoch = steps_per_epoch(index.total, args.batch_size), args.epochs
    say(f"Pass before the first epoch: {steps} steps without updates of weights")
    plan = training_plan(index, args.batch_size, args.seed, range(epoch, epoch + 1), args.lanes)
    batches = load_batches(index, method.views(args), plan, args.seed, args.workers, device, args.photometric)
    for i, batch in enumerate(batches):
        step = Step(epoch * steps + i, epoch * steps, args.seed)
        step.seed_torch()
        method.prepare(batch, step)


def compute_again(args, device):
    """--replay: compute a failed step once more; exit code 0 if it fails again."""
    if dist.world() > 1:
        raise ValueError(f"--replay {args.replay}: runs in one process, not in {dist.world()}; start it without torchrun")
    saved = replay.read_failed_step(args.replay)
    if args.accumulate == "auto":
        args.accumulate = METHODS[args.method].bn_groups(args)
    method = build(args, saved["images"], device)

    def loss_of(saved, backward):
        step = Step(saved["epoch"] * saved["steps"] + saved["step"], args.epochs * saved["steps"], args.seed)
        step.seed_torch()
        views, ids = [view.to(device) for view in saved["views"]], saved["samples"].to(device)
        batch = Batch(views, saved["flips"], ids, torch.full_like(ids, -1), [])
        return accumulate(method, batch, method.targets(batch, step), step, args.accumulate, backward)[0]

    again = replay.run(method, saved, amp.scaler(args.amp), loss_of)
    sys.exit(0 if again else 1)


if __name__ == "__main__":
    main()
