"""Every flag of every method, and every general flag, changes the result of two training steps."""

import argparse

import pytest
import torch
from helpers import forward, method_args, uint8_batch

import main_pretrain
from methods import METHODS
from utils.learning import optim
from utils.learning.method import Step

OTHER = {  # another value of each flag; a tuple also has the flags that it needs
    "arch": "tiny_convnext", "output_stride": "16", "lr": "0.5", "momentum": "0.5", "weight_decay": "0.1", "trust": "0.01",
    "warmup_epochs": "0.9", "lr_per": "step", "lr_steps": "1", "lr_gamma": ("0.5", "--lr-steps", "1"), "seed": "9",
    "batch_size": "4",
    "bn_splits": "2", "size": "96", "crop_min": "0.5", "local_scale": ("0.2 0.4", "--local-crops", "2"), "moco_dim": "24",
    "moco_k": "64", "moco_m": "0.5", "moco_t": "0.5", "local_crops": "2", "moco_head": "linear", "loss": None, "aug": "v1",
    "shift_enable": "0", "shift_range": "5", "shift_beta": ("9", "--shift-range", "29"),
    "im_type": "IM", "unmix_prob": "0.5", "overlap": "0.2", "moco_mlp_dim": "48", "moco_m_cos": "", "loss_t": "0.7",
    "loss_loc": "0.3", "loss_crop": "0.3", "flip_aware_location": "", "nce_dim": "24", "nce_k": "12", "nce_t": "0.3",
    "nce_m": "0.9", "space": "HSV", "views": "L ab Y", "graph": ("core", "--views", "L", "ab", "Y"),
    **{name: (value, "--im-type", "IM", *much) for name, value, much in (
        ("g_alpha", "9", ["--g-prob", "1"]), ("g_num", "5", ["--g-prob", "1"]), ("g_prob", "1", []),
        ("r_beta", "9", ["--r-prob", "1"]), ("r_num", "5", ["--r-prob", "1"]), ("r_prob", "1", []),
        ("r_pixel_decay", "0.3", ["--r-prob", "1"]),
    )},
}  # fmt: skip
OF_TRAINING = ["arch", "lr", "momentum", "weight_decay", "trust", "warmup_epochs", "lr_per", "lr_steps",
               "lr_gamma", "seed", "batch_size"]  # fmt: skip


def own_flags(name):
    parser = argparse.ArgumentParser()
    METHODS[name].add_flags(parser.add_argument_group())
    return [action.option_strings[0][2:].replace("-", "_") for action in parser._actions if action.dest != "help"]


def other(name, flag):
    """Another value of a flag, from OTHER, or made of its default; then the flags that it needs."""
    if flag in OTHER:
        return OTHER[flag] if isinstance(OTHER[flag], tuple) else (OTHER[flag],)
    default = getattr(method_args(name), flag)
    return ("" if default is False else str(type(default)(default / 2) or 0.5),)


def changed(name, flag):
    """(flags of the base line, flags with another value)."""
    value, *base = other(name, flag)
    option = f"--{flag.replace('_', '-')}"
    if flag == "moco_m_cos":
        return [], ["--no-moco-m-cos"]
    if flag == "local_scale" and name == "mosrep":
        base = []
    if flag == "arch" and name == "cmc":
        value = "resnet18v2"
    if flag == "loss":
        value = "nce" if name == "moco" else "softmax"
    if flag == "lr_steps" and name in ("cmc", "insdis"):
        base, value = ["--lr-steps", "1"], ""
    if flag == "lr_per":
        base, value = ["--lr-steps"], "epoch" if name == "w2ssl" else "step"
    if flag in ("lr_steps", "lr_gamma") and name == "w2ssl":
        base = [*base, "--lr-per", "epoch"]
    return base, [*base, option, *value.split()]


def two_steps(name, flags):
    """Views, losses and weights of the pass before, a step of the first epoch and one of the second, as in main_pretrain.py."""
    args = method_args(name, "--epochs", "2", *flags)
    main_pretrain.check(args, 40)
    specs, losses = METHODS[name].views(args), []
    method = main_pretrain.build(args, 40, torch.device("cpu")).train()
    lr = optim.scaled_lr(args.lr, args.batch_size)
    optimizer = optim.sgd(method.parameters(), lr, args.momentum, args.weight_decay, args.trust, exclude=True)
    if method.prepares:
        method.prepare(uint8_batch(args, seed=9), Step(5 * args.epochs, 5 * args.epochs, args.seed))
    for number in (0, 7):
        step = Step(number, 5 * args.epochs, args.seed)
        schedule = args.warmup_epochs, args.lr_per == "step", args.lr_steps, args.lr_gamma
        optim.set_lr(optimizer, optim.lr_at(lr, number / 5 + 0.1, args.epochs, *schedule))
        loss, _ = forward(method, uint8_batch(args, seed=number), step)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.commit(step)
    return specs, losses, {key: value.clone() for key, value in method.state_dict().items()}


def differ(a, b):
    return (
        a[:2] != b[:2]
        or a[2].keys() != b[2].keys()
        or any(a[2][k].shape != b[2][k].shape or not torch.equal(a[2][k], b[2][k]) for k in a[2])
    )


@pytest.fixture(scope="module")
def base_line():
    known = {}

    def outcome(name, flags):
        key = (name, *flags)
        if key not in known:
            known[key] = two_steps(name, flags)
        return known[key]

    return outcome


@pytest.mark.parametrize(
    "name, flag", [(name, flag) for name in METHODS for flag in [*OF_TRAINING, *own_flags(name)]]
)  # fmt: skip
def test_flag__changes_something(base_line, name, flag):
    base, flags = changed(name, flag)
    assert differ(base_line(name, base), two_steps(name, flags))


@pytest.mark.parametrize("name", METHODS)
def test_two_steps__give_the_same_result_again(name):
    """Otherwise the test above could not fail."""
    assert not differ(two_steps(name, []), two_steps(name, []))
