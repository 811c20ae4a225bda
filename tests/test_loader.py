import itertools
import random

import numpy as np
import pytest
import torch
from shards_helpers import color_of, one_color, one_photograph, write_shards

from utils import loader
from utils.loader import evaluation_batches, load, training_batches
from utils.photometric import photometric
from utils.shards import Reader
from utils.views import ViewSpec, color_parameters, cut, decode, draw, moco_v2_view

# the machine may have fewer cores than a test starts workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZES = (10, 10, 10, 7)
CPU = torch.device("cpu")
PLAIN = [ViewSpec("plain", 4)]
MOCO = [moco_v2_view("global", 16, (0.2, 1.0)), moco_v2_view("local", 8, (0.1, 0.6), count=2)]


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Each image has one colour, that of its number; labels are number mod 3."""
    return write_shards(tmp_path_factory.mktemp("colors"), SIZES)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("photographs"), SIZES, image=one_photograph)


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(loader.dist, "rank", lambda: rank)
    monkeypatch.setattr(loader.dist, "world", lambda: world)


def train(monkeypatch, index, batch, world=1, workers=0, specs=MOCO, seed=0, epochs=range(2)):
    """[batches of process 0, of process 1, ...] as real loaders give them."""
    out = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        out.append(list(load(index, specs, training_batches(index, batch, seed, epochs), seed, workers, CPU)))
    return out


def joined(processes):
    """Global batches, from those of the processes: [views..., sample numbers, labels]."""
    parts = []
    for step in zip(*processes, strict=True):  # strict: equal step counts
        views = [torch.cat(v) for v in zip(*[b.views for b in step], strict=True)]
        parts.append([*views, torch.cat([b.index for b in step]), torch.cat([b.label for b in step])])
    return parts


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for step, other in zip(a, b, strict=True) for x, y in zip(step, other, strict=True)
    )


@pytest.fixture(scope="module")
def alone(photographs):
    """The global batches of two epochs, by one process without workers."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return joined(train(monkeypatch, photographs, 6))


