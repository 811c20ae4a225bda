"""Learning rates and optimizers against slow loops."""

import math

import pytest
import torch
from torch import nn

from utils.learning import optim


@pytest.mark.parametrize("lr, batch, effective", [(0.03, 256, 0.03), (0.03, 512, 0.06), (0.2, 4096, 3.2), (0.06, 64, 0.015)])
def test_scaled_lr__linear_rule_once(lr, batch, effective):
    assert optim.scaled_lr(lr, batch) == pytest.approx(effective, rel=1e-12)


def test_cosine__half_a_period_from_lr_to_zero():
    assert optim.cosine(3.2, 0) == 3.2
    assert optim.cosine(3.2, 0.5) == pytest.approx(1.6)
    assert optim.cosine(3.2, 1 / 3) == pytest.approx(2.4)
    assert optim.cosine(3.2, 1) == pytest.approx(0, abs=1e-12)
    rates = [optim.cosine(0.03, epoch / 200) for epoch in range(200)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_set_lr__every_group():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], 1.0)
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def slow(weights, gradients, rates, momentum, decay, trust):
    """Plain lists of floats, one parameter at a time. -> weights after all steps"""
    weights = [w.flatten().tolist() for w in weights]
    buffers = [[0.0] * len(w) for w in weights]
    for step, lr in enumerate(rates):
        for w, m, g in zip(weights, buffers, gradients[step], strict=True):
            g = [gi + decay * wi for gi, wi in zip(g.flatten().tolist(), w, strict=True)]
            size_w, size_g = (math.sqrt(sum(x * x for x in v)) for v in (w, g))
            layer = trust * size_w / size_g if trust and size_w and size_g else 1.0  # a zero layer takes the plain gradient
            for i in range(len(w)):
                m[i] = momentum * m[i] + layer * g[i]
                w[i] -= lr * m[i]
    return weights


@pytest.mark.parametrize(
    "momentum, decay, trust", [(0.9, 1e-2, 0.0), (0.9, 0.0, 0.001), (0.5, 0.0, 0.9), (0.9, 0.0, 0.0), (0.9, 0.1, 0.001)]
)
def test_sgd__is_the_slow_loop_on_every_parameter(momentum, decay, trust):
    """Weight, BatchNorm gain and zero bias alike; with trust .9 a layer's rate is above 1 too: no clipping."""
    rng = torch.Generator().manual_seed(0)
    layers = [torch.randn(4, 3, generator=rng), 30 * torch.ones(4), torch.zeros(4)]
    parameters = [nn.Parameter(p.clone()) for p in layers]
    rates = [3.2, 3.2, 1.6, 0.1]  # the rate of a step is that step's, not the one of an older gradient
    gradients = [[torch.randn(p.shape, generator=rng) for p in layers] for _ in rates]
    optimizer = optim.sgd(parameters, rates[0], momentum, decay, trust)
    for lr, step in zip(rates, gradients, strict=True):
        optim.set_lr(optimizer, lr)
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, w in zip(parameters, slow(layers, gradients, rates, momentum, decay, trust), strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(w), rtol=2e-5, atol=1e-6)


def test_sgd__frozen_parameters_stay_out():
    free, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    for trust in (0.0, 0.001):
        held = [p for group in optim.sgd([free, frozen], 0.1, 0.9, 1e-4, trust).param_groups for p in group["params"]]
        assert len(held) == 1 and held[0] is free


@pytest.mark.parametrize("trust", [0.0, 0.001])
def test_sgd__state_travels(trust):
    """Two steps, saved and loaded, one more = three steps, to the bit."""
    gradients = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))

    def go(p, optimizer, steps):
        for g in gradients[steps]:
            p.grad = g.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(5))
    go(whole, optim.sgd([whole], 0.5, 0.9, 1e-4, trust), slice(0, 3))
    first = nn.Parameter(torch.ones(5))
    optimizer = optim.sgd([first], 0.5, 0.9, 1e-4, trust)
    go(first, optimizer, slice(0, 2))
    second = nn.Parameter(first.detach().clone())
    resumed = optim.sgd([second], 0.5, 0.9, 1e-4, trust)
    resumed.load_state_dict(optimizer.state_dict())
    go(second, resumed, slice(2, 3))
    assert torch.equal(whole, second)


@pytest.fixture
def nan_memory():
    """New memory holds NaN instead of values of before."""
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("settings", [{"trust": 0.0}, {"trust": 0.001}, {"nesterov": True}])
def test_sgd__a_skipped_first_step_never_was(settings, resumed, nan_memory):
    """fp16 often overflows in the first step, whose update is skipped. resumed: from the state before the first good step."""

    def new(p):
        return (
            optim.Sgd([p], 0.5, momentum=0.9, nesterov=True)
            if "nesterov" in settings
            else optim.sgd([p], 0.5, 0.9, 1e-4, **settings)
        )

    ends = []
    for first in ([float("inf"), float("nan")], []):  # two skipped steps, or none
        p = nn.Parameter(torch.ones(5))
        optimizer, scaler = new(p), torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, x in enumerate([*first, 3.0, 2.0]):
            scaler.scale((x * p).sum()).backward()
            scaler.step(optimizer)
            scaler.update(4.0)
            optimizer.zero_grad()
            if resumed and i + 1 == len(first):
                state, optimizer = optimizer.state_dict(), new(p)
                optimizer.load_state_dict(state)
        ends.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    (p, momentum), (p_never, momentum_never) = ends
    assert momentum.isfinite().all() and torch.equal(momentum, momentum_never) and torch.equal(p, p_never)


@pytest.mark.parametrize("epoch, factor", [(0, 1), (119.9, 1), (120, 0.1), (160, 0.01), (199, 0.01), (200, 1e-3), (239, 1e-3)])
def test_lr_at__steps(epoch, factor):
    assert optim.lr_at(0.03, epoch, 240, drops=[120, 160, 200]) == pytest.approx(0.03 * factor)


def test_sgd__lars_leaves_out_biases_and_gains():
    """docs/methods.md, "W2SSL", 6, parameter by parameter: no decay and no adaptive rate where there is one axis."""
    rng = torch.Generator().manual_seed(0)
    layers = [torch.randn(4, 3, generator=rng), 3 * torch.ones(4), torch.zeros(4), torch.randn(2, 4, 3, 3, generator=rng)]
    parameters = [nn.Parameter(p.clone()) for p in layers]
    optimizer = optim.sgd(parameters, 0.7, 0.9, 0.1, 0.001, exclude=True)
    weights, moving = [p.clone() for p in layers], [torch.zeros_like(p) for p in layers]
    for lr in (0.7, 0.7, 0.2):
        optim.set_lr(optimizer, lr)
        for i, p in enumerate(parameters):
            p.grad = g = torch.randn(p.shape, generator=rng)
            if p.ndim > 1:
                g = g + 0.1 * weights[i]
                g = g * 0.001 * weights[i].square().sum().sqrt() / g.square().sum().sqrt()
            moving[i] = 0.9 * moving[i] + g
            weights[i] = weights[i] - lr * moving[i]
            p.grad = p.grad.clone()
        optimizer.step()
    for p, w in zip(parameters, weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)
