"""The shell scripts and utils/run/env.sh, without an installation: their commands and their Python."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

import main_finetune
import main_lincls
import main_pretrain
import main_transfer
from methods import METHODS
from utils.run.requirements import main as unsatisfied

ROOT = Path(__file__).parent.parent
LAUNCHED = [method for method in METHODS if (ROOT / f"pretrain_{method}.sh").exists()]  # a new method may come without
PRETRAIN, LINEAR, FINETUNE = ([f"{kind}_{method}.sh" for method in LAUNCHED] for kind in ("pretrain", "linear", "finetune"))
LAUNCHERS = PRETRAIN + LINEAR + FINETUNE
SCRIPTS = [*LAUNCHERS, "transfer.sh", "utils/run/env.sh", "tests/run.sh", ".ci/run"]
ENTRY_POINTS = {module.PROG: module for module in (main_pretrain, main_lincls, main_finetune, main_transfer)}

# After the real utils/run/env.sh: no environment is looked for, and a launcher prints its arguments and runs no program.
DRY_RUN = """
use_environment() { :; }
launch() { printf '%s\\n' "$@"; }
"""


@pytest.fixture
def project(tmp_path):
    """A dry-run copy of the scripts in a folder with a space, with a converted sample and a finished run of each method."""
    folder = tmp_path / "a project"
    for script in SCRIPTS:
        (folder / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, folder / script)
    with open(folder / "utils/run/env.sh", "a") as env:
        env.write(DRY_RUN)
    for split in ("train", "val"):
        write(folder / f"output/sample-shards/{split}/index.json")
        write(folder / f"output/sample-shards/{split}/names.txt", "".join(f"FashionMNIST {split} {i}\n" for i in range(700)))
    for run in (*LAUNCHED, "moco-multicrop", "moco-v1", "moco-unmix", "w2ssl-1024"):
        write(folder / f"output/{run}/checkpoint_latest.pth.tar")
        write(folder / f"output/sample-{run}/checkpoint_latest.pth.tar")
    return folder


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def bash(*command, cwd=ROOT, **variables):
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def dry_run(project, launcher, *flags, cwd=None, **variables):
    """The flags that a launcher would pass, as the entry point itself understands them. cwd: default: the project's folder."""
    done = bash(project / launcher, *flags, cwd=cwd or project, **variables)
    assert done.returncode == 0, done.stderr
    script, *argv = done.stdout.splitlines()
    assert script == (f"{project}/" if cwd else "") + Path(script).name
    with contextlib.chdir(cwd or project):  # as the launcher, which passes relative paths
        return ENTRY_POINTS[Path(script).name].get_args(argv)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts__parse(script):
    assert bash("-n", script).stderr == ""


