"""Features of an index: those of the trunk, each image once, saved and loaded by any number of processes."""

import resource
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import spawn
from PIL import Image
from safetensors.torch import load_file
from shards_helpers import encode, one_png, write_shards

from methods import METHODS
from utils.data.bad_samples import BadSamples
from utils.data.index import load_index
from utils.data.reader import Reader
from utils.data.shards import evaluation_plan
from utils.data.views import cut_views, draw
from utils.evaluation import features, pixels
from utils.evaluation.frozen import Frozen, build_trunk, read_source
from utils.learning import backbones
from utils.learning.backbones import Probed

ARGS = Namespace(batch_size=8, seed=0, workers=0, photometric="auto", size=32, resize=36, interpolation="bicubic")
CPU = torch.device("cpu")
IDENTITY = {"weights": "w", "val": "v", "size": 32}


def trunk():
    torch.manual_seed(0)
    model = backbones.build("tiny_resnet", num_classes=0)
    return Frozen(Probed(model, (6,), "fc", lambda x, _: {6: model(backbones.normalized(x))}))


def of_val(folder, out, batch=8, images=None, dtype=torch.float32):
    index, frozen = load_index(f"{folder}/val"), trunk()
    args = Namespace(**vars(ARGS) | {"batch_size": batch})
    return features.features(args, index, features.test_view(ARGS), lambda x: frozen.features(x, "fp32")[6], CPU,
                             BadSamples(out, index.total, 0.5), images=images, dtype=dtype)  # fmt: skip


def saved(folder, out, batch=8):
    found = of_val(folder, out, batch)
    features.save(out / "f.safetensors", IDENTITY, {"val": found})
    return found.sample_ids.tolist(), features.gathered(found.values)


def loaded(path):
    found = features.load(path, IDENTITY, CPU)["val"]
    return found, features.gathered(found.labels).tolist()


def test_features__are_the_trunks_in_fp32_one_image_after_the_other(images, tmp_path):
    found, frozen = of_val(images, tmp_path), trunk()
    assert found.values.dtype == torch.float32 and found.sample_ids.tolist() == list(range(11)) and found.unusable == 0
    assert found.labels.tolist() == [i % 2 for i in range(6)] + [i % 2 for i in range(5)]
    index = load_index(f"{images}/val")
    reader = Reader(index, 2)
    for row in range(11):
        (crop,) = cut_views(reader(row, True).image, [features.test_view(ARGS)], draw(0, 0, row, 1))
        with torch.no_grad():
            wanted = frozen.trunk(backbones.normalized(crop[None]))[0]
        assert torch.allclose(found.values[row], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["bicubic", "bilinear"])
def test_test_view__is_pils(how):
    """256 of 224, as the protocol has it; an image of noise is the hardest."""
    view = features.test_view(Namespace(size=14, resize=16, interpolation=how))
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    (crop,) = cut_views(encode(Image.fromarray(noise), "PNG"), [view], draw(0, 0, 0, 1))
    wanted = np.asarray(Image.fromarray(noise).resize((16, 20), Image.Resampling[how.upper()]))[3:17, 1:15]
    assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("images_taken", [None, 7, 99])
def test_evaluation_plan__takes_so_many_at_equal_distances(images, images_taken):
    index = load_index(f"{images}/val")
    ((_, steps),) = evaluation_plan(index, 4, images_taken).epochs()
    ids = np.concatenate(list(steps)).tolist()
    assert ids == ([0, 1, 3, 4, 6, 7, 9] if images_taken == 7 else list(range(11)))


def test_save__two_processes_write_the_file_of_one(images, tmp_path):
    (one, two) = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    ids, values = saved(images, one)
    results = spawn(saved, images, two, 16)
    assert [i for part, _ in results for i in part] == ids and torch.equal(results[0][1], values)
    first, second = (load_file(folder / "f.safetensors") for folder in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    found, labels = loaded(two / "f.safetensors")
    assert torch.equal(found.values, values) and found.sample_ids.tolist() == ids
    parts = spawn(loaded, one / "f.safetensors")
    assert [i for part, _ in parts for i in part.sample_ids.tolist()] == ids and parts[0][1] == parts[1][1] == labels


def test_save__is_read_by_safetensors_itself(images, tmp_path):
    _, values = saved(images, tmp_path)
    read = load_file(tmp_path / "f.safetensors")
    assert torch.equal(read["val.values"], values) and set(read) == {"val.values", "val.labels", "val.sample_ids"}


def test_save__a_full_disk_leaves_nothing(images, tmp_path):
    """A limit on the size of a file has the same effect in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"^--features {tmp_path}/f.safetensors: .*File too large.*; pass a file where there"):
            saved(images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_load__refuses_other_features_in_one_line(images, tmp_path):
    saved(images, tmp_path)
    path = tmp_path / "f.safetensors"
    with pytest.raises(ValueError, match=f"^--features {path}: was made with other weights, size; pass another file, or dele"):
        features.load(path, IDENTITY | {"weights": "x", "size": 64}, CPU)
    for content in (b"", b"x" * 99, path.read_bytes()[:-5]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match=f"^--features {tmp_path / 'bad'}: is no file of features .*; pass another file$"):
            features.load(tmp_path / "bad", IDENTITY, CPU)


def test_check_finite__fp16_that_overflows_is_refused(images, tmp_path):
    found = of_val(images, tmp_path, dtype=torch.float16)
    features.check_finite(found)
    found.values[3, 0] = 70000
    with pytest.raises(features.RunError, match="not finite"):
        features.check_finite(found)


def test_features__an_unusable_image_is_left_out(tmp_path):
    write_shards(tmp_path / "x", (5,), lambda i: b"no image" if i == 2 else one_png(i))
    index = load_index(str(tmp_path / "x"))
    view = features.test_view(Namespace(size=16, resize=18, interpolation="bicubic"))
    found = features.features(ARGS, index, view, lambda x: x.flatten(1).float(), CPU, BadSamples(tmp_path, 5, 0.5))
    assert found.sample_ids.tolist() == [0, 1, 3, 4] and found.unusable == 1 and found.values.shape == (4, 768)


def test_build_trunk__pixels_are_those_of_the_view():
    argv = ["--pretrained", "pixels"]
    source = read_source("p", METHODS, argv)
    assert (source.arch, source.path, source.facts) == ("pixels", None, "pixels of the views")
    frozen = build_trunk(Namespace(pretrained="pixels"), METHODS[source.method], source)
    view = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    (layer,) = frozen.choose(None, "pixels")
    found = frozen.features(view, "fp32")[layer]
    assert layer == pixels.LAYER and frozen.widths(4) == {layer: 48}
    assert found.dtype == torch.float32 and torch.equal(found, torch.stack([v.flatten() / 255 for v in view]))
