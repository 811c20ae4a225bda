"""The counts of tests/launches.py."""

import json

import launches
import pytest
import torch
from launches import Launches, backward
from test_methods import fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def test_backward__gives_the_gradients_of_torchs_engine():
    """A layer used twice, a broadcast bias, a cast, a branch without gradient and a function of our own."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    network, bias, x = nn.Linear(5, 5), nn.Parameter(torch.rand(5)), torch.rand(3, 5)
    found = []
    for run in (backward, torch.Tensor.backward):
        y = network(Double.apply(network(x).relu() + bias))
        run(y.bfloat16().logsumexp(1).sum() + (y * network(x).detach()).unbind(1)[2].mean())
        found.append([p.grad for p in (*network.parameters(), bias)])
        network.zero_grad()
        bias.grad = None
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)  # sums may have another order


def test_launches__counts_operations_copies_and_waits():
    with FakeTensorMode():
        if not fake_cuda():
            pytest.skip("this torch has no fake CUDA")
        x, host = torch.empty(4, 6, device="cuda"), torch.empty(4, 6)
        with Launches() as found:
            host.add_(1)  # on the host
            x.view(2, 12).t()[1:].unsqueeze(0)  # views
            torch.empty_like(x)
            x.add_(1).mul(2)  # 2 launches
            with torch.inference_mode():
                torch.nn.functional.linear(x.clone().float(), x)  # 2, one of them inside a composite operation
            torch._foreach_add_([x] * 111, 1.0)  # 2: more tensors than the arguments of one kernel hold
            host.to("cuda")
            host.to("cuda", non_blocking=True)
            host.pin_memory()[1:].to("cuda", non_blocking=True)
            host.copy_(x, non_blocking=True)
    assert found.found == {"launches": 6, "pinned copies": 1, "pageable copies": 2, "copies back": 1, "waits": 1}


def test_main__ends_with_a_line_of_json(capsys):
    with FakeTensorMode():
        if not fake_cuda():
            pytest.skip("this torch has no fake CUDA")
    launches.main(["--methods", "moco", "-a", "resnet18", "--size", "32", "--batch-size", "4", "--moco-k", "8", "--top", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"moco"} and found["moco"].keys() == {"step", "color"}
    assert found["moco"]["step"]["waits"] == 0 < found["moco"]["step"]["launches"]
