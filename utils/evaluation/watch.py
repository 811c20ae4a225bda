"""Measures of a watched training step: of the live trunk's features, of views and weights, and of the processes."""

import time

import torch

from utils.data.batch import Batch
from utils.evaluation import health
from utils.evaluation.frozen import Live
from utils.learning import health as of_step
from utils.learning.method import Method, Stats
from utils.run import dist

IMAGES = 512  # of all processes, whose features are compared


class Watch:
    """Measures the trunk, as an evaluation would build it, on the images of a step. All processes call it together."""

    def __init__(self, live: Live):
        self.live, self.specs = live, live.method.views(live.args)

    @torch.no_grad()
    def __call__(self, model: Method, batch: Batch) -> Stats:
        """Scalars, equal on all processes but for the share of flat views.

        health_rankme: of the features of the step's images, at most `health_full_rankme`. health_weight_norm. health_flat_*:
        see `flat`. Of several processes: the one that computes these features slowest, and its time as a multiple of the
        median time of the others.
        """
        self.live.load(model)
        x = batch.views[0][: max(1, IMAGES // dist.world())]
        values, seconds = self.features(x)
        everyone = dist.gather(values)  # N x C
        keep = "cpu" if x.device.type == "mps" else x.device  # which has no float64
        wide = everyone.to(keep, torch.float64)
        found = {"health_weight_norm": of_step.weight_norm(model.parameters())}
        if wide.isfinite().all():  # fp16 may overflow
            products = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide  # of the same singular values
            found["health_rankme"] = values.new_tensor(health.rankme(products))
            found["health_full_rankme"] = values.new_tensor(float(min(wide.shape)))
        for spec, view in zip(self.specs, batch.views, strict=True):
            found[f"health_flat_{spec.name.replace(' ', '_')}"] = of_step.flat(view)
        if dist.world() > 1:
            times = dist.gather(values.new_tensor([seconds]))
            slowest = times.argmax()
            others = times[torch.arange(len(times), device=times.device) != slowest]
            found |= {"health_slowest": slowest.float(), "health_slowness": times[slowest] / others.median()}
        return found

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The features of n views, n x C, and the seconds that this took."""
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        values = self.live.features(x, self.live.args.amp)[self.live.layers[-1]]
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return values, time.perf_counter() - start
