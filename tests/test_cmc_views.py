"""CMC with more than two views: losses by the paper's formulas, names, flags, runs, probes of chosen views."""

import json
import math
import shutil

import numpy as np
import pytest
import skimage.color
import torch
from helpers import IMAGES, batch_of, build, forward, method_args, method_of, opened, spawn, tiny, uint8_views
from torch.nn.functional import cross_entropy, normalize

import main_lincls
import main_pretrain
from cmc.color import PARTS, SCALES, color_views, view_names
from cmc.memory import Scores, draw_rows
from cmc.nets import Branches, half
from methods import METHODS
from utils.learning import mixture
from utils.learning.criterion import criterion
from utils.learning.method import Step
from utils.run import checkpoint

PUBLISHED = {"Lab": ((50, 6.025, -6.6895), (50, 92.208, 101.1675)),
             "YCbCr": ((116.151, 121.080, 132.342), (109.5, 111.855, 111.964))}  # fmt: skip
CHANNELS = {"L": ("Lab", [0]), "ab": ("Lab", [1, 2]), "b": ("Lab", [2]), "Y": ("YCbCr", [0]), "CbCr": ("YCbCr", [1, 2]),
            "Cr": ("YCbCr", [2]), "HSV-H": ("HSV", [0]), "SV": ("HSV", [1, 2]), "HSV-V": ("HSV", [2]), "HED-H": ("HED", [0]),
            "LUV-UV": ("LUV", [1, 2]), "X": ("XYZ", [0]), "IQ": ("YIQ", [1, 2]), "YIQ-Y": ("YIQ", [0]), "Dr": ("YDbDr", [2]),
            "RGB-CIE-GB": ("RGB-CIE", [1, 2])}  # fmt: skip


def slow_view(pixels, name):
    """n x 3 x H x W uint8 -> the view by scikit-image."""
    space, channels = CHANNELS[name]
    x = getattr(skimage.color, f"rgb2{space.lower().replace('-', '')}")(pixels.permute(0, 2, 3, 1).numpy() / 255)
    middle, half_range = map(np.array, PUBLISHED.get(space, SCALES[space]))
    return torch.from_numpy(((x - middle) / half_range)[..., channels]).permute(0, 3, 1, 2).float()


def test_color_views__parts_of_several_spaces():
    pixels = torch.randint(0, 256, (2, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, found in zip(CHANNELS, color_views(pixels, "+".join(CHANNELS)), strict=True):
        torch.testing.assert_close(found, slow_view(pixels, name), rtol=0, atol=1e-4)


def test_parts__one_or_two_channels_of_each_space_under_one_name():
    assert len(PARTS) == 11 * 5 and all(1 <= part.stop - part.start <= 2 for _, part in PARTS.values())
    assert [view_names(space) for space in ("Lab", "YCbCr", "HSV")] == [["L", "ab"], ["Y", "CbCr"], ["HSV-H", "SV"]]


# ---- steps


def slow_terms(f, query, bank, loss, z, rows, ids):
    """The mean over the images (docs/methods.md, "CMC"). f: view -> n x C. bank: IMAGES x C. z: of the first step."""
    terms = []
    for i, image in enumerate(ids):
        scores = torch.stack([f[query][i] @ bank[r] for r in (image, *rows[i])]) / 0.07
        if loss == "softmax":
            terms.append(cross_entropy(scores[None], torch.tensor([0])))
            continue
        p, noise = scores.exp() / z, len(rows[i]) / IMAGES
        terms.append(-(p[0] / (p[0] + noise)).log() - (noise / (p[1:] + noise)).log().sum())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views, graph, loss", [
    ("L ab Y", "full", "nce"), ("ab L CbCr", "core", "nce"), ("L ab Y CbCr", "full", "softmax"), ("Y L ab Cr", "core", "nce"),
    ("ab L", "full", "nce"),
])  # fmt: skip
def test_step__losses_and_banks_equal_the_papers_formulas(views, graph, loss):
    """L_F = sum over i < j of L(i, j), L_C = sum over j > 1 of L(1, j), L(i, j) = both directions. The second step keeps Z."""
    names = views.split()
    flags = ["--views", *names, "--graph", graph, "--loss", loss]
    method, args = build("cmc", *flags), method_args("cmc", *flags)
    edges = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if graph == "full" or i == 0]
    pairs, z = edges + [(b, a) for a, b in edges], {}
    banks = {name: method.banks[name].memory.clone() for name in names}
    for number, ids in enumerate(([4, 39, 0, 7, 12, 13, 30, 21], [5, 4, 3, 39, 1, 0, 33, 7])):
        step, pixels = Step(number, 10, 0), uint8_views(args, seed=number)[0]
        found, stats = forward(method, batch_of([pixels], torch.tensor(ids)), step)
        rows = draw_rows(0, number, range(8), IMAGES, 24).tolist()  # the same rows for all pairs
        f = {v: normalize(method.encoder.get_submodule(f"view_{v}")(slow_view(pixels, v)), dim=1) for v in names}
        total, right = 0, {name: [] for name in names}
        for query, bank in pairs:
            scores = torch.stack([banks[bank][[i, *r]] @ x for i, r, x in zip(ids, rows, f[query], strict=True)]).detach()
            z.setdefault((query, bank), (scores / 0.07).exp().mean() * IMAGES)
            total = total + slow_terms(f, query, banks[bank], loss, z[query, bank], rows, ids)
            right[bank].append(100 * (scores.argmax(1) == 0).float().mean().item())
        assert found.item() == pytest.approx(total.item(), rel=2e-4)
        assert {k: v.item() for k, v in stats.items()} == pytest.approx(
            {f"top1_{v}": np.mean(x) for v, x in right.items()} | {"top1": np.mean(sum(right.values(), []))}
        )
        assert method.chance(8) == pytest.approx(len(pairs) * criterion(loss, 0.07, IMAGES).chance(25))
        method.commit(step)
        for name in names:
            for i, x in zip(ids, f[name].detach(), strict=True):
                banks[name][i] = normalize(0.5 * banks[name][i] + 0.5 * x, dim=0)
            torch.testing.assert_close(method.banks[name].memory, banks[name], rtol=1e-3, atol=1e-4)
    assert len(method.criteria) == len(pairs)
    if loss == "nce":
        kept = torch.stack([method.criteria[f"{q}_{b}" if len(names) > 2 else b].log_z.exp() for q, b in pairs])
        torch.testing.assert_close(kept, torch.stack([z[pair] for pair in pairs]), rtol=1e-3, atol=0)


