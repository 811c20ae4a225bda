"""Files of weights from elsewhere: every layout of docs/methods.md gives equal features; what cannot be right is refused."""

import re

import pytest
import timm
import torch
import torchvision
from helpers import opened
from safetensors.torch import save_file

from utils.learning import layouts

PROBE = ["--train-shards", "x", "--val-shards", "x", "--output-dir", "x"]
HEAD = {"0.weight": torch.randn(8, 96), "0.bias": torch.randn(8), "2.weight": torch.randn(4, 8)}
MOSREP = {f"module.projector_{s}.{n}": torch.randn(4) for s in "qk" for n in ("conv.0.weight", "conv.1.running_var")}
CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def filled(model, seed):
    """The model with random weights and statistics, of both signs where they may be."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if "running_var" in name else (noise - 0.4) * (0.2 if value.ndim > 1 else 1))
    return model.eval()


@pytest.fixture(scope="module")
def resnets():
    """The trunk to load, with a classifier, and another one that must not be loaded."""
    return [filled(timm.create_model("tiny_resnet", num_classes=3), seed) for seed in (1, 2)]


def under(prefix, model, *head):
    """The weights of a trunk below a prefix; head: name of the published head that replaces its classifier."""
    state = {prefix + name: value for name, value in model.state_dict().items() if head == () or not name.startswith("fc.")}
    return state | {f"{prefix}{name}.{part}": value for name in head for part, value in HEAD.items()}


def numbered(prefix, model):
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    return {f"{prefix}{CHILDREN[name.split('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


def rest(**heads):
    return {f"module.{name}.{part}": value for name in heads for part, value in HEAD.items()}


LAYOUTS = {  # title -> a file of the trunk a; b is the trunk of another branch
    "MoCo-v1": lambda a, b: {"state_dict": under("module.encoder_q.", a) | under("module.encoder_k.", b)},
    "MoCo-v2": lambda a, b: {"state_dict": under("module.encoder_k.", b, "fc") | under("module.encoder_q.", a, "fc")},
    "MosRep": lambda a, b: {"state_dict": under("module.encoder_q.", a, *[]) | under("module.encoder_k.", b) | MOSREP},
    "MoCo-v3": lambda a, b: {"state_dict": under("module.momentum_encoder.", b, "fc") | under("module.base_encoder.", a, "fc")
                             | rest(predictor=1)},
    "MoCo-v3 ": lambda a, b: {"state_dict": under("module.momentum_encoder.", a, "fc")},
    "W2SSL": lambda a, b: {"state_dict": under("module.base_encoder.", a, "fc_crop", "fc_loc")
                           | under("module.momentum_encoder.", b, "fc_crop") | rest(predictor=1)},
    "InsDis or MoCo-v1, CMC's authors": lambda a, b: {"model": under("encoder.module.", a), "epoch": 200},
    "InsDis or MoCo-v1, CMC's authors ": lambda a, b: {"model": under("module.", a)},
    "VISSL": lambda a, b: {"classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", a, *[]), "heads": {"0.clf.weight": torch.randn(3, 3)}}}}},
    "lightly": lambda a, b: {"state_dict": numbered("backbone_momentum.", b) | numbered("backbone.", a)
                             | {"projection_head.layers.0.weight": torch.randn(3)}},
    "DINO (teacher)": lambda a, b: {"student": under("module.backbone.", b), "teacher": under("backbone.", a)
                                    | {"head.mlp.0.weight": torch.randn(3)}},
    "DINO (student)": lambda a, b: {"student": under("module.backbone.", a) | rest(head=1), "epoch": 3},
    "DINOv2 (teacher)": lambda a, b: {"teacher": under("backbone.", a) | {"dino_head.mlp.0.weight": torch.randn(3)}},
    "Barlow Twins": lambda a, b: {"model": under("module.backbone.", a) | rest(projector=1), "optimizer": {}},
    "solo-learn or mmpretrain": lambda a, b: {"state_dict": under("momentum_backbone.", b) | under("backbone.", a)
                                              | rest(neck=1, classifier=1), "meta": {"epoch": 1}},
    "SwAV": lambda a, b: under("module.", a) | rest(projection_head=1, prototypes=1),
    "SimSiam, BYOL or older solo-learn": lambda a, b: {"arch": "resnet50", "state_dict": under("module.encoder.", a, "fc")
                                                       | rest(predictor=1)},
    "SimSiam, BYOL or older solo-learn ": lambda a, b: {"state_dict": under("momentum_encoder.", b) | under("encoder.", a)},
    "torchvision or timm": lambda a, b: {"model": under("", a)},
    "torchvision or timm ": lambda a, b: under("", a),
    "torchvision or timm  ": lambda a, b: {"arch": "tiny_resnet", "state_dict": under("module.", a)},
}  # fmt: skip


def changed(content, rename):
    """A file with other names of weights, at any depth."""
    if not isinstance(content, dict):
        return content
    weights = any(isinstance(value, torch.Tensor) for value in content.values())
    return {rename(name) if weights else name: changed(value, rename) for name, value in content.items()}


FORMS = {
    "as saved": lambda name: name,
    "single": lambda name: re.sub(r"^module\.|(?<=encoder\.)module\.", "", name),
    "compiled": lambda name: re.sub(r"((encoder\w*|backbone|_feature_blocks)\.(module\.)?)", r"\1_orig_mod.", name, count=1),
    "compiled whole": lambda name: f"_orig_mod.{name}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("title", LAYOUTS)
def test_build_trunk__every_layout_gives_equal_features(resnets, tmp_path, capsys, title, form):
    content = changed(LAYOUTS[title](*resnets), FORMS[form])
    torch.save(content, tmp_path / "c.pth")
    frozen, args = opened("--pretrained", tmp_path / "c.pth", "--arch", "tiny_resnet", "--size", "64", *PROBE)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        wanted = resnets[0].forward_head(resnets[0].forward_features((x / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(frozen.features(x, "fp32")[6], wanted)
    said = capsys.readouterr().out
    count = len([name for name in resnets[0].state_dict() if not name.startswith("fc.")])
    if title.startswith("InsDis") and form == "single":  # without `module.` its names are torchvision's or SimSiam's
        title = "torchvision or timm" if title.endswith(" ") else title
    assert f"c.pth: {title.strip()}, {count} tensors, trunk tiny_resnet" in said, said


WHOLE = ["convnext_atto", "efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("arch", WHOLE)
def test_build_trunk__inside_a_classifier_of_timm(tmp_path, arch):
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5).eval()
    state = dict(model.state_dict())
    if "swin" in arch:  # buffers of older releases
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt", "arch": arch})
    frozen, args = opened("--pretrained", tmp_path / "model.safetensors", *PROBE)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(x), pre_logits=True)
        assert args.arch == arch and torch.equal(frozen.trunk(x), wanted)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_build_trunk__a_resnet_of_torchvision_is_recognized_by_its_shapes(tmp_path, arch):
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    frozen, args = opened("--pretrained", tmp_path / "c.pth", *PROBE)
    model.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen.trunk(x), model(x))
    assert args.arch == arch


@pytest.mark.parametrize("arch, name", [("mobilenetv2_100", "mobilenet_v2"), ("efficientnet_b0", "efficientnet_b0"),
                                        ("convnext_tiny", "convnext_tiny")])  # fmt: skip
def test_build_trunk__under_torchvisions_own_names(tmp_path, arch, name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=3).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    frozen, _ = opened("--pretrained", tmp_path / "c.pth", "--arch", arch, *PROBE)
    model.classifier[-1] = torch.nn.Identity()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(frozen.trunk(x), model(x), rtol=1e-4, atol=1e-5)


def test_build_trunk__torchvisions_network_may_be_another_one(tmp_path, monkeypatch):
    """As efficientnet_b5: its BatchNorm adds 1e-3 to the variance, timm's 1e-5."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None, norm_layer=lambda n: torch.nn.BatchNorm2d(n, eps=1e-3))
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: model)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    with pytest.raises(ValueError, match="--arch mobilenetv2_100: torchvision's mobilenet_v2 is another network"):
        opened("--pretrained", tmp_path / "c.pth", "--arch", "mobilenetv2_100", *PROBE)


