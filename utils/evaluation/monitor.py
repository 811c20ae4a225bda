"""kNN and measures of health of the live trunk during pre-training. They change nothing of the training.

The weights are copied into the frozen trunk that an evaluation of the checkpoint would build. So the training's modules, their
mode and their statistics stay as they are, and the result is that of the checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from utils.data.bad_samples import BadSamples
from utils.data.index import Index
from utils.data.views import ViewSpec, side_before_crop
from utils.evaluation import health, knn, neighbours, pictures
from utils.evaluation.features import features
from utils.evaluation.frozen import Live
from utils.evaluation.session import check_classes
from utils.learning.drawing import SHOWN
from utils.run import dist, flags
from utils.run.log import Log, harmless, say

K = (1, 20)
TEMPERATURE, MEMORY = 0.07, 2**28  # of kNN; bytes for similarities
GIVEN = ("eval_every", "eval_images", "eval_neighbours")


def add_flags(group: flags.Group) -> None:
    add = group.add_argument
    add("--eval-shards", metavar="DIR", help="held-out shards: measure the trunk on them during training")
    add("--eval-every", type=int, metavar="EPOCHS", help="epochs between two measurements; default: 1")
    add("--eval-images", type=int, help="largest number of images of --eval-shards that are measured; default: 5000")
    add("--eval-neighbours", type=int, help="number of training images among which neighbours are looked for; default: 20000")


def check(args: flags.Flags, train: Index, held_out: Index | None) -> None:
    """Fill in the defaults. Raises ValueError for flags and shards that cannot work."""
    for name, default in zip(GIVEN, (1, 5000, 20000), strict=True):
        if vars(args)[name] is None:
            setattr(args, name, default)
        elif not args.eval_shards:
            raise ValueError(f"{flags.typed(name, vars(args)[name])}: measures nothing without --eval-shards; pass that too")
    flags.positive([f"--{name.replace('_', '-')}" for name in GIVEN], args)
    if held_out and train.labelled and held_out.labelled:
        check_classes(("--shards", args.shards, train), ("--eval-shards", args.eval_shards, held_out))


def view_of(args: flags.Flags) -> ViewSpec:
    """The test view of main_knn.py, at the size of the training's views."""
    return ViewSpec("test", args.size, resize=side_before_crop(args.size), bicubic=True)


class Asked(Exception):
    """Ends a measurement on all processes, because the run was asked to stop."""


class Monitor:
    """Measures the trunk of a method on held-out images. All processes call it together.

    train: the images of the training, whose labels are those of the neighbours. Without labels in both there is no kNN.
    """

    def __init__(self, live: Live, train: Index, held_out: Index, device: torch.device):
        self.args, self.live, self.train, self.held_out, self.device = live.args, live, train, held_out, device
        self.folder = Path(live.args.output_dir)
        self.labelled = train.labelled and held_out.labelled
        self.start, self.spent = time.perf_counter(), 0.0

    def due(self, epoch: int) -> bool:
        return (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs

    def __call__(self, epoch: int, model: nn.Module, asked_to_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Values for Log.scalars, or None if `asked_to_stop`, called before each step, was true."""

        def ask():
            if asked_to_stop():
                raise Asked

        began = time.perf_counter()
        self.live.load(model)
        try:
            found = self.measure(ask)
        except Asked:
            return None
        seconds = time.perf_counter() - began
        self.spent += seconds
        share = self.spent / (time.perf_counter() - self.start)
        text = "  ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in found.items())
        say(f"epoch {epoch}: held-out {text or 'features are not finite'}  ({seconds:.1f} s, {share:.0%} of the time so far)")
        return found

    def measure(self, ask: Callable[[], None]) -> dict[str, float]:
        args, bad = self.args, BadSamples(self.folder, self.train.total + self.held_out.total, self.args.max_bad)
        view = view_of(args)
        keep = torch.device("cpu") if self.device.type == "mps" else self.device  # which has no float64

        def of(index, images):
            def extract(x):
                return self.live.features(x, "fp32")[self.live.layers[-1]]

            return features(args, index, view, extract, self.device, bad, ask, images=images, keep=keep)

        test = of(self.held_out, args.eval_images)
        self.draw_pca(self.held_out, neighbours.spread(test, SHOWN))
        found = health.measures(test.values)
        if self.labelled and found:
            train = of(self.train, args.eval_neighbours)
            knn.to_unit_length_(train, test, centre=False)
            ks = [k for k in K if k <= min(args.eval_neighbours, self.train.total)]
            near = knn.neighbours(train, test, ks[-1], MEMORY, ask)
            result = knn.accuracy(train, test, near, len(self.train.classes or ()), self.train.total, ks, TEMPERATURE)
            self.draw_neighbours(neighbours.rows_of(test, near[1], SHOWN))
            found = {f"knn{k}": result[k]["top1"] for k in ks} | found
        return {f"eval_{name}": value for name, value in found.items()}

    def draw_pca(self, index: Index, ids: list[int]) -> None:
        """pca.png of these images."""
        if dist.rank() == 0 and ids:
            with harmless("pca.png"), torch.no_grad():
                images = neighbours.images_of(self.args, view_of(self.args), index, ids)
                x = torch.stack([pixels for pixels, _ in images.values()])  # m x 3 x H x W
                pictures.write_pca(self.folder / "pca.png", x, self.live.maps_of(x.to(self.device)))

    def draw_neighbours(self, rows: list[neighbours.Row]) -> None:
        """neighbours.png of these test images."""
        if dist.rank() == 0 and rows:
            with harmless("neighbours.png"):
                path = self.folder / "neighbours.png"
                neighbours.write_picture(path, self.args, view_of(self.args), self.train, self.held_out, rows)

    def show(self, log: Log) -> None:
        """Show the pictures of the last measurement in TensorBoard."""
        for name in ("neighbours.png", "pca.png") if dist.rank() == 0 else ():
            with harmless(f"{name} for TensorBoard"):
                if (self.folder / name).exists():
                    log.picture(self.folder / name)
