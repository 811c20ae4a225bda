"""One page about a run: report.html in its folder. Side by side: several runs.

    python -m utils.run.report RUN                             write RUN/report.html again
    python -m utils.run.report RUN RUN ... -o compare.html     the runs side by side

The page is one file and loads nothing from a network. It reads the folder of the run only, and changes nothing in it.
"""

import base64
import hashlib
import io
import json
import signal
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from utils.run import curves, dist, warned
from utils.run.files import Lines, atomic, write_json
from utils.run.flags import Parser, one_line_errors
from utils.run.history import STATE, WARNINGS, Run
from utils.run.log import harmless

NAME = "report.html"
PARTS = Path(__file__).parent / "page"
LARGEST = 400_000  # bytes of a picture that is embedded as it is; a larger one becomes a JPEG
CAPTIONS = {
    "views": "What the networks see of the first images",
    "neighbours": "Held-out images with their nearest training images; red: another class",
    "pca": "Images, and the first three principal components of their feature maps as colours",
    "curves": "Curves",
}
SAID = 50  # newest warnings of the page


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="utils.run.report", description=__doc__, usage="python -m %(prog)s RUN [RUN ...] [-o FILE]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"file to write; default for one run: {NAME} in its folder")
    args = parser.parse_args(argv)
    with one_line_errors("utils.run.report"):
        folders = [Path(run) for run in args.runs]
        for folder in folders:
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder}: has no config.json; pass the folder of a run")
        if len(folders) > 1 and not args.output:
            raise ValueError(f"{len(folders)} runs: pass -o compare.html, the file to write")
        path = Path(args.output) if args.output else folders[0] / NAME
        _put(path, page(folders[0]) if len(folders) == 1 else comparison(folders))
    print(path)


def renew(folder: Path, stopped_by: int | None = None) -> None:
    """Write report.html of a run, and note its state. An error ends no run.

    stopped_by: None while it is running, 0 at its end, or the number of the signal that has stopped it.
    """
    if dist.rank() == 0:
        stopped = f"stopped by {signal.Signals(stopped_by).name}" if stopped_by else "finished"
        state = "running" if stopped_by is None else stopped
        with harmless(NAME):
            _write(folder, state)


def _write(folder, state):
    write_json(folder / STATE, {"state": state, "time": _now().isoformat(timespec="seconds")})
    given, warned.GIVEN[:] = list(warned.GIVEN), []
    if given:
        Lines(folder / WARNINGS).put(*({"time": _now().isoformat(timespec="seconds"), "text": text} for text in given))
    _put(folder / NAME, page(folder))