def test_two_views__are_two_networks_and_two_banks_to_the_bit():
    """Weights, names, rows and loss: one network and bank after the other from the seed, ab scored before L."""
    torch.manual_seed(3)
    method = method_of(method_args("cmc"))
    torch.manual_seed(3)
    wanted = {f"encoder.{name}.{k}": v for name, channels in (("l_to_ab", 1), ("ab_to_l", 2))
              for k, v in half("tiny_resnetv0", channels, 16).state_dict().items()}  # fmt: skip
    bound = 1 / math.sqrt(16 / 3)
    wanted |= {f"banks.{name}.memory": torch.empty(IMAGES, 16).uniform_(-bound, bound) for name in ("l", "ab")}
    wanted |= {f"criteria.{name}.log_z": torch.tensor(math.inf) for name in ("l", "ab")}
    state = method.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(v, state[k]) for k, v in wanted.items())
    gammas = [v for k, v in state.items() if k.endswith("bn2.weight")]
    assert len(gammas) == 8 and all((v == 1).all() for v in gammas)  # not timm's 0

    pixels, ids = uint8_views(method_args("cmc"))[0], torch.arange(8)
    loss, _ = forward(method, batch_of([pixels], ids), Step(6, 10, 0))
    rows = torch.cat([ids[:, None], torch.from_numpy(draw_rows(0, 6, range(8), IMAGES, 24))], 1)
    networks = method.encoder.l_to_ab, method.encoder.ab_to_l
    layouts = [x.contiguous(memory_format=torch.channels_last) for x in color_views(pixels, "Lab")]
    f_l, f_ab = (normalize(network(x), dim=1) for network, x in zip(networks, layouts, strict=True))
    terms = []
    for f, bank in ((f_l, "ab"), (f_ab, "l")):
        scores, nce = Scores.apply(f, state[f"banks.{bank}.memory"], rows), criterion("nce", 0.07, IMAGES)
        nce.start(scores)
        terms.append(nce(scores)[0])
    assert torch.equal(loss, terms[0] + terms[1])


@pytest.mark.parametrize("kind", ["IM", "random-erasing", "cutout"])
def test_mixture__is_of_the_converted_image(monkeypatch, kind):
    """Of its normalized channels as one image, so random erasing fills each channel with other noise."""
    monkeypatch.setattr(mixture, "PROBABILITY", 1.0)
    flags = ["--im-type", kind, *(["--g-prob", "1", "--r-prob", "1"] if kind == "IM" else [])]
    pixels, args = uint8_views(method_args("cmc"))[0], method_args("cmc", *flags)
    found = method_of(args).targets(batch_of([pixels]), Step(2, 10, 0)).views
    assert [x.shape for x in found] == [(8, 1, 32, 32), (8, 2, 32, 32)]
    image = torch.cat([slow_view(pixels, "L"), slow_view(pixels, "ab")], 1)
    (wanted,) = mixture.Mixture(args)([image], Step(2, 10, 0).rng)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(wanted, image, atol=0.01)
    if kind == "random-erasing":
        erased = ((found[0] - image[:, :1]).abs() > 1e-3)[:, 0]
        assert (found[0][:, 0][erased] != found[1][:, 0][erased]).all()


