"""export.py and hubconf.py: the features of a run in other libraries, released layouts, errors that leave nothing."""

import hashlib
import json
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from helpers import method_args, method_of, opened
from safetensors.torch import load_file
from torch import nn

import export
import main_pretrain
from cmc.color import color_views
from cmc.nets import Branches
from methods import METHODS
from utils.evaluation import exports
from utils.evaluation.card import OUTSIDE
from utils.run import checkpoint

ROOT = Path(__file__).parent.parent
IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
MEAN, STD = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
X = (IMAGES / 255 - MEAN) / STD  # normalized as timm and torchvision do
ENDING = {"torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors", "huggingface": "", "detectron2": ".pkl",
          "released": ".pth.tar"}  # fmt: skip
RUNS = {
    "resnet50": ("insdis", "--arch", "resnet50"),
    "convnext_tiny": ("insdis", "--arch", "convnext_tiny"),
    "efficientnet_b0": ("insdis", "--arch", "efficientnet_b0"),
    **{name: (name,) for name in METHODS},
    "cmc": ("cmc", "--arch", "resnet18v1"),  # of which timm has the depths
    "alexnet": ("cmc", "--arch", "alexnet", "--size", "224"),
    "dilated": ("moco", "--arch", "resnet18", "--output-stride", "16"),
    "dilated cmc": ("cmc", "--arch", "resnet18v1", "--output-stride", "8"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """name of RUNS -> (folder of a run with random weights, state dict of its trunk in timm's names)."""
    known = {}

    def of(name):
        if name not in known:
            method, *flags = RUNS[name]
            folder, args = tmp_path_factory.mktemp(name), method_args(method, *flags)
            torch.manual_seed(0)
            model = method_of(args)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("running_mean"):
                    buffer.normal_(std=0.1)
                elif buffer_name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
            content = {"epoch": 3, "step": 0, "method": method, "arch": args.arch, "flags": vars(args), "index": "0123abcd"}
            torch.save(content | {"state_dict": checkpoint.prefixed(model), "optimizer": {}}, folder / checkpoint.LATEST)
            encoder = getattr(model, {"w2ssl": "base_encoder", "cmc": "encoder", "insdis": "encoder"}.get(method, "encoder_q"))
            head = r"((l_to_ab|ab_to_l)\.)?(fc|classifier|head\.fc)"
            known[name] = folder, {n: v.clone() for n, v in encoder.state_dict().items() if not re.match(head, n)}
        return known[name]

    return of


def skip_unless_loads(to):
    if to == "huggingface" and not hasattr(exports.timm_hub, "load_model_config_from_path"):
        pytest.skip("this timm loads no folder")


def exported(run, name, to, tmp_path, *flags):
    skip_unless_loads(to)
    folder, _ = run(name)
    out = tmp_path / f"out{ENDING[to]}"
    export.main([str(folder), "--to", to, "-o", str(out), *flags])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return out


def features(arch, state, x, **options):
    """The pooled features of timm's model with these weights."""
    model = timm.create_model(arch, num_classes=0, **options).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(x)


def equal(model, x, wanted, rounding=1e-6):
    with torch.no_grad():
        found = model.eval()(x) if isinstance(model, nn.Module) else model(x)
    assert found.shape == wanted.shape and wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, atol=rounding, rtol=rounding)


def timms(out, arch, **options):
    return timm.create_model(arch, num_classes=0, checkpoint_path=str(out), **options)


def torchvisions(out, arch):
    """Without the last linear layer, whose weights must be absent in the file."""
    model = torchvision.models.get_model(arch, weights=None)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.set_submodule(last, nn.Identity())
    model.load_state_dict(torch.load(out, weights_only=True))
    return model


def safetensorss(out, arch):
    model = timm.create_model(arch, num_classes=0)
    model.load_state_dict(load_file(out))
    return model


def huggingfaces(out, arch):
    return timm.create_model(f"local-dir:{out}", pretrained=True)


def detectron2s(out, arch):
    """torchvision's model, with weights found by detectron2's names ."""
    saved, model = pickle.loads(out.read_bytes()), torchvision.models.get_model(arch, weights=None)
    assert saved["matching_heuristics"] is True and "__author__" in saved
    names = {"stem.conv1": model.conv1, "stem.conv1.norm": model.bn1}
    for stage, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), 2):
        for number, block in enumerate(layer):
            for i in (1, 2, 3):
                names[f"res{stage}.{number}.conv{i}"] = getattr(block, f"conv{i}")
                names[f"res{stage}.{number}.conv{i}.norm"] = getattr(block, f"bn{i}")
            if block.downsample:
                names |= dict(zip((f"res{stage}.{number}.shortcut{n}" for n in ("", ".norm")), block.downsample, strict=True))
    seen = set()
    for name, module in names.items():
        for part in ["weight"] if isinstance(module, nn.Conv2d) else ["weight", "bias", "running_mean", "running_var"]:
            with torch.no_grad():
                getattr(module, part).copy_(torch.from_numpy(saved["model"][f"{name}.{part}"]))
            seen.add(f"{name}.{part}")
    assert seen == saved["model"].keys()
    model.fc = nn.Identity()
    return model


