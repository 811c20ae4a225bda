"""main_knn.py against a slow loop over all pairs; one process and two agree to the last image."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import spawn
from PIL import Image
from runs import TWO, Run
from shards_helpers import name_classes, one_png, write_shards

import main_knn
from utils.data.index import load_index
from utils.data.loader import load_batches
from utils.data.shards import evaluation_plan
from utils.evaluation import features, knn
from utils.evaluation.features import Features
from utils.run import dist

FLAGS = ["--device", "cpu", "--workers", "0", "--size", "8", "--resize", "8", "--batch-size", "6"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train: 36 images with labels 0 to 3, each photograph twice; val: 11 others, two of them in train."""
    folder = tmp_path_factory.mktemp("knn")
    write_shards(folder / "train", (20, 16), lambda i: one_png(i % 18), lambda i: (i * 7 // 3) % 4)
    write_shards(folder / "val", (6, 5), lambda i: one_png(16 + i), lambda i: (i * 5 // 2) % 4)
    return folder


def command(data, out, *flags):
    paths = ["--train-shards", data / "train", "--val-shards", data / "val", "--output-dir", out]
    return [str(word) for word in ["--pretrained", "pixels", *paths, *FLAGS, *flags]]


def run(data, out, *flags):
    main_knn.main(command(data, out, *flags))
    return json.loads((out / "result.json").read_text())


def pixels_of(data, split):
    index = load_index(str(data / split))
    view, plan = features.test_view(main_knn.get_args(command(data, data))), evaluation_plan(index, 99)
    batch = next(load_batches(index, [view], plan, 0, 0, torch.device("cpu")))
    return batch.views[0].flatten(1).double().numpy() / 255, batch.labels.tolist()


def slow(data, ks, temperature=0.07, centre=False):
    """k -> top-1 and top-5 in %: one pair of images after the other, all votes counted."""
    (train, labels), (test, truth) = pixels_of(data, "train"), pixels_of(data, "val")
    mean = sum(train) / len(train) if centre else 0 * train[0]
    right = {k: [0, 0] for k in ks}
    for x, own in zip(test - mean, truth, strict=True):
        nearest = []
        for i, y in enumerate(train - mean):
            cosine = sum(x * y) / math.sqrt(sum(x * x)) / math.sqrt(sum(y * y))
            nearest.append((-np.float32(round(float(cosine), 7)), i))
        nearest.sort()
        for k in ks:
            votes = {}
            for negative, i in nearest[:k]:
                votes[labels[i]] = votes.get(labels[i], 0) + math.exp(-negative / temperature)
            order = sorted(votes, key=lambda label: (-votes[label], label))
            right[k][0] += order[0] == own
            right[k][1] += own in order[:5]
    return {str(k): {"top1": 100 * a / len(truth), "top5": 100 * b / len(truth)} for k, (a, b) in right.items()}


@pytest.mark.parametrize("flags, options", [
    ([], {}), (["--temperature", "0.5"], {"temperature": 0.5}), (["--centre"], {"centre": True}), (["--memory", "0.01"], {}),
])  # fmt: skip
def test_main_knn__is_the_slow_loop(data, tmp_path, flags, options):
    ks = [1, 2, 5, 36]
    result = run(data, tmp_path, "--k", *ks, *flags)
    assert result["knn"] == {k: pytest.approx(found) for k, found in slow(data, ks, **options).items()}
    assert len({found["top1"] for found in result["knn"].values()}) > 1
    assert result["train"]["images"] == 36 and result["val"]["unusable"] == 0 and result["checkpoint_sha256"] is None
    assert result["protocol"]["k"] == ks and result["protocol"]["arch"] == "pixels"


def found_by(data, out, *flags):
    """The neighbours of all test images, and their similarities, by sample id."""
    args = main_knn.get_args(command(data, out, *flags))
    sets = {}
    for name in ("train", "val"):
        index = load_index(str(data / name))
        bad = features.BadSamples(out, index.total, 0.5)
        extract = lambda x: x.flatten(1).float() / 255  # noqa: E731
        dtype = features.DTYPES[args.dtype]
        sets[name] = features.features(args, index, features.test_view(args), extract, torch.device("cpu"), bad, dtype=dtype)
    knn.to_unit_length_(sets["train"], sets["val"], args.centre)
    similarities, ids = knn.neighbours(sets["train"], sets["val"], 36, int(args.memory * 2**20))
    return {
        i: (s, near) for i, s, near in zip(sets["val"].sample_ids.tolist(), similarities.tolist(), ids.tolist(), strict=True)
    }


@pytest.mark.parametrize("flags", [["--centre"], ["--dtype", "fp16", "--memory", "0.01"]])
def test_neighbours__two_processes_find_those_of_one(data, tmp_path, flags):
    """Each photograph is there twice, so that many similarities are equal; ids decide."""
    one = found_by(data, tmp_path, *flags)
    parts = spawn(found_by, data, tmp_path, *flags)
    assert parts[0].keys().isdisjoint(parts[1]) and parts[0] | parts[1] == one
    for similarities, near in one.values():
        assert sorted(near) == list(range(36)) and similarities == sorted(similarities, reverse=True)
        assert all(a < b for s, t, a, b in zip(similarities, similarities[1:], near, near[1:], strict=False) if s == t)


def test_main_knn__two_processes_write_the_result_of_one(data, tmp_path):
    flags = ["--k", "1", "3", "36", "--neighbours", "3"]
    one = run(data, tmp_path / "one", *flags)
    with Run(tmp_path, ["knn", *command(data, tmp_path / "two", *flags)], TWO) as two:
        assert two.end() == 0, two.said()
    assert json.loads((tmp_path / "two/result.json").read_text())["knn"] == one["knn"]
    pictures = [(tmp_path / name / "neighbours.png").read_bytes() for name in ("one", "two")]
    assert pictures[0] == pictures[1]


def set_of(values, ids):
    values = torch.tensor(values)
    return Features(values, torch.zeros(len(values), dtype=torch.long), torch.tensor(ids), 0)


def test_neighbours__a_process_without_images_has_no_part_in_it():
    near = spawn(two_parts)
    assert near[0] == [[7, 3, -1]] and near[1] == []


def two_parts():
    both = (set_of([[1.0, 0], [0, -1.0]], [7, 3]), set_of([[1.0, 0]], [0]))
    none = set_of(np.zeros((0, 2), np.float32), [])
    none.sample_ids = none.sample_ids.long()
    train, test = (none, none) if dist.rank() else both
    return knn.neighbours(train, test, 3, 2**20)[1].tolist()


def test_keys__keep_the_order_of_similarities_and_decide_ties_by_the_id():
    values = torch.tensor([[-1.0, -0.5, -0.0, 0.0, 1e-40, 0.3, 0.3, 1.0]])
    ids = torch.tensor([5, 2**32 - 1, 4, 3, 9, 8, 7, 0])
    keys = knn._keys(values, ids)
    similarities, found = knn._parts(keys.sort(descending=True).values)
    assert found.tolist() == [[0, 7, 8, 9, 3, 4, 2**32 - 1, 5]]
    assert similarities.tolist() == values.sort(descending=True).values.tolist()


@pytest.mark.parametrize("width", [1, 2048, 150528])
@pytest.mark.parametrize("mib", [0.001, 64, 1024, 1e6])
def test_chunk_sizes__fit_in_the_memory(mib, width):
    queries, rows = knn.chunk_sizes(int(mib * 2**20), width)
    assert queries >= 1 <= rows
    assert (queries, rows) == (1, 1) or knn.PAIR * queries * rows + 8 * width * (queries + rows) <= mib * 2**20
    if mib == 1e6:
        assert (queries, rows) == (knn.QUERIES, knn.ROWS)


def test_votes_right__a_class_without_votes_is_not_among_the_first_five():
    similarities, near = torch.tensor([[0.9, 0.9, 0.1]] * 4), torch.tensor([[2, 1, 0]] * 3 + [[2, -1, -1]])
    truth = torch.tensor([1, 2, 3, 2])
    right = knn.votes_right(similarities, near, truth, 4, [1, 2, 3], 0.07)
    assert right == {1: (2, 2), 2: (2, 3), 3: (2, 3)}  # of the classes 1 and 2 with equal votes, 1 comes first


def test_main_knn__features_are_kept_and_other_flags_need_no_image(data, tmp_path, monkeypatch, capsys):
    file = tmp_path / "f.safetensors"
    first = run(data, tmp_path, "--features", file, "--k", "1", "5")
    monkeypatch.setattr(features, "load_batches", None)
    assert run(data, tmp_path, "--features", file, "--k", "1", "5")["knn"] == first["knn"]
    again = run(data, tmp_path, "--features", file, "--k", "2", "--temperature", "0.5", "--centre")
    assert again["knn"] == {"2": pytest.approx(slow(data, [2], 0.5, True)["2"])}
    with pytest.raises(SystemExit, match="2"):
        run(data, tmp_path, "--features", file, "--size", "7")
    assert f"--features {file}: was made with other size; pass another file" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--k", "37"], "--k 37: must lie in [1, 36]"), (["--k", "0"], "--k 0: "), (["--temperature", "0"], "--temperature 0.0: "),
    (["--features", "f.pt"], "--features f.pt: must end with .safetensors"), (["--resize", "4"], "--resize 4: must lie in [8,"),
    (["--pretrained", "/nowhere"], "--pretrained /nowhere: no such file"), (["--layer", "3"], "--layer 3: pixels has 0"),
    (["--neighbours", "99"], "--neighbours 99: must lie"), (["--memory", "0"], "--memory 0.0: "),
])  # fmt: skip
def test_main_knn__bad_input_is_one_line(data, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        run(data, tmp_path, *flags)
    line = capsys.readouterr().err.splitlines()[-1]  # before it may stand the bar of an index that is made first
    assert line.startswith("main_knn.py: error: ") and message in line


def test_main_knn__the_default_ks_are_those_that_exist(data, tmp_path):
    assert list(run(data, tmp_path)["knn"]) == ["1", "10", "20"]
    args = main_knn.get_args(command(data, tmp_path))
    assert (args.amp, args.temperature, args.dtype) == ("fp32", 0.07, "fp32")  # METHODS.md, "Evaluation protocols"
    args = main_knn.get_args(["--pretrained", "random", "--train-shards", "t", "--val-shards", "v"])
    assert (args.size, args.resize, args.output_dir) == (224, 256, "output/random/knn")


def test_write_picture__has_any_name_of_a_class(data, tmp_path):
    name_classes(data / "train", ["\u72ac \U0001f436", "a\nb" * 50, "\x00", "\u0627"])
    name_classes(data / "val", ["\u72ac \U0001f436", "a\nb" * 50, "\x00", "\u0627"])
    run(data, tmp_path, "--k", "1", "--neighbours", "4")
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    assert picture.shape == (4 * 114 + 4, 5 * 100 + 4, 3)
    first = picture[4:100, 4:100]  # the first test image, enlarged: its pixels as they are
    pixels = (pixels_of(data, "val")[0][0] * 255).round().reshape(3, 8, 8).transpose(1, 2, 0)
    assert np.array_equal(first[::12, ::12], pixels)
    near = picture[4:100, 104:200]  # it is in the training set
    assert np.array_equal(near, first)