# ---- flags


@pytest.mark.parametrize("flags, space", [
    (["--views", "L", "ab"], "Lab"), (["--views", "Y", "CbCr"], "YCbCr"), (["--space", "L+ab+Y"], "L+ab+Y"),
    (["--views", "L", "ab", "Y"], "L+ab+Y"), (["--space", "L+ab"], "Lab"), (["--views", "ab", "L"], "ab+L"), ([], "Lab"),
])  # fmt: skip
def test_flags__space_and_views_are_two_forms(flags, space):
    assert method_args("cmc", *flags).space == space


@pytest.mark.parametrize("flags, message", [
    ("--views UV L", "--views UV L: UV is no part of a colour space; pass LUV-UV or YUV-UV"),
    ("--views L Lab", "--views L Lab: Lab is no part of a colour space; pass "),
    ("--views L", "--views L: one view has nothing to be contrasted with; pass two, such as L ab"),
    ("--views L ab L", "--views L ab L: L is there twice; pass each view once"),
    ("--space lab", "--space lab: is no colour space; pass one of Lab, YCbCr,"),
    ("--space Lab --views L ab Y", "--space and --views: are two forms of one flag; leave one out"),
    ("--views L ab Y --space=YIQ", "--views and --space: are two forms of one flag; leave one out"),
    ("--views L ab Y --graph star", "argument --graph: invalid choice: 'star'"),
])  # fmt: skip
def test_flags__a_wrong_view_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        method_args("cmc", *flags.split())
    assert f"error: {message}" in capsys.readouterr().err


def test_check__core_needs_three_views():
    METHODS["cmc"].check(method_args("cmc", "--views", "L", "ab", "Y", "--graph", "core"), 40)
    with pytest.raises(ValueError, match="--graph core: is the full graph if there are two views; leave it out, or pass more"):
        METHODS["cmc"].check(method_args("cmc", "--graph", "core"), 40)


# ---- runs

COMMON = ["--device", "cpu", "--amp", "fp32", "--workers", "0"]
THREE = ["--views", "ab", "L", "Cr"]


def start(images, out, *flags):
    main_pretrain.main([*tiny("cmc"), "--shards", f"{images}/train", "--output-dir", str(out), *COMMON, *map(str, flags)])


def train(images, out, *flags):
    start(images, out, *flags)
    return torch.load(out / checkpoint.LATEST, weights_only=True)


def fails(capsys, *flags):
    with pytest.raises(SystemExit, match="2"):
        train(*flags)
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def three(images, tmp_path_factory):
    """The folder and the last checkpoint of two epochs with three views."""
    folder = tmp_path_factory.mktemp("three")
    return folder, train(images, folder, *THREE, "--epochs", 2, "--save-freq", 1)


def test_run__three_views_resume_exactly(images, tmp_path, capsys, three):
    folder, whole = three
    assert whole["flags"]["space"] == "ab+L+Cr" and whole["flags"]["graph"] == "full"
    shutil.copy(folder / "checkpoint_0000.pth.tar", tmp_path / checkpoint.LATEST)
    again = train(images, tmp_path, *THREE, "--epochs", 2, "--resume", "auto")
    assert again["state_dict"].keys() == whole["state_dict"].keys()
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in whole["state_dict"].items())
    resume = ["--epochs", 3, "--resume", "auto"]
    line = fails(capsys, images, tmp_path, *THREE, "--graph", "core", *resume)
    assert "--graph core: " in line and "was trained with --graph full" in line
    for flags, now in (
        (["--views", "ab", "L"], "--space ab+L"),
        ([], "--space Lab"),
        (["--views", "L", "ab", "Cr"], "--space L+"),
    ):
        line = fails(capsys, images, tmp_path, *flags, *resume)
        assert f"{now}" in line and "was trained with --space ab+L+Cr" in line
    other = tmp_path / "other"
    other.mkdir()
    for i, shard in enumerate(sorted((images / "train").glob("*.tar"), reverse=True)):
        (other / f"{i}.tar").symlink_to(shard)
    assert "holds features of other images" in fails(capsys, images, tmp_path, *THREE, *resume, "--shards", other)


