"""Does this Python satisfy a requirements file? Exit code 0, or 1 and one line that lists what is missing.

    python utils/run/requirements.py requirements.txt

Takes a tenth of a second: it reads the installed versions and imports none of the packages.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def unmet(path: Path) -> list[str]:
    """The requirements of a file (and of those it includes with -r) that this environment does not satisfy."""
    # installed with tensorboard: an environment without it lacks other packages too
    from packaging.requirements import Requirement

    missing = []
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            missing += unmet(path.parent / line.removeprefix("-r").strip())
        elif line:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate():
                continue
            found = installed(requirement.name)
            if not found:
                missing.append(str(requirement))
            elif not requirement.specifier.contains(found, prereleases=True):  # a nightly or +cpu build is fine
                missing.append(f"{requirement} (it has {found})")
    return missing


def installed(package: str) -> str | None:
    """The version of a package, or None if it is not installed, or only in part."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(path: str) -> str | None:
    """The missing packages, or None."""
    if Path(sys.prefix, "incomplete").exists():  # left by make_environment of utils/run/env.sh
        return "packages: its installation was interrupted"
    try:
        missing = unmet(Path(path))
    except ModuleNotFoundError:
        return f"the packages of {path}"
    return ", ".join(missing) or None


if __name__ == "__main__":
    if reason := main(sys.argv[1]):
        print(reason)
        sys.exit(1)
