"""MoCo-v2 against docs/methods.md, and the parts that MosRep inherits: the tests over VARIANTS."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torchvision
from helpers import batch_of, build, forward, method_args, method_of, own_part, random_views, spawn
from torch import nn
from torch.nn.functional import normalize

import main_pretrain
from methods import METHODS
from utils.learning.method import Step
from utils.run import checkpoint, dist

VARIANTS = {
    "moco": ("moco",),
    "multi-crop": ("moco", "--local-crops", "4"),
    "mosrep": ("mosrep", "--output-stride", "16"),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def inputs(variant, n=8, size=64):
    return random_views(n, size, local_crops=0 if variant == "moco" else 4)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def slow_loss(method, views):
    """docs/methods.md, "MoCo-v2", in words and loops, from the key encoder as it is."""
    x_q, x_k, *local = views

    def embed(encoder, x):
        if method.training:
            return normalize(encoder(x), dim=1)
        return torch.cat([normalize(encoder(image[None]), dim=1) for image in x])  # one at a time

    def cross_entropy(query, key):
        positive = torch.exp(query @ key / 0.2)
        negatives = sum(torch.exp(query @ column / 0.2) for column in method.queue.T)
        return -torch.log(positive / (positive + negatives))

    with torch.no_grad():
        keys = embed(method.encoder_k, x_k)
    total = sum(cross_entropy(q, k) for q, k in zip(embed(method.encoder_q, x_q), keys, strict=True)) / len(keys)
    if local:
        n, crops = local[0].shape[:2]
        queries = embed(method.encoder_q, local[0].reshape(n * crops, *local[0].shape[2:]))
        for i in range(n):
            for v in range(crops):
                total = total + cross_entropy(queries[i * crops + v], keys[i]) / (n * crops)
    return total, keys


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("local_crops", [0, 1, 3])
def test_moco__loss_gradients_and_queue_equal_a_slow_loop(local_crops, mode):
    method = build("moco", "--local-crops", str(local_crops)).train(mode == "train")
    reference, views = copy.deepcopy(method), random_views(8, local_crops=local_crops)
    loss, _ = forward(method, views, Step(0, 10, 0))
    loss.backward()
    wanted, keys = slow_loss(reference, views)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, p), r in zip(method.encoder_q.named_parameters(), reference.encoder_q.parameters(), strict=True):
        assert torch.allclose(p.grad, r.grad, rtol=1e-3, atol=1e-4 * r.grad.abs().max().item()), name
    assert torch.equal(method.queue, reference.queue)  # it waits for the update
    method.commit(Step(0, 10, 0))
    assert torch.allclose(method.queue, torch.cat([keys.T, reference.queue[:, 8:]], dim=1), atol=1e-5)
    assert method.queue_ptr.tolist() == [8]


def first_step(flags, views):
    """The state after a step on this process's part of the global batch. Global seeds differ between processes."""
    method = build(*flags)
    model = dist.data_parallel(method, torch.device("cpu"))
    random.seed(dist.rank()), np.random.seed(dist.rank()), torch.manual_seed(dist.rank())
    step = Step(3, 10, seed=5)
    loss, stats = forward(model, own_part(batch_of(views)), step)
    loss.backward()
    method.commit(step)
    return {
        "loss": loss.item(),
        "stats": {name: value.item() for name, value in stats.items()},
        "gradients": {name: p.grad for name, p in method.named_parameters() if p.grad is not None},
        "keys": [p.detach() for pair in method.pairs() for p in pair[1].parameters()],
        "queue": method.queue,
        "pointer": method.queue_ptr.item(),
        "next random number": step.rng.random(),
        "saved names": sorted(checkpoint.prefixed(model)),
    }