def test_run__a_two_view_checkpoint_of_before_resumes(images, tmp_path, capsys):
    """It knows --space, but no --graph."""
    old = train(images, tmp_path / "run", "--epochs", 1, "--space", "YCbCr")
    assert old["flags"].pop("graph") == "full"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        torch.save(old, tmp_path / folder / checkpoint.LATEST)
    whole = train(images, tmp_path / "run", "--epochs", 2, "--space", "YCbCr", "--resume", "auto")
    again = train(images, tmp_path / "a", "--epochs", 2, "--views", "Y", "CbCr", "--resume", "auto")
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in whole["state_dict"].items())
    line = fails(capsys, images, tmp_path / "b", "--epochs", 2, "--views", "L", "ab", "--resume", "auto")
    assert "--space Lab: " in line and "was trained with --space YCbCr" in line


def test_run__a_failed_step_is_computed_again_with_its_views(images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(images, tmp_path, *THREE, "--graph", "core", "--lr", "1e30", "--epochs", 1, "--lr-steps")
    (path,) = tmp_path.glob("failed_step_*.pth.tar")
    with pytest.raises(SystemExit, match="0"):
        main_pretrain.main(["--replay", str(path), "--device", "cpu"])
    assert "the step fails again" in capsys.readouterr().out


def test_run__two_processes_have_the_loss_of_one(images, tmp_path):
    flags = [*THREE, "--graph", "core", "--epochs", 1, "--print-freq", 1]
    start(images, tmp_path / "one", *flags, "--bn-splits", 2)
    spawn(start, images, tmp_path / "two", *flags)
    first = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0]) for run in ("one", "two")]
    for name in ("loss", "top1", "top1_ab", "top1_L", "top1_Cr"):
        assert first[1][name] == pytest.approx(first[0][name], rel=1e-5), name


# ---- probes


def paths(folder, out="x"):
    return ["--pretrained", folder, "--train-shards", "x", "--val-shards", "x", "--output-dir", out, "--size", 32]


def test_probe__features_of_chosen_views_are_their_part_of_all(three):
    folder, saved = three
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole, args = opened(*paths(folder))
    features = whole.features(x, "fp32")[6]
    assert args.space == "ab+L+Cr" and features.shape == (4, 3 * 64)
    for name, part in zip(("ab", "L", "Cr"), features.split(64, 1), strict=True):
        network = half("tiny_resnetv0", len(CHANNELS[name][1]))
        prefix = f"module.encoder.view_{name}."
        state = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix) and ".fc." not in k}
        network.load_state_dict(state)
        wanted = network.eval().maps(slow_view(x, name))[6]
        torch.testing.assert_close(part, wanted.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(opened(*paths(folder), "--only-views", name)[0].features(x, "fp32")[6], part)
    two = opened(*paths(folder), "--only-views", "Cr", "ab")[0].features(x, "fp32")[6]  # in the order of the training
    torch.testing.assert_close(two, torch.cat([features[:, :64], features[:, 128:]], 1))
    with pytest.raises(ValueError, match="--only-views Y: the views are ab L Cr; pass some of them"):
        opened(*paths(folder), "--only-views", "Y")
    with pytest.raises(ValueError, match="--space Lab: .* was trained with ab.L.Cr; leave it out"):
        opened(*paths(folder), "--space", "Lab")


def test_probe__of_bare_weights_names_its_views(tmp_path):
    """A file without flags is recognized as CMC's by its names; its views come from the flag."""
    trunk = Branches("resnet18v1", {"view_ab": 2, "view_L": 1, "view_Cr": 1}).state_dict()
    torch.save({"state_dict": trunk}, tmp_path / "bare.pth")
    loaded, args = opened(*paths(tmp_path / "bare.pth"), "--space", "ab+L+Cr")
    assert (args.method, args.arch) == ("cmc", "resnet18v1") and all(
        torch.equal(v, trunk[k]) for k, v in loaded.trunk.state_dict().items()
    )
    with pytest.raises(ValueError, match="--space: .*bare.pth does not contain it"):
        opened(*paths(tmp_path / "bare.pth"))


def test_main_lincls__of_two_of_three_views(images, tmp_path, three):
    flags = ["--train-shards", f"{images}/train", "--val-shards", f"{images}/val", "--only-views", "L", "ab", "--epochs", "1",
             "--batch-size", "8", "--size", "32", "--output-dir", str(tmp_path), *COMMON]  # fmt: skip
    main_lincls.main(["--pretrained", str(three[0]), *flags])
    state = checkpoint.read(tmp_path / checkpoint.LATEST, "x")
    assert state["probe"]["only_views"] == ["L", "ab"] and state["state_dict"]["module.fc.6.weight"].shape == (2, 128)
