"""Probes of several layers in one pass: as if each were alone, each image once on several processes."""

import contextlib
import io
import json
import math

import pytest
import torch
from helpers import spawn

import main_lincls
from utils.run import checkpoint

FLAGS = ["--method", "cmc", "--pretrained", "random", "--arch", "alexnet", "--epochs", "1", "--batch-size", "8", "--lr", "3.2",
         "--device", "cpu", "--amp", "fp32", "--workers", "0"]  # fmt: skip


def run(images, out, *flags):
    splits = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val"]
    main_lincls.main([*FLAGS, *splits, "--output-dir", str(out), *map(str, flags)])


def probe(images, out, *flags):
    run(images, out, *flags)
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def all_layers(images, tmp_path_factory):
    folder, output = tmp_path_factory.mktemp("all"), io.StringIO()
    with contextlib.redirect_stdout(output):
        result = probe(images, folder, "--layer", "1", "2", "3", "4", "5")
    assert f"(chance {5 * math.log(2):.3f})" in output.getvalue()  # the loss is a sum over the layers
    return result, folder


@pytest.mark.parametrize("layer, width", [(1, 9600), (3, 9600), (5, 9216)])
def test_main_lincls__layers_are_probed_as_if_alone(images, tmp_path, all_layers, layer, width):
    result, folder = all_layers
    assert list(result["layers"]) == ["1", "2", "3", "4", "5"] and result["last"] == result["layers"]["5"]["last"]
    alone = probe(images, tmp_path, "--layer", layer)
    assert alone["last"] == result["layers"][str(layer)]["last"] and "layers" not in alone
    saved = [checkpoint.read(f / checkpoint.LATEST, "x")["state_dict"] for f in (tmp_path, folder)]
    weights = [state[f"module.fc.{layer}.weight"] for state in saved]
    assert weights[0].shape == (2, width)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(f"top1_layer{layer}" in lines[0] for layer in range(1, 6))


def test_main_lincls__layers_on_two_processes_count_every_image_once(images, tmp_path, all_layers):
    """evaluate() itself raises for an image too many or too few; accuracies are of 11 images."""
    spawn(run, images, tmp_path, "--layer", "1", "5", "3")
    layers = json.loads((tmp_path / "result.json").read_text())["layers"]
    assert list(layers) == ["1", "3", "5"]
    for found in layers.values():
        right = found["last"]["top1"] * 11 / 100
        assert right == pytest.approx(round(right)) and found["last"]["unusable"] == 0
    assert layers["1"]["last"] == pytest.approx(all_layers[0]["layers"]["1"]["last"])


@pytest.mark.parametrize("flags, message", [
    (["--layer", "6"], "--layer 6: alexnet has 1 2 3 4 5"),
    (["--size", "64"], "--size 64: AlexNet's fully connected layers need 224"),
    (["--arch", "resnet50"], "--arch resnet50: CMC has alexnet"),
    (["--arch", "resnet18v1", "--size", "64", "--layer", "5"], "--layer 5: resnet18v1 has 6"),
])  # fmt: skip
def test_main_lincls__a_layer_that_is_not_there_is_one_line(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        probe(images, tmp_path, *flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
