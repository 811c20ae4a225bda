"""Does this Python satisfy a requirements file? Exit code 0, or 1 and one line that lists the missing packages.

    python utils/run/requirements.py requirements.txt

Takes a tenth of a second: it reads the installed versions and imports none of the packages.
"""

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def unmet(path: Path) -> list[str]:
    """The requirements of a file (and of those it includes with -r) that this environment does not satisfy."""
    # installed with tensorboard: an environment without it lacks other packages too
    from packaging.requirements import Requirement

    missing = []
    for line in path.read_text().splitlines():
        line, found = line.partition("#")[0].strip(), None
        if line.startswith("-r"):
            missing += unmet(path.parent / line.removeprefix("-r").strip())
        elif line and ((wanted := Requirement(line)).marker is None or wanted.marker.evaluate()):
            with suppress(PackageNotFoundError):
                found = version(wanted.name)  # None if it is installed only in part
            if not found or not wanted.specifier.contains(found, prereleases=True):  # a nightly or +cpu build is fine
                missing.append(f"{wanted} (it has {found})" if found else str(wanted))
    return missing


def main(path: str) -> str | None:
    """The missing packages, or None."""
    if Path(sys.prefix, "incomplete").exists():  # left by make_environment of utils/run/env.sh
        return "packages: its installation was interrupted"
    try:
        return ", ".join(unmet(Path(path))) or None
    except ModuleNotFoundError:
        return f"the packages of {path}"


if __name__ == "__main__" and (reason := main(sys.argv[1])):
    print(reason)
    sys.exit(1)
