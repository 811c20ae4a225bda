"""BatchNorm over processes against BatchNorm of the whole batch on one."""

import pytest
import torch
from helpers import spawn
from timm.layers import BatchNormAct2d
from torch import nn

from utils.learning.sync_bn import synchronized
from utils.run import dist

KINDS = {  # what follows which layer
    "1d": (nn.Linear, lambda: nn.BatchNorm1d(5)),
    "without affine": (nn.Linear, lambda: nn.BatchNorm1d(5, affine=False)),
    "2d": (nn.Conv2d, lambda: nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)),
    "with activation": (nn.Conv2d, lambda: BatchNormAct2d(5)),
}


def one_step(kind):
    """Two training steps and an evaluation: this process's outputs, gradients and statistics."""
    torch.manual_seed(1)
    layer, norm = KINDS[kind]
    model = nn.Sequential(layer(3, 5, *([3] if layer is nn.Conv2d else [])), norm())
    for p in model[1].parameters():
        nn.init.normal_(p)
    model = synchronized(model).train()
    seen = []
    for step in range(2):
        x = torch.randn(8, 3, *([6, 4] if layer is nn.Conv2d else []), generator=torch.Generator().manual_seed(step)) * 3 + 2
        n = len(x) // dist.world()
        x = x[dist.rank() * n :][:n].requires_grad_()
        model.zero_grad()
        y = model(x)
        weights = torch.linspace(-1, 2, y[0].numel()).view_as(y[0])
        (y.square() * weights).sum().backward()
        gradients = [dist.total(p.grad.clone()) for p in model.parameters()]  # of the sum of the losses of all processes
        seen += [y.detach(), x.grad]
    statistics = {name: value.clone() for name, value in model[1].named_buffers()}
    return seen, gradients, statistics, model.eval()(x).detach(), list(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_synchronized__two_processes_are_one_batch(kind):
    (y, gradients, statistics, evaluated, names), parts = one_step(kind), spawn(one_step, kind)
    for i, whole in enumerate(y):
        torch.testing.assert_close(torch.cat([part[0][i] for part in parts]), whole, rtol=1e-4, atol=1e-5)
    for part in parts:
        assert part[4] == names
        for a, b in zip(part[1], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        for name, value in statistics.items():
            torch.testing.assert_close(part[2][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), evaluated, rtol=1e-4, atol=1e-5)


def test_synchronized__one_process_keeps_its_modules():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronized(model) is model and type(model[0]) is nn.BatchNorm2d
