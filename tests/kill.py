"""Send SIGKILL at random moments to a run of two processes: its result is equal to an unbroken run, to the last bit.

    python tests/kill.py --kills 30 --seed 0

Each time one of these dies: the whole group, torchrun's agent, one training process, one loader worker. Then all processes must
end, and the same command resumes. Prints a line for each kill, and fails with a traceback.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from runs import TWO, Run, children, metrics, pretrain, same, steps, without_clock
from shards_helpers import one_color, write_shards

SECONDS = 30  # after which all processes must have ended


def trial(folder: Path, kills: int, seed: int) -> Counter:
    """Kill a run `kills` times, and compare it with an unbroken one. Returns the number of kills of each kind of process."""
    write_shards(folder / "train", (20, 20), lambda number: one_color(number, (24, 24)))
    flags = ["--workers", "1", "--save-steps", "3", "--epochs", str(2 * kills)]
    rng, done, slowest = random.Random(seed), Counter[str](), 0.0
    broken, whole = (pretrain(folder, folder / name, *flags) for name in ("broken", "whole"))
    for number in range(kills):
        with Run(folder, broken, TWO) as run:
            wait(run, folder / "broken", rng)
            kind, taken = kill(run, rng)
            slowest = max(slowest, taken)
            done[kind] += 1
            place = steps(folder / "broken")[-1:]
            print(f"kill {number}: {kind}, after step {place or 'none'}, all gone in {taken:.1f} s", flush=True)
    for command in (broken, whole):
        with Run(folder, command, TWO) as run:
            assert run.end(600) == 0, run.said()
    compare(folder / "broken", folder / "whole")
    print(f"{dict(done)}: equal to the unbroken run; the slowest end took {slowest:.1f} s", flush=True)
    return done


def wait(run: Run, out: Path, rng: random.Random) -> None:
    """Wait a moment after the start, or for some more steps and a moment."""
    if rng.random() < 2 / 3:
        further = len(steps(out)) + rng.randrange(1, 8)
        run.until(lambda: len(steps(out)) >= further or run.process.exitcode is not None)
    time.sleep(rng.uniform(0, 0.5))


def kill(run: Run, rng: random.Random) -> tuple[str, float]:
    """Kill a process of a random kind. Returns the kind, and the seconds until no process is left."""
    os.kill(run.process.pid, signal.SIGSTOP)  # so that it starts no process while we look
    tree, trainers = children(), run.workers()
    kinds = {"group": run.pids(), "agent": [run.process.pid], "process": trainers}
    kinds["worker"] = [pid for trainer in trainers for pid in tree.get(trainer, [])]
    kind = rng.choice([kind for kind, pids in kinds.items() if pids])
    chosen = kinds[kind] if kind == "group" else [rng.choice(kinds[kind])]
    everyone, start = run.pids(), time.monotonic()
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    if kind not in ("group", "agent"):
        os.kill(run.process.pid, signal.SIGCONT)
    while left := [pid for pid in everyone if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < start + SECONDS, f"{kind}: {left} are left: {run.said()}"
        time.sleep(0.02)
    return kind, time.monotonic() - start


def compare(broken: Path, whole: Path) -> None:
    """Raise AssertionError unless weights, optimizer, position and metrics are equal."""
    a, b = (torch.load(folder / "checkpoint_latest.pth.tar", weights_only=True) for folder in (broken, whole))
    assert all(same(a[name], b[name]) for name in ("epoch", "step", "state_dict", "optimizer", "scaler"))
    assert without_clock(metrics(broken)) == without_clock(metrics(whole)) and not list(broken.glob(".*.tmp"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trial(Path(temporary), arguments.kills, arguments.seed)
