"""The initial weights of trunks."""

import pytest
import timm
import torch
from helpers import method_args, method_of

from utils.learning import backbones


def gammas(module):
    """The values of the last BatchNorm gamma of each residual branch of a ResNet."""
    last = "bn3" if any("bn3" in name for name, _ in module.named_modules()) else "bn2"
    found = [p for name, p in module.named_parameters() if f".{last}.weight" in f".{name}" and "layer" in name]
    assert found
    return torch.cat(found).unique().tolist()


@pytest.mark.parametrize("name, flags, gamma", [  # docs/methods.md, "Initialization"
    ("moco", [], 0), ("moco", ["--local-crops", "4"], 0), ("mosrep", [], 0), ("w2ssl", [], 1),
    ("moco", ["--moco-head", "linear", "--aug", "v1"], 1), ("moco", ["--unmix-prob", "0.5"], 1),
])  # fmt: skip
@pytest.mark.parametrize("arch", ["tiny_resnet", "resnet50"])
def test_methods__the_last_gamma_of_a_branch_starts_as_published(name, flags, gamma, arch):
    method = method_of(method_args(name, *flags, "--arch", arch))
    for key, encoder in method.named_children():
        if "encoder" in key:  # both of the query and of its moving average
            assert gammas(encoder) == [gamma], key


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "tiny_resnet", "tiny_convnext"])
@pytest.mark.parametrize("zero", [True, False])
def test_build__changes_no_other_weight_and_draws_nothing(arch, zero):
    torch.manual_seed(3)
    wanted, after = timm.create_model(arch, num_classes=5).state_dict(), torch.rand(1)
    torch.manual_seed(3)
    model = backbones.build(arch, zero_init_last=zero, num_classes=5)
    assert torch.equal(torch.rand(1), after)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, wanted[name])]
    assert all(name.startswith("layer") and ".bn" in name and name.endswith(".weight") for name in changed)
    assert bool(changed) == (not zero and arch != "tiny_convnext")
    if arch != "tiny_convnext":
        assert gammas(model) == [float(not zero)]