def _put(path, text):
    with atomic(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _now():
    return datetime.now(UTC)


def page(folder: Path) -> str:
    """The HTML about a run."""
    run = Run(folder)
    published = {name: value for name, value in run.config.get("published", {}).items() if name != "method"}
    recipe = [[name, value, published.get(name, "")] for name, value in sorted(run.flags.items())]
    other, same = ([row for row in recipe if (row[0] in published) == wanted] for wanted in (True, False))
    title = f"{run.flags.get('method', 'run')} {run.flags.get('arch', '')}: {folder.resolve().name}"
    health = "".join(_verdict(verdict) for verdict in run.verdicts)
    said = list(dict.fromkeys(str(warning.get("text")) for warning in run.warnings))  # a run that resumes repeats some
    warnings = "".join(f"<li>{_text(text)}</li>" for text in said[-SAID:])
    share = min(1.0, run.at / run.epochs) if run.epochs else 0
    parts = [
        f"<div class=card>{_pairs(run.facts())}<progress max=1 value={share:.4f}></progress></div>",
        _section("Health", f"<ul>{health}</ul>" if health else "<p class=good>No verdict was given.</p>"),
        _section("Results", _table([[name, f"{value:.4g}"] for name, value in run.results().items()])),
        _charts(run.charts),
        *(_pictures(folder)),
        _section("Recipe", "<p class=soft>These flags differ from the published recipe, the defaults of the method.</p>"
                 + _table(other, ["flag", "this run", "published"], "other") if other else "", ),
        _section("", f"<details><summary>All other flags</summary>{_table([row[:2] for row in same])}</details>"),
        _section("Speed", _pairs(run.speed())),
        _section("Data and versions", _pairs(run.data())),
        _section("Warnings", f"<ul>{warnings}</ul>" if warnings else ""),
        _section("Starts", _table([[s.get(n) for n in ("time", "epoch", "step", "resumed")] for s in run.starts],
                                  ["time", "epoch", "step", "resumed from"])),
    ]  # fmt: skip
    return _document(title, parts, run.charts)


def _verdict(found):
    place = ", ".join(f"{name} {found[name]}" for name in ("epoch", "step") if name in found)
    kind = "soft" if found.get("kind") == "note" else "bad"
    return f"<li><span class={kind}>{_text(found.get('text'))}</span> <span class=soft>{_text(place)}</span></li>"


def comparison(folders: Sequence[Path]) -> str:
    """The HTML about several runs: flags that differ, results, curves over each other, pictures."""
    runs, names = [Run(folder) for folder in folders], _short([str(folder) for folder in folders])
    keys = sorted({key for run in runs for key in run.flags})
    rows = [[key, *(run.flags.get(key, "") for run in runs)] for key in keys]
    differ = [row for row in rows if any(value != row[1] for value in row[1:])]
    same = [row[:2] for row in rows if row not in differ]
    facts = [{"verdicts": "; ".join(str(v.get("name")) for v in run.verdicts), **run.facts(),
              **{name: f"{value:.4g}" for name, value in run.results().items()}} for run in runs]  # fmt: skip
    labels = list(dict.fromkeys(label for found in facts for label in found))
    joined: dict[str, curves.Chart] = {}
    for name, run in zip(names, runs, strict=True):
        for chart in run.charts:
            own = {curve: points for curve, points in chart.series.items() if curves.FULL not in curve}
            full = [points[1][-1] for curve, points in chart.series.items() if curve not in own]  # references
            for curve, points in own.items():
                title = chart.title if len(own) == 1 else f"{chart.title}: {curve}"
                both = joined.setdefault(curve, curves.Chart(title))
                both.series[name] = points
                both.references |= curves.labelled([run.config.get("references", {}).get(curve), *full])
    pictures = [part for name, folder in zip(names, folders, strict=True) for part in _pictures(folder, name)]
    head = ["", *names]
    parts = [
        _section("Flags that differ", _table(differ, head)),
        _section("State and results", _table([[label, *(found.get(label, "") for found in facts)] for label in labels], head)),
        _charts(list(joined.values())),
        *pictures,
        _section("", f"<details><summary>Flags that are equal</summary>{_table(same)}</details>"),
    ]
    return _document(f"{len(runs)} runs", parts, list(joined.values()))


def _short(names):
    """The names without the folders that all of them share."""
    paths = [Path(name).parts for name in names]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    short = [str(Path(*path[common:])) for path in paths]
    return short if len(set(short)) == len(short) else [f"{i} {name}" for i, name in enumerate(short, 1)]


def _text(value: Any) -> str:
    return escape("" if value is None else str(value))


def _section(title, content):
    return (f"<h2>{_text(title)}</h2>" if title else "") + f"<div class=card>{content}</div>" if content else ""


def _pairs(found):
    return _table([[name, value] for name, value in found.items() if value not in (None, "")])


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), kind: str = "") -> str:
    lines = [f"<tr class={kind or 'row'}>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    top = f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f"<div class=wide><table>{top}{''.join(lines)}</table></div>" if lines else ""


def _charts(charts):
    if not charts:
        return ""
    ends = "".join(f"<label>{name} <input type=range min=0 max=1000 value={value}></label>"
                   for name, value in (("from", 0), ("to", 1000)))  # fmt: skip
    note = "<span class=soft>drag in a chart to zoom, double click to see all; shaded: least and largest value</span>"
    cards = [f"<div class=card><h3>{_text(c.title)}</h3><div data-chart={i}></div></div>" for i, c in enumerate(charts)]
    return f"<h2>Curves</h2><div class=zoom>{ends}{note}</div><div class=grid>{''.join(cards)}</div>"


def _pictures(folder, name=""):
    """A section for each picture of the folder. curves.png is left out: the page has the curves."""
    for path in sorted(folder.glob("*.png"), key=lambda p: (list(CAPTIONS).index(p.stem) if p.stem in CAPTIONS else 9, p.stem)):
        if path.stem != "curves":
            caption = CAPTIONS.get(path.stem, path.stem) + (f": {name}" if name else "")
            yield _section(caption, f'<img alt="{_text(caption)}" src="{_embedded(path)}">')


def _embedded(path):
    """A data URL."""
    content, kind = path.read_bytes(), "png"
    if len(content) > LARGEST:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(smaller := io.BytesIO(), "JPEG", quality=85)
        content, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _document(title, parts, charts):
    points = [_points(chart) for chart in charts]
    data = {"charts": points, "last": max([chart["x"][-1] for chart in points], default=0)}
    scripts = [(PARTS / name).read_text() for name in ("uPlot.iife.min.js", "page.js")]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no text ends the element
    return "".join([
        f"<!DOCTYPE html><!-- The curves are drawn by uPlot.\n{(PARTS / 'uPlot.LICENSE').read_text()}--><html lang=en><head>",
        "<meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">',
        '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">',
        f"<title>{_text(title)}</title>",
        f"<style>{(PARTS / 'uPlot.min.css').read_text()}</style><style>{(PARTS / 'page.css').read_text()}</style></head><body>",
        f"<h1>{_text(title)}</h1><p class=soft>written {_now():%Y-%m-%d %H:%M} UTC</p>",
        *parts,
        f"<script type=application/json id=data>{content}</script>",
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ])  # fmt: skip


def _points(chart):
    x, found = curves.thinned(chart)
    rows = [{"name": name, "dashed": curves.FULL in name, "rows": r if r[1] != r[2] else r[:1]} for name, r in found.items()]
    return {"x": x, "curves": rows, "references": list(chart.references.items())}


if __name__ == "__main__":
    main()
