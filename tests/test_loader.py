import contextlib
import ctypes
import errno
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import default_start_method, forkserver
from PIL import Image
from runs import as_script
from shards_helpers import (
    color_of,
    encode,
    member_at,
    name_classes,
    one_color,
    one_photograph,
    one_png,
    overwrite,
    write_members,
    write_shards,
)

from utils.data import limits, loader, reader, shards
from utils.data.batch import Batch
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.measure import worker_ms
from utils.data.photometric import COLUMNS, photometric
from utils.data.reader import Reader
from utils.data.shards import BatchPlan, epoch_plan, evaluation_plan, training_plan
from utils.data.views import ViewSpec, cut_views, draw, moco_v2_view, parameters_of
from utils.run.cpu import keep_freed_memory
from utils.run.flags import MAX_PIXELS, RunError, one_line_ends, one_line_errors

# the machine may have fewer cores than a test starts workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZES = (10, 10, 10, 7)
CPU = torch.device("cpu")
PLAIN = [ViewSpec("plain", 4)]
TEST = [ViewSpec("test", 4, resize=5)]
PIXEL = one_color(0, (1, 1))
MOCO = [moco_v2_view("global", 16, (0.2, 1.0)), moco_v2_view("local", 8, (0.1, 0.6), count=2)]
LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 1)]  # processes, workers of each


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Each image has the one color of its sample id. A label is the sample id mod 3."""
    return write_shards(tmp_path_factory.mktemp("colors"), SIZES)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("photographs"), SIZES, image=one_photograph)


@pytest.fixture(autouse=True)
def _pixel_limit(monkeypatch):
    """Restore it: it is a setting of PIL, not of a loader."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(shards.dist, "rank", lambda: rank)
    monkeypatch.setattr(shards.dist, "world", lambda: world)


def train(monkeypatch, index, batch, world=1, workers=0, specs=MOCO, seed=0, epochs=range(2), first_step=0, on="auto"):
    """[batches of process 0, of process 1, ...] from real loaders."""
    out = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        batches = training_plan(index, batch, seed, epochs, first_step=first_step)
        out.append(list(load_batches(index, specs, batches, seed, workers, CPU, on)))
    return out


def joined(processes):
    """The global batches, joined from those of the processes: [views..., sample ids, labels]."""
    parts = []
    for step in zip(*processes, strict=True):  # strict: equal step counts
        views = [torch.cat(v) for v in zip(*[b.views for b in step], strict=True)]
        parts.append([*views, torch.cat([b.sample_ids for b in step]), torch.cat([b.labels for b in step])])
    return parts


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for step, other in zip(a, b, strict=True) for x, y in zip(step, other, strict=True)
    )


