"""The unusable samples of a run: a record of each, their number, and its limit."""

from pathlib import Path

from utils.run import dist
from utils.run.files import Lines, read_lines
from utils.run.flags import RunError

FILE = "bad_samples.jsonl"


class BadSamples:
    """Writes shard, key and error of each unusable sample once, to bad_samples.jsonl. Every process has one.

    images: the number of images that the run uses; max_bad: the share of them that may be unusable, in [0, 1]. Samples that an
    earlier start of the run has met are not written again, and not counted: they may have been fixed since.
    """

    def __init__(self, folder: Path, images: int, max_bad: float):
        self.path, self.images, self.max_bad = folder / FILE, images, max_bad
        self.lines = Lines(self.path)
        self.met: set[tuple[str, str]] = set()
        self.written = dist.first_process_does(lambda: set(map(_identity, read_lines(self.path))))

    def add(self, records: list[dict[str, str]]) -> int:
        """Add the records of all processes; all call it together. Returns the number of samples that this start has met.

        Raises RunError, on every process, if there are too many.
        """
        met = {_identity(record): record for part in dist.gather_objects(records) for record in part}
        fresh = [record for identity, record in met.items() if identity not in self.written]
        self.met |= met.keys()
        self.written |= met.keys()
        if fresh and dist.rank() == 0:
            self.lines.put(*fresh)
        if len(self.met) > self.max_bad * self.images:
            raise RunError(f"--max-bad {self.max_bad}: {len(self.met)} of {self.images} images cannot be used, see "
                           f"{self.path}; fix the shards, or raise --max-bad")  # fmt: skip
        return len(self.met)


def _identity(record):
    return str(record.get("shard")), str(record.get("key"))