@variants
def test_first_step__two_processes_equal_one_with_two_batchnorm_groups(variant):
    flags, views = VARIANTS[variant], inputs(variant)
    first, second = spawn(first_step, flags, views)
    alone = first_step((*flags, "--bn-splits", "2"), views)
    whole = first_step(flags, views)

    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"], rel=1e-5)
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-4)  # they really had different images
    for name, value in alone["stats"].items():
        assert (first["stats"][name] + second["stats"][name]) / 2 == pytest.approx(value, rel=1e-5), name
    names = [name for name, _ in build(*flags).named_parameters() if "_q." in name]
    for process in (first, second):
        assert list(process["gradients"]) == list(alone["gradients"]) == names
        for name in names:
            assert relative(process["gradients"][name], alone["gradients"][name]) < 1e-4, name
        flat = [torch.cat([g.flatten() for g in run["gradients"].values()]) for run in (process, alone)]
        assert relative(*flat) < 1e-5
        assert torch.allclose(process["queue"], alone["queue"], atol=1e-5)
        assert process["pointer"] == alone["pointer"] == 8
        assert process["next random number"] == alone["next random number"]
        assert all(torch.equal(a, b) for a, b in zip(process["keys"], alone["keys"], strict=True))
        assert process["saved names"] == alone["saved names"]
    assert torch.equal(first["queue"], second["queue"])  # to the bit, or replicas drift apart
    assert abs(whole["loss"] - alone["loss"]) > 1e-4 * alone["loss"]  # groups do matter


@variants
def test_keys__start_as_a_copy_and_take_no_gradient(variant):
    method = method_of(method_args(*VARIANTS[variant]))
    state = method.state_dict()
    queries = [name for name in state if "_q." in name]
    assert len(queries) == len([name for name in state if "_k." in name]) > 10
    for name in queries:
        key_name = name.replace("_q.", "_k.")
        assert torch.equal(state[name], state[key_name]), name
        assert state[name].data_ptr() != state[key_name].data_ptr(), name
    loss, stats = forward(method.train(), inputs(variant), Step(0, 10, 0))
    loss.backward()
    for name, p in method.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ("_q." in name), name
    assert not any(value.requires_grad for value in stats.values())
    assert not method.queue.requires_grad


@variants
def test_commit__averages_parameters_once_and_spares_statistics(variant):
    method = build(*VARIANTS[variant], "--moco-m", "0.75")
    forward(method, inputs(variant), Step(0, 10, 0))
    before = copy.deepcopy(method)
    method.commit(Step(0, 10, 0))
    for (old_q, old_k), (new_q, new_k) in zip(before.pairs(), method.pairs(), strict=True):
        parameters = {name for name, _ in old_k.named_parameters()}
        q, k = old_q.state_dict(), old_k.state_dict()
        for name, value in new_k.state_dict().items():
            wanted = 0.75 * k[name] + 0.25 * q[name] if name in parameters else k[name]
            assert torch.allclose(value, wanted, atol=1e-6), name
        assert all(torch.equal(value, q[name]) for name, value in new_q.state_dict().items())


def image_number(x):
    """Of views in one colour, the number of their image. Cells at the edge of a tile mix two colours; most cells are pure."""
    return x[:, 0].flatten(1).mul(50).round().mode(dim=1).values.div(50).round().long()