def test_arch_of__every_resnet_that_it_names():
    for arch in layouts.RESNETS.values():
        with torch.device("meta"):
            state = timm.create_model(arch).state_dict()
        assert layouts.arch_of({f"module.encoder_q.{name}": value for name, value in state.items()}) == arch
    with torch.device("meta"):
        assert layouts.arch_of(timm.create_model("resnet26").state_dict()) is None


@pytest.mark.parametrize("arch", ["alexnet", "resnet18v1", "resnet18v2", "resnet50v1", "resnet101v3"])
def test_arch_of__cmcs_networks(arch):
    from cmc.nets import Branches

    with torch.device("meta"):
        state = Branches(arch, {"l_to_ab": 1, "ab_to_l": 2}, 128).state_dict()
    assert layouts.arch_of({f"encoder.module.{name}": value for name, value in state.items()}) == arch


def test_build_trunk__moco_v3s_small_transformer_has_12_heads(tmp_path):
    """timm's has 6 heads and equal shapes: its features would be wrong without an error."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12).eval()
    state = {f"module.base_encoder.{name}": value for name, value in model.state_dict().items()}
    state["module.base_encoder.head.0.weight"] = torch.randn(4)
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "c.pth")
    frozen, args = opened("--pretrained", tmp_path / "c.pth", *PROBE)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert args.arch == "vit_small_mocov3" and torch.equal(frozen.trunk(x), model(x))
    with pytest.raises(ValueError, match="MoCo-v3 have 12 heads, those of this --arch 6, .* pass --arch vit_small_mocov3"):
        opened("--pretrained", tmp_path / "c.pth", "--arch", "vit_small_patch16_224", *PROBE)


def test_trunk_state__chunked_blocks_of_dinov2():
    state = {"backbone.blocks.1.7.norm1.weight": 1, "backbone.blocks.0.2.ls1.gamma": 2, "backbone.mask_token": 3,
             "dino_head.mlp.0.weight": 4}  # fmt: skip
    assert layouts.trunk_state(state) == {"blocks.7.norm1.weight": 1, "blocks.2.ls1.gamma": 2, "mask_token": 3}


REFUSED = {  # what must not load, and what the message says
    "another trunk": (lambda s: timm.create_model("tiny_convnext", num_classes=0).state_dict(), "pass the --arch"),
    "a layer less": (lambda s: {n: v for n, v in s.items() if not n.startswith("layer3.")}, "missing"),
    "unknown prefix": (lambda s: {f"{'net.' * 40}{n}": v for n, v in s.items()}, "prefixes found: net.net."),
    "key branch only": (lambda s: {f"module.encoder_k.{n}": v for n, v in s.items()}, "module.encoder_k."),
    "text": (lambda s: {"state_dict": {"conv1.weight": "x" * 9000}}, "conv1.weight"),
    "teacher that is no dictionary": (lambda s: {"teacher": 3, "epoch": 1}, "no weights by name"),
}


@pytest.mark.parametrize("spoil, message", REFUSED.values(), ids=REFUSED)
def test_build_trunk__what_must_not_load_is_refused_in_400_characters(resnets, tmp_path, spoil, message):
    folder = tmp_path / "a-long-name-of-a-folder" / ("x" * 150)
    folder.mkdir(parents=True)
    torch.save(spoil(resnets[0].state_dict()), folder / "c.pth")
    with pytest.raises(ValueError) as error:
        opened("--pretrained", folder / "c.pth", "--arch", "tiny_resnet", *PROBE)
    text = str(error.value)
    assert len(text) <= 400 and "\n" not in text and message in text and text.startswith("--pretrained "), text


def test_read__a_damaged_safetensors_file_is_one_line(resnets, tmp_path):
    save_file(resnets[0].state_dict(), tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "c.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"--pretrained .*c.safetensors: not a readable checkpoint"):
            opened("--pretrained", tmp_path / "c.safetensors", *PROBE)
