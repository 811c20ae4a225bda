"""--tracker: the numbers and pictures of TensorBoard also go to wandb, trackio or mlflow, which users install themselves.

A thread sends them, so that training never waits for a server. An error ends the sending with a warning, and the run continues:
metrics.jsonl and TensorBoard have everything.
"""

import json
import os
import threading
import uuid
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from utils.run import dist
from utils.run.files import write_json
from utils.run.log import harmless, say
from utils.run.text import shown, shown_flags

PROJECT = "contrastive-pretraining"  # the tracker's own variables change it: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME
NAME = "tracker.json"  # tracker -> id of the tracked run, which a run that resumes continues
PATIENCE = 30  # seconds to wait for a server, at the start and at the end


class Wandb:
    """A run of wandb. Its steps are a number of their own, because wandb's must grow, also in a run that resumes."""

    def __init__(self, run: str | None, name: str, config: dict[str, Any], folder: Path):
        import wandb

        quiet = {"console": "off", "silent": True, "x_disable_meta": True}  # meta: the command line, with its passwords
        wandb.setup(wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE / 2, **quiet))  # silent: it asks for no login
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=run or uuid.uuid4().hex[:8], name=name,
                              resume="allow", config=config, allow_val_change=True, dir=folder)  # fmt: skip
        self.run.define_metric("*", step_metric="global_step")
        self.image, self.id, self.place = wandb.Image, self.run.id, self.run.dir if self.run.offline else self.run.url

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values | {"global_step": step})

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.image(str(path)), "global_step": step})

    def finish(self, failed: bool) -> None:
        self.run.finish(int(failed))


class Trackio:
    """A run of trackio, which knows runs by their names."""

    def __init__(self, run: str | None, name: str, config: dict[str, Any], folder: Path):
        import trackio

        self.id = run or f"{name}-{uuid.uuid4().hex[:8]}"
        self.run = trackio.init(PROJECT, name=self.id, resume="allow", config=config, embed=False)
        self.image, self.place = trackio.Image, f"trackio show --project {PROJECT}"

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.image(str(path))}, step)

    def finish(self, failed: bool) -> None:
        self.run.finish()


class Mlflow:
    """A run of mlflow. Its parameters cannot change, so they are those of the first start."""

    def __init__(self, run: str | None, name: str, config: dict[str, Any], folder: Path):
        import mlflow

        self.mlflow = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        self.id = mlflow.start_run(run, run_name=None if run else name).info.run_id
        if not run:
            mlflow.log_params(config)
        self.place = mlflow.get_tracking_uri()

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step)

    def picture(self, path: Path, step: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.mlflow.log_image(image, key=path.stem, step=step)

    def finish(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


Library = Wandb | Trackio | Mlflow
LIBRARIES: dict[str, type[Library]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def start(args: Namespace, folder: Path) -> "Tracker | None":
    """The tracker of --tracker, on the first process; None on the others, and without the flag."""
    return Tracker(args.tracker, folder, shown_flags(vars(args))) if args.tracker and dist.rank() == 0 else None


class Tracker:
    """Sends the numbers and pictures of a run to a tracked run, from a thread. folder: of the run. config: its flags."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        self.name, self.folder, self.config = name, folder, config
        self.jobs, self.ready = SimpleQueue[Callable[[Library], None] | None](), threading.Event()
        self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self.thread.start()
        self.ready.wait(PATIENCE)  # before the loader's workers fork: its imports are done then

    def numbers(self, values: dict[str, float], step: int) -> None:
        """step: over all epochs."""
        self._put(lambda library: library.numbers(values, step))

    def picture(self, path: Path, step: int) -> None:
        self._put(lambda library: library.picture(path, step))

    def close(self, failed: bool) -> None:
        """Send what is left, for at most PATIENCE seconds. failed: the run ends with an error."""
        self._put(lambda library: library.finish(failed))
        self._put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            say(f"warning: --tracker {self.name} has not sent everything in {PATIENCE} s; the rest is lost there")

    def _put(self, job):
        if self.thread.is_alive():
            self.jobs.put(job)

    def _work(self):
        with harmless(f"--tracker {self.name}: the tracked run"):
            library = self._open()
            self.ready.set()
            while job := self.jobs.get():
                job(library)
        self.ready.set()

    def _open(self):
        path = self.folder / NAME
        known = json.loads(path.read_text()) if path.exists() else {}
        name = "-".join(self.folder.resolve().parts[-2:])
        library: Library = LIBRARIES[self.name](known.get(self.name), name, self.config, self.folder)
        write_json(path, known | {self.name: library.id})
        say(f"--tracker {self.name}: {shown(library.place)}")
        return library
