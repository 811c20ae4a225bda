"""W2SSL against docs/methods.md, "W2SSL": halves, montages, losses, schedules, and many processes against one."""

import copy
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import batch_of, build, forward, method_args, method_of, own_part, spawn, uint8_batch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, cross_entropy, interpolate, normalize

import main_pretrain
from methods import METHODS
from utils.data.views import crop_box, cut_views, draw
from utils.learning import optim
from utils.learning.method import Step
from utils.run import dist
from w2ssl import builder, montage
from w2ssl.losses import location, supervised_contrastive

# ---- halves


def columns(height, width):
    """A PNG with the column of each pixel as its red value."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 201, 10, 3])
@pytest.mark.parametrize("overlap, left_end, right_start", [(0.6, 0.8, 0.2), (0.0, 0.5, 0.5), (1.0, 1.0, 0.0)])
def test_halves__are_cut_where_they_should_be(width, overlap, left_end, right_start):
    specs = METHODS["w2ssl"].views(method_args("w2ssl", "--overlap", str(overlap), "--crop-min", "1"))
    assert [spec.name for spec in specs] == ["left 1", "right 1", "left 2", "right 2"]
    for spec in specs:
        low, high = (0, int(left_end * width)) if "left" in spec.name else (int(right_start * width), width)
        boxes = [crop_box(spec, row, 100, width) for row in draw(0, 0, 7, 64)]
        assert min(left for _, left, _, _ in boxes) >= low and max(left + w for _, left, _, w in boxes) <= high
        if width < 75:  # too narrow for the ratios: the whole width is taken, and the middle of the height
            assert {(left, left + w) for _, left, _, w in boxes} == {(low, high)}


def test_halves__show_both_ends_and_the_overlap():
    specs = METHODS["w2ssl"].views(method_args("w2ssl", "--crop-min", "0.9"))
    seen = {spec.name: [] for spec in specs}
    for sample in range(40):
        crops = cut_views(columns(200, 200), specs, draw(3, 0, sample, len(specs)))
        for spec, crop in zip(specs, crops, strict=True):
            seen[spec.name] += [int(crop[0].min()), int(crop[0].max())]
    for name, found in seen.items():
        wanted = (0, 159) if "left" in name else (40, 199)
        assert min(found) == pytest.approx(wanted[0], abs=3) and max(found) == pytest.approx(wanted[1], abs=3), name
        assert wanted[0] <= min(found) and max(found) <= wanted[1]


def test_halves__are_rounded_down_for_every_width():
    """[0, int(.8 W)] and [int(.2 W), W]; in floats .2 is not 1 - .8."""
    u = draw(0, 0, 7, 1)[0]
    left, right = METHODS["w2ssl"].views(method_args("w2ssl"))[:2]
    for width in range(2, 2000):
        for spec, start, end in ((left, 0, int(0.8 * width)), (right, int(0.2 * width), width)):
            ratio = (end - start) / 7
            whole = replace(spec, scale=(1.0, 1.0), ratio=(ratio, ratio))
            assert crop_box(whole, u, 7, width) == (0, start, 7, end - start)


def test_views__are_the_published_ones():
    specs = METHODS["w2ssl"].views(main_pretrain.get_args(["--method", "w2ssl", "--shards", "none"]))
    for spec in specs:
        assert (spec.size, spec.scale, spec.count, spec.ratio, spec.flip_p) == (112, (0.2, 1.0), 1, (3 / 4, 4 / 3), 0.5)
        assert (spec.jitter, spec.jitter_p, spec.gray_p, spec.blur) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (0.1, 2.0))
        assert (spec.blur_p, spec.solarize_p) == ((1.0, 0.0) if spec.name.endswith("1") else (0.1, 0.2))


# ---- montages


def test_deal__by_hand():
    """Four images, eight crops, two montages: slot s of montage j has place 2 s + j of the permutation."""

    class Dealt:
        def permutation(self, count):
            assert count == 8
            return np.array([3, 0, 6, 5, 1, 7, 2, 4])

    order = montage.deal(4, Dealt())
    assert order.tolist() == [3, 6, 1, 2, 0, 5, 7, 4]
    assert (order // 2).tolist() == [1, 3, 0, 1, 0, 2, 3, 2]  # the image of each crop
    assert (order % 2).tolist() == [1, 0, 1, 0, 0, 1, 1, 0]  # 1: it is a right half


@pytest.mark.parametrize("images", [2, 6, 32])
def test_deal__every_half_once_and_another_order_each_step(images):
    orders = [montage.deal(images, Step(number, 10, 0).rng) for number in (0, 0, 1)]
    assert all(sorted(order) == list(range(2 * images)) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    assert images == 2 or not np.array_equal(orders[0], orders[2])


def slow_montage(crops):
    """Four after four: top-left, top-right, bottom-left, bottom-right."""
    rows = []
    for a, b, c, d in zip(crops[0::4], crops[1::4], crops[2::4], crops[3::4], strict=True):
        rows.append(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))
    return torch.stack(rows)


def test_compose__is_the_slow_loop():
    crops = torch.randint(0, 256, (12, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(montage.compose(crops), slow_montage(crops))


@pytest.mark.parametrize("size, stride", [(112, 32), (112, 16), (112, 8), (36, 8), (36, 12), (48, 32), (20, 8)])
def test_separate__returns_every_crop_to_its_image(size, stride):
    """112 pixels: maps of 7 x 7 cells at stride 32, where the middle cells see four crops. A crop's channel is its number."""
    crops = torch.eye(8).view(8, 8, 1, 1).expand(8, 8, size, size)
    features = avg_pool2d(montage.compose(crops), stride, ceil_mode=True, count_include_pad=False)
    found = montage.separate(features)
    assert found.shape == (8, 8)
    assert found.argmax(1).tolist() == list(range(8))
    if features.shape[2] % 8 == 0:  # no cell and no resize mixes crops
        assert torch.allclose(found, torch.eye(8), atol=1e-6)