LOADERS = {"timm": timms, "torchvision": torchvisions, "safetensors": safetensorss, "huggingface": huggingfaces,
           "detectron2": detectron2s}  # fmt: skip


CASES = [  # the other pairs take the same ways
    *(("resnet50", to) for to in ("torchvision", "huggingface", "detectron2", "released")),
    *(("efficientnet_b0", to) for to in ("timm", "torchvision", "safetensors", "released", "detectron2")),
    *(("convnext_tiny", to) for to in ("torchvision", "huggingface")),
]


@pytest.mark.parametrize("arch, to", CASES)
def test_export__features_are_equal(run, tmp_path, arch, to, capsys):
    if to == "detectron2" and arch != "resnet50":
        with pytest.raises(SystemExit):
            exported(run, arch, to, tmp_path)
        assert "--to detectron2: its ResNets have no weight like" in capsys.readouterr().err
        return
    out, wanted = exported(run, arch, to, tmp_path), features(arch, run(arch)[1], X)
    if to == "released":
        flags = "--pretrained", out, "--train-shards", "x", "--val-shards", "x", "--output-dir", "x", "--method", RUNS[arch][0]
        equal(opened(*flags)[0].trunk, X, wanted)
    else:
        equal(LOADERS[to](out, arch), X, wanted)
    said = capsys.readouterr().out
    assert f"{out}: method {RUNS[arch][0]} (checkpoint), arch {arch} (checkpoint); equal features of 4 images" in said
    assert float(re.search(r"largest difference (\S+),", said)[1]) <= 1e-5


@pytest.mark.parametrize("branch, to, stride", [
    ("l", "huggingface", 32), ("ab", "timm", 32), ("l", "safetensors", 32), ("ab", "huggingface", 8), ("l", "timm", 8)
])  # fmt: skip
def test_export__a_branch_of_cmc(run, tmp_path, branch, to, stride):
    """It is timm's ResNet of half the width, for one or two channels."""
    cmc, (name, number) = {32: "cmc", 8: "dilated cmc"}[stride], {"l": ("l_to_ab.", 0), "ab": ("ab_to_l.", 1)}[branch]
    state = {n.removeprefix(name): v for n, v in run(cmc)[1].items() if n.startswith(name)}
    options = {"in_chans": number + 1, "channels": (32, 64, 128, 256), "output_stride": stride}
    x, out = color_views(IMAGES, "Lab")[number], exported(run, cmc, to, tmp_path, "--branch", branch)
    model = huggingfaces(out, "") if to == "huggingface" else timms(out, "resnet18", **options)
    equal(model, x, features("resnet18", state, x, **options))


@pytest.mark.parametrize("name", ["cmc", "alexnet"])
def test_export__both_branches_in_one_file(run, tmp_path, name):
    saved, state = load_file(exported(run, name, "safetensors", tmp_path)), run(name)[1]
    state = {n: v for n, v in state.items() if ".fc" not in n}
    assert saved.keys() == state.keys() and all(torch.equal(v, state[n]) for n, v in saved.items())


def test_export__a_dilated_trunk(run, tmp_path):
    wanted = features("resnet18", run("dilated")[1], X, output_stride=16)
    equal(huggingfaces(exported(run, "dilated", "huggingface", tmp_path), ""), X, wanted)


