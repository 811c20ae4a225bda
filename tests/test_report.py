"""report.html and the pictures: what they show, that strangers' text stays text, and that a run stays as it is."""

import copy
import html
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import build, method_args, tiny, uint8_batch
from PIL import Image
from runs import FLAGS, metrics, same, without_clock

import main_pretrain
import pictures as entry
from methods import METHODS
from utils.evaluation import pictures
from utils.learning.drawing import SHOWN, SIDE
from utils.learning.method import Step
from utils.run import checkpoint, curves, report, warned
from utils.run.history import Run

WRITE_CURVES, WRITE_OWN_PCA = pictures.write_curves, pictures.write_own_pca  # conftest.py replaces them
BAD = "<script>document.title = 'changed'</script>\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run_of(folder, epochs=3, steps=20, every=1, **changed):
    """A folder as a run of MosRep leaves it, with hostile text in every place for text."""
    folder.mkdir(parents=True)
    flags = {"method": "mosrep", "arch": "resnet18", "epochs": epochs, "batch_size": 8, "shards": BAD, "lr": 0.03, BAD: BAD}
    config = {"flags": flags | changed, "samples": 8 * steps, "index": BAD, "versions": {"torch": BAD}, "published": {BAD: BAD},
              "hardware": {"processor": BAD}, "references": {"loss": 9.7}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "state.json").write_text(json.dumps({"state": "running", "time": "2026-01-01T01:00:00+00:00"}))
    start = {"time": "2026-01-01T00:00:00+00:00", "epoch": 0, "step": 0, "resumed": BAD}
    (folder / "starts.jsonl").write_text(json.dumps(start))
    (folder / "verdicts.jsonl").write_text(json.dumps({"epoch": 0, "step": 1, "name": BAD, "text": f"all is grey {BAD}"}))
    (folder / "warnings.jsonl").write_text(json.dumps({"text": f"take care {BAD}"}) + "\n")
    (folder / "knn").mkdir()
    (folder / "knn/result.json").write_text(json.dumps({"knn": {BAD: {"top1": 71.25}}, "protocol": {"top1": 1}}))
    Image.new("RGB", (300, 200), "red").save(folder / "views.png")
    lines = []
    for epoch in range(epochs):
        for step in range(every - 1, steps, every):
            t = epoch + step / steps
            values = {"loss": 9 + math.sin(9 * t), "top1": t, BAD: t, "bad": 0}
            lines.append({"epoch": epoch, "step": step, "steps": every, **values})
        lines.append({"epoch": epoch, "eval_spread": 0.1, "eval_full_spread": 0.2, "eval_knn1": 50.0 + epoch})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def visible(page):
    return re.sub("<script.*?</script>|<style.*?</style>", "", page, flags=re.S)


def test_report__shows_the_run_and_strangers_text_as_text(tmp_path):
    page = report.page(run_of(tmp_path / BAD.replace("/", "")))
    seen = visible(page)
    assert "<script>document" not in page and "document.title = " in html.unescape(seen)
    for word in ("all is grey", "take care", "71.25", "running on", "data:image/png;base64", "published"):
        assert word in seen, word
    assert "3 of 3" in seen and "about 0 min" in seen
    assert not re.search("(src|href)=.?(http|//)", page)
    titles = [html.unescape(title) for title in re.findall("<h3>(.*?)</h3>", seen)]
    assert titles[:3] == ["Loss", "Top-1 of the training's own task, %", "kNN on held-out images, %"]
    assert "Unusable images" not in titles  # while there are none
    data = json.loads(re.search("id=data>(.*?)</script>", page, re.S)[1])
    assert data["charts"][0]["references"] == [["reference 9.7", 9.7]]
    assert [curve["dashed"] for curve in data["charts"][3]["curves"]] == [True, False]