def oracle(flags, n=4):
    """Stats of an encoder that recognises every image. The colour of a view is the place of its image in the global batch."""
    method = method_of(method_args(*flags, "--output-stride", "8")).train()

    def recognise(module, args, output):
        return nn.functional.one_hot(image_number(args[0]), 16).float().requires_grad_()

    def smaller(module, args, output):
        return nn.functional.avg_pool2d(args[0], 8).repeat(1, output.shape[1] // 3, 1, 1)

    for side in "qk":
        if flags[0] == "mosrep":
            getattr(method, f"projector_{side}").register_forward_hook(recognise)
            getattr(method, f"encoder_{side}").register_forward_hook(smaller)
        else:
            getattr(method, f"encoder_{side}").register_forward_hook(recognise)
    place = (dist.rank() * n + torch.arange(1.0, n + 1)).view(n, 1, 1, 1)
    views = [place.expand(n, 3, 64, 64), place.expand(n, 3, 64, 64), place[:, None].expand(n, 4, 3, 32, 32)]
    views = views[:2] if flags == VARIANTS["moco"] else views
    return [{name: v.item() for name, v in forward(method, views, Step(s, 10, 0))[1].items()} for s in range(3)]


@pytest.mark.parametrize("processes", [1, 2])
@variants
def test_targets__who_recognises_images_is_always_right(variant, processes):
    """For any shuffles, mosaics and shifts: the target of each query is the key of its image in the global batch."""
    for runs in spawn(oracle, VARIANTS[variant]) if processes == 2 else [oracle(VARIANTS[variant])]:
        for stats in runs:
            right = {name: value for name, value in stats.items() if name.startswith("top1")}
            assert right == dict.fromkeys(right, 100)
            assert len(right) == (1 if variant == "moco" else 2)


@pytest.mark.parametrize(
    "flags, terms, candidates",
    [
        (VARIANTS["moco"], 1, 1 + 4096),
        (VARIANTS["multi-crop"], 2, 1 + 4096),
        ((*VARIANTS["mosrep"], "--shift-enable", "0"), 2, 8 + 4096),
    ],
)
def test_chance__is_the_loss_of_a_network_that_knows_nothing(flags, terms, candidates):
    method = build(*flags, "--moco-k", "4096", "--moco-t", "20")
    assert method.chance(8) == pytest.approx(terms * math.log(candidates))
    loss, _ = forward(method, inputs("moco" if flags == VARIANTS["moco"] else "others"), Step(0, 10, 0))
    assert loss.item() == pytest.approx(method.chance(8), rel=0.02)


@pytest.mark.parametrize("name", ["moco", "mosrep"])
def test_state_dict__names_and_shapes_are_the_published_ones(name):
    flags = ["--arch", "resnet50", "--size", "224", "--moco-dim", "128", "--moco-k", "65536"]
    with torch.device("meta"):
        state = method_of(method_args(name, *flags)).state_dict()
        trunk = torchvision.models.resnet50().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {"queue": (128, 65536), "queue_ptr": (1,)}
    for side in "qk":
        wanted |= {f"encoder_{side}.{key}": tuple(v.shape) for key, v in trunk.items() if not key.startswith("fc.")}
        head = f"encoder_{side}.fc" if name == "moco" else f"projector_{side}.projector"
        wanted |= {f"{head}.0.weight": (2048, 2048), f"{head}.0.bias": (2048,)}
        wanted |= {f"{head}.2.weight": (128, 2048), f"{head}.2.bias": (128,)}
        if name == "mosrep":
            conv = f"projector_{side}.conv"
            wanted |= {f"{conv}.0.weight": (2048, 2048, 1, 1), f"{conv}.0.bias": (2048,), f"{conv}.1.num_batches_tracked": ()}
            wanted |= {f"{conv}.1.{part}": (2048,) for part in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == wanted
    assert state["queue_ptr"].dtype == torch.long


@pytest.mark.parametrize("name", ["moco", "mosrep"])
@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet26", "bn3")])
def test_init__last_batchnorm_scale_of_each_branch_is_zero(name, arch, last):
    method = method_of(method_args(name, "--arch", arch))
    scales = {key: p for key, p in method.named_parameters() if "encoder" in key and "bn" in key and key.endswith("weight")}
    assert len([key for key in scales if "layer" in key]) == 2 * 8 * int(last[-1])  # both sides, 8 blocks
    for key, scale in scales.items():
        assert (scale == (0 if f"{last}.weight" in key else 1)).all(), key


def test_init__queue_holds_unit_columns_that_differ():
    queue = method_of(method_args("moco")).queue
    assert queue.shape == (16, 32)
    assert torch.allclose(queue.norm(dim=0), torch.ones(32))
    assert (queue.T @ queue - torch.eye(32)).abs().max() < 0.95


@pytest.mark.parametrize(
    "arch, flags", [("tiny_convnext", []), ("tiny_convnext", ["--output-stride", "16"]), ("test_efficientnet", [])]
)
@variants
def test_forward__other_trunks(variant, arch, flags):
    method = build(*VARIANTS[variant], "--arch", arch, *(flags or ["--output-stride", "0"]))
    before = copy.deepcopy(method.encoder_q)
    views = inputs(variant)
    loss, _ = forward(method, views, Step(0, 10, 0))
    loss.backward()
    assert 0 < loss.item() < 10 * method.chance(8)
    idle = [name for name, p in method.named_parameters() if "_q." in name and not (p.grad is not None and p.grad.any())]
    assert idle == []
    if variant != "mosrep":  # the head sits where the trunk's classifier was, after its pooling and norm
        assert before(views[0]).shape == (8, 16)
        prefix = {"tiny_convnext": "head.fc", "test_efficientnet": "classifier"}[arch]
        names = [key for key in before.state_dict() if key.startswith(f"{prefix}.")]
        assert names == [f"{prefix}.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]


@pytest.mark.parametrize("name, local", [("moco", 0), ("moco", 4), ("mosrep", 4)])
def test_views__published_augmentation(name, local):
    flags = ["--local-crops", str(local)] if name == "moco" else []
    query, key, *rest = METHODS[name].views(method_args(name, "--size", "224", *flags))
    for spec in (query, key, *rest):
        assert (spec.jitter, spec.jitter_p) == ((0.4, 0.4, 0.4, 0.1), 0.8)
        assert (spec.gray_p, spec.blur, spec.blur_p, spec.solarize_p, spec.flip_p) == (0.2, (0.1, 2.0), 0.5, 0, 0.5)
        assert spec.ratio == (3 / 4, 4 / 3) and spec.resize is None
    assert [(s.size, s.scale, s.count) for s in (query, key)] == [(224, (0.2, 1.0), 1)] * 2
    assert [(s.size, s.scale, s.count) for s in rest] == ([(112, (0.1, 0.6), 4)] if local else [])


@pytest.mark.parametrize("name", ["moco", "mosrep"])
def test_flags__published_defaults(name):
    args = main_pretrain.get_args(["--method", name, "--shards", "x"])
    assert (args.arch, args.epochs, args.batch_size, args.lr) == ("resnet50", 200, 256, 0.03)
    assert (args.momentum, args.weight_decay, args.bn_splits, args.output_stride) == (0.9, 1e-4, 1, 0)
    assert (args.moco_dim, args.moco_k, args.moco_m, args.moco_t) == (128, 65536, 0.999, 0.2)
    assert (args.size, args.crop_min, args.local_scale) == (224, 0.2, [0.1, 0.6])
    if name == "mosrep":
        assert (args.shift_enable, args.shift_range, args.shift_beta) == (1.0, 48, 0.5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--moco-k", "100", "--batch-size", "8"], "--moco-k 100: .*--batch-size 8; pass 96 or 104"),
        (["--moco-k", "4", "--batch-size", "8"], "--moco-k 4: .*; pass 8"),
        (["--moco-k", "0"], "--moco-k 0: "),
        (["--moco-m", "1.5"], "--moco-m 1.5: "),
        (["--moco-t", "0"], "--moco-t 0"),
        (["--local-scale", "0.6", "0.1"], "--local-scale 0.6 0.1: "),
        (["--local-crops", "-1"], "--local-crops -1: "),
        (["--local-scale", "0.2", "0.4"], "--local-scale: does nothing without --local-crops"),
    ],
)
def test_check__names_the_flag_and_a_value_that_works(flags, message):
    args = method_args("moco", *flags)
    with pytest.raises(ValueError, match=message):
        METHODS["moco"].check(args, samples=1000)