class Saved(nn.Module):
    """The released modules of CMC and InsDis: an encoder inside DataParallel, which saves its names with `module.`."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.module = encoder


@pytest.mark.parametrize("name", [*METHODS, "alexnet"])
def test_export__the_released_probe_loads_it(run, tmp_path, name):
    """By the rules of the probes of MoCo and MoCo-v3: a prefix, and fc left out. Those of CMC and InsDis load every name."""
    saved = torch.load(exported(run, name, "released", tmp_path), weights_only=True)
    state, method = run(name)[1], RUNS[name][0]
    assert saved["epoch"] == 3 and saved["arch"] == method_args(*RUNS[name]).arch
    if method in ("cmc", "insdis"):
        if method == "cmc":
            model = Branches(saved["arch"], {"l_to_ab": 1, "ab_to_l": 2}, 16)
            if name == "alexnet":
                for branch in (model.l_to_ab, model.ab_to_l):
                    branch.fc8 = nn.Sequential(branch.fc8)
        else:
            model = timm.create_model("tiny_resnet", num_classes=16)
        Saved(model).load_state_dict(saved["model"])
    else:
        prefix = "module.base_encoder" if method == "w2ssl" else "module.encoder_q"
        kept = [n for n in saved["state_dict"] if n.startswith(prefix) and not n.startswith(f"{prefix}.fc")]
        model = timm.create_model("tiny_resnet", num_classes=7)
        missing = model.load_state_dict({n[len(prefix) + 1 :]: saved["state_dict"][n] for n in kept}, strict=False)
        assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[n]) for n, value in state.items())
    if method == "w2ssl":
        places = {n for n in saved["state_dict"] if "fc_loc" in n}
        assert places == {"module.base_encoder.fc_loc.weight", "module.base_encoder.fc_loc.bias"}


def probe_of(folder, name, width, sha256=None):
    """A linear probe with 5 classes, as main_lincls.py saves it -> its folder and classifier."""
    out, fc = folder / "linear", nn.Linear(width, 5)
    out.mkdir(exist_ok=True)
    sha256 = sha256 or hashlib.sha256((folder / checkpoint.LATEST).read_bytes()).hexdigest()
    state = {"module.fc.6.weight": fc.weight.detach(), "module.fc.6.bias": fc.bias.detach()}
    torch.save({"probe": {"weights": sha256}, "epoch": 1, "step": 0, "state_dict": state}, out / checkpoint.LATEST)
    return out, fc


@pytest.mark.parametrize("to", ["torchvision", "timm", "huggingface"])
def test_export__with_the_classifier_of_a_probe(run, tmp_path, to):
    folder, state = run("efficientnet_b0")
    probe, fc = probe_of(folder, "efficientnet_b0", 1280)
    out = exported(run, "efficientnet_b0", to, tmp_path, "--classifier", str(probe))
    if to == "torchvision":
        model = torchvision.models.efficientnet_b0(num_classes=5)
        model.load_state_dict(torch.load(out, weights_only=True))
    else:
        model = (
            timm.create_model("efficientnet_b0", num_classes=5, checkpoint_path=str(out))
            if to == "timm"
            else huggingfaces(out, "")
        )
    with torch.no_grad():
        equal(model, X, fc(features("efficientnet_b0", state, X)))


def test_export__model_card_and_preprocessing(run, tmp_path):
    folder, _ = run("mosrep")
    sha256 = hashlib.sha256((folder / checkpoint.LATEST).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps({"commit": "fedc987", "samples": 40}))
    for name, top1, of in (("linear", 71.25, sha256), ("older", 33.5, "another")):
        (folder / name).mkdir()
        result = {"last": {"top1": top1, "epoch": 89}, "protocol": {"lr": 0.2, "trust": 0.001}, "checkpoint_sha256": of}
        (folder / name / "result.json").write_text(json.dumps(result))
    out = exported(run, "mosrep", "huggingface", tmp_path, "--license", "cc-by-4.0")
    card = (out / "README.md").read_text()
    for part in ("library_name: timm\n", "license: cc-by-4.0\n", "method | mosrep", "hash of the data | 0123abcd",
                 "fedc987", "images | 40", "epochs | 3", "--shift-range 14", sha256, "last top1 71.25",
                 "`--lr 0.2 --trust 0.001`"):  # fmt: skip
        assert part in card, part
    assert "33.5" not in card and "--shards" not in card
    config = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [3, 64, 64] and config["interpolation"] == "bilinear" and config["crop_mode"] == "center"
    assert config["mean"] == [0.485, 0.456, 0.406] and config["std"] == [0.229, 0.224, 0.225]
    assert round(64 / config["crop_pct"]) == 64 * 256 // 224


def test_export__a_card_leaves_out_what_is_no_recipe():
    assert main_pretrain.get_args(["--shards", "x"]).outside - {"init"} <= OUTSIDE


def refused(capsys, *argv):
    """The one line of an export that ends with an error."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and len(lines[0]) < 400
    return lines[0]


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("mosrep", "--to torchvision -o out.pth", "torchvision has no tiny_resnet; pass --to timm"),
        ("dilated", "--to torchvision -o out.pth", "its resnet18 cannot have output_stride 16"),
        ("dilated", "--to detectron2 -o out.pkl", "takes no trunk with output_stride"),
        (
            "cmc",
            "--to timm -o out.pth",
            "--to timm: cannot hold the trunk resnet18v1 of cmc as one network; pass --branch l or ab",
        ),
        ("alexnet", "--to timm -o out.pth", "alexnet of cmc as one network; pass --to safetensors or released"),
        ("cmc", "--to timm --branch a -o out.pth", "--branch a: resnet18v1 of cmc has no such branch; pass l or ab"),
        ("cmc", "--to torchvision --branch l -o out.pth", "its resnet18 cannot have in_chans 1"),
        ("mosrep", "--to timm --branch l -o out.pth", "--branch l: tiny_resnet of mosrep has no such branch; leave it out"),
        ("mosrep", "--to released --branch l -o out.pth.tar", "holds the whole checkpoint; leave out --branch"),
        ("mosrep", "--to timm -o out.pkl", "--to timm needs the ending .pth; pass out.pth"),
        ("mosrep", "--to timm -o no/out.pth", "there is no folder no; make it"),
        ("mosrep", "--to timm -o there.pth", "-o there.pth: exists; pass another name"),
        ("mosrep", "--to huggingface -o there.pth", "-o there.pth: exists; pass another name"),
        (
            "mosrep",
            "--to timm -o /proc/out.pth",
            "-o /proc/out.pth: No such file or directory; pass a place where you may write",
        ),
        ("mosrep", "--to timm -o out.pth --classifier nothing", "--classifier nothing: no such file"),
        ("mosrep", "--to timm -o out.pth --license mit", "--license mit: is for the model card of --to huggingface"),
    ],
)
def test_export__refuses_in_one_line(run, tmp_path, monkeypatch, capsys, name, flags, message):
    folder = run(name)[0]
    monkeypatch.chdir(tmp_path)
    Path("there.pth").write_text("mine")
    assert message in refused(capsys, folder, *flags.split())
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"] and Path("there.pth").read_text() == "mine"


