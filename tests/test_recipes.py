"""CONFIG.md, row by row: every flag that decides a result, of pre-training and of its probe, against docs/methods.md."""

import contextlib
import re
import shlex

import pytest
import torch
from test_launchers import ROOT, bash, project  # noqa: F401

import main_finetune
import main_knn
import main_lincls
import main_pretrain
from methods import METHODS
from utils.evaluation.frozen import read_source
from utils.run.flags import meaning

ASIDE = ("seed", "lanes", "method", "output_stride", "bn_splits", "replay")  # the published value is the plain one

# ---- docs/methods.md; lr: of the whole batch, as published

SGD = {"momentum": 0.9, "weight_decay": 1e-4, "trust": 0.0, "warmup_epochs": 0.0, "lr_per": "epoch", "lr_gamma": 0.1,
       "amp": "auto"}  # fmt: skip
COSINE, DROPS_200, DROPS_240 = ({"epochs": n, "lr_steps": steps} for n, steps in (
    (200, []), (200, [120, 160]), (240, [120, 160, 200])))  # fmt: skip
MIXTURE = {"im_type": None, "g_alpha": 1.0, "g_num": 2, "g_prob": 0.1, "r_beta": 1.0, "r_num": 2, "r_prob": 0.1,
           "r_pixel_decay": 1.0}  # fmt: skip
