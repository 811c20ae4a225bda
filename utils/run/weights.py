"""Weights by name, hf:// or URL: downloads into a cache, where a file is complete or absent.

python -m utils.run.weights                  the names of weights.json, their figures and links
python -m utils.run.weights NAME|URL ...     download these now, for example before a job without network
"""

import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from utils.run import dist
from utils.run.files import atomic
from utils.run.flags import one_line_errors
from utils.run.log import say
from utils.run.text import brief, shown

TABLE = Path(__file__).parents[2] / "weights.json"
CACHE = "WEIGHTS_CACHE"  # variable of the environment: the folder of the cache
HUB = "https://huggingface.co"
TRIES, WAIT, STALL = 5, 1.0, 60.0  # tries without a new byte; seconds before the first retry, then doubled; of silence
BLOCK = 1 << 18  # bytes of a read
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # faults of the cache's disk, not of the network


def table() -> dict[str, dict]:
    """name -> what, method, arch, top1 (in %, null if not published), protocol, source, link and sha256 (null if unknown)."""
    return json.loads(TABLE.read_text())


def is_elsewhere(spec: str) -> bool:
    """Whether it is a URL, or a name of the table and no local file."""
    return bool(re.match(r"(https?|hf)://", spec)) or (spec in table() and not Path(spec).exists())


def label(spec: str) -> str:
    """A name for the results of weights that are elsewhere: the name in the table, or that of the file without its ending."""
    return spec if spec in table() else Path(urllib.parse.urlsplit(spec).path).name.partition(".")[0] or "weights"


def fetch(spec: str, flag: str) -> Path:
    """The local file of weights that are elsewhere, downloaded once; other paths are returned as they are.

    A file with an unknown sha256 keeps that of its first download, and is compared with it from then on. Raises ValueError in
    one line that names the flag.
    """
    if not is_elsewhere(spec):
        if not Path(spec).exists() and (near := difflib.get_close_matches(spec, table(), 1, 0.7)):
            raise ValueError(f"{flag} {spec}: no such file or name; did you mean {near[0]}?")
        return Path(spec)
    entry, where = table().get(spec, {}), f"{flag} {shown(spec)}"
    url = _address(entry.get("link", spec), where)
    folder = Path(os.environ.get(CACHE) or "~/.cache/contrastive-weights").expanduser()
    name = Path(urllib.parse.urlsplit(url).path).name or "weights"
    path = folder / (f"{spec}.pth" if entry else f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path, where):
            if not path.exists():
                _download(url, path, entry.get("sha256"), where)
            found, record = _sha256(path), _record(path)
            if not record.exists():
                raise ValueError(f"{where}: {path} was put there without {record.name}; pass the path of a file of yours")
            if found != record.read_text().split()[0]:
                raise ValueError(f"{where}: {path} has changed since its download; delete it")
    except OSError as error:
        raise ValueError(f"{where}: {folder}: {error.strerror or error}; set {CACHE} to another folder") from None
    return path


def _address(link, where):
    """The URL of the file itself. Raises ValueError for a folder."""
    if link.startswith("hf://"):
        found = re.fullmatch(r"hf://([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", link)
        if not found:
            raise ValueError(f"{where}: names no file; pass hf://ORGANIZATION/REPOSITORY/FILE")
        return f"{HUB}/{found[1]}/resolve/{found[2] or 'main'}/{found[3]}"
    parts = urllib.parse.urlsplit(link)
    if re.search(r"(^|\.)dropbox\.com$", parts.hostname or ""):
        if re.match(r"/(sh|scl/fo)/", parts.path):
            raise ValueError(f"{where}: is a folder of several files; download one from {link} and pass its path")
        query = dict(urllib.parse.parse_qsl(parts.query)) | {"dl": "1"}
        return parts._replace(query=urllib.parse.urlencode(query)).geturl()
    return link


def _record(path):
    return path.with_name(f"{path.name}.sha256")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path, where: str) -> Iterator[None]:
    """One process at a time downloads a file. A waiting one ends if the other makes no progress. The system frees the lock."""
    part, said, size, since = _part(path), False, -1, time.monotonic()
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = part.stat().st_size if part.exists() else 0
                size, since = (now, time.monotonic()) if now != size else (size, since)
                if time.monotonic() - since > 4 * STALL:
                    raise ValueError(f"{where}: another process has {path} locked and makes no progress; end it") from None
                if not said:
                    say(f"{path}: another process downloads it; waiting")
                said = True
                dist.alive()
                time.sleep(0.2)
        yield