@pytest.mark.parametrize("world, workers", list(itertools.product((1, 2, 3), (0, 1, 2, 3)))[1:])
def test_load__global_batches_do_not_depend_on_processes_and_workers(monkeypatch, photographs, alone, world, workers):
    """Equal step counts, every sample at most once an epoch, and the very same bytes: pixels, numbers and labels."""
    processes = train(monkeypatch, photographs, 6, world, workers)
    assert [len(p) for p in processes] == [2 * (37 // 6)] * world
    assert all(len(batch.index) == 6 // world for p in processes for batch in p)
    batches = joined(processes)
    for epoch in (batches[:6], batches[6:]):
        numbers = torch.cat([b[-2] for b in epoch]).tolist()
        assert len(numbers) == len(set(numbers)) == 36 and set(numbers) <= set(range(37))
    assert same(batches, alone)


@pytest.mark.parametrize("batch, world, workers", [(37, 1, 2), (1, 1, 3), (4, 2, 3)])
def test_load__every_sample_exactly_once_where_the_batch_divides(monkeypatch, colors, tmp_path, batch, world, workers):
    """Also with more workers than a batch has samples."""
    index = colors if 37 % batch == 0 else write_shards(tmp_path / "x", (10, 10, 10, 6))
    batches = joined(train(monkeypatch, index, batch, world, workers, PLAIN, epochs=range(1)))
    assert sorted(torch.cat([b[-2] for b in batches]).tolist()) == list(range(index.total))


def test_load__images_and_labels_belong_to_their_numbers(monkeypatch, colors):
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for workers in (0, 2):
        for batch in train(monkeypatch, colors, 4, workers=workers, specs=PLAIN)[0]:
            for view, number, label in zip(batch.views[0], batch.index.tolist(), batch.label.tolist(), strict=True):
                expected = (np.array(color_of(number)) / 255 - mean) / std
                assert np.abs(view.numpy() - expected[:, None, None]).max() < 1e-5 and label == number % 3


def test_load__shapes(alone):
    global_, local, numbers, labels = alone[0]
    assert global_.shape == (6, 3, 16, 16) and local.shape == (6, 2, 3, 8, 8)
    assert global_.dtype == local.dtype == torch.float32 and numbers.dtype == labels.dtype == torch.long
    assert numbers.shape == labels.shape == (6,)
    assert not torch.equal(local[:, 0], local[:, 1])


def test_load__no_labels_is_minus_one(monkeypatch, tmp_path):
    index = write_shards(tmp_path / "x", (5, 3), label=None)
    batches = joined(train(monkeypatch, index, 4, specs=PLAIN, epochs=range(1)))
    assert [b[-1].tolist() for b in batches] == [[-1] * 4] * 2


def test_load__view_is_a_function_of_seed_epoch_and_sample(monkeypatch, photographs, alone):
    """Not of the batch it comes in, nor of its place there. A new epoch and a new seed give new views and another order."""
    views = {}
    for step, (*parts, numbers, _) in enumerate(alone):
        views |= {(step // 6, number): [p[i] for p in parts] for i, number in enumerate(numbers.tolist())}
    met = 0
    for step, (*parts, numbers, _) in enumerate(joined(train(monkeypatch, photographs, 12))):
        for i, number in enumerate(numbers.tolist()):
            if (expected := views.get((step // 3, number))) is not None:
                met += 1
                for part, other in zip(parts, expected, strict=True):
                    torch.testing.assert_close(part[i], other, atol=1e-5, rtol=0)
    assert met >= 70
    other_seed = joined(train(monkeypatch, photographs, 6, seed=1))
    for a, b, numbers in [(alone[:6], alone[6:], 6), (alone, other_seed, 12)]:
        assert [x[-2].tolist() for x in a[:numbers]] != [x[-2].tolist() for x in b[:numbers]]
    for number in range(37):
        if (0, number) in views and (1, number) in views:
            assert all(not torch.equal(x, y) for x, y in zip(views[0, number], views[1, number], strict=True))


def test_load__each_view_has_its_own_box_and_colours(monkeypatch, photographs):
    """View number v over all specs is cut with row v of the sample's draws and coloured by it."""
    specs = [ViewSpec("a", 8), ViewSpec("b", 8, count=2), moco_v2_view("c", 8, (0.2, 1.0), count=2)]
    reader = Reader(photographs)
    for batch in train(monkeypatch, photographs, 18, workers=2, specs=specs, seed=5, epochs=range(3, 4))[0]:
        a, b, c = batch.views
        for i, number in enumerate(batch.index.tolist()):
            image, u = decode(reader(number)[0]), draw(5, 3, number, 5)
            found = [a[i], b[i, 0], b[i, 1], c[i, 0], c[i, 1]]
            for v, (view, spec) in enumerate(zip(found, [specs[0], specs[1], specs[1], specs[2], specs[2]], strict=True)):
                expected = photometric(cut(image, spec, u[v]), torch.from_numpy(color_parameters(spec, u[v])))
                torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)
            assert not any(torch.equal(x, y) for x, y in itertools.combinations(found[:3], 2))  # no colours: other boxes
    reader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_load__global_random_state_decides_nothing(monkeypatch, photographs, alone, workers):
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        assert same(joined(train(monkeypatch, photographs, 6, workers=workers)), alone)


@pytest.mark.parametrize("epoch", [1, 2])
def test_load__continued_at_an_epoch(monkeypatch, photographs, epoch):
    unbroken = joined(train(monkeypatch, photographs, 12, epochs=range(3)))
    continued = joined(train(monkeypatch, photographs, 12, workers=1, epochs=range(epoch, 3)))
    assert same(continued, unbroken[3 * epoch :])


def test_load__continued_at_any_step(photographs, alone):
    """What comes after a step needs nothing of what came before it."""
    batches = training_batches(photographs, 6, 0, range(2))
    for step in range(0, 12, 3):
        rest = load(photographs, MOCO, lambda step=step: itertools.islice(batches(), step, None), 0, 0, CPU)
        assert same(joined([list(rest)]), alone[step:])


@pytest.mark.parametrize("world, workers", list(itertools.product((1, 2, 3), (0, 1, 2, 3))))
@pytest.mark.parametrize("batch", [8, 37])
def test_load__evaluation_sees_each_sample_exactly_once(monkeypatch, colors, batch, world, workers):
    """The last short batch included, and each with its own label, however many processes and workers share the work."""
    seen, spec = [], ViewSpec("test", 4, resize=5)
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        mine = list(load(colors, [spec], evaluation_batches(colors, batch), 0, workers, CPU))
        assert all(0 < len(b.index) <= max(1, batch // world) for b in mine)
        for b in mine:
            assert b.label.tolist() == [i % 3 for i in b.index.tolist()]
            assert b.views[0].shape == (len(b.index), 3, 4, 4)
            seen += b.index.tolist()
    assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("samples, batch, world", [(2, 8, 3), (7, 2, 3), (1, 1, 1), (9, 8, 2), (16, 8, 2)])
def test_evaluation_batches__few_samples_and_small_batches(monkeypatch, tmp_path, samples, batch, world):
    index, seen = write_shards(tmp_path / "x", (samples,)), []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        for epoch, numbers in evaluation_batches(index, batch)():
            assert epoch == 0 and len(numbers)
            seen += numbers.tolist()
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_load__an_image_that_cannot_be_decoded_raises(monkeypatch, tmp_path, workers):
    """No sample is lost in silence."""
    index = write_shards(tmp_path / "x", (6,), image=lambda number: b"no image" if number == 4 else one_color(number))
    with pytest.raises(Exception, match="identify image"):
        train(monkeypatch, index, 6, workers=workers, specs=PLAIN, epochs=range(1))


def test_load__leaves_the_number_of_threads(colors):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for batch in load(colors, PLAIN, training_batches(colors, 18, 0, range(1)), 0, 0, CPU):
            assert torch.get_num_threads() == 2 and len(batch.index) == 18
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_load__batches_come_one_by_one(colors):
    """It reads no further than it is asked to."""
    asked = []

    def batches():
        for step in itertools.count():
            asked.append(step)
            yield 0, np.array([step % 37])

    stream = load(colors, PLAIN, batches, 0, 0, CPU)
    assert [next(stream).index.tolist() for _ in range(3)] == [[0], [1], [2]]
    assert len(asked) <= 4