def test_export__messages_name_what_the_user_types(tmp_path, capsys):
    to = "--to", "timm", "-o", tmp_path / "out.pth"
    assert refused(capsys, tmp_path / "no", *to).startswith(f"export.py: error: RUN {tmp_path}/no: no such file")
    assert refused(capsys, "random", *to).endswith("error: RUN random: has no weights to export; pass the folder of a run")
    assert "RUN: is the first word; pass export.py RUN --to" in refused(capsys, *to, tmp_path)
    torch.save({"state_dict": {"module.encoder_q.x": X}}, tmp_path / "c.pth")
    assert f"RUN {tmp_path}/c.pth: does not fit the trunk" in refused(capsys, tmp_path / "c.pth", *to)


def test_export__the_licence_of_weights_is_not_guessed(run, tmp_path, capsys):
    card = (exported(run, "mosrep", "huggingface", tmp_path) / "README.md").read_text()
    assert "license: unknown\n" in card and "licence is unknown; --license NAME" in capsys.readouterr().out


def test_export__refuses_a_probe_of_other_weights(run, tmp_path, capsys):
    folder, _ = run("mosrep")
    probe, _ = probe_of(folder, "mosrep", 96, "another")
    line = refused(capsys, folder, "--to", "timm", "-o", tmp_path / "out.pth", "--classifier", probe)
    assert f"is of another checkpoint than {folder}" in line
    line = refused(capsys, folder, "--to", "timm", "-o", tmp_path / "out.pth", "--classifier", folder)
    assert "is not a linear probe" in line


def test_export__without_safetensors(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for to in ("safetensors", "huggingface"):
        line = refused(capsys, run("mosrep")[0], "--to", to, "-o", tmp_path / f"out{ENDING[to]}")
        assert "pip install safetensors" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ENDING)
