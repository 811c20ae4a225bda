"""The image files below a folder. Everything else in it is counted and named."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.encoding import extensions, is_image
from utils.data.splits import DANGLING, Files, extension_of

# Folders that systems create: NAS, Windows, macOS, file systems. Hidden ones (.ipynb_checkpoints, .Trashes) are skipped too.
SYSTEM = {"@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "__macosx", "lost+found"}


@dataclass
class Listing:
    """The images of a folder, sorted by path, and the number of other things in it."""

    files: Files
    folders: set[str] = field(default_factory=set)  # directly below it
    skipped: Counter[str] = field(default_factory=Counter)  # system folders, hidden images, loops of links
    others: Counter[str] = field(default_factory=Counter)  # extension -> number of files

    def report(self) -> None:
        """Print one line about skipped folders and files, if there are any."""
        if self.skipped:
            print(f"{self.files.folder}: skipped {counts(self.skipped)}")


def counts(found: Counter[str]) -> str:
    """`name number` for each, the most frequent first."""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number}" for name, number in ordered[:10]) + (" ..." if len(ordered) > 10 else "")


def is_system_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def list_images(folder: Path) -> Listing:
    """List a folder and everything below it; links are followed, since a subset of ImageNet is often a folder of links.

    Raises ValueError for a folder or file that cannot be read: without it the numbers of the classes could change.
    """
    sizes: dict[str, int] = {}
    listing = Listing(Files(folder, [], []))

    def visit(at: str, chain: tuple[str, ...]) -> None:
        with os.scandir(folder / at) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = os.path.join(at, entry.name)
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if is_system_folder(entry.name):
                    listing.skipped[f"{entry.name}/"] += 1
                elif real in chain:
                    listing.skipped[f"link to a parent folder ({path})"] += 1
                else:
                    listing.folders |= set() if at else {entry.name}
                    visit(path, (*chain, real))
            else:
                add_file(path, entry)

    def add_file(path: str, entry: os.DirEntry) -> None:
        extension = extension_of(entry.name)
        dangling = entry.is_symlink() and not os.path.exists(entry.path)
        if entry.name.startswith("."):
            if extension in extensions():
                listing.skipped["AppleDouble files (._*)" if entry.name.startswith("._") else "hidden images"] += 1
        elif extension in extensions() or (not extension and entry.is_file() and is_image(entry.path)):
            sizes[path] = DANGLING if dangling else entry.stat().st_size
        elif dangling:  # perhaps a class folder
            raise FileNotFoundError(2, "a link to a missing file or folder", entry.path)
        else:
            listing.others[f".{extension}" if extension else "none"] += 1

    try:
        visit("", (os.path.realpath(folder),))
    except OSError as error:
        raise ValueError(f"-i {error.filename or folder}: cannot be read ({error.strerror}); fix or remove it") from None
    names = sorted(sizes)
    listing.files = Files(folder, names, [sizes[name] for name in names])
    return listing


def has_images(folder: Path) -> bool:
    """Whether there are images in a folder that is not converted. An unreadable folder counts as empty."""
    try:
        return bool(list_images(folder).files.names)
    except ValueError:
        return False
