"""CMC, InsDis and the criteria against docs/methods.md, "CMC": slow loops, draws, banks on several processes, layers."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from helpers import IMAGES, batch_of, build, forward, method_args, own_part, spawn, uint8_views
from torch.nn.functional import normalize

import main_pretrain
from cmc import memory as unit
from cmc.color import color_views
from cmc.memory import Bank, DrawnAhead, Scores, draw_rows, last_places
from cmc.nets import ARCHS, Branches
from methods import METHODS
from utils.learning.criterion import Nce, Softmax, criterion
from utils.learning.method import Step
from utils.run import dist

# ---- criteria


def slow_nce(scores, t, z, n):
    total = 0
    for row in scores.tolist():
        noise = (len(row) - 1) / n
        p = [math.exp(s / t) / z for s in row]
        total += -math.log(p[0] / (p[0] + noise)) - sum(math.log(noise / (q + noise)) for q in p[1:])
    return total / len(scores)


def test_nce__by_the_formula_and_z_of_the_first_batch():
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.rand(5, 9, generator=rng, dtype=torch.double) * 2 - 1 for _ in range(2))
    nce = Nce(0.07, 1000)
    z = sum(math.exp(s / 0.07) for s in first.flatten().tolist()) / first.numel() * 1000
    nce.start(first)
    assert nce(first)[0].item() == pytest.approx(slow_nce(first, 0.07, z, 1000), rel=1e-6)
    assert nce.log_z.isinf()  # until the step is done
    nce.commit()
    assert nce.log_z.dtype == torch.float32 and nce.log_z.exp().item() == pytest.approx(z, rel=1e-5)
    assert nce(second)[0].item() == pytest.approx(slow_nce(second, 0.07, z, 1000), rel=1e-5)
    nce.commit()
    assert nce.log_z.exp().item() == pytest.approx(z, rel=1e-5)


def test_nce__a_checkpoint_brings_z():
    """A checkpoint without a step has no Z; the next step measures it."""
    first, second = (torch.rand(5, 9, generator=torch.Generator().manual_seed(i)) for i in range(2))
    old, new, fresh = (Nce(0.07, 1000) for _ in range(3))
    fresh.load_state_dict(new.state_dict())
    old.start(first)
    old.commit()
    new.load_state_dict(old.state_dict())
    assert new.ready and not fresh.ready
    fresh.start(second)
    assert new(second)[0] == old(second)[0] != fresh(second)[0]


def test_nce__a_low_temperature_is_finite():
    """exp(1 / 0.005) is more than float32 holds."""
    scores = (torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) * 2 - 1).requires_grad_()
    nce = Nce(0.005, 1000)
    nce.start(scores)
    loss, _ = nce(scores)
    loss.backward()
    wanted = scores.detach().double()
    z = (wanted / 0.005).exp().mean().item() * 1000
    assert loss.item() == pytest.approx(slow_nce(wanted, 0.005, z, 1000), rel=1e-5) and scores.grad.isfinite().all()


def test_softmax__by_the_formula():
    scores = torch.rand(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    wanted = sum(-math.log(math.exp(r[0] / 0.07) / sum(math.exp(s / 0.07) for s in r)) for r in scores.tolist()) / 4
    loss, top1 = Softmax(0.07)(scores)
    assert loss.item() == pytest.approx(wanted) and top1.item() == 100 * sum(r[0] == max(r) for r in scores.tolist()) / 4


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_chance__is_the_loss_of_scores_that_are_all_equal(loss):
    c, scores = criterion(loss, 0.07, 500), torch.full((3, 1 + 64), 0.3)
    if loss == "nce":
        c.start(scores)
    assert c(scores)[0].item() == pytest.approx(c.chance(1 + 64), rel=1e-4)


def z_of_two(n):
    scores = torch.rand(2 * n, 7, generator=torch.Generator().manual_seed(2))
    nce = Nce(0.5, 100)
    scores = scores[dist.rank() * n :][:n] if dist.world() > 1 else scores
    nce.start(scores)
    loss, _ = nce(scores)
    nce.commit()
    return loss.item(), nce.log_z.item()


def test_nce__z_is_of_all_processes():
    (loss, z), parts = z_of_two(4), spawn(z_of_two, 4)
    assert [part[1] for part in parts] == pytest.approx([z, z], rel=1e-6)
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss, rel=1e-6)


# ---- draws and banks


def test_draw_rows__uniform_with_replacement():
    rows = draw_rows(0, 5, range(40), 50, 1000)
    assert rows.shape == (40, 1000) and rows.min() == 0 and rows.max() == 49
    counts = np.bincount(rows.ravel(), minlength=50)
    chi = ((counts - 800) ** 2 / 800).sum()
    assert abs(chi - 49) < 4 * math.sqrt(2 * 49)  # mean and spread of chi-square with 49 degrees of freedom
    few = draw_rows(0, 5, range(4000), 50, 10)
    repeats = sum(len(set(row)) < 10 for row in few.tolist()) / 4000
    assert repeats == pytest.approx(1 - math.prod(1 - i / 50 for i in range(10)), abs=0.03)  # the birthday problem
    pairs = np.bincount(50 * few[:-1, 0] + few[1:, 0], minlength=2500)  # neighbours in the batch are independent
    assert abs(((pairs - 3999 / 2500) ** 2 / (3999 / 2500)).sum() - 2499) < 4 * math.sqrt(2 * 2499)


def test_draw_rows__of_seed_step_and_place_alone():
    """A process draws for its own places what one process draws for all."""
    rows = draw_rows(0, 5, range(8), 10**6, 30)
    assert np.array_equal(np.concatenate([draw_rows(0, 5, range(i, i + 4), 10**6, 30) for i in (0, 4)]), rows)
    others = [draw_rows(seed, step, range(8), 10**6, 30) for seed, step in ((0, 6), (1, 5))]
    assert all((rows == other).mean() < 0.01 for other in (*others, np.roll(rows, 1, 0)))


def test_drawn_ahead__is_the_draw_of_each_step_from_another_thread(monkeypatch):
    """Resumed, repeated and skipped steps included: the rows are a function of seed and step."""
    threads, drawn = [], DrawnAhead()

    def watched(seed, number, *others):
        threads.append((number, threading.current_thread() is threading.main_thread()))
        return draw_rows(seed, number, *others)

    monkeypatch.setattr(unit, "draw_rows", watched)
    for number in (7, 8, 9, 9, 3, 4):
        assert np.array_equal(drawn(0, number, range(2, 6), 100, 20), draw_rows(0, number, range(2, 6), 100, 20))
    assert np.array_equal(drawn(0, 5, range(2, 4), 100, 20), draw_rows(0, 5, range(2, 4), 100, 20))  # another batch
    assert sorted(number for number, main in threads if main) == [3, 5, 7, 9]


@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])  # at a time
def test_scores__value_and_gradient_are_those_of_all_products(monkeypatch, images):
    monkeypatch.setattr(unit, "images_at_a_time", lambda bank, rows: images)
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, generator=rng, dtype=torch.double, requires_grad=True)
    bank, rows = torch.randn(30, 4, generator=rng, dtype=torch.double), torch.randint(30, (5, 8), generator=rng)
    weights = torch.randn(5, 8, generator=rng, dtype=torch.double)
    scores = Scores.apply(features, bank, rows)
    (scores * weights).sum().backward()
    for i in range(5):
        for j in range(8):
            assert scores[i, j].item() == pytest.approx((features[i] @ bank[rows[i, j]]).item())
    wanted = torch.stack([sum(weights[i, j] * bank[rows[i, j]] for j in range(8)) for i in range(5)])
    torch.testing.assert_close(features.grad, wanted)


def test_scores__on_a_cpu_are_to_the_bit_those_of_one_image_after_the_other():
    rng = torch.Generator().manual_seed(0)
    features, bank = torch.randn(5, 128, generator=rng, requires_grad=True), torch.randn(300, 128, generator=rng)
    rows, weights = torch.randint(300, (5, 1025), generator=rng, dtype=torch.int32), torch.randn(5, 1025, generator=rng)
    scores = Scores.apply(features, bank, rows)
    (scores * weights).sum().backward()
    for i in range(5):
        assert torch.equal(scores[i], bank[rows[i]] @ features[i])
        assert torch.equal(features.grad[i], bank[rows[i]].T @ weights[i])


def test_images_at_a_time__fill_the_memory_of_a_gpu():
    bank, rows = (torch.empty(shape, device="meta") for shape in ((1000, 128), (128, 16385)))
    assert unit.images_at_a_time(bank, rows) == 19 and unit.MEMORY < 20 * 16385 * 128 * 4
    assert unit.images_at_a_time(bank, rows.new_empty(8, 10**6)) == 1  # one image may need more


def test_last_places__are_exact_in_a_large_batch():
    ids = torch.arange(2**20) % (2**20 - 3)
    assert last_places(ids, 2**20).tolist()[:4] == [2**20 - 3, 2**20 - 2, 2**20 - 1, 3]


def test_bank__starts_uniform_with_the_published_bound():
    torch.manual_seed(0)
    memory = Bank(2000, 12).memory
    bound = 1 / math.sqrt(12 / 3)
    assert memory.abs().max() <= bound and memory.abs().max() > 0.99 * bound and abs(memory.mean()) < 0.01
    assert memory.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_bank__update_by_hand():
    torch.manual_seed(0)
    bank, features = Bank(9, 4), normalize(torch.randn(4, 4), dim=1)
    before, index = bank.memory.clone(), torch.tensor([7, 2, 5, 2])  # 2 comes twice, in the place of an unusable image
    bank.update(features[last_places(index, 9)], index, 0.5)
    for row in range(9):
        seen = {7: 0, 2: 3, 5: 2}.get(row)
        wanted = before[row] if seen is None else normalize(0.5 * before[row] + 0.5 * features[seen], dim=0)
        torch.testing.assert_close(bank.memory[row], wanted)


def test_bank__a_feature_that_is_not_finite_leaves_its_row():
    bank, features = Bank(9, 4), normalize(torch.ones(3, 4), dim=1)
    features[1, 2] = math.inf
    before = bank.memory.clone()
    bank.update(features, torch.tensor([3, 4, 5]), 0.5)
    same = [torch.equal(bank.memory[row], before[row]) for row in (3, 4, 5)]
    assert same == [False, True, False] and bank.memory.isfinite().all()


# ---- whole steps


def slow_step(method, args, views, index, rows):
    """docs/methods.md, "CMC": -> the loss and the rows of the banks after it."""
    if args.method == "cmc":
        x, y = color_views(views[0], args.space)
        f = {"l": normalize(method.encoder.l_to_ab(x), dim=1), "ab": normalize(method.encoder.ab_to_l(y), dim=1)}
        pairs = [("l", "ab"), ("ab", "l")]  # L queries the bank of ab
    else:
        f = {"image": normalize(method.encoder(views[0]), dim=1)}
        pairs = [("image", "image")]
    loss = 0
    for query, bank in pairs:
        memory = method.banks[bank].memory
        scores = torch.stack([torch.stack([f[query][i] @ memory[r] for r in (index[i], *rows[i])]) for i in range(len(index))])
        if args.loss == "softmax":
            loss = loss + torch.nn.functional.cross_entropy(scores / 0.07, torch.zeros(len(index), dtype=torch.long))
            continue
        p = (scores / 0.07).exp()
        p = p / (p.detach().mean() * IMAGES)
        noise = len(rows[0]) / IMAGES
        loss = loss + (-(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)).mean()
    after = {name: method.banks[name].memory.clone() for name in f}
    for name, memory in after.items():
        for i, row in enumerate(index):
            memory[row] = normalize(0.5 * memory[row] + 0.5 * f[name][i].detach(), dim=0)
    return loss, after


@pytest.mark.parametrize("loss", ["nce", "softmax"])
@pytest.mark.parametrize("name", ["cmc", "insdis"])
def test_step__loss_gradients_and_banks_equal_a_slow_loop(name, loss):
    args = method_args(name, "--loss", loss)
    method = build(name, "--loss", loss)
    reference, step = copy.deepcopy(method), Step(0, 10, 0)
    views = [torch.randn(v.shape, generator=torch.Generator().manual_seed(4)) for v in uint8_views(args)]
    index = torch.tensor([4, 39, 0, 7, 12, 13, 30, 21])
    rows = draw_rows(0, 0, range(8), IMAGES, 24).tolist()
    found, _ = forward(method, batch_of(views, index), step)
    found.backward()
    wanted, after = slow_step(reference, args, views, index.tolist(), rows)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (n, p), r in zip(method.encoder.named_parameters(), reference.encoder.parameters(), strict=True):
        assert torch.allclose(p.grad, r.grad, rtol=1e-3, atol=1e-4 * r.grad.abs().max().item() + 1e-8), n
    method.commit(step)
    for bank, memory in after.items():
        torch.testing.assert_close(method.banks[bank].memory, memory, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["nce", "softmax"])
@pytest.mark.parametrize("name", ["cmc", "insdis"])
def test_prepare__replaces_the_rows_of_its_images_by_their_features_and_changes_nothing_else(name, loss):
    """But Z of NCE, which the first step of a training without this pass gives too."""
    flags = ["--loss", loss, "--fill-banks"]
    views, index, step = uint8_views(method_args(name)), torch.tensor([4, 39, 0, 7, 12, 13, 30, 21]), Step(0, 10, 0)
    method, plain = build(name, *flags), build(name, *flags)
    assert method.prepares and not build(name).prepares
    before = copy.deepcopy(method.state_dict())
    method.prepare(batch_of(views, index), step)
    features = plain.features(plain.targets(batch_of(views, index), step))
    forward(plain, batch_of(views, index), step)
    plain.commit(step)
    after = method.state_dict()
    for bank, f in zip(method.banks, features, strict=True):
        wanted = before.pop(f"banks.{bank}.memory").clone()
        wanted[index] = f.detach()
        torch.testing.assert_close(after[f"banks.{bank}.memory"], wanted)
    for key, value in before.items():
        wanted = plain.state_dict()[key] if key.endswith("log_z") else value
        assert torch.equal(after[key], wanted), key
        assert not key.endswith("log_z") or wanted.isfinite()


@pytest.mark.parametrize("name", ["cmc", "insdis"])
def test_step__in_bf16_scores_and_loss_are_float32(name):
    """And near those of float32: only the encoders are bf16."""
    args = method_args(name)
    views, index = uint8_views(args), torch.arange(8)
    losses, gradients = [], []
    for amp in ("fp32", "bf16"):
        method = build(name, "--amp", amp)
        loss, _ = forward(method, batch_of(views, index), Step(0, 10, 0))
        loss.backward()
        method.commit(Step(0, 10, 0))
        assert loss.dtype == torch.float32 and all(f.dtype == torch.float32 for fs in method.seen.values() for f in fs)
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in method.encoder.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.8


def ten_steps(name, *flags):
    """Banks and criteria of this process after ten steps of training, each process with its own images."""
    method = build(name, *flags)
    model = dist.data_parallel(method, torch.device("cpu"))
    args = method_args(name, *flags)
    torch.manual_seed(dist.rank())
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    for number in range(10):
        step = Step(number, 10, 0)
        index = torch.from_numpy(step.rng.permutation(IMAGES)[:8])
        index[7] = index[0]  # an image in the place of an unusable one, on both processes
        loss, _ = forward(model, own_part(batch_of(uint8_views(args, seed=number), index)), Step(number, 10, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.commit(step)
    return {k: v for k, v in method.state_dict().items() if k.startswith(("banks", "criteria"))}


@pytest.mark.parametrize("name, flags", [("cmc", ["--views", "L", "ab", "Y"]), ("insdis", [])])
def test_banks__replicas_stay_identical(name, flags):
    first, second = spawn(ten_steps, name, *flags)
    assert first.keys() == second.keys() and all(torch.equal(value, second[k]) for k, value in first.items())
    rows = [v for k, v in first.items() if "memory" in k]
    assert all(((row.norm(dim=1) - 1).abs() < 1e-5).sum() > 30 for row in rows)  # most images were seen


# ---- networks

TWO = {"l_to_ab": 1, "ab_to_l": 2}


@pytest.mark.parametrize("arch", ARCHS)
def test_branches__layer_shapes(arch):
    with torch.device("meta"):
        trunk = Branches(arch, TWO).eval()
        found = trunk.features([torch.empty(2, 1, 224, 224), torch.empty(2, 2, 224, 224)], trunk.layers)
        with_head = Branches(arch, TWO, 128).eval()
        heads = [with_head.l_to_ab(torch.empty(2, 1, 224, 224)).shape, with_head.ab_to_l(torch.empty(2, 2, 224, 224)).shape]
    if arch == "alexnet":
        wanted = {1: 96 * 10 * 10, 2: 256 * 6 * 6, 3: 384 * 5 * 5, 4: 384 * 5 * 5, 5: 256 * 6 * 6}
    else:
        wanted = {6: int(2 * 512 * {"v1": 0.5, "v2": 1, "v3": 2}[arch[-2:]] * (1 if "18" in arch else 4))}
    assert {layer: x.shape for layer, x in found.items()} == {layer: (2, width) for layer, width in wanted.items()}
    assert heads == [(2, 128)] * 2
    if arch != "alexnet":
        assert trunk.l_to_ab.conv1.weight.shape == (64, 1, 7, 7) and trunk.ab_to_l.conv1.weight.shape == (64, 2, 7, 7)


@pytest.mark.parametrize("stride", [0, 8, 16, 32])
def test_branches__output_stride_dilates_without_other_weights(stride):
    trunk = Branches("resnet18v1", TWO, output_stride=stride)
    side = 64 // (stride or 32)
    assert trunk.last_maps([torch.zeros(1, n, 64, 64) for n in (1, 2)]).shape == (1, 512, side, side)
    shapes = [{name: v.shape for name, v in t.state_dict().items()} for t in (trunk, Branches("resnet18v1", TWO))]
    assert shapes[0] == shapes[1]


def test_alexnet__published_channels_and_maps():
    branch = Branches("alexnet", TWO, 128).l_to_ab.eval()
    shapes = [tuple(x.shape[1:]) for x in branch.maps(torch.zeros(1, 1, 224, 224), branch.layers).values()]
    assert shapes == [(48, 27, 27), (128, 13, 13), (192, 13, 13), (192, 13, 13), (128, 6, 6)]
    assert [branch.fc6[0].out_features, branch.fc7[0].out_features, branch.fc8.out_features] == [2048, 2048, 128]


# ---- flags


@pytest.mark.parametrize("name, arch", [("cmc", "resnet50v1"), ("insdis", "resnet50")])
def test_flags__published_defaults(name, arch):
    args = main_pretrain.get_args(["--method", name, "--shards", "x"])
    published = {"arch": arch, "epochs": 240, "batch_size": 128, "momentum": 0.9, "weight_decay": 1e-4, "nce_k": 16384,
                 "nce_t": 0.07, "nce_m": 0.5, "nce_dim": 128, "lr_steps": [120, 160, 200], "lr_gamma": 0.1, "size": 224,
                 "loss": "nce", "crop_min": 0.08}  # fmt: skip
    assert {k: getattr(args, k) for k in published} == published
    assert args.lr * args.batch_size / 256 == pytest.approx(0.03)
    spec, *more = METHODS[name].views(args)
    assert not more and (spec.size, spec.scale, spec.flip_p, spec.blur_p) == (224, (0.08, 1.0), 0.5, 0)
    jitter = ((0.4, 0.4, 0.4, 0.4), 1.0, 0.2, True) if name == "insdis" else ((0, 0, 0, 0), 0, 0, False)
    assert (spec.jitter, spec.jitter_p, spec.gray_p, spec.gray_first) == jitter


@pytest.mark.parametrize("name, flags, message", [
    ("cmc", ["--arch", "resnet50"], "--arch resnet50: CMC has alexnet, resnet18v1"),
    ("cmc", ["--arch", "alexnet"], "--size 32: AlexNet's .* 224"),
    ("cmc", ["--arch", "alexnet", "--size", "224", "--bn-splits", "8"], "--batch-size 8: leaves one image .*; pass 16"),
    ("cmc", ["--arch", "alexnet", "--size", "224", "--output-stride", "8"], "--output-stride 8: alexnet has 0; pass"),
    ("cmc", ["--output-stride", "4"], "--output-stride 4: tiny_resnetv0 has 0, 8, 16, 32; pass one of them"),
    ("cmc", ["--nce-k", "0"], "--nce-k 0"),
    ("insdis", ["--nce-m", "1.5"], "--nce-m 1.5"),
    ("insdis", ["--nce-t", "0"], "--nce-t 0"),
    ("insdis", ["--crop-min", "0"], "--crop-min 0"),
])  # fmt: skip
def test_check__names_the_flag(name, flags, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].check(method_args(name, *flags), 40)


def test_check__steps_that_no_epoch_reaches_give_a_warning(capsys):
    main_pretrain.check(method_args("insdis", "--epochs", "2", "--lr-steps", "1", "2"), 40)
    assert capsys.readouterr().out == "warning: --lr-steps 1 2: not all of them lie before --epochs 2; scale them\n"
    main_pretrain.check(method_args("insdis", "--epochs", "3", "--lr-steps", "1", "2"), 40)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags, message", [
    (["--lr-steps", "5", "3"], "--lr-steps 5 3: must be epochs above 0 in rising order"),
    (["--lr-steps", "0"], "--lr-steps 0: "),
    (["--lr-steps", "3", "--lr-per", "step"], "--lr-per step: .*--lr-steps"),
    (["--lr-gamma", "2"], "--lr-gamma 2.0"),
])  # fmt: skip
def test_check__steps_of_the_learning_rate(flags, message):
    with pytest.raises(ValueError, match=message):
        main_pretrain.check(method_args("moco", *flags), 40)