def test_separate__is_a_resize_to_8_and_quarters():
    features = torch.randn(3, 5, 7, 7)
    resized = interpolate(features, (8, 8), mode="bilinear", align_corners=False)
    wanted = [resized[m, :, y : y + 4, x : x + 4].mean((1, 2)) for m in range(3) for y in (0, 4) for x in (0, 4)]
    torch.testing.assert_close(montage.separate(features), torch.stack(wanted))


# ---- losses


def slow_supcon(online, target, image, temperature):
    """arXiv 2004.11362, eq. 2, anchor by anchor. -> mean, % of online anchors nearest to a positive"""
    every, owner = torch.cat([online, target]), [*image, *image]
    losses, right = [], 0
    for a in range(len(every)):
        others = [b for b in range(len(every)) if b != a]
        positives = [b for b in others if owner[b] == owner[a]]
        assert len(positives) == 3
        scores = {b: (every[a] @ every[b]).item() / temperature for b in others}
        total = sum(math.exp(s) for s in scores.values())
        losses.append(-sum(math.log(math.exp(scores[p]) / total) for p in positives) / len(positives))
        right += a < len(online) and owner[max(scores, key=scores.get)] == owner[a]
    return sum(losses) / len(losses), 100 * right / len(online)


def test_supervised_contrastive__by_the_definition():
    rng = torch.Generator().manual_seed(0)
    image = torch.tensor([1, 3, 0, 1, 0, 2, 3, 2])
    online, target = (normalize(torch.randn(8, 6, generator=rng, dtype=torch.double), dim=1) for _ in range(2))
    target = normalize(target + torch.eye(8, dtype=torch.double)[image][:, :6], dim=1)
    loss, top1 = supervised_contrastive(online, target, image, 0.3)
    wanted = slow_supcon(online, target, image.tolist(), 0.3)
    assert (loss.item(), top1.item()) == pytest.approx(wanted, rel=1e-9)