@pytest.fixture(scope="module")
def alone(photographs):
    """The global batches of two epochs, by one process without workers."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return joined(train(monkeypatch, photographs, 12))


@pytest.mark.parametrize("world, workers", [*list(itertools.product((1, 2, 3), (0, 1, 2, 3)))[1:], (4, 1)])
def test_load_batches__global_batches_do_not_depend_on_processes_and_workers(monkeypatch, photographs, alone, world, workers):
    """The number of steps is equal, a sample comes at most once an epoch, and pixels, sample ids and labels are bit-equal."""
    processes = train(monkeypatch, photographs, 12, world, workers)
    assert [len(p) for p in processes] == [2 * (37 // 12)] * world
    assert all(len(batch.sample_ids) == 12 // world and batch.bad == [] for p in processes for batch in p)
    batches = joined(processes)
    for epoch in (batches[:3], batches[3:]):
        numbers = torch.cat([b[-2] for b in epoch]).tolist()
        assert len(numbers) == len(set(numbers)) == 36 and set(numbers) <= set(range(37))
    assert same(batches, alone)


@pytest.mark.parametrize(
    "batch, world, workers", [(37, 1, 2), (1, 1, 3), (4, 2, 3), *[(12, *layout) for layout in LAYOUTS], (36, 4, 1)]
)
def test_load_batches__every_sample_exactly_once_where_the_batch_divides(monkeypatch, colors, tmp_path, batch, world, workers):
    """Also with more workers than a batch has samples."""
    index = colors if 37 % batch == 0 else write_shards(tmp_path / "x", (10, 10, 10, 6))
    batches = joined(train(monkeypatch, index, batch, world, workers, PLAIN))
    steps = index.total // batch
    assert len(batches) == 2 * steps
    for epoch in (batches[:steps], batches[steps:]):
        assert sorted(torch.cat([b[-2] for b in epoch]).tolist()) == list(range(index.total))


def test_load_batches__images_and_labels_belong_to_their_numbers(monkeypatch, colors):
    for workers in (0, 2):
        for batch in train(monkeypatch, colors, 4, workers=workers, specs=PLAIN)[0]:
            for view, number, label in zip(batch.views[0], batch.sample_ids.tolist(), batch.labels.tolist(), strict=True):
                assert (view.numpy() == np.array(color_of(number))[:, None, None]).all() and label == number % 3


@pytest.mark.parametrize("on", ["worker", "device"])
def test_load_batches__shapes(monkeypatch, photographs, on):
    batch = train(monkeypatch, photographs, 6, on=on)[0][0]
    (global_, local), numbers, labels = batch.views, batch.sample_ids, batch.labels
    assert global_.shape == (6, 3, 16, 16) and local.shape == (6, 2, 3, 8, 8)
    assert global_.dtype == local.dtype == torch.uint8 and numbers.dtype == labels.dtype == torch.long
    assert numbers.shape == labels.shape == (6,) and batch.bad == []
    assert not torch.equal(local[:, 0], local[:, 1])
    assert [(flips.shape, flips.dtype) for flips in batch.flips] == [((6, 1), torch.bool), ((6, 2), torch.bool)]


@pytest.mark.parametrize("world, workers", LAYOUTS)
def test_load_batches__flips_tell_which_views_are_mirrored(monkeypatch, tmp_path, world, workers):
    """Of every view, on the CPU. The images become brighter from left to right, a mirrored view from right to left."""
    ramp = encode(Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))), "PNG")
    index, seen = write_shards(tmp_path / "x", (8,), image=lambda number: ramp), Counter()
    for batch in sum(train(monkeypatch, index, 8, world, workers, specs=[ViewSpec("one", 8), ViewSpec("two", 8, count=2)]), []):
        for view, flips in zip(batch.views, batch.flips, strict=True):
            first, last = view[..., 0].float().mean((-1, -2)), view[..., -1].float().mean((-1, -2))
            assert flips.device.type == "cpu" and torch.equal((first > last).view(flips.shape), flips)
            seen.update(flips.flatten().tolist())
    assert seen.keys() == {False, True}


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__photometric_gives_the_same_in_the_worker_and_on_the_device(monkeypatch, photographs, alone, workers):
    """To the bit. `auto` is one of the two."""
    here, spied = [], loader.photometric
    monkeypatch.setattr(loader, "photometric", lambda *args: here.append(1) or spied(*args))
    for on in ("worker", "device"):
        here.clear()
        assert same(joined(train(monkeypatch, photographs, 12, workers=workers, on=on)), alone)
        sizes = len({spec.size for spec in MOCO}) if on == "device" else len(MOCO) * (workers == 0)
        assert len(here) == 6 * sizes


def test_load_batches__an_accelerator_colors_all_views_of_one_size_together(monkeypatch, photographs):
    """The device `meta`, of tensors without content, stands for an accelerator."""
    sizes, spied = [], loader.photometric_batch
    monkeypatch.setattr(loader, "photometric_batch", lambda x, rows: sizes.append((*x.shape, len(rows))) or spied(x, rows))
    specs = [moco_v2_view("query", 16, (0.2, 1.0)), moco_v2_view("key", 16, (0.2, 1.0)), MOCO[1]]
    plan = training_plan(photographs, 12, 0, range(1))
    batch = next(load_batches(photographs, specs, plan, 0, 0, torch.device("meta")))
    assert sizes == [(24, 3, 16, 16, 24), (24, 3, 8, 8, 24)]
    assert [(x.dtype, *x.shape) for x in batch.views] == [
        (torch.uint8, 12, *s) for s in [(3, 16, 16), (3, 16, 16), (2, 3, 8, 8)]
    ]
    assert [flips.shape for flips in batch.flips] == [(12, 1), (12, 1), (12, 2)]


def test_load_batches__no_labels_is_minus_one(monkeypatch, tmp_path):
    index = write_shards(tmp_path / "x", (5, 3), label=None)
    batches = joined(train(monkeypatch, index, 4, specs=PLAIN, epochs=range(1)))
    assert [b[-1].tolist() for b in batches] == [[-1] * 4] * 2


def test_load_batches__view_is_a_function_of_seed_epoch_and_sample(monkeypatch, photographs, alone):
    """It does not depend on its batch and its place there. A new epoch or seed gives new views and another order."""
    views = {}
    for step, (*parts, numbers, _) in enumerate(alone):
        views |= {(step // 3, number): [p[i] for p in parts] for i, number in enumerate(numbers.tolist())}
    met = 0
    for step, (*parts, numbers, _) in enumerate(joined(train(monkeypatch, photographs, 6))):
        for i, number in enumerate(numbers.tolist()):
            if (expected := views.get((step // 6, number))) is not None:
                met += 1
                assert all(torch.equal(part[i], other) for part, other in zip(parts, expected, strict=True))
    assert met >= 70
    other_seed = joined(train(monkeypatch, photographs, 12, seed=1))
    for a, b in [(alone[:3], alone[3:]), (alone, other_seed)]:
        assert all(x[-2].tolist() != y[-2].tolist() for x, y in zip(a, b, strict=True))
    others = {}
    for step, (*parts, numbers, _) in enumerate(other_seed):
        others |= {(step // 3, number): [p[i] for p in parts] for i, number in enumerate(numbers.tolist())}
    for number in range(37):
        for one, another in [
            (views.get((0, number)), views.get((1, number))),
            (views.get((0, number)), others.get((0, number))),
        ]:
            if one and another:
                assert all(not torch.equal(x, y) for x, y in zip(one, another, strict=True))


def finished(image, specs, seed, epoch, planned):
    """The views of one encoded image, drawn for the sample `planned`: each cropped and colored alone, in the order of specs."""
    kinds = [spec for spec in specs for _ in range(spec.count)]
    u = draw(seed, epoch, planned, len(kinds))
    views = []
    for v, spec in enumerate(kinds):
        (view,) = cut_views(image, [ViewSpec(**vars(spec) | {"count": 1})], u[v : v + 1])
        views.append(photometric(view, torch.from_numpy(parameters_of(spec, u[v]))))
    return views


def views_of(batch, i):
    """All views of the i-th sample of a batch, in the order of the specs."""
    return [view for part in batch.views for view in (part[i] if part.ndim == 5 else part[i : i + 1])]


def test_load_batches__each_view_has_its_own_box_and_colours(monkeypatch, tmp_path):
    """Row v of the sample's draws decides the crop and the colors of view v, counted over all specs."""
    index = write_shards(tmp_path / "x", SIZES, image=one_png)
    specs = [ViewSpec("a", 8), ViewSpec("b", 8, count=2), moco_v2_view("c", 8, (0.2, 1.0), count=2)]
    for batch in train(monkeypatch, index, 18, workers=2, specs=specs, seed=5, epochs=range(3, 4))[0]:
        for i, number in enumerate(batch.sample_ids.tolist()):
            found = views_of(batch, i)
            for view, expected in zip(found, finished(one_png(number), specs, 5, 3, number), strict=True):
                assert torch.equal(view, expected)
            assert not any(torch.equal(x, y) for x, y in itertools.combinations(found[:3], 2))  # the boxes differ


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__global_random_state_decides_nothing(monkeypatch, photographs, alone, workers):
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        assert same(joined(train(monkeypatch, photographs, 12, workers=workers)), alone)


