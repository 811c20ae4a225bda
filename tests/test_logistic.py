"""Logistic regression against scikit-learn and against formulas."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from utils.evaluation import logistic
from utils.evaluation.logistic import GRID, Fit, Problem, mean_per_class, path, top1


def blobs(n, width, classes, seed=0):
    """Features of very different scales, with means far from 0, as pooled features have; classes overlap."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=rng)
    labels[:classes] = torch.arange(classes)
    centres, noise = torch.randn(classes, width, generator=rng), torch.randn(n, width, generator=rng)
    return (centres[labels] + 1.5 * noise) * torch.logspace(-2, 1, width) + 5, labels


def objective(x, labels, weight, bias, l2):
    """The sum over the images, one by one."""
    loss = l2 / 2 * sum(w * w for w in weight.flatten().tolist())
    for row, label in zip(x.double() @ weight + bias, labels.tolist(), strict=True):
        loss += math.log(sum(math.exp(v - row[label].item()) for v in row.tolist()))
    return loss


def sklearns(x, labels, l2):
    """Weight of C x classes and bias of scikit-learn's solution."""
    solver = LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-8, max_iter=1000).fit(x.double().numpy(), labels.numpy())
    return torch.from_numpy(solver.coef_).T, torch.from_numpy(solver.intercept_)


@pytest.mark.parametrize("n, width, classes", [(120, 8, 3), (30, 50, 4)], ids=["more images", "more features"])
def test_path__has_the_loss_of_scikit_learn(n, width, classes):
    x, labels = blobs(n, width, classes)
    fits = list(path(Problem(x, labels, classes), GRID[::4]))
    assert [fit.l2 for fit in fits] == sorted(GRID[::4], reverse=True)
    for fit in fits[:8:2]:  # 1e5 to 0.1; far below, scikit-learn itself does not converge
        expected = objective(x, labels, *sklearns(x, labels, fit.l2), fit.l2)
        assert fit.loss == pytest.approx(objective(x, labels, fit.weight, fit.bias, fit.l2), rel=1e-9)
        assert fit.converged and fit.loss == pytest.approx(expected, rel=1e-4)


def test_fit__has_the_weights_of_scikit_learn():
    x, labels = blobs(150, 6, 3, seed=1)
    weight, bias = sklearns(x, labels, 3.0)
    fit = Problem(x, labels, 3).fit(3.0, steps=500, tolerance=1e-12)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.bias - fit.bias.mean(), bias - bias.mean(), rtol=1e-3, atol=1e-4)
    assert fit.predict(x).tolist() == (x.double() @ weight + bias).argmax(1).tolist()


def test_fit__does_not_depend_on_its_start():
    x, labels = blobs(100, 5, 3)
    problem = Problem(x, labels, 3)
    far = Fit(0, torch.full((5, 3), 2.0).double() * torch.tensor([1.0, -1.0, 0.5]), torch.tensor([3.0, 0.0, -1.0]).double())
    assert problem.fit(0.1, far, 300, 1e-9).loss == pytest.approx(problem.fit(0.1, None, 300, 1e-9).loss, rel=1e-8)


def test_fit__few_steps_are_not_called_converged():
    x, labels = blobs(200, 20, 4)
    assert not Problem(x, labels, 4).fit(1e-4, steps=10).converged


def test_fit__features_without_spread_and_classes_without_images():
    x, labels = blobs(60, 4, 3)
    x = torch.cat([x, x[:, :1], torch.ones(60, 1)], dim=1)  # a feature twice, and a constant one
    fit = Problem(x, labels, 4).fit(1.0)
    assert fit.weight.isfinite().all() and not (fit.predict(x) == 3).any()
    torch.testing.assert_close(fit.weight[0], fit.weight[4])  # the l2 term divides it evenly
    assert fit.weight[5].abs().max() < 1e-9


def test_path__is_near_the_minimum_down_to_the_smallest_l2():
    x, labels = blobs(200, 30, 5)
    problem = Problem(x, labels, 5)
    for fit in list(path(problem, GRID[::2]))[::11]:
        assert fit.loss < problem.fit(fit.l2, fit, 1000, 1e-8).loss * 1.001


def test_grid__is_the_published_one():
    torch.testing.assert_close(torch.tensor(GRID).double(), torch.logspace(-6, 5, 45).double())


def test_metrics__are_the_ones_counted_by_hand():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (50,), generator=rng)
    labels[labels == 2] = 3  # a class without images
    predicted = torch.where(torch.rand(50, generator=rng) < 0.5, labels, torch.randint(0, 8, (50,), generator=rng))
    shares = []
    for c in range(6):
        mine = [p == c for p, label in zip(predicted.tolist(), labels.tolist(), strict=True) if label == c]
        shares += [sum(mine) / len(mine)] if mine else []
    assert len(shares) == 5 and mean_per_class(predicted, labels) == pytest.approx(100 * sum(shares) / 5)
    hits = sum(p == label for p, label in zip(predicted.tolist(), labels.tolist(), strict=True))
    assert top1(predicted, labels) == pytest.approx(100 * hits / 50)
    assert set(logistic.METRICS) == {"top1", "mean-per-class"}
