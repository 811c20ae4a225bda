"""The warnings that this process has printed, until the report of the run takes them."""

GIVEN: list[str] = []


def warn(text: str) -> None:
    """Print a warning, and keep it for the report. For the first process, and for modules that do not import log.py."""
    GIVEN.append(text)
    print(f"warning: {text}", flush=True)