@pytest.mark.parametrize("epoch", [1, 2])
def test_load_batches__resumes_at_an_epoch(monkeypatch, photographs, epoch):
    unbroken = joined(train(monkeypatch, photographs, 12, epochs=range(3)))
    resumed = joined(train(monkeypatch, photographs, 12, workers=1, epochs=range(epoch, 3)))
    assert same(resumed, unbroken[3 * epoch :])


SMALL = [moco_v2_view("small", 6, (0.2, 1.0))]


@pytest.fixture(scope="module")
def unbroken(photographs):
    """Three epochs of 18 steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return joined(train(monkeypatch, photographs, 2, specs=SMALL, epochs=range(3)))


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1)])
def test_load_batches__resumes_at_any_step(monkeypatch, photographs, unbroken, world, workers):
    """No step needs the steps before it."""
    assert len(unbroken) == 54
    for stop in range(7, 54, 7):
        epoch, step = divmod(stop, 18)
        rest = train(monkeypatch, photographs, 2, world, workers, SMALL, epochs=range(epoch, 3), first_step=step)
        assert same(joined(rest), unbroken[stop:])


def test_load_batches__resumes_after_the_last_step_of_an_epoch(monkeypatch, photographs, unbroken):
    assert same(joined(train(monkeypatch, photographs, 2, specs=SMALL, epochs=range(1, 3), first_step=18)), unbroken[36:])


def spy_on_reader(monkeypatch, path):
    """A function that returns the ids of the samples that the processes have read."""
    call = Reader.__call__

    def spied(self, number, *rest):
        with open(path, "a") as file:
            file.write(f"{number}\n")
        return call(self, number, *rest)

    monkeypatch.setattr(Reader, "__call__", spied)
    return lambda: [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__resumes_without_reading_earlier_samples(monkeypatch, photographs, tmp_path, workers):
    numbers = spy_on_reader(monkeypatch, tmp_path / "numbers")
    plan = epoch_plan(photographs, 2, 0, 1)
    list(train(monkeypatch, photographs, 2, workers=workers, specs=SMALL, epochs=range(1, 2), first_step=13))
    assert Counter(numbers()) == Counter(plan[13:].ravel().tolist())


@pytest.mark.parametrize("world, workers", list(itertools.product((1, 2, 3), (0, 1, 2, 3))))
@pytest.mark.parametrize("batch", [8, 37])
def test_load_batches__evaluation_sees_each_sample_exactly_once(monkeypatch, colors, batch, world, workers):
    """With its own label, for any number of processes and workers. The last batch may be smaller."""
    seen = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        mine = list(load_batches(colors, TEST, evaluation_plan(colors, batch), 0, workers, CPU))
        assert all(len(b.sample_ids) <= max(1, batch // world) and b.bad == [] for b in mine)
        for b in mine:
            assert b.labels.tolist() == [i % 3 for i in b.sample_ids.tolist()]
            assert b.views[0].shape == (len(b.sample_ids), 3, 4, 4)
            seen += b.sample_ids.tolist()
    assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("samples, batch, world", [(2, 8, 3), (7, 2, 3), (1, 1, 1), (9, 8, 2), (16, 8, 2)])
def test_evaluation_plan__few_samples_and_small_batches(monkeypatch, tmp_path, samples, batch, world):
    index, seen, counts = write_shards(tmp_path / "x", (samples,)), [], set()
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        ((epoch, steps),) = ((epoch, list(steps)) for epoch, steps in evaluation_plan(index, batch).epochs())
        assert epoch == 0
        counts.add(len(steps))
        seen += [number for numbers in steps for number in numbers.tolist()]
    assert sorted(seen) == list(range(samples)) and len(counts) == 1  # or one would wait for another for ever


FAULTY = (10, 10, 10, 7, 11)
# sample id -> (its key, a part of the error, the next sample id that may be usable)
FAULTS = {
    3: ("00003", "identify image", 4),  # bytes that are not an image
    4: ("00004", "identify image", 5),  # no bytes
    12: ("00012", "(?i)truncated|incomplete|premature", 13),  # half a JPEG
    17: ("00017", "label", 18),  # none
    18: ("00018", "label", 19),  # not a number
    26: ("sample 6", "corrupt", 27),  # a corrupt header
    **{number: (f"sample {number - 30}", "corrupt", 37) for number in range(34, 37)},  # after the end of a cut shard
    47: ("00047", "identify image", 48),  # the last one
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")

    def image(number):
        jpeg = one_photograph(number)
        return {3: b"no image", 4: b"", 12: jpeg[: len(jpeg) // 2], 47: b"\xff" * 700}.get(number, one_png(number))

    write_shards(folder, FAULTY, image, lambda number: {17: None, 18: "cat"}.get(number, number % 3))
    index = name_classes(folder, ["a", "b", "c"])
    paths = [shard.path for shard in index.shards]
    overwrite(paths[2], member_at(paths[2], "00026.png")[0], b"\xa5" * 512)
    os.truncate(paths[3], member_at(paths[3], "00034.png")[1] + 100)
    return index


def slow_replacement(number):
    """The usable sample that replaces `number`, and the unusable ones before it."""
    met = []
    while number in FAULTS:
        met.append(number)
        number = FAULTS[number][2] % 48
    return number, met


def check_records(index, records, numbers):
    """Check that these are the records of these unusable samples, in this order."""
    shard_of = np.repeat(range(5), FAULTY)
    assert [(r["shard"], r["key"]) for r in records] == [(index.shards[shard_of[n]].path, FAULTS[n][0]) for n in numbers]
    for record, number in zip(records, numbers, strict=True):
        assert sorted(record) == ["error", "key", "shard"] and re.search(FAULTS[number][1], record["error"]), record


@pytest.fixture(scope="module")
def faulty_alone(faulty):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train(monkeypatch, faulty, 12)


def test_load_batches__an_unusable_sample_is_replaced_by_the_next_usable_one(faulty, faulty_alone):
    """The batch has its id and label, its views are drawn for the planned sample, and each unusable sample has a record."""
    replaced = 0
    for step, batch in enumerate(faulty_alone[0]):
        planned = epoch_plan(faulty, 12, 0, step // 4)[step % 4].tolist()
        taken, met = zip(*map(slow_replacement, planned), strict=True)
        assert batch.sample_ids.tolist() == list(taken) and batch.labels.tolist() == [number % 3 for number in taken]
        check_records(faulty, batch.bad, sum(met, []))
        for i, number in enumerate(planned):
            replaced += number != taken[i]
            for view, expected in zip(views_of(batch, i), finished(one_png(taken[i]), MOCO, 0, step // 4, number), strict=True):
                assert torch.equal(view, expected)
    assert len(faulty_alone[0]) == 8 and replaced == 2 * len(FAULTS)


@pytest.mark.parametrize("world, workers", LAYOUTS[1:])
def test_load_batches__replacements_do_not_depend_on_processes_and_workers(monkeypatch, faulty, faulty_alone, world, workers):
    processes = train(monkeypatch, faulty, 12, world, workers)
    assert same(joined(processes), joined(faulty_alone))
    for step, alone in zip(zip(*processes, strict=True), faulty_alone[0], strict=True):
        assert [record for batch in step for record in batch.bad] == alone.bad


@pytest.mark.parametrize("world, workers", LAYOUTS)
def test_load_batches__evaluation_skips_unusable_samples(monkeypatch, faulty, world, workers):
    """Every other sample comes once, and each unusable one has one record."""
    seen, bad = [], []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        for batch in load_batches(faulty, TEST, evaluation_plan(faulty, 5), 0, workers, CPU):
            assert batch.labels.tolist() == [number % 3 for number in batch.sample_ids.tolist()]
            for i, number in enumerate(batch.sample_ids.tolist()):
                assert torch.equal(batch.views[0][i], finished(one_png(number), TEST, 0, 0, number)[0])
            seen += batch.sample_ids.tolist()
            bad += batch.bad
    assert seen == [number for number in range(48) if number not in FAULTS]
    check_records(faulty, bad, list(FAULTS))


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__evaluation_of_nothing_but_unusable_samples(tmp_path, workers):
    """The batches are empty; any number of them is no error here."""
    index = write_shards(tmp_path / "x", (110,), image=lambda number: b"junk")
    batches = list(load_batches(index, TEST, evaluation_plan(index, 50), 0, workers, CPU))
    assert [batch.views[0].shape for batch in batches] == [(0, 3, 4, 4)] * 3
    assert [len(batch.bad) for batch in batches] == [50, 50, 10] and all(len(batch.sample_ids) == 0 for batch in batches)


def test_load_batches__keys_that_come_again_and_groups_without_image(monkeypatch, tmp_path):
    """All samples with equal keys are used. A group without image is no sample and has no record."""
    write_members(tmp_path / "x.tar", [
        ("a.png", one_color(0)), ("a.cls", b"0"), ("a.png", one_color(1)), ("a.cls", b"1"), ("lone.cls", b"2"),
        ("b.png", one_color(2)), ("b.cls", b"2"), ("notes.txt", b"?"), ("a.png", one_color(3)), ("a.cls", b"0"),
    ])  # fmt: skip
    index = load_index(str(tmp_path))
    assert index.total == 4 and index.labelled
    for workers in (0, 2):
        (batch,) = train(monkeypatch, index, 4, workers=workers, specs=PLAIN, epochs=range(1))[0]
        assert sorted(zip(batch.sample_ids.tolist(), batch.labels.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 2), (3, 0)]
        color = {number: torch.tensor(color_of(number), dtype=torch.uint8).view(3, 1, 1) for number in range(4)}
        assert all(
            torch.equal(v, color[i].expand_as(v)) for v, i in zip(batch.views[0], batch.sample_ids.tolist(), strict=True)
        )
        assert batch.bad == []


@pytest.mark.parametrize("workers", [0, 1])
def test_load_batches__images_above_max_pixels_are_unusable(tmp_path, workers):
    """By the flag, in every worker, and with a reason that names it."""
    write_shards(tmp_path / "x", (5,), image=lambda number: one_color(number, (10, 10 + number)))
    for limit, bad in ((120, [3, 4]), (99, range(5)), (140, [])):
        index = load_index(str(tmp_path / "x"), max_pixels=limit)
        (batch,) = load_batches(index, TEST, evaluation_plan(index, 5), 0, workers, CPU)
        assert batch.sample_ids.tolist() == [number for number in range(5) if number not in bad]
        assert [r["error"] for r in batch.bad] == [f"ValueError: more pixels than --max-pixels {limit}"] * len(bad)
    assert index.max_pixels == 140 and load_index(str(tmp_path / "x")).max_pixels == MAX_PIXELS


def junk_below(folder, count, total=130):
    return write_shards(folder, (total - 60, 60), image=lambda number: b"junk" if number < count else one_color(number))


def why_it_ends(monkeypatch, index, batch, workers):
    """The text of the RunError that ends the training."""
    try:
        train(monkeypatch, index, batch, workers=workers, specs=PLAIN, epochs=range(1))
    except RunError as error:
        assert type(error) is RunError
        return str(error.with_traceback(None))  # the traceback would keep the loader alive
    pytest.fail("the training did not end")


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__hundred_unusable_samples_in_a_row_end_the_run(monkeypatch, tmp_path, workers):
    """In the training process, with one line that names the first."""
    index = junk_below(tmp_path / "x", 120)
    text = why_it_ends(monkeypatch, index, 10, workers)
    assert text.startswith("100 samples in a row cannot be used")
    assert "Traceback" not in text and "worker" not in text and "\n" not in text and index.shards[0].path in text
    first = re.search(r"'key': '(\d+)'", text)[1]
    assert int(first) < 21 or int(first) == 129  # the planned one


def test_load_batches__fewer_than_hundred_in_a_row_are_replaced(monkeypatch, tmp_path):
    index = junk_below(tmp_path / "x", 99)
    batches = train(monkeypatch, index, 10, specs=PLAIN, epochs=range(1))[0]
    numbers = Counter(number for batch in batches for number in batch.sample_ids.tolist())
    assert numbers == {99: 100} | dict.fromkeys(range(100, 130), 1)
    met = Counter(record["key"] for batch in batches for record in batch.bad)
    assert met == {f"{number:05d}": number + 1 for number in range(99)}


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__few_samples_of_which_none_is_usable(monkeypatch, tmp_path, workers):
    index = write_shards(tmp_path / "x", (3, 2), image=lambda number: b"junk")
    assert why_it_ends(monkeypatch, index, 5, workers).startswith("100 samples in a row")


def test_load_batches__workers_are_gone_when_it_ends_the_run(monkeypatch, tmp_path):
    """They do not wait for the garbage collector, which would take five seconds for each."""
    index = write_shards(tmp_path / "x", (3,), image=lambda number: b"junk")
    try:
        train(monkeypatch, index, 3, workers=1, specs=PLAIN)
    except RunError as error:
        assert str(error).startswith("100 samples in a row")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__shard_with_another_number_of_samples_ends_the_run(monkeypatch, tmp_path, workers):
    """Such a shard holds other samples than the index says."""
    index = write_shards(tmp_path / "x", (5, 5))
    write_shards(tmp_path / "y", (5, 6))
    os.replace(tmp_path / "y/001.tar", tmp_path / "x/001.tar")
    text = why_it_ends(monkeypatch, index, 5, workers)
    assert "/001.tar holds 6 samples, its index says 5" in text and "\n" not in text


def test_load_batches__leaves_the_number_of_threads(monkeypatch, colors):
    """Views are cropped with one thread."""
    threads, inside = torch.get_num_threads(), set()
    monkeypatch.setattr(loader, "cut_views", lambda *args: inside.add(torch.get_num_threads()) or cut_views(*args))
    torch.set_num_threads(2)
    try:
        for batch in load_batches(colors, PLAIN, training_plan(colors, 18, 0, range(1)), 0, 0, CPU):
            assert torch.get_num_threads() == 2 and len(batch.sample_ids) == 18
        assert torch.get_num_threads() == 2 and inside == {1}
    finally:
        torch.set_num_threads(threads)


def test_load_batches__leaves_the_number_of_threads_when_it_ends_the_run(monkeypatch, tmp_path):
    index = write_shards(tmp_path / "x", (3,), image=lambda number: b"junk")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RunError):
            train(monkeypatch, index, 3, specs=PLAIN)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_load_batches__batches_come_one_by_one(monkeypatch, colors, tmp_path):
    """Without workers no batch is read ahead."""
    numbers, asked = spy_on_reader(monkeypatch, tmp_path / "numbers"), []

    def epochs():
        for epoch in itertools.count():
            asked.append(epoch)
            yield epoch, [np.array([2 * epoch]), np.array([2 * epoch + 1])]

    stream = load_batches(colors, PLAIN, BatchPlan(epochs, replace=True), 0, 0, CPU)
    assert [next(stream).sample_ids.tolist() for _ in range(3)] == [[0], [1], [2]]
    assert len(numbers()) <= 4 and len(asked) <= 2


def test_keep_freed_memory__twice(colors):
    before = [b.views[0] for b in load_batches(colors, PLAIN, evaluation_plan(colors, 8), 0, 0, CPU)]
    assert keep_freed_memory() is None and keep_freed_memory() is None
    kept = [torch.full((1 << 20,), float(i)) for i in range(20)]
    assert all((x == i).all() for i, x in enumerate(kept))
    after = [b.views[0] for b in load_batches(colors, PLAIN, evaluation_plan(colors, 8), 0, 0, CPU)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("images", [4, 256])
def test_worker_ms__is_positive_and_leaves_the_number_of_threads(monkeypatch, photographs, tmp_path, images):
    """A round reads each image once, also where there are fewer than `images`."""
    numbers, threads = spy_on_reader(monkeypatch, tmp_path / "numbers"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ms = worker_ms(photographs, MOCO, 0, images=images, rounds=2)
        assert 0 < ms < 1000 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert Counter(numbers()) == dict.fromkeys(range(min(images, 37)), 3)


def test_worker_ms__is_cpu_time(monkeypatch, colors):
    """The time for an image is the time of a round divided by its images."""
    clock = itertools.count(step=0.5)  # seconds, at each look
    monkeypatch.setattr(loader.time, "process_time", lambda: next(clock))
    assert worker_ms(colors, PLAIN, 0, images=10, rounds=3) == pytest.approx(50)
    assert worker_ms(colors, PLAIN, 0, images=25, rounds=1) == pytest.approx(20)


class Stream:
    """A stand-in for a CUDA stream that records events and the stream of each."""

    now, events = None, []

    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        Stream.events.append((self.name, "waits for", other.name))


class Tensor:
    def record_stream(self, stream):
        Stream.events.append(("used in", stream.name))


def test_load_batches__on_cuda_a_batch_is_made_beside_the_step(monkeypatch):
    """With stand-ins: batches are made on their own stream, the step waits for it, and the tensors know both streams."""
    main = Stream.now = Stream("main")

    @contextlib.contextmanager
    def stream(other):
        Stream.now = other
        yield
        Stream.now = main

    def batches():
        for _ in range(2):
            Stream.events.append(("made in", Stream.now.name))
            yield Batch([Tensor()], [], Tensor(), Tensor(), [])

    made = []
    for name, value in (
        ("Stream", lambda device: made.append(Stream()) or made[-1]),
        ("stream", stream),
        ("current_stream", lambda device: Stream.now),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    Stream.events.clear()
    loader._side_stream.cache_clear()
    for _ in range(10):  # a training and its evaluations
        for _ in loader._beside_the_step(batches(), torch.device("cuda", 0)):
            Stream.events.append(("step in", Stream.now.name))
    loader._side_stream.cache_clear()
    one = [("made in", "side"), ("main", "waits for", "side"), *[("used in", "main")] * 3, ("step in", "main")]
    assert Stream.events == one * 20
    assert len(made) == 1  # each new stream would take memory of its own


@pytest.mark.parametrize("sizes", [(2, 2), (2, 0), (0, 2), (0, 1), (3, 1)])
def test_load_batches__parts_of_any_size_are_channels_last(monkeypatch, sizes):
    """On a device. The last batch of an evaluation may have fewer images than workers; its results must not depend on them."""

    def chunk(n):
        crops = torch.zeros(n, 1, 4, 4, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        return loader.Chunk([crops], [torch.zeros(n, 1, len(COLUMNS))], torch.zeros(n), torch.zeros(n), [])

    monkeypatch.setattr(loader, "photometric", lambda views, parameters: views)  # a CPU's makes its views contiguous
    (view,) = loader._joined([chunk(n) for n in sizes], PLAIN, CPU, in_worker=False).views
    assert view.shape == (sum(sizes), 3, 4, 4) and view.is_contiguous(memory_format=torch.channels_last)


def test_load_batches__shards_that_their_lanes_have_left_are_closed(monkeypatch, tmp_path):
    """An open shard keeps the places of its samples in memory: two of each lane stay, and none is opened again and again."""
    monkeypatch.setattr(shards, "POOL", 64)
    index, opened, alive = write_shards(tmp_path / "x", [100] * 24, image=lambda number: PIXEL), [], []

    class Watched(reader.LocalShard):
        def __init__(self, shard, path):
            super().__init__(shard, path)
            opened.append(path)

    class WatchedReader(reader.Reader):
        def __call__(self, *args):
            alive.append(len(self.local))
            return super().__call__(*args)

    monkeypatch.setattr(reader, "LocalShard", Watched)
    monkeypatch.setattr(loader, "Reader", WatchedReader)
    train(monkeypatch, index, 8, specs=PLAIN, epochs=range(1))
    assert max(alive) == 16 and set(opened) == {shard.path for shard in index.shards}
    assert len(opened) <= 24 + 8 + 6  # lanes begin within a shard; few samples come late


# shared memory and open files

BATCH = 12 * 3 * (3 * 100**2 + 4 * 10)  # bytes of views of 100 pixels and their parameters
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)


def limited(folder, shared_memory, files, check, workers):
    """Load batches in this process of its own, with its output in files."""
    default_start_method()
    warnings.simplefilter("ignore")
    for stream, name in ((1, "out"), (2, "errors")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), stream)
    if shared_memory:
        own = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
        assert ctypes.CDLL(None).unshare(NEW_USER | NEW_MOUNTS) == 0
        for name, text in own.items():
            Path("/proc/self", name).write_text(text)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={shared_memory}", "tmpfs", "/dev/shm"], check=True)
    index, specs = load_index(str(folder / "x")), [ViewSpec("one", 100), ViewSpec("two", 100, count=2)]
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with one_line_errors("loader"), one_line_ends("loader"):  # as the entry points
        if check:
            limits.check_workers(specs, 12, workers)
        else:
            loader.open_shards = lambda specs, workers: 128
        for _ in load_batches(index, specs, training_plan(index, 12, 0, range(20)), 0, workers, torch.device("cpu")):
            time.sleep(0.01)  # meanwhile the workers fill what they may
        print("done")


def run_loader(tmp_path, shared_memory=None, files=0, check=True, workers=2):
    """(exit code, output, errors) of a process with so many bytes of shared memory and so many open files."""
    if not (tmp_path / "x").exists():
        write_shards(tmp_path / "x", SIZES)
    process = forkserver().Process(target=as_script, args=(limited, tmp_path, shared_memory, files, check, workers))
    process.start()
    process.join(60)
    return process.exitcode, *((tmp_path / name).read_text() for name in ("out", "errors"))


def can_mount():
    test = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(test, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="only who may mount a file system can make a small one")
def test_load_batches__small_shared_memory_is_one_line_at_the_start(tmp_path):
    """What the check accepts, works; what it refuses names a flag and a value; without it nothing hangs."""
    enough = f"{4 * BATCH // 1000}k"
    assert run_loader(tmp_path, enough)[:2] == (0, "done\n")
    code, _, errors = run_loader(tmp_path, "1m")
    need = round(3 * BATCH / 1e6)
    assert code == 2 and errors.splitlines()[-1].startswith(
        f"loader: error: --workers 2: needs {need} MB of /dev/shm, which has 1 MB"
    )
    assert "--shm-size" in errors and "--workers 0" in errors
    assert run_loader(tmp_path, "1m", workers=0)[:2] == (0, "done\n")
    code, _, errors = run_loader(tmp_path, "500k", check=False)
    last = errors.splitlines()[-1].strip("\0")
    if not last.startswith("loader: error: DataLoader worker"):  # torch 2.9 ends a worker by SIGBUS
        assert last.startswith("loader: error: --workers 2: a batch could not be handed over") and "--shm-size" in last
    assert code == 2 and "--workers" in last and "Traceback" not in errors


def test_load_batches__few_open_files_are_one_line_at_the_start(tmp_path):
    """It does not blame the shards."""
    assert run_loader(tmp_path, files=200)[:2] == (0, "done\n")
    code, _, errors = run_loader(tmp_path, files=100)
    assert code == 2 and re.search(r"^loader: error: --workers 2: needs more than \d+ open files, the limit is 100; pass "
                                   r"--workers [01], or raise it with ulimit -n \d+$", errors.splitlines()[-1])  # fmt: skip
    assert ".tar" not in errors
    assert run_loader(tmp_path, files=100, workers=0)[:2] == (0, "done\n")


def test_open_shards__raises_the_soft_limit_and_keeps_the_rest_for_workers(monkeypatch):
    limits_set = []
    monkeypatch.setattr(limits.os, "listdir", lambda _: range(20))
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (256, hard))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, values: limits_set.append(values))
    for hard, workers, most in ((10**6, 8, 128), (300, 8, 127), (resource.RLIM_INFINITY, 64, 128)):
        limits_set.clear()
        found = limits.open_shards(MOCO, workers)
        assert 1 <= found <= most and limits_set[0][0] <= (hard if hard > 0 else 10**6)
    hard = 256
    with pytest.raises(ValueError, match="--workers 8.*the limit is 256; pass --workers [1-7],"):
        limits.open_shards(MOCO, 8)
    assert limits.open_shards(MOCO, 0) >= 1


def test_check_workers__counts_the_processes_of_the_machine(monkeypatch):
    image = 3 * 16**2 + 2 * 3 * 8**2 + 3 * 4 * 10
    monkeypatch.setattr(limits, "_free", lambda folder: 3 * 8 * 32 * image)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    limits.check_workers(MOCO, 32, 4)
    for images, processes in ((33, 8), (32, 9)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        with pytest.raises(ValueError, match="^--workers 4: needs 1 MB of /dev/shm, which has 1 MB free; .*--workers 0$"):
            limits.check_workers(MOCO, images, 4)
        limits.check_workers(MOCO, images, 0)


def test_load_batches__a_lost_chunk_is_one_line(monkeypatch, colors):
    """Not the message of a function of Python."""
    lost = loader._until_a_worker_dies
    monkeypatch.setattr(loader, "_until_a_worker_dies", lambda chunks: itertools.islice(lost(chunks), 3))
    text = why_it_ends(monkeypatch, colors, 10, workers=2)
    assert text.startswith("--workers 2: a batch could not be handed over (1 of 2 parts came); ") and "--shm-size" in text


def test_load_batches__too_many_open_files_in_a_worker_are_no_fault_of_the_shards(monkeypatch, colors):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(reader, "LocalShard", refuse)
    text = why_it_ends(monkeypatch, colors, 10, workers=2)
    assert "open files" in text and "ulimit -n" in text and "--workers" in text and ".tar" not in text