def _part(path):
    return path.with_name(f".{path.name}.part")


def _download(url, path, expected, where):
    """Download to another name, where an interrupted download keeps its bytes; check it, record its sha256, rename it."""
    part = _part(path)
    try:
        (_from_drive if "//drive.google.com/" in url else _with_retries)(url, part, where)
    except OSError as error:
        if error.errno in LOCAL:
            part.unlink(missing_ok=True)  # the room is needed
        raise
    with open(part, "rb+") as file:
        page = file.read(512).lstrip()[:5].lower() in (b"<!doc", b"<html")
        os.fsync(file.fileno())
    found, record = _sha256(part), _record(path)
    wanted = expected or (record.read_text().split()[0] if record.exists() else found)
    if page or found != wanted:
        part.unlink()
        got = "a web page and no file" if page else f"a file with sha256 {found}, not {wanted}"
        raise ValueError(f"{where}: its server gives {got}; nothing was kept")
    with atomic(record) as file:
        file.write(f"{found}  {path.name}\n".encode())
    os.replace(part, path)
    _tag(part).unlink(missing_ok=True)
    known = "" if expected else " (recorded; none is published)"
    say(f"{path}: downloaded {path.stat().st_size / 1e6:.1f} MB, sha256 {found}{known}")


def _from_drive(url, part, where):
    try:
        import gdown  # optional
    except ModuleNotFoundError:
        raise ValueError(f"{where}: is on Google Drive; run pip install gdown, or download {url} and pass its path") from None
    number = re.search(r"/d/([\w-]+)|[?&]id=([\w-]+)", url)
    try:
        gdown.download(id=number and (number[1] or number[2]), output=str(part), quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:  # of gdown and requests, which have no common class
        if isinstance(error, OSError) and error.errno in LOCAL:
            raise
        raise ValueError(f"{where}: {brief(str(error), 200)}; download {url} and pass its path") from None
    if not part.exists():
        raise ValueError(f"{where}: gdown gave no file; download {url} and pass its path")


def _with_retries(url, part, where):
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _copy(url, part)
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code}"
            if error.code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            elif 400 <= error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{where}: {reason}; the file may be private or have another address") from None
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in LOCAL:
                raise
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = brief(str(cause) or type(cause).__name__)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ValueError(f"{where}: {reason}") from None
        failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
        if failures == TRIES:
            raise ValueError(f"{where}: cannot be downloaded ({reason}); the same command continues the download")
        time.sleep(WAIT * 2 ** (failures - 1))


def _tag(part):
    """The file with the server's own mark of the version that a part belongs to."""
    return part.with_name(f"{part.name}.tag")


def _copy(url, part):
    """Append the missing bytes of a file, or all of it if the server has another version now. Raises OSError if it is cut."""
    tag, headers = _tag(part), {"User-Agent": "contrastive-weights", "Accept-Encoding": "identity"}
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status == 206 and not resumed:
            tag.unlink(missing_ok=True)
            raise ConnectionError("the server gives other bytes than the missing ones")
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        with suppress(FileNotFoundError):
            tag.unlink()
        if version and not version.startswith("W/"):
            tag.write_text(version)
        from tqdm import tqdm  # here, because torch.hub imports this module without it

        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name[1:-5], leave=False, disable=None)
        with bar, open(part, "ab" if resumed else "wb") as file:
            while data := answer.read(BLOCK):
                dist.alive()
                file.write(data)
                bar.update(len(data))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"it ends after {part.stat().st_size} of {total} bytes")


def main(specs: list[str]) -> None:
    """List the table, or download."""
    for spec in specs:
        print(fetch(spec, "download"))
    for name, entry in {} if specs else table().items():
        top1 = f"top-1 {entry['top1']} %" if entry["top1"] else "no figure"
        print(f"{name}\n    {entry['what']}: {top1}, {entry['protocol']}\n    {entry['link']}")


if __name__ == "__main__":
    with one_line_errors("utils.run.weights"):
        main(sys.argv[1:])