def test_report__time_left_is_that_at_the_speed_since_the_start(tmp_path):
    folder = run_of(tmp_path / "run", epochs=3)
    config = json.loads((folder / "config.json").read_text())
    config["flags"]["epochs"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    assert Run(folder).left() == "about 20 min"  # 3 epochs took an hour


def test_report__names_the_state_and_each_verdict_once(tmp_path):
    folder = run_of(tmp_path / "run")
    warned.GIVEN[:] = ["a new warning", f"all is grey {BAD}"]  # the second one is the verdict, which is printed too
    for stopped_by, state in ((None, "running on"), (15, "stopped by SIGTERM"), (0, "finished")):
        report.renew(folder, stopped_by)
        seen = visible((folder / "report.html").read_text())
        assert f"<td>{state}" in seen and seen.count("a new warning") == 1 and seen.count("all is grey") == 1


def test_report__of_many_runs_begins_with_the_flags_that_differ(tmp_path, capsys):
    runs = [run_of(tmp_path / name, lr=lr) for name, lr in (("a", 0.03), ("b", 0.06))]
    report.main([*map(str, runs), "-o", str(tmp_path / "compare.html")])
    page = (tmp_path / "compare.html").read_text()
    first = page[page.index("<h2>") :].partition("</table>")[0]
    assert re.findall("<td>(.*?)</td>", first) == ["lr", "0.03", "0.06"] and "<script>document" not in page
    data = json.loads(re.search("id=data>(.*?)</script>", page, re.S)[1])
    assert [curve["name"] for curve in data["charts"][0]["curves"]] == ["a", "b"]
    titles = [html.unescape(title) for title in re.findall("<h3>(.*?)</h3>", page)]
    lines = {title: chart["references"] for title, chart in zip(titles, data["charts"], strict=True)}
    assert lines["Loss"] == [["reference 9.7", 9.7]] and lines["Spread of held-out features"] == [["reference 0.2", 0.2]]
    with pytest.raises(SystemExit, match="2"):
        report.main([*map(str, runs)])
    assert "pass -o compare.html" in capsys.readouterr().err


@pytest.mark.parametrize("points", [5, 800, 5000])
def test_thinned__is_mean_least_and_largest_of_each_column(points):
    rng = np.random.default_rng(points)
    x, y = np.sort(rng.random(points) * 7), rng.normal(size=points)
    places, found = curves.thinned(curves.Chart("", {"a": (x, y)}), columns=50)
    wanted = {}
    for at, value in zip(x, y, strict=True):
        column = at if points <= 50 else min(49, int((at - x[0]) / ((x[-1] - x[0]) / 50)))
        wanted.setdefault(column, []).append((at, value))
    assert len(places) == len(wanted) <= 50
    for i, cell in enumerate(wanted.values()):
        values = [value for _, value in cell]
        assert places[i] == pytest.approx(np.mean([at for at, _ in cell]), rel=1e-5)
        expected = [np.mean(values), min(values), max(values)]
        assert [row[i] for row in found["a"]] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_report__of_a_long_run_is_small_and_written_soon(tmp_path):
    """200 epochs of 5,000 steps, with the default --print-freq 50."""
    folder = run_of(tmp_path / "run", epochs=200, steps=5000, every=50)
    start = time.process_time()
    report.renew(folder)
    assert time.process_time() - start < 4
    assert (folder / "report.html").stat().st_size < 8e6


def test_read_lines__of_a_run_that_is_being_written(tmp_path):
    """A line that is not whole is left out, and stays in the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert curves.read_lines(path) == [{"epoch": 0}, {"epoch": 1}] and path.read_bytes().endswith(b"epo")


@pytest.mark.parametrize("method", METHODS)
def test_pictures__show_what_the_networks_see(method):
    args = method_args(method)
    torch.manual_seed(0)
    model, batch = build(method), uint8_batch(args)
    with torch.no_grad():
        targets = model.targets(batch, Step(0, 10, 0))
    before = copy.deepcopy((model.state_dict(), batch.views)), repr(targets), torch.get_rng_state()
    rows = model.pictures(batch, targets)
    assert same(before[0], (model.state_dict(), batch.views)) and before[1] == repr(targets)
    assert torch.equal(before[2], torch.get_rng_state())
    specs = METHODS[method].views(args)
    assert len(rows) >= sum(spec.count for spec in specs)
    assert all(x.dtype == torch.uint8 and x.shape[1] == 3 and len(x) <= SHOWN for _, x in rows)
    assert torch.equal(rows[0][1], batch.views[0][:SHOWN])
    titles = " ".join(title for title, _ in rows)
    if method == "mosrep":
        assert torch.equal(rows[5][1], batch.views[2][:, 3]) and "mosaics" in titles
        drawn = rows[-1][1]
        yellow = (drawn == torch.tensor([255, 255, 0], dtype=torch.uint8).view(3, 1, 1)).all(1).flatten(1).sum(1)
        assert (yellow > drawn.shape[-1]).all()
    if method == "w2ssl":
        montage, sides = rows[-1][1][0], targets.side[:4].tolist()
        quarter = montage.shape[-1] // 2
        edges = [montage[:, y + 1, x + quarter // 2].tolist() for y in (0, quarter) for x in (0, quarter)]
        assert edges == [[255, 0, 0] if side else [0, 0, 255] for side in sides]
    if method == "cmc":
        assert "view L" in titles and titles.count("view ab, channel") == 2
        light = targets.views[0][0, 0]
        assert torch.equal(rows[1][1][0, 0], (128 + 60 * light).round().clamp(0, 255).to(torch.uint8))


def test_pictures__of_mixtures():
    args = method_args("moco", "--im-type", "IM", "--unmix-prob", "0.5")
    model, batch = build("moco", "--im-type", "IM", "--unmix-prob", "0.5"), uint8_batch(args)
    with torch.no_grad():
        titles = [title for title, _ in model.pictures(batch, model.targets(batch, Step(0, 10, 0)))]
    assert titles[:3] == ["query", "key", "query, mixed"] and titles[3].startswith("Un-Mix, 0.")


def test_colours__are_the_first_three_principal_components():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 6, 3, 5)) * np.array([9, 5, 3, 0.1, 0.1, 0.1]).reshape(1, 6, 1, 1)
    found = pictures.colours(torch.tensor(maps))
    assert found.shape == (4, 3, 3, 5) and found.dtype == torch.uint8
    flat = maps.transpose(0, 2, 3, 1).reshape(-1, 6)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    for part in range(3):
        wanted = (flat - flat.mean(0)) @ vectors[:, -1 - part]
        shown = found[:, part].flatten().double().numpy()
        assert abs(np.corrcoef(wanted, shown)[0, 1]) > 0.9999 and shown.min() == 0 and shown.max() == 255


def trained(images, out, method, *flags):
    argv = [*tiny(method), *FLAGS, "--epochs", "1", "--shards", f"{images}/train", "--output-dir", str(out), *flags]
    main_pretrain.main(argv)
    return torch.load(out / checkpoint.LATEST, weights_only=True), without_clock(metrics(out))


@pytest.mark.parametrize("method, held_out", [("mosrep", True), ("cmc", True), ("mosrep", False), ("cmc", False)])
def test_main_pretrain__with_pictures_is_the_run_without_them(images, tmp_path, monkeypatch, method, held_out):
    monkeypatch.setattr(pictures, "write_own_pca", WRITE_OWN_PCA)
    shards = ["--eval-shards", f"{images}/val"] if held_out else []
    saved, lines = trained(images, tmp_path / "run", method, *shards)
    names = {"views.png", "pca.png", "report.html", *(["neighbours.png"] if held_out else [])}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    with Image.open(tmp_path / "run/views.png") as views:
        assert views.width >= SHOWN * SIDE
    assert "finished" in visible((tmp_path / "run/report.html").read_text())
    for module, name in ((pictures, "write_views"), (pictures, "write_pca"), (report, "renew")):
        monkeypatch.setattr(module, name, lambda *_: None)
    alone, plain = trained(images, tmp_path / "plain", method, *shards)
    assert lines == plain and all(same(saved[name], alone[name]) for name in ("state_dict", "optimizer"))


def test_main_pretrain__a_report_that_cannot_be_written_stops_no_run(images, tmp_path, monkeypatch, capsys):
    """Without matplotlib, and on a disk that takes no picture and no page."""

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pictures, "write_curves", WRITE_CURVES)
    monkeypatch.setattr(pictures, "atomic", full)
    monkeypatch.setattr(report, "atomic", full)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trained(images, tmp_path, "moco")
    said = capsys.readouterr().out
    for name in ("views.png", "curves.png", "report.html"):
        assert f"warning: {name} is not written (" in said, name
    assert "No space left" in said and "matplotlib" in said


def test_write_curves__draws_each_chart_also_for_tensorboard(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "write_curves", WRITE_CURVES)
    trained(images, tmp_path, "moco", "--eval-shards", f"{images}/val")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width >= 1000 and len(image.convert("L").getcolors()) > 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert {"views", "neighbours", "pca", "curves"} <= set(events.Tags()["images"])


def test_pictures__are_drawn_again_from_a_run(images, tmp_path, monkeypatch):
    """Those of the features are the same, byte for byte."""
    monkeypatch.setattr(pictures, "write_curves", WRITE_CURVES)
    trained(images, tmp_path / "run", "mosrep", "--eval-shards", f"{images}/val")
    names = ("views", "neighbours", "pca", "curves")
    drawn = {name: (tmp_path / f"run/{name}.png").read_bytes() for name in names}
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in names:
        (tmp_path / f"moved/{name}.png").unlink()
    entry.main([str(tmp_path / "moved"), "--workers", "0"])
    again = {name: (tmp_path / f"moved/{name}.png").read_bytes() for name in names}
    assert all(again[name] == drawn[name] for name in ("neighbours", "pca", "curves"))


def test_pictures__of_a_run_without_held_out_images(images, tmp_path, monkeypatch):
    """The first row of pca.png is that of views.png: the first images of the training."""
    monkeypatch.setattr(pictures, "write_own_pca", WRITE_OWN_PCA)
    trained(images, tmp_path, "moco")
    height = SIDE + pictures.TEXT
    for again in (False, True):
        rows = [np.array(Image.open(tmp_path / name).convert("RGB"))[:height] for name in ("views.png", "pca.png")]
        left = pictures.TEXT + pictures.GAP
        assert np.array_equal(rows[0][left:], rows[1][left:]) and rows[0].std() > 9
        if not again:
            for name in ("views.png", "pca.png"):
                (tmp_path / name).unlink()
            entry.main([str(tmp_path), "--workers", "0"])


def test_pictures__of_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        entry.main([str(tmp_path)])
    assert f"pictures.py: error: {tmp_path}: has no checkpoint" in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_report__in_a_browser(tmp_path, width, dark):
    """No error on its console; a canvas for each chart; the hostile text has not run."""
    folder = run_of(tmp_path / "run", epochs=200, steps=500, every=50)
    report.renew(folder)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path}/profile", *(["--force-dark-mode"] if dark else [])]  # fmt: skip
    shown = subprocess.run([CHROMIUM, *flags, "--virtual-time-budget=2000", "--dump-dom", f"file://{folder}/report.html"],
                           capture_output=True, text=True, timeout=120)  # fmt: skip
    assert shown.returncode == 0 and "CONSOLE" not in shown.stderr
    charts = json.loads(re.search('id="data">(.*?)</script>', shown.stdout, re.S)[1])["charts"]
    assert shown.stdout.count("<canvas") == len(charts) >= 5
    assert "<title>changed" not in shown.stdout and "mosrep resnet18" in shown.stdout