def test_export__a_full_disk_leaves_nothing(run, tmp_path, capsys, to):
    """A limit on the size of a file has the same effect in the middle of a write."""
    skip_unless_loads(to)
    name, soft = "efficientnet_b0" if to != "detectron2" else "mosrep", resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = run(name)[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft[1]))
    try:
        line = refused(capsys, folder, "--to", to, "-o", tmp_path / f"out{ENDING[to]}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert "File too large; pass a place where you may write" in line and not list(tmp_path.iterdir())


def test_export__other_features_are_not_written(run, tmp_path, monkeypatch, capsys):
    ending, files, load = exports.TARGETS["timm"]

    def broken(wanted):
        state = wanted.state()
        return {"": exports.pickled(state | {"bn1.weight": state["bn1.weight"] + 0.01})}

    monkeypatch.setitem(exports.TARGETS, "timm", (ending, broken, load))
    line = refused(capsys, run("mosrep")[0], "--to", "timm", "-o", tmp_path / "out.pth")
    assert re.search(r"--to timm: gives other features \(largest difference \S+, .*\); nothing is written", line)
    monkeypatch.setitem(exports.TARGETS, "timm", (ending, lambda wanted: {"": exports.pickled({})}, load))
    assert "nothing is written" in refused(capsys, run("mosrep")[0], "--to", "timm", "-o", tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


HUB = """
import sys
for name in ("webdataset", "tensorboard", "torch.utils.tensorboard", "tqdm", "braceexpand", "huggingface_hub", "safetensors"):
    sys.modules[name] = None
import torch
root, run, cmc, out = sys.argv[1:]
x = torch.load(out, weights_only=True)
model = torch.hub.load(root, "insdis_resnet50", source="local", weights=run)
assert not model.training and all(p.requires_grad for p in model.parameters())
with torch.no_grad():
    found = {"one": model(x), "cmc": torch.hub.load(root, "trunk", source="local", weights=cmc)(x)}
torch.save(found, out)
"""


def test_hubconf__needs_only_torch_torchvision_and_timm(run, tmp_path):
    """torch.hub.load in a process without the other packages."""
    (one, state), (cmc, halves), out = run("resnet50"), run("cmc"), tmp_path / "x.pt"
    torch.save(X, out)
    words = [sys.executable, "-W", "error", "-c", HUB, ROOT, one, cmc, out]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = torch.load(out, weights_only=True)
    equal(lambda _: found["one"], None, features("resnet50", state, X), 1e-4)  # another number of threads
    parts = []
    for number, name in enumerate(("l_to_ab.", "ab_to_l.")):
        half = {n.removeprefix(name): v for n, v in halves.items() if n.startswith(name)}
        view = color_views(IMAGES, "Lab")[number]
        parts.append(features("resnet18", half, view, in_chans=number + 1, channels=(32, 64, 128, 256)))
    torch.testing.assert_close(found["cmc"], torch.cat(parts, 1), atol=1e-4, rtol=1e-4)


def test_hubconf__has_an_entry_for_each_method():
    import hubconf

    names = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert names == {"trunk", *(f"{name}_{method.ARCH}" for name, method in METHODS.items())}


def test_detection__protocols():
    """docs of MoCo (VOC, C4) and W2SSL (COCO, FPN): the numbers that decide a result."""
    voc, coco = (yaml.safe_load((ROOT / "detection" / f"{name}.yaml").read_text()) for name in ("voc_c4", "coco_fpn"))
    assert voc["SOLVER"] == {
        "IMS_PER_BATCH": 16,
        "BASE_LR": 0.02,
        "STEPS": [18000, 22000],
        "MAX_ITER": 24000,
        "WARMUP_ITERS": 100,
    }
    assert coco["SOLVER"] == {"IMS_PER_BATCH": 8, "BASE_LR": 0.01, "STEPS": [120000, 160000], "MAX_ITER": 180000}
    assert voc["DATASETS"] == {"TRAIN": ["voc_2007_trainval", "voc_2012_trainval"], "TEST": ["voc_2007_test"]}
    assert f"class {voc['MODEL']['ROI_HEADS']['NAME']}(Res5ROIHeads)" in (ROOT / "detection" / "train_net.py").read_text()
    for config in (voc, coco):
        model = config["MODEL"]
        assert (
            model["BACKBONE"]["FREEZE_AT"] == 0
            and config["INPUT"]["FORMAT"] == "RGB"
            and config["TEST"]["PRECISE_BN"]["ENABLED"]
        )
        assert (model["RESNETS"]["DEPTH"], model["RESNETS"]["NORM"], model["RESNETS"]["STRIDE_IN_1X1"]) == (50, "SyncBN", False)
        pixels = torch.tensor([model["PIXEL_MEAN"], model["PIXEL_STD"]]) / 255
        torch.testing.assert_close(pixels, torch.stack([MEAN, STD]).flatten(1), atol=1e-4, rtol=0)