def test_location__cross_entropy_and_accuracy():
    scores, side = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.5], [1.0, -1.0]]), torch.tensor([0, 1, 0, 0])
    loss, found = location(scores, side)
    assert found.item() == 75
    assert loss.item() == pytest.approx(cross_entropy(scores, side).item())


def floats(args, seed=1):
    batch, rng = uint8_batch(args), torch.Generator().manual_seed(seed)
    return batch_of([torch.randn(v.shape, generator=rng) for v in batch.views], flips=batch.flips)


@pytest.mark.parametrize("flags", [[], ["--flip-aware-location"], ["--loss-loc", "0.5", "--loss-crop", "2", "--loss-t", "0.1"],
                                   ["--loss-loc", "0"], ["--loss-crop", "0", "--size", "72"]])  # fmt: skip
def test_w2ssl__loss_and_gradients_equal_a_slow_loop(monkeypatch, flags):
    method = build("w2ssl", *flags)
    args = method_args("w2ssl", *flags)
    reference, batch = copy.deepcopy(method), floats(args)
    order = np.random.default_rng(2).permutation(16)
    monkeypatch.setattr(builder, "deal", lambda images, rng: order)
    loss, stats = forward(method, batch, Step(0, 10, 0))
    loss.backward()

    views = batch.views
    halves = [[views[h + 2 * v][i] for i in range(8) for h in range(2)] for v in range(2)]  # of view 1 and 2, crop 2 i + h
    mirrored = [bool(batch.flips[h][i]) if args.flip_aware_location else False for i in range(8) for h in range(2)]
    montages = [slow_montage([view[number] for number in order]) for view in halves]
    image = [number // 2 for number in order]
    side = [(number % 2) ^ mirrored[number] for number in order]

    def vectors(encoder, x):
        maps = interpolate(encoder(x), (8, 8), mode="bilinear", align_corners=False)
        return torch.stack([adaptive_avg_pool2d(m, 2)[:, y, x] for m in maps for y in (0, 1) for x in (0, 1)])

    def head(layers, x):
        x = x @ layers[0].weight.T
        x = torch.relu(layers[1](x)) @ layers[3].weight.T
        return layers[4](x) if len(layers) > 4 else x

    online, target, first = [], [], None
    for x in montages:
        features = vectors(reference.base_encoder, x)
        first = features if first is None else first
        online.append(normalize(head(reference.predictor, head(reference.base_encoder.fc_crop, features)), dim=1))
        with torch.no_grad():
            features = vectors(reference.momentum_encoder, x)
            target.append(normalize(head(reference.momentum_encoder.fc_crop, features), dim=1))
    scores = first @ reference.fc_loc.weight.T + reference.fc_loc.bias
    loc = sum(-torch.log_softmax(s, 0)[at] for s, at in zip(scores, side, strict=True)) / 16
    crop = 0
    for z, k in ((online[0], target[1]), (online[1], target[0])):
        every = torch.cat([z, k])
        for a in range(32):
            others = [b for b in range(32) if b != a]
            logits = every[a] @ every[others].T / args.loss_t
            log_p = logits - torch.logsumexp(logits, 0)
            same = [i for i, b in enumerate(others) if image[b % 16] == image[a % 16]]
            crop = crop - log_p[same].mean() / 32
    crop = crop * args.loss_t / 0.07
    wanted = args.loss_loc * loc + args.loss_crop * crop
    wanted.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert stats["loss_loc"].item() == pytest.approx(loc.item(), rel=1e-4)
    assert stats["loss_crop"].item() == pytest.approx(crop.item(), rel=1e-4)
    right = [s[at] > s[1 - at] for s, at in zip(scores.tolist(), side, strict=True)]
    assert stats["location"].item() == pytest.approx(100 * sum(right) / 16)
    for (name, p), r in zip(method.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (r.grad is None), name
        if r.grad is not None:
            assert torch.allclose(p.grad, r.grad, rtol=1e-2, atol=1e-3 * r.grad.abs().max().item() + 1e-7), name


def test_chance__is_the_loss_of_a_network_that_knows_nothing():
    method = build("w2ssl", "--loss-t", "20", "--loss-loc", "2")
    with torch.no_grad():
        method.fc_loc.weight.zero_(), method.fc_loc.bias.zero_()
    loss, _ = forward(method, floats(method_args("w2ssl")), Step(0, 10, 0))
    assert loss.item() == pytest.approx(method.chance(8), rel=0.01)


# ---- over processes


def one_step(flags, n):
    """Loss and gradients of a step on this process's part of n images. Global seeds differ between processes."""
    method = build("w2ssl", *flags)
    model = dist.data_parallel(method, torch.device("cpu"))
    torch.manual_seed(dist.rank())
    args = method_args("w2ssl", *flags, "--batch-size", str(n))
    loss, stats = forward(model, own_part(floats(args)), Step(3, 10, 5))
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    method.commit(Step(3, 10, 5))
    return loss.item(), {name: s.item() for name, s in stats.items()}, gradients, method.state_dict()


@pytest.mark.parametrize("flags", [[], ["--flip-aware-location"]])
def test_step__two_processes_are_one(monkeypatch, flags):
    """The same loss, gradients, statistics and averages: BatchNorm and losses span the processes, DDP counts nothing twice."""
    (loss, stats, gradients, state), parts = one_step(flags, 8), spawn(one_step, flags, 8)
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss, rel=1e-5)
    assert parts[0][0] != pytest.approx(parts[1][0], rel=1e-5)  # each has its own anchors
    for name, value in stats.items():
        assert sum(part[1][name] for part in parts) / 2 == pytest.approx(value, rel=1e-5), name
    for part in parts:
        assert part[2].keys() == gradients.keys()
        flat = [torch.cat([g.flatten() for g in found.values()]) for found in (part[2], gradients)]
        assert (flat[0] - flat[1]).norm() / flat[1].norm() < 3e-5
        for name, g in gradients.items():
            assert (part[2][name] - g).norm() / g.norm() < 1e-4, name
        assert part[3].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(part[3][name], value, rtol=1e-5, atol=1e-5, msg=name)


# ---- schedules, flags, checks


def test_commit__momentum_rises_by_half_a_cosine():
    """At update u of U: 1 - (1 - .99) (1 + cos(pi u / U)) / 2. The published order averages before a step's forward."""
    for number, momentum in ((-1, 0.99), (49, 0.995), (24, 1 - 0.01 * (1 + math.sqrt(0.5)) / 2), (99, 1.0)):
        method = build("w2ssl")
        before = copy.deepcopy(method)
        method.commit(SimpleNamespace(number=number, total=100))
        for p, old, q in zip(*(list(m.parameters()) for m in (method.momentum_encoder, before.momentum_encoder,
                                                              before.base_encoder)), strict=True):  # fmt: skip
            assert torch.allclose(p, momentum * old + (1 - momentum) * q, atol=1e-6)


def test_commit__without_cosine_momentum_stays():
    method = build("w2ssl", "--no-moco-m-cos", "--moco-m", "0.75")
    before = copy.deepcopy(method)
    method.commit(Step(60, 100, 0))
    old, q = (next(e.parameters()) for e in (before.momentum_encoder, before.base_encoder))
    assert torch.allclose(next(method.momentum_encoder.parameters()), 0.75 * old + 0.25 * q, atol=1e-6)


@pytest.mark.parametrize("epoch, lr", [
    (0, 0), (0.5, 0.06), (5, 0.6), (9.99, 1.1988), (10, 1.2), (105, 0.6), (57.5, 0.6 * (1 + math.sqrt(0.5))), (200, 0),
])  # fmt: skip
def test_lr_at__of_the_published_run(epoch, lr):
    args = main_pretrain.get_args(["--method", "w2ssl", "--shards", "none"])
    top = optim.scaled_lr(args.lr, args.batch_size)
    found = optim.lr_at(top, epoch, args.epochs, args.warmup_epochs, args.lr_per == "step")
    assert found == pytest.approx(lr, abs=1e-9)


def test_flags__published_defaults():
    args = main_pretrain.get_args(["--method", "w2ssl", "--shards", "x"])
    published = {
        "arch": "resnet50", "epochs": 200, "batch_size": 512, "lr": 0.6, "momentum": 0.9, "weight_decay": 1e-6, "trust": 0.001,
        "warmup_epochs": 10, "lr_per": "step", "size": 224, "crop_min": 0.2, "overlap": 0.6, "moco_dim": 256,
        "moco_mlp_dim": 4096, "moco_m": 0.99, "moco_m_cos": True, "loss_t": 0.3, "loss_loc": 1.0, "loss_crop": 1.0,
        "flip_aware_location": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    assert METHODS["w2ssl"].PROBE == {"epochs": 100, "batch_size": 256, "lr": 0.1, "trust": 0.0}


def test_state_dict__names_and_shapes():
    with torch.device("meta"):
        method = method_of(main_pretrain.get_args(["--method", "w2ssl", "--shards", "x"]))
    shapes = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    for side in ("base", "momentum"):
        assert shapes[f"{side}_encoder.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
        assert shapes[f"{side}_encoder.fc_crop.0.weight"] == (4096, 2048)
        assert shapes[f"{side}_encoder.fc_crop.3.weight"] == (256, 4096)
        assert f"{side}_encoder.fc_crop.4.running_mean" in shapes and f"{side}_encoder.fc_crop.4.weight" not in shapes
        assert not any(f"{side}_encoder.fc_crop.{i}.bias" in shapes for i in (0, 3))
    assert (shapes["predictor.0.weight"], shapes["predictor.3.weight"]) == ((4096, 256), (256, 4096))
    assert not any(name.startswith(("predictor.0.bias", "predictor.3.bias", "predictor.4")) for name in shapes)
    assert (shapes["fc_loc.weight"], shapes["fc_loc.bias"]) == ((2, 2048), (2,))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", "7"], "--batch-size 7: .*; pass 6"),
        (["--size", "65"], "--size 65: .*; pass 66"),
        (["--size", "48"], "--size 48: makes views of 24 pixels"),
        (["--overlap", "1.2"], "--overlap 1.2: must lie in"),
        (["--crop-min", "0"], "--crop-min 0"),
        (["--moco-m", "2"], "--moco-m 2"),
        (["--loss-t", "0"], "--loss-t 0"),
        (["--loss-loc", "-1"], "--loss-loc -1"),
        (["--loss-loc", "0", "--loss-crop", "0"], "--loss-loc 0 --loss-crop 0: nothing would be learned"),
        (["--loss-loc", "0", "--flip-aware-location"], "--flip-aware-location: .*--loss-loc 0"),
    ],
)
def test_check__names_the_flag_and_a_value_that_works(flags, message):
    args = method_args("w2ssl", *flags)
    with pytest.raises(ValueError, match=message):
        METHODS["w2ssl"].check(args, samples=1000)
        method_of(args)


@pytest.mark.parametrize("batch, fits", [(6, 4), (2, 4), (10, 8)])
def test_check__halves_must_fill_montages_on_each_process(monkeypatch, batch, fits):
    monkeypatch.setattr(dist, "world", lambda: 2)
    METHODS["w2ssl"].check(method_args("w2ssl", "--batch-size", "8"), 1000)
    with pytest.raises(ValueError, match=f"--batch-size {batch}: .*each of 2 processes; pass {fits}"):
        METHODS["w2ssl"].check(method_args("w2ssl", "--batch-size", str(batch)), 1000)
