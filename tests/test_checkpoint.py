"""Checkpoint files: whole or not at all, never executed, and in the layouts of docs/methods.md."""

import collections

import pytest
import timm
import torch
from helpers import build, method_args

from methods import METHODS
from utils.learning import backbones, layouts
from utils.run import checkpoint


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_load__refuses_code_by_name_and_does_not_run_it(tmp_path, capsys):
    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match=rf"--resume {path}: it holds a (builtins.)?print") as error:
        checkpoint.read(path, "--resume")
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_load__truncated_file_is_an_error(tmp_path):
    path = tmp_path / "cut.pth.tar"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=f"--pretrained {path}: not a readable checkpoint"):
        checkpoint.read(path, "--pretrained")


def test_load__tensor_alone_is_an_error(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "t.pth")
    with pytest.raises(ValueError, match="holds a Tensor"):
        checkpoint.read(tmp_path / "t.pth", "--pretrained")


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(3)
    return timm.create_model("resnet18", num_classes=7)


# docs/methods.md, last table: the prefix of the trunk, and what else such a checkpoint holds
LAYOUTS = {
    "MoCo v1, v2, MosRep, Un-Mix": ("module.encoder_q.", ["module.encoder_k.", "module.queue", "module.queue_ptr"]),
    "the same without DDP": ("encoder_q.", ["encoder_k.", "queue"]),
    "MoCo-v3": ("module.base_encoder.", ["module.momentum_encoder.", "module.predictor.0.weight"]),
    "MoCo-v3, older release": ("module.momentum_encoder.", []),
    "supervised under DDP": ("module.", []),
    "torchvision, timm": ("", []),
}


@pytest.mark.parametrize("prefix, others", LAYOUTS.values(), ids=LAYOUTS)
def test_load_trunk__every_published_layout(resnet, prefix, others):
    state = collections.OrderedDict((prefix + name, value) for name, value in resnet.state_dict().items())
    for other in others:  # weights that must not be taken for the trunk's
        names = [other + name for name in resnet.state_dict()] if other.endswith(".") else [other]
        state |= {name: torch.full((1,), -7.0) for name in names}
    trunk = backbones.build("resnet18", num_classes=0)
    layouts.load_trunk(trunk, METHODS["moco"].trunk(state, None), "fc", "--pretrained x")
    loaded = trunk.state_dict()
    assert loaded.keys() == {name for name in resnet.state_dict() if not name.startswith("fc.")}
    assert all(torch.equal(value, resnet.state_dict()[name]) for name, value in loaded.items())


@pytest.mark.parametrize("method", METHODS)
def test_load_trunk__our_own(method):
    trained = build(method)
    args = method_args(method)
    frozen = METHODS[method].frozen(args)
    state = METHODS[method].trunk(checkpoint.prefixed(trained), args)
    layouts.load_trunk(frozen.trunk, state, frozen.classifier, "--pretrained x")
    state = (trained.encoder if method == "cmc" else trained.encoders()[0]).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in frozen.trunk.state_dict().items())


@pytest.mark.parametrize("spoil, message", [
    (lambda s: s.pop("layer3.0.bn1.bias"), "1 missing: layer3.0.bn1.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "1 left over: extra"),
    (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "1 of another shape: conv1.weight"),
    (lambda s: s.clear(), "missing: "),
])  # fmt: skip
def test_load_trunk__anything_but_an_exact_cover_is_an_error(resnet, spoil, message):
    state = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    spoil(state)
    trunk = backbones.build("resnet18", num_classes=0)
    before = checkpoint.weights_hash(trunk)
    with pytest.raises(ValueError, match=message):
        layouts.load_trunk(trunk, state, "fc", "--pretrained x")
    assert checkpoint.weights_hash(trunk) == before


def test_trunk_state__of_nothing_is_empty():
    assert layouts.trunk_state({}) == {}
