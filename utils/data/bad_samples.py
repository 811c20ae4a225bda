"""The samples of a run that cannot be used: written down, counted, and limited."""

import json
from pathlib import Path

from utils.run import dist
from utils.run.files import Lines, whole_lines
from utils.run.flags import RunError

FILE = "bad_samples.jsonl"


class BadSamples:
    """Each unusable sample once: shard, key and error, in bad_samples.jsonl of the run's folder. Lives on every process.

    images: how many the run uses; max_bad: the share of them that may be unusable. What an earlier start of the run has met is
    not written again, and not counted: it may have been mended.
    """

    def __init__(self, folder: Path, images: int, max_bad: float):
        self.path, self.images, self.max_bad = folder / FILE, images, max_bad
        self.lines = Lines(self.path)
        self.met: set[tuple[str, str]] = set()
        self.written = dist.first_process_does(lambda: {_identity(json.loads(line)) for line in whole_lines(self.path)})

    def add(self, records: list[dict[str, str]]) -> int:
        """What each process has met since the last call -> how many this start has met. Called by all processes together.

        Raises RunError, on every process, if there are too many.
        """
        records = {_identity(record): record for part in dist.gather_objects(records) for record in part}
        fresh = [record for identity, record in records.items() if identity not in self.written]
        self.met |= records.keys()
        self.written |= records.keys()
        if fresh and dist.rank() == 0:
            self.lines.put(*fresh)
        if len(self.met) > self.max_bad * self.images:
            raise RunError(f"--max-bad {self.max_bad}: {len(self.met)} of {self.images} images cannot be used, see "
                           f"{self.path}; mend the shards, or allow more")  # fmt: skip
        return len(self.met)


def _identity(record):
    return record["shard"], record["key"]
