"""The samples of a run that cannot be used: written down, counted, and limited."""

import json
import os
from pathlib import Path

from utils import dist
from utils.flags import RunError

FILE = "bad_samples.jsonl"


class BadSamples:
    """Each unusable sample once: shard, key and error, in bad_samples.jsonl of the run's folder. Lives on every process.

    images: how many the run uses; max_bad: the share of them that may be unusable. What an earlier start of the run has met is
    not written again, and not counted: it may have been mended.
    """

    def __init__(self, folder: Path, images: int, max_bad: float):
        self.path, self.images, self.max_bad = folder / FILE, images, max_bad
        self.met: set[tuple[str, str]] = set()
        self.written = dist.first_process_does(lambda: {_identity(json.loads(line)) for line in _lines(self.path)})

    def add(self, records: list[dict[str, str]]) -> int:
        """What each process has met since the last call -> how many this start has met. Called by all processes together.

        Raises RunError, on every process, if there are too many.
        """
        records = {_identity(record): record for part in dist.gather_objects(records) for record in part}
        fresh = [record for identity, record in records.items() if identity not in self.written]
        self.met |= records.keys()
        self.written |= records.keys()
        if fresh and dist.rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in fresh)
        if len(self.met) > self.max_bad * self.images:
            raise RunError(f"--max-bad {self.max_bad}: {len(self.met)} of {self.images} images cannot be used, see "
                           f"{self.path}; mend the shards, or allow more")  # fmt: skip
        return len(self.met)


def _identity(record):
    return record["shard"], record["key"]


def _lines(path):
    """The lines of a file, which may not exist. A run that was killed may have left half a line, which is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return whole.splitlines()