QUEUE = SGD | COSINE | {"arch": "resnet50", "size": 224, "crop_min": 0.2, "local_scale": [0.1, 0.6], "moco_dim": 128,
         "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.2, "batch_size": 256, "lr": 0.03}  # fmt: skip
MOCO = QUEUE | MIXTURE | {"local_crops": 0, "moco_head": "mlp", "loss": "softmax", "unmix_prob": None, "aug": "v2"}
MOCO_V1 = MOCO | {"moco_head": "linear", "aug": "v1", "moco_k": 16384, "moco_t": 0.07, "batch_size": 128,
                  "lr": 0.03, "amp": "fp32"}  # fmt: skip
MOSREP = QUEUE | {"shift_enable": 1.0, "shift_range": 48, "shift_beta": 0.5}
W2SSL = SGD | COSINE | {
    "arch": "resnet50", "size": 224, "crop_min": 0.2, "overlap": 0.6, "moco_dim": 256, "moco_mlp_dim": 4096, "moco_m": 0.99,
    "moco_m_cos": True, "loss_t": 0.3, "loss_loc": 1.0, "loss_crop": 1.0, "flip_aware_location": False, "trust": 0.001,
    "weight_decay": 1e-6, "warmup_epochs": 10.0, "lr_per": "step", "batch_size": 512, "lr": 0.6 * 512 / 256,
}  # fmt: skip
BANK = SGD | MIXTURE | DROPS_240 | {
    "size": 224, "crop_min": 0.08, "nce_dim": 128, "nce_k": 16384, "nce_t": 0.07, "nce_m": 0.5, "fill_banks": False,
    "batch_size": 128, "lr": 0.03, "amp": "fp32",
}  # fmt: skip
INSDIS = BANK | {"arch": "resnet50", "loss": "softmax"}
CMC = BANK | {"arch": "resnet50v1", "graph": "full"}

PROBE = {"size": 224, "resize": 256, "momentum": 0.9, "weight_decay": 0.0, "layer": None, "aug": "crop", "crop_min": 0.08,
         "amp": "fp32", "lr_steps": [], "lr_gamma": 0.1, "val_fraction": None}  # fmt: skip
LARC = PROBE | {"epochs": 90, "batch_size": 4096, "lr": 3.2, "trust": 0.001}
OF_W2SSL = PROBE | {"epochs": 100, "batch_size": 256, "lr": 0.1, "trust": 0.0}
STEPS = PROBE | {"epochs": 60, "batch_size": 256, "lr": 30.0, "trust": 0.0, "lr_steps": [30, 40, 50], "lr_gamma": 0.2}
JITTERED = STEPS | {"aug": "v1"}
UNMIX = PROBE | {"epochs": 100, "batch_size": 256, "lr": 30.0, "trust": 0.0, "lr_steps": [60, 80]}
OF_100 = {"lr": 10.0, "crop_min": 0.2}

EXPECTED = {  # number: (flags of the pre-training, GPUs if they matter, flags of the probe)
    "67.7": (MOCO, None, LARC), "69.8": (MOCO | {"local_crops": 4}, None, LARC), "72.3": (MOSREP, None, LARC),
    "70.8": (W2SSL, None, OF_W2SSL), "72.8": (W2SSL | {"batch_size": 2048, "lr": 0.6 * 2048 / 256}, None, OF_W2SSL),
    "56.5": (INSDIS | DROPS_200 | {"nce_k": 4096, "loss": "nce"}, "4", JITTERED),
    "57.1": (INSDIS | DROPS_200 | {"nce_k": 4096}, "4", JITTERED),
    "58.5": (INSDIS | DROPS_200, "4", JITTERED),
    "59.4": (MOCO_V1 | DROPS_200 | {"crop_min": 0.08}, "4", JITTERED),
    "69.1": (INSDIS | {"crop_min": 0.2}, "4", JITTERED | OF_100),
    "73.4": (MOCO_V1 | DROPS_240, "4", JITTERED | OF_100),
    "75.8": (CMC | {"loss": "softmax", "space": "YCbCr", "nce_k": 4096, "crop_min": 0.2}, None, STEPS | {"crop_min": 0.2}),
    "68.6": (MOCO | {"unmix_prob": 0.5}, None, UNMIX),
    "80.9": (MOCO, None, LARC), "83.8": (MOCO | {"local_crops": 4}, None, LARC), "85.7": (MOSREP, None, LARC),
}  # fmt: skip


def rows():
    """(number, commands) of each row of CONFIG.md's tables."""
    for line in (ROOT / "CONFIG.md").read_text().splitlines():
        if found := re.match(r"\| (\d\d\.\d) \|", line):
            yield found[1], re.findall("`(.*?)`", line)


def run(folder, command):
    """(entry point, its arguments, variables) of a command of the table. No program runs."""
    *variables, _, launcher = shlex.split(command)
    variables = dict(v.split("=") for v in variables)
    done = bash(folder / launcher, cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    script, *argv = done.stdout.splitlines()
    return script, argv, variables


def decisive(args):
    """All flags that decide a result; lr as that of the whole batch."""
    found = {name: value for name, value in meaning(args).items() if name not in ASIDE}
    return found | {"lr": pytest.approx(args.lr * args.batch_size / 256)}


def save(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | {"state_dict": {"module.x": torch.zeros(1)}}, path)


def probe_args(argv):
    return main_lincls.get_args(argv, read_source("p", METHODS, argv))


def test_config__has_a_row_for_every_expected_number():
    numbers = [number for number, commands in rows() if len(commands) == 2 or "pretrain_" in commands[0]]
    assert sorted(numbers) == sorted(EXPECTED)


@pytest.mark.parametrize("number, commands", [row for row in rows() if "pretrain_" in row[1][0]])
def test_config__every_flag_is_the_published_one(project, number, commands):  # noqa: F811
    """The probe reads the run's own checkpoint, and then one of the same run that does not contain its flags."""
    pretrain, gpus, probe = EXPECTED[number]
    script, argv, variables = run(project, commands[0])
    args = main_pretrain.get_args(argv)
    assert script == "main_pretrain.py" and variables.get("NPROC") == gpus
    assert decisive(args) == pretrain
    file = project / args.output_dir / "checkpoint_latest.pth.tar"
    whole = {"method": args.method, "arch": args.arch, "flags": vars(args)}
    for content in (whole, {"method": args.method, "arch": args.arch}):
        save(file, **content)
        script, argv, variables = run(project, commands[-1].replace("pretrain_", "linear_"))
        with contextlib.chdir(project):
            found = probe_args(argv)
        assert script == "main_lincls.py" and found.pretrained == args.output_dir
        assert (found.method, found.arch) == (args.method, args.arch)
        space = {"space": args.space if "flags" in content else None, "only_views": None} if args.method == "cmc" else {}
        assert decisive(found) == probe | {"arch": args.arch} | space
    assert variables.get("SHARDS") in commands[0]


@pytest.mark.parametrize("number, commands", [row for row in rows() if "CHECKPOINT" in row[1][0] and "linear_" in row[1][0]])
def test_config__released_weights_have_the_same_probe(project, number, commands):  # noqa: F811
    variables = dict(v.split("=") for v in shlex.split(commands[0])[:-2])
    save(project / variables["CHECKPOINT"])
    _, argv, _ = run(project, commands[0])
    with contextlib.chdir(project):
        assert decisive(probe_args(argv)) == EXPECTED[number][2] | {"arch": "resnet50"}


@pytest.mark.parametrize("number", ["59.4", "68.6"])
def test_config__without_recipe_the_checkpoint_decides_the_probe(project, number):  # noqa: F811
    """OUTPUT alone, as with runs of older versions: MoCo-v1 and Un-Mix are not probed as MoCo-v2."""
    commands = dict(rows())[number]
    args = main_pretrain.get_args(run(project, commands[0])[1])
    save(project / args.output_dir / "checkpoint_latest.pth.tar", method="moco", arch="resnet50", flags=vars(args))
    _, argv, _ = run(project, re.sub("RECIPE=[^ ]*", f"OUTPUT={args.output_dir}", commands[1]))
    with contextlib.chdir(project):
        assert decisive(probe_args(argv)) == EXPECTED[number][2] | {"arch": "resnet50"}


SWAV = {"epochs": 20, "batch_size": 256, "momentum": 0.9, "weight_decay": 0.0, "lr_steps": [12, 16], "lr_gamma": 0.2,
        "crop_min": 0.08, "size": 224, "resize": 256, "nesterov": False, "steps": 0}  # fmt: skip
OTHERS = {  # number -> run, and the flags of the protocol
    **{number: (run, {"k": [1], "size": 224, "resize": 256, "dtype": "fp16", "amp": "fp32"})
       for number, run in (("55.7", "moco"), ("56.0", "moco-multicrop"), ("61.7", "mosrep"))},
    **{number: (run, SWAV | {"lr": 0.02, "lr_head": 5.0})
       for number, run in (("43.5", "moco"), ("45.4", "moco-multicrop"), ("52.8", "mosrep"))},
    **{number: (run, SWAV | {"lr": 0.01, "lr_head": 0.2})
       for number, run in (("58.9", "moco"), ("60.8", "moco-multicrop"), ("65.7", "mosrep"))},
}  # fmt: skip


@pytest.mark.parametrize("number", OTHERS)
def test_config__other_evaluations_have_their_protocol(project, number):  # noqa: F811
    (command,) = dict(rows())[number]
    folder, protocol = OTHERS[number]
    save(project / "output" / folder / "checkpoint_latest.pth.tar", method=folder.partition("-")[0], arch="resnet50")
    python, script, *argv = shlex.split(command)
    if python != "python":
        script, argv, _ = run(project, command)
    module = {m.PROG: m for m in (main_knn, main_finetune)}[script]
    with contextlib.chdir(project):
        args = module.get_args(argv, read_source("p", METHODS, argv))
    assert args.pretrained == f"output/{folder}"
    assert vars(args) | protocol == vars(args)


def test_config__has_a_command_for_every_number_of_the_readme():
    """The authors' figures, and ours: their rows have the commands beside them, or on the page docs/results.md."""
    readme = (ROOT / "README.md").read_text()
    authors = readme[readme.index("**These are the authors' figures.**") :].partition("Our figures")[0]
    lines = [line for line in (ROOT / "CONFIG.md").read_text().splitlines() if "`" in line]
    numbers = re.findall(r"(?<![\d.])\d\d\.\d(?![\d.])", authors)
    assert len(numbers) > 15
    assert not [number for number in numbers if not any(f"| {number} |" in line for line in lines)]
    ours = readme[readme.index("Our figures") :].partition("\n## ")[0]
    rows_of_ours = [line for line in ours.splitlines() if line.startswith("| ") and re.search(r"\d\d\.\d", line)]
    assert rows_of_ours and all("`" in line or "docs/results.md" in line for line in rows_of_ours)