def test_scripts__shellcheck_is_silent():
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("shards", ["", "/data/imagenet shards"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers__every_flag_is_known_and_the_users_flags_win(project, launcher, shards):
    args = dry_run(project, launcher, "--epochs", "3", "--lr", "7", SHARDS=shards, IMAGES="list.txt")
    assert (args.method, args.epochs, args.lr) == (re.search("_(.*).sh", launcher)[1], 3, 7)
    assert args.resume == "auto"
    assert Path(vars(args).get("shards") or args.train_shards) == Path(
        shards or ("data/clipart" if args.method == "cmc" else "output/sample-shards"), "train"
    )


@pytest.mark.parametrize("launcher", PRETRAIN)
def test_launchers__imagenet_recipe_is_the_published_default(project, launcher):
    args = dry_run(project, launcher, SHARDS="/imagenet")
    given = {"shards": "/imagenet/train", "output_dir": args.output_dir, "resume": "auto"}
    default = main_pretrain.get_args(["--method", args.method, "--shards", "/imagenet/train"])
    assert vars(args) == {**vars(default), **given}


@pytest.mark.parametrize("launcher", LINEAR)
def test_launchers__imagenet_probe_is_the_published_default(project, launcher):
    args = dry_run(project, launcher, SHARDS="/imagenet")
    given = {"pretrained": args.pretrained, "train_shards": "/imagenet/train", "val_shards": "/imagenet/val", "resume": "auto"}
    required = [f"--{flag.replace('_', '-')}={value}" for flag, value in given.items() if flag != "resume"]
    with contextlib.chdir(project):
        assert vars(args) == {**vars(main_lincls.get_args(["--method", args.method, *required])), **given}


FINE = {  # lr, lr_head, lr_steps, lr_gamma, epochs, steps, batch size, nesterov
    "1percent": (0.02, 5, [12, 16], 0.2, 20, 0, 256, False), "10percent": (0.01, 0.2, [12, 16], 0.2, 20, 0, 256, False),
    "barlow-1percent": (0.005, 0.5, [], 0.2, 20, 0, 256, False), "transfer": (0.04, 0.04, [], 0.2, 20, 5000, 64, True),
}  # fmt: skip


@pytest.mark.parametrize("recipe", FINE)
def test_launchers__recipes_of_fine_tuning_are_the_published_ones(project, recipe):
    args = dry_run(project, "finetune_moco.sh", SHARDS="/x", RECIPE=recipe, IMAGES="a list.txt")
    found = args.lr, args.lr_head, args.lr_steps, args.lr_gamma, args.epochs, args.steps, args.batch_size, args.nesterov
    assert found == FINE[recipe] and (args.momentum, args.weight_decay, args.crop_min) == (0.9, 0, 0.08)
    assert (args.method, args.images, args.pretrained) == ("moco", "a list.txt", "output/moco")
    assert args.output_dir == f"output/moco/finetune-{recipe}" and (args.size, args.resize) == (224, 256)


@pytest.mark.parametrize("checkpoint, folder", [
    ("random", "output/random/finetune"), ("https://host/a.pth?x=1", "output/a/finetune"), ("other.pth.tar", "finetune-other"),
    ("output/moco", "output/moco/finetune"), ("output/moco/checkpoint_latest.pth.tar", "output/moco/finetune"),
])  # fmt: skip
def test_launchers__results_of_fine_tuning_are_beside_the_weights(project, checkpoint, folder):
    write(project / "other.pth.tar")
    args = dry_run(project, "finetune_moco.sh", SHARDS="/x", RECIPE="1percent", IMAGES="all", CHECKPOINT=checkpoint)
    assert Path(args.output_dir) == Path(f"{folder}-1percent") and args.pretrained == checkpoint


def test_launchers__fine_tuning_with_few_labels_needs_a_list(project):
    done = bash(project / "finetune_mosrep.sh", cwd=project, SHARDS="/x", RECIPE="barlow-1percent")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: RECIPE=barlow-1percent: set IMAGES to SimCLR's 1percent.txt, or to all if SHARDS has only "
                           "these images\n")  # fmt: skip
    assert dry_run(project, "finetune_mosrep.sh", SHARDS="/x", IMAGES="all").images is None
    assert dry_run(project, "finetune_mosrep.sh", "--images", "b", SHARDS="/x").images == "b"
    assert dry_run(project, "finetune_mosrep.sh", SHARDS="/x", RECIPE="transfer").images is None
    args = dry_run(project, "finetune_mosrep.sh")
    assert Path(project, args.images).read_text() == "".join(f"FashionMNIST train {i}\n" for i in range(600))


@pytest.mark.parametrize("shards, prefix", [("", "output/sample-"), ("/imagenet", "output/")])
@pytest.mark.parametrize("method, variables, run", [
    *((method, {}, method) for method in LAUNCHED), ("moco", {"MULTI_CROP": "0"}, "moco"),
    ("moco", {"MULTI_CROP": "1"}, "moco-multicrop"), ("w2ssl", {"BATCH": "1024"}, "w2ssl-1024"),
    ("moco", {"RECIPE": "v1"}, "moco-v1"), ("moco", {"RECIPE": "unmix"}, "moco-unmix"), ("moco", {"RECIPE": ""}, "moco"),
])  # fmt: skip
def test_launchers__probe_finds_the_run(project, method, variables, run, shards, prefix):
    pretrain = dry_run(project, f"pretrain_{method}.sh", SHARDS=shards, **variables)
    probe = dry_run(project, f"linear_{method}.sh", SHARDS=shards, **variables)
    assert Path(pretrain.output_dir) == Path(prefix + run)
    assert Path(probe.pretrained) == Path(prefix + run)
    assert Path(probe.output_dir) == Path(prefix + run, "linear")
    assert probe.size == pretrain.size
    if method == "moco":
        assert pretrain.local_crops == (4 if run == "moco-multicrop" else 0)
    if method == "w2ssl" and shards:  # a batch of montages, which are half as many as images
        assert pretrain.batch_size == 2 * int(variables.get("BATCH", 256))


def test_launchers__output_and_checkpoint_can_be_given(project):
    write(project / "a run/checkpoint_latest.pth.tar")
    write(project / "released/mosrep.pth.tar")
    assert dry_run(project, "pretrain_mosrep.sh", OUTPUT="a run").output_dir == "a run"
    assert dry_run(project, "linear_mosrep.sh", OUTPUT="a run").pretrained == "a run"
    assert dry_run(project, "linear_mosrep.sh", CHECKPOINT="a run").pretrained == "a run"
    assert dry_run(project, "linear_mosrep.sh", CHECKPOINT="released/mosrep.pth.tar").output_dir == "released/linear-mosrep"


def test_transfer__evaluates_the_sets_that_exist_and_names_the_others(project, tmp_path):
    for name in ("DTD", "CIFAR10", "Another"):
        (tmp_path / "my sets" / name).mkdir(parents=True)
    done = bash(project / "transfer.sh", "--val-fraction", "0.3", cwd=project, DATA=f"{tmp_path}/my sets", CHECKPOINT="pixels")
    said, *argv = done.stdout.splitlines()
    assert said.startswith(f"not in {tmp_path}/my sets: CIFAR100 STL10 Food101 Flowers102 OxfordIIITPet StanfordCars; ")
    args = main_transfer.get_args(argv[1:])
    assert argv[0] == "main_transfer.py" and (args.pretrained, args.val_fraction) == ("pixels", 0.3)
    assert args.sets == [f"{tmp_path}/my sets/{name}" for name in ("CIFAR10", "DTD")]
    assert "holds none of CIFAR10" in bash(project / "transfer.sh", cwd=project, DATA="/nowhere").stderr
    assert "DATA" in bash(project / "transfer.sh", cwd=project).stderr


@pytest.mark.parametrize("method", LAUNCHED)
@pytest.mark.parametrize("flag", [["--shards", "my data"], ["--shards=my data"]])
def test_launchers__a_flag_of_shards_chooses_the_recipe_as_the_variable_does(project, method, flag):
    args, other = (dry_run(project, f"pretrain_{method}.sh", *x) for x in (flag, ["--shards", "y", "--epochs", "1"]))
    assert vars(args) | {"shards": 0} == vars(dry_run(project, f"pretrain_{method}.sh", SHARDS="/x")) | {"shards": 0}
    assert (args.shards, args.output_dir, other.epochs) == ("my data", f"output/{method}", 1)
    given = ["--train-shards", "a", "--val_shards=b"]
    probe = dry_run(project, f"linear_{method}.sh", *given)
    assert (probe.train_shards, probe.val_shards, probe.pretrained) == ("a", "b", f"output/{method}")
    assert dry_run(project, f"linear_{method}.sh", *given[:2]).val_shards == "MISSING"  # and not that of the sample


SPECS = {  # SHARDS -> the shards of training and of validation
    "both": ("both/train", "both/val"), "both/": ("both/train", "both/val"), "both/train": ("both/train", "both/val"),
    "unlabelled": ("unlabelled/train", "unlabelled/val"), "flat": ("flat", "MISSING"), "indexed/": ("indexed/", "MISSING"),
    "flat/{0..1}.tar": ("flat/{0..1}.tar", "MISSING"), "flat/*": ("flat/*", "MISSING"), "flat/0.tar": ("flat/0.tar", "MISSING"),
    "https://host/x": ("https://host/x/train", "https://host/x/val"), "s3://b/train/": ("s3://b/train/", "s3://b/val"),
    "https://host/x-{0..1}.tar": ("https://host/x-{0..1}.tar", "MISSING"),
    "https://host/x/index.json": ("https://host/x/index.json", "MISSING"), "pipe:cat x.tar": ("pipe:cat x.tar", "MISSING"),
}  # fmt: skip


@pytest.mark.parametrize("shards, expected", SPECS.items(), ids=SPECS)
def test_launchers__the_variable_takes_all_that_the_flag_takes(project, shards, expected):
    for path in ("both/train/0.tar", "both/val/0.tar", "unlabelled/train/0.tar", "flat/0.tar", "flat/1.tar",
                 "indexed/index.json"):  # fmt: skip
        write(project / path)
    assert dry_run(project, "pretrain_moco.sh", SHARDS=shards).shards == expected[0]
    probe = dry_run(project, "linear_moco.sh", SHARDS=shards)
    assert (probe.train_shards, probe.val_shards) == expected


@pytest.mark.parametrize("how", ["path", "link"])
def test_launchers__from_another_folder_and_through_a_link(project, tmp_path, how):
    """Relative paths are of the folder where the command is typed; the project's own files are found."""
    here = tmp_path / "here"
    write(here / "runs/moco/checkpoint_latest.pth.tar")
    write(here / "mine/train/0.tar")
    for name in ("pretrain_moco.sh", "linear_moco.sh"):
        (here / name).symlink_to(project / name)
    folder = project if how == "path" else here
    args = dry_run(project, folder / "pretrain_moco.sh", cwd=here)
    assert (args.shards, args.output_dir) == (f"{project}/output/sample-shards/train", f"{project}/output/sample-moco")
    args = dry_run(project, folder / "pretrain_moco.sh", cwd=here, SHARDS="mine", OUTPUT="runs/moco")
    assert (args.shards, args.output_dir) == ("mine/train", "runs/moco")
    assert dry_run(project, folder / "linear_moco.sh", cwd=here, OUTPUT="runs/moco").output_dir == "runs/moco/linear"
    assert dry_run(project, folder / "linear_moco.sh", cwd=here).pretrained == f"{project}/output/sample-moco"


def test_launchers__two_that_start_together_convert_the_sample_once(project):
    """The second one waits for the first, and finds the shards complete."""
    shutil.rmtree(project / "output/sample-shards")
    stand_in = """
PYTHON=convert
convert() {
    echo convert >>log
    sleep 0.5
    mkdir -p $TRAIN $VAL
    touch {$TRAIN,$VAL}/{names.txt,index.json}
}
launch() { [[ -f $VAL/index.json ]] && echo train >>log; }
"""
    with open(project / "utils/run/env.sh", "a") as env:
        env.write(stand_in)
    both = bash("-c", "bash pretrain_moco.sh & bash pretrain_mosrep.sh && wait $!", cwd=project)
    assert both.returncode == 0, both.stderr
    assert (project / "log").read_text().split() == ["convert", "train", "train"]


def test_launchers__modules_are_found_from_another_folder(tmp_path):
    script = f'source "{ROOT}/utils/run/env.sh"; PYTHON="{sys.executable}"; cd /; launch -c "import utils.run.streams"'
    assert bash("-c", script, cwd=tmp_path, NPROC="1").returncode == 0


@pytest.mark.parametrize("name, value", [
    ("NPROC", "abc"), ("NPROC", "0"), ("NPROC", "1.5"), ("NNODES", "two"), ("BATCH", "x"), ("MAX_RESTARTS", "-1"),
    ("MULTI_CROP", "yes"),
])  # fmt: skip
def test_launchers__a_variable_that_is_no_number_is_one_line(project, name, value):
    done = bash(project / "pretrain_w2ssl.sh", cwd=project, **{name: value})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {name}={value}: must be ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("launcher, variables, message", [
    ("pretrain_moco.sh", {"RECIPE": "v3"}, "RECIPE=v3: no such recipe for the embedded sample; known: v1 unmix"),
    ("pretrain_moco.sh", {"RECIPE": "v3", "SHARDS": "/x"}, "RECIPE=v3: no such recipe; known: v1 v1-100 unmix cifar10"),
    ("linear_moco.sh", {"RECIPE": "v1 unmix", "SHARDS": "/x"},
     "RECIPE=v1 unmix: no such recipe; known: v1 v1-100 unmix cifar10"),
    ("pretrain_insdis.sh", {"RECIPE": "softmax"}, "RECIPE=softmax: no such recipe for the embedded sample; known: none"),
    ("linear_insdis.sh", {"RECIPE": "n", "SHARDS": "/x"},
     "RECIPE=n: no such recipe; known: softmax softmax-4096 nce-4096 100 cifar10"),
    ("linear_cmc.sh", {"RECIPE": "1000", "SHARDS": "/x"}, "RECIPE=1000: no such recipe; known: 100 cifar10"),
    ("pretrain_mosrep.sh", {"RECIPE": "v1", "SHARDS": "/x"}, "RECIPE=v1: no such recipe; known: cifar10"),
    ("linear_w2ssl.sh", {"RECIPE": "v1", "SHARDS": "/x"}, "RECIPE=v1: no such recipe; known: cifar10"),
    ("linear_moco.sh", {"RECIPE": "v1", "MULTI_CROP": "1"}, "RECIPE=v1: has two crops; leave out MULTI_CROP=1"),
    ("finetune_moco.sh", {"MULTI_CROP": "1"},
     "MULTI_CROP=1: does not choose the run here; leave it out and set OUTPUT, such as OUTPUT=output/moco"),
    ("finetune_w2ssl.sh", {"BATCH": "1024"},
     "BATCH=1024: does not choose the run here; leave it out and set OUTPUT, such as OUTPUT=output/w2ssl"),
])  # fmt: skip
def test_launchers__an_unknown_recipe_is_one_line(project, launcher, variables, message):
    done = bash(project / launcher, cwd=project, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def test_launchers__no_checkpoint_is_one_line(project):
    shutil.rmtree(project / "output/sample-mosrep")
    done = bash(project / "linear_mosrep.sh", cwd=project)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: no checkpoint output/sample-mosrep: run bash pretrain_mosrep.sh first.*\n", done.stderr)
    assert dry_run(project, "linear_mosrep.sh", "--pretrained", "a file").pretrained == "a file"  # asks for no other


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"NPROC": "1"}, "main.py --lr 1"),
        ({"NPROC": "4"}, "-m utils.run.agent --nproc_per_node 4 --max_restarts 0 --standalone main.py --lr 1"),
        (
            {"NPROC": "1", "MAX_RESTARTS": "2"},
            "-m utils.run.agent --nproc_per_node 1 --max_restarts 2 --standalone main.py --lr 1",
        ),
        (
            {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"},
            "-m utils.run.agent --nproc_per_node 8 --max_restarts 0 --nnodes 2 --node_rank 1 "
            "--master_addr first --master_port 29500 main.py --lr 1",
        ),
    ],
)
def test_launch__one_process_or_torchrun(tmp_path, variables, expected):
    python = tmp_path / "python"
    write(python, '#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    script = "set -euo pipefail; source utils/run/env.sh; launch main.py --lr 1; echo not reached"
    assert bash("-c", script, PYTHON=str(python), **variables).stdout == expected + "\n"


def test_launch__exit_code_is_the_programs(tmp_path):
    write(tmp_path / "fails.py", "raise SystemExit(7)")
    script = f'set -euo pipefail; source utils/run/env.sh; launch "{tmp_path}/fails.py"'
    assert bash("-c", script, PYTHON=sys.executable, NPROC="1").returncode == 7


@pytest.mark.parametrize(
    "requirements, missing",
    [
        ("", None),
        ("# a comment\n\npytest  # and another\n", None),
        ("pytest>=1.0,<1000\n", None),
        ("pytest>=1000\n", f"pytest>=1000 (it has {version('pytest')})"),
        ("no-such-package>=1\n", "no-such-package>=1"),
        ("no-such-package; python_version < '3'\npytest; python_version > '3'\n", None),
        ("no-such-package\npytest==0.1\n", f"no-such-package, pytest==0.1 (it has {version('pytest')})"),
        ("-r other/more.txt\npytest\n", "no-such-package"),
    ],
)
def test_requirements__lists_the_missing_packages(tmp_path, requirements, missing):
    write(tmp_path / "other/more.txt", "no-such-package\n")
    write(tmp_path / "requirements.txt", requirements)
    assert unsatisfied(str(tmp_path / "requirements.txt")) == missing


@pytest.mark.parametrize("found, satisfies", [("2.9.1+cpu", True), ("2.13.0.dev20260101+cu130", True), ("2.9.0", False)])
def test_requirements__local_and_nightly_builds_count(tmp_path, monkeypatch, found, satisfies):
    monkeypatch.setattr("utils.run.requirements.version", lambda package: found)
    write(tmp_path / "requirements.txt", "torch>=2.9.1\n")
    assert (unsatisfied(str(tmp_path / "requirements.txt")) is None) == satisfies


def test_requirements__unfinished_installation_does_not_satisfy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    write(tmp_path / "requirements.txt", "pytest\n")
    assert unsatisfied(str(tmp_path / "requirements.txt")) is None
    write(tmp_path / "incomplete")
    assert "interrupted" in unsatisfied(str(tmp_path / "requirements.txt"))


def test_requirements__as_a_program_imports_no_package(tmp_path):
    write(tmp_path / "requirements.txt", "torch\nnumpy\n")
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    program += "print(*{'torch', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", program, ROOT / "utils/run/requirements.py", tmp_path / "requirements.txt"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "\n"


def test_requirements__what_the_tests_run_in_satisfies_both_files():
    assert unsatisfied(str(ROOT / "requirements-test.txt")) is None
