"""Fine-tuning: the trunk of a checkpoint and a new linear classifier learn from labels, all or a few.

    python main_finetune.py --pretrained RUN --train-shards DIR --val-shards DIR --images 10percent.txt       one process
    torchrun --nproc_per_node 8 main_finetune.py --pretrained RUN ...                                         eight GPUs
    python main_finetune.py --pretrained random --arch resnet50 ...                                           from scratch

RUN is a checkpoint or the folder of a run. The defaults are SwAV's for 10 % of ImageNet. Launchers with the published recipes:
finetune_*.sh.
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

import torch
import torch.nn.functional as F

from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.loader import load_batches
from utils.data.measure import say_workers
from utils.data.shards import steps_per_epoch, training_plan
from utils.data.views import ViewSpec
from utils.evaluation import session, supervised
from utils.evaluation.classifiers import Classifiers, Tuned, evaluate
from utils.evaluation.frozen import Source, add_weights_flags, build_trunk, read_source
from utils.learning import amp, optim
from utils.learning.method import Step
from utils.run import checkpoint, dist, flags, lock, signals, tracker
from utils.run.engine import Engine, StepInputs
from utils.run.log import Log, say

PROG, KEY = "main_finetune.py", "finetune"


def get_args(argv: list[str] | None = None, source: Source | None = None) -> flags.Flags:
    """Parse the flags. source: the result of read_source, for defaults; without it no file is read."""
    source = source or read_source(PROG, METHODS, argv, opened=False)
    usage = "%(prog)s --pretrained RUN --train-shards DIR --val-shards DIR [flags]"
    parser = flags.Parser(prog=PROG, usage=usage, description=__doc__)
    add_weights_flags(parser, METHODS, source)
    supervised.add_data_flags(parser)
    add = parser.group("data").add_argument
    add("--images", identity=False, metavar="FILE", help="use only the training images in FILE, with a file name on each line")
    group = parser.group("optimization")
    add = group.add_argument
    add("--epochs", type=int, default=20, help="number of epochs")
    add("--steps", type=int, default=0, help="number of steps instead of epochs, with a cosine by step; 0: --epochs")
    add("--batch-size", type=int, default=256, help="global batch: images of a step over all processes")
    add("--lr", type=float, default=0.01, help="learning rate of the trunk for a batch of 256; scaled once by batch size / 256")
    add("--lr-head", type=float, default=0.2, help="learning rate of the classifier, scaled alike")
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--weight-decay", type=float, default=0.0, help="weight decay of SGD, of all weights")
    flags.add_lr_steps(group)
    group.set_defaults(lr_steps=[12, 16], lr_gamma=0.2)
    add("--eval-every", type=int, default=1, metavar="EPOCHS", help="validate after every Nth epoch, and after the last")
    flags.add_run_flags(
        parser, None, "folder of results; default: `finetune` in the run's folder, or finetune-FILE beside FILE"
    )
    args = parser.parse_args(argv)
    supervised.fill_in(args, "finetune")
    return args


def check(args: Namespace, train: Index, val: Index) -> None:
    """Raise ValueError for flags and data that cannot work."""
    supervised.check(args, train, val, specs(args))
    flags.positive(["--lr-head", "--eval-every"], args)
    flags.in_range("--steps", args.steps, 0, math.inf)
    if args.steps and args.lr_steps:
        raise ValueError(f"--steps {args.steps}: has a cosine by step; pass --lr-steps without a value")
    if args.nesterov and not args.momentum:
        raise ValueError("--nesterov: needs momentum; pass a --momentum above 0")


def specs(args: Namespace) -> list[ViewSpec]:
    """The views of a training image."""
    return [ViewSpec("train", args.size, (args.crop_min, 1.0))]


def total_steps(args: Namespace, steps: int) -> int:
    """The steps of the whole training. steps: of an epoch."""
    return args.steps or args.epochs * steps


def rates(args: Namespace, number: int, steps: int) -> list[float]:
    """The learning rates of trunk and head in step `number`, counted over all epochs. steps: of an epoch."""
    if args.steps:
        share = optim.cosine(1, number / args.steps)
    else:
        share = optim.lr_at(1, number // steps, args.epochs, drops=args.lr_steps, gamma=args.lr_gamma)
    return [share * optim.scaled_lr(lr, args.batch_size) for lr in (args.lr, args.lr_head)]


@lock.released()
def main(argv: list[str] | None = None) -> None:
    with flags.one_line_errors(PROG):
        args, source, device = session.start(PROG, METHODS, argv, get_args)
        train_index, val_index = session.load_splits(args, args.images)
        check(args, train_index, val_index)
        torch.manual_seed(args.seed)
        trunk = build_trunk(args, METHODS[args.method], source)
        if not list(trunk.parameters()):
            raise ValueError(f"--pretrained {args.pretrained}: has no weights to fine-tune; pass a checkpoint or `random`")
        trunk.choose(None, args.arch)
        fc = Classifiers(trunk.widths(args.size), len(train_index.classes or ()), args.seed)
        model = Tuned(trunk, fc, args.amp).to(device).to(memory_format=torch.channels_last)
        groups = [{"params": list(model.trunk.parameters())}, {"params": list(fc.parameters())}]
        settings = {"momentum": args.momentum, "weight_decay": args.weight_decay, "nesterov": args.nesterov}
        optimizer, scaler = optim.Sgd(groups, args.lr, **settings), amp.scaler(args.amp)

        def load(saved):
            model.load_state_dict(checkpoint.unprefixed(saved["state_dict"]))
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:  # empty unless the run is in fp16
                scaler.load_state_dict(saved["scaler"])

        steps, splits = steps_per_epoch(train_index.total, args.batch_size), (train_index, val_index)
        progress, identity = supervised.open_run(args, KEY, source, *splits, trunk.layers, device, load)
        if args.dry_run is not None:
            return say_workers(args, train_index, specs(args), steps)
    say(f"fine-tuning of {args.pretrained}: {source.facts}, {args.amp}")
    lr, lr_head = rates(args, 0, steps)
    say(f"{train_index.total} training and {val_index.total} validation images, {steps} steps per epoch, "
        f"{total_steps(args, steps)} in all, learning rates of this batch: trunk {lr:.4g}, head {lr_head:.4g}")  # fmt: skip
    with flags.one_line_ends(PROG, args.batch_size):
        stopped_by = train(args, train_index, val_index, model, optimizer, scaler, progress, identity, device)
    if not stopped_by:
        with flags.one_line_errors(PROG, (OSError,)):
            supervised.report(args, progress, {"images": train_index.total, "checkpoint_sha256": source.sha256})
        return dist.teardown()
    say(signals.stopped(stopped_by, args.resume))
    dist.teardown()
    sys.exit(signals.exit_code(stopped_by))


def train(args: Namespace, train_index: Index, val_index: Index, model: Tuned, optimizer: torch.optim.Optimizer,
          scaler: torch.amp.GradScaler, progress: dict, identity: dict, device: torch.device) -> int:  # fmt: skip
    """Train and update `progress`, until the end or a signal. Returns the signal, or 0."""
    steps = steps_per_epoch(train_index.total, args.batch_size)
    total, folder, start = total_steps(args, steps), Path(args.output_dir), (progress["epoch"], progress["step"])
    parallel = dist.data_parallel(model, device)
    epochs = range(start[0], -(-total // steps))
    plan = training_plan(train_index, args.batch_size, args.seed, epochs, first_step=start[1])
    batches = load_batches(train_index, specs(args), plan, args.seed, args.workers, device, args.photometric)
    bad = BadSamples(folder, train_index.total + val_index.total, args.max_bad)

    def content(epoch: int, step: int) -> dict[str, Any]:
        state = {"state_dict": checkpoint.prefixed(model), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return {"arch": args.arch, KEY: identity, **progress, "epoch": epoch, "step": step, **state}

    chance = math.log(len(train_index.classes or ()))
    with (
        Log(folder, start, steps, args.print_freq, args.batch_size, bad, chance, tracker=tracker.start(args, folder)) as log,
        Engine(args, steps, optimizer, scaler, log, device, content) as engine,
    ):
        for epoch in epochs:
            model.train()  # BatchNorm takes the statistics of the batch, as in the published recipes
            for step in log.epoch(epoch, start[1] if epoch == start[0] else 0):
                number = epoch * steps + step
                if number == total:  # --steps ends inside an epoch
                    log.flush()
                    break
                lrs = rates(args, number, steps)
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr
                Step(number, total, args.seed).seed_torch()
                with log.waiting():
                    batch = next(batches)
                (logits,) = parallel(batch.views[0]).values()
                loss = F.cross_entropy(logits, batch.labels)
                engine.backward(loss)
                stats = engine.update(loss, StepInputs(epoch, step))
                stats["top1"] = (logits.argmax(1) == batch.labels).float().mean() * 100
                log.add(step, loss, stats, lrs[0], batch.bad)
                if engine.done(epoch, step + 1):
                    return engine.stopped_by
            if (epoch + 1) % args.eval_every == 0 or epoch == epochs[-1]:
                dist.from_first_(list(model.buffers()))  # the running statistics, as torch's DDP does it at each step
                model.eval()
                result = evaluate(args, val_index, model, model.fc, device, bad, partial(engine.asked_to_stop, epoch))
                if result is None:
                    return engine.stopped_by
                (found,) = result.values()
                say(f"epoch {epoch}: validation top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
                log.scalars(epoch, {f"val_{name}": value for name, value in found.items()})
                supervised.note(progress, epoch, result)
            engine.save(epoch + 1, 0)
        engine.finish()
    return 0


if __name__ == "__main__":
    main()
