"""Command lines: strict flags, one-line errors, and no flag that does nothing."""

import argparse
import inspect
import re
import sys

import pytest
from helpers import tiny
from runs import AT_ONCE, EVALUATIONS, MODULES, TRAINED, Run, evaluation

import main_pretrain
from methods import METHODS
from utils.data.index import load_index
from utils.learning import amp
from utils.run import flags
from utils.run.flags import Parser, RunError, one_line_ends, one_line_errors

PRETRAIN = ["--shards", "x"]
PROBE = ["--pretrained", "p", "--train-shards", "t", "--val-shards", "v"]
REQUIRED = {"pretrain": PRETRAIN, "transfer": ["--pretrained", "p", "--sets", "s"]}
ALL = [(module.get_args, REQUIRED.get(name, PROBE)) for name, module in MODULES.items()]
TRAINING = [(MODULES[name].get_args, REQUIRED.get(name, PROBE)) for name in ("pretrain", *TRAINED)]


def fails(capsys, get_args, argv):
    with pytest.raises(SystemExit) as stop:
        get_args(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code != 0 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("get_args, required", ALL)
def test_parser__unknown_flags_and_abbreviations_are_refused(capsys, get_args, required):
    get_args(required)  # the base line is fine
    for bad in (["--no-such-flag"], ["--see", "3"], ["--batch", "8"], ["--meth", "moco"], ["--out", "x"], ["--amp=int8"]):
        assert bad[0].split("=")[0] in fails(capsys, get_args, [*required, *bad])
    assert re.search("--seed.*ten", fails(capsys, get_args, [*required, "--seed", "ten"]))
    assert "simclr" in fails(capsys, get_args, ["--method", "simclr", *required])
    line = fails(capsys, get_args, [*required, "--batchsize", "8"])
    assert line.endswith("error: --batchsize: no such flag; did you mean --batch-size?")
    assert fails(capsys, get_args, ["stray", *required]).endswith("stray: no such flag; --help lists the flags")


@pytest.mark.parametrize("get_args, required", TRAINING)
def test_parser__flags_of_other_code_are_refused_with_our_names(capsys, get_args, required):
    line = fails(capsys, get_args, ["-m", "moco", "-b", "64", "--lr_decay_epochs=120,160", "--wd", "0", "--epochs", "3"])
    for part in ("-m is --method;", "-b is --batch-size: here the images of all GPUs together", "--wd is --weight-decay",
                 "--lr-decay-epochs is --lr-steps, with spaces: 120 160 200", "docs/migration.md"):  # fmt: skip
        assert part in line
    assert "--epochs" not in line.replace("decay-epochs", "")
    line = fails(capsys, get_args, [*required, "--pretrain", "x"])
    assert "--pretrain is --pretrained" in line


@pytest.mark.parametrize("flag, values", [("--amp", flags.AMP), ("--method", METHODS), ("--device", ["auto", "cuda"])])
def test_parser__a_flag_without_its_value_says_which_there_are(capsys, flag, values):
    for argv in ([*PRETRAIN, flag], [*PRETRAIN, flag, "--lr", "1"]):
        assert f"argument {flag}: expected one argument: {', '.join(values)}" in fails(capsys, main_pretrain.get_args, argv)
    assert fails(capsys, main_pretrain.get_args, [*PRETRAIN, "--arch"]).endswith("expected one argument")


def test_parser__a_flag_of_another_method_is_an_error(capsys):
    for flag in ("--shift-range", "--shift-enable", "--shift-beta"):
        main_pretrain.get_args(["--method", "mosrep", *PRETRAIN, flag, "1"])
        line = fails(capsys, main_pretrain.get_args, ["--method", "moco", *PRETRAIN, flag, "1"])
        assert line.endswith(f"error: {flag}: no such flag here; --method mosrep has it")
    main_pretrain.get_args(["--method", "moco", *PRETRAIN, "--local-crops", "4"])
    assert "--local-crops" in fails(capsys, main_pretrain.get_args, ["--method", "mosrep", *PRETRAIN, "--local-crops", "4"])


def test_parser__method_may_stand_anywhere():
    for argv in (["--method", "moco", *PRETRAIN], [*PRETRAIN, "--method", "moco"], [*PRETRAIN, "--method=moco"]):
        args = main_pretrain.get_args([*argv, "--local-crops", "2"])
        assert (args.method, args.local_crops) == ("moco", 2)
    assert main_pretrain.get_args(PRETRAIN).method == "mosrep"


def test_parser__dash_and_underscore_are_the_same_inside_a_name_and_kept_in_a_value():
    for k in (["--moco-k", "64"], ["--moco_k", "64"], ["--moco-k=64"], ["--moco_k=64"]):
        assert main_pretrain.get_args([*PRETRAIN, *k]).moco_k == 64
    args = main_pretrain.get_args(["--shards=/a_b/c_d-e", "--output_dir", "/x_y", "-a", "convnext_tiny"])
    assert (args.shards, args.output_dir, args.arch) == ("/a_b/c_d-e", "/x_y", "convnext_tiny")


def test_parser__help_shows_the_default_of_the_parser(capsys):
    parser = Parser(prog="p")
    parser.add_argument("--height", type=int, default=3, help="in pixels")
    parser.set_defaults(height=17)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0 and "in pixels (default: 17)" in " ".join(capsys.readouterr().out.split())


def test_parser__a_misspelt_flag_of_no_parser_we_know(capsys):
    parser = Parser(prog="p")
    parser.add_argument("--height", type=int)
    assert fails(capsys, parser.parse_args, ["--heigth=3"]) == "p: error: --heigth: no such flag; did you mean --height?"


def test_group__identity_is_of_the_group_or_of_the_flag():
    parser = Parser(prog="p")
    parser.add_argument("--plain")
    where, how = parser.group("where", identity=False), parser.group("how")
    where.add_argument("--folder-name")
    where.add_argument("-s", "--seed", identity=True)
    how.add_argument("--rate", type=float)
    how.add_argument("--workers", identity=False)
    parser.group("where").add_argument("--again")  # the same part of the help
    how.set_defaults(rate=3.0)
    args = parser.parse_args(["--folder-name", "x"])
    assert flags.meaning(args) == {"plain": None, "seed": None, "rate": 3.0, "again": None}
    assert vars(args).keys() == {"plain", "folder_name", "seed", "rate", "workers", "again"}
    assert parser.format_help().count("where:") == 1


@pytest.mark.parametrize("name", MODULES)
def test_parser__help_has_an_example_at_its_head_and_groups(capsys, name):
    with pytest.raises(SystemExit):
        MODULES[name].get_args(["--help"])
    parts = [f"python main_{name}.py", "\ndata:", *["\noptimization:"] * (name not in AT_ONCE)]
    parts += [*["\nmethod:"] * (name == "pretrain"), "\nrun:"]
    text = capsys.readouterr().out
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)


def test_amp__has_the_choices_of_learning():
    assert ("auto", *amp.DTYPES) == flags.AMP


@pytest.mark.parametrize("method", METHODS)
def test_parser__every_flag_has_help(method, capsys):
    with pytest.raises(SystemExit):
        main_pretrain.get_args(["--method", method, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    args = main_pretrain.get_args(["--method", method, *PRETRAIN])
    fixed = {"local_crops"} if method == "mosrep" else set()  # a mosaic is 2 x 2: a number, but no flag
    assert all("--" + name.replace("_", "-") in text for name in vars(args).keys() - fixed)
    assert ("--shift-range" in text) == (method == "mosrep")


@pytest.mark.parametrize("method", ["moco", "mosrep"])
def test_parser__published_defaults(method):
    args = main_pretrain.get_args(["--method", method, *PRETRAIN])
    published = {"arch": "resnet50", "epochs": 200, "batch_size": 256, "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4,
                 "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.2, "moco_dim": 128, "size": 224, "crop_min": 0.2,
                 "local_scale": [0.1, 0.6]}  # fmt: skip
    if method == "mosrep":
        published |= {"shift_range": 48, "shift_enable": 1.0, "shift_beta": 0.5}
    assert {name: getattr(args, name) for name in published} == published


def test_one_line_errors__bad_input_is_one_line_and_exit_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for error in (ValueError("--a 3:\nno\n   good"), FileNotFoundError("--b x: no such file")):
        with pytest.raises(SystemExit) as stop, one_line_errors("main.py"):
            raise error
        assert stop.value.code == 2
    assert capsys.readouterr().err == "main.py: error: --a 3: no good\nmain.py: error: --b x: no such file\n"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), one_line_errors("main.py"):
        raise ValueError("--a 3: no")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "main.py: error: --a 3: no" in err and "3" in err.split("main.py")[0]


def test_one_line_errors__a_bug_is_not_hidden():
    with pytest.raises(KeyError), one_line_errors("main.py"):
        raise KeyError("a bug, with its traceback")


LOST = ["DataLoader worker (pid 71) is killed by signal: Killed. ", "DataLoader worker (pid(s) 71, 72) exited unexpectedly"]


@pytest.mark.parametrize("error", [RunError("--max-bad 0.1:\n  too many"), *map(RuntimeError, LOST)])
def test_one_line_ends__a_known_reason_is_one_line_and_exit_2(capsys, monkeypatch, error):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop, one_line_ends("main.py"):
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    if isinstance(error, RunError):
        assert line == "main.py: error: --max-bad 0.1: too many\n"
    else:
        assert line.startswith("main.py: error: DataLoader worker (pid") and "71" in line and "--workers" in line
        assert "memory" in line


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug in a DataLoader worker"), ValueError("a bug"), OSError("a bug"), KeyError(1)]
)
def test_one_line_ends__a_bug_is_not_hidden(capsys, error):
    """A ValueError after the start is a bug too."""
    with pytest.raises(type(error)) as raised, one_line_ends("main.py"):
        raise error
    assert raised.value is error and capsys.readouterr().err == ""


@pytest.mark.parametrize("get_args, required", ALL)
def test_add_shard_flags__all_reach_load_index(get_args, required):
    default = {"cache_dir": None, "allow_pipe": False, "verify_shards": False, "max_pixels": flags.MAX_PIXELS}
    assert flags.shard_flags(get_args(required)) == default
    args = get_args([*required, "--cache-dir", "/c_d", "--allow_pipe", "--verify-shards", "--max-pixels", "9"])
    assert flags.shard_flags(args) == {"cache_dir": "/c_d", "allow_pipe": True, "verify_shards": True, "max_pixels": 9}
    with pytest.raises(ValueError, match="--max-pixels 0: must be above 0"):
        flags.shard_flags(get_args([*required, "--max-pixels", "0"]))
    parameters = inspect.signature(load_index).parameters
    assert all(parameters[name].default == value for name, value in flags.shard_flags(get_args(required)).items())


@pytest.mark.parametrize("get_args, required", ALL)
def test_check_evaluation_flags__max_bad_is_a_share_of_at_most_a_half(capsys, get_args, required):
    for value in ("0", "0.01", "0.5"):
        flags.check_evaluation_flags(get_args([*required, "--max-bad", value]))
    for value in ("-0.01", "0.51", "1", "nan"):
        with pytest.raises(ValueError, match=f"--max-bad {float(value)}: must lie in"):
            flags.check_evaluation_flags(get_args([*required, "--max-bad", value]))
    assert get_args(required).max_bad == 0.01
    assert "--photometric" in fails(capsys, get_args, [*required, "--photometric", "gpu"])


@pytest.mark.parametrize("get_args, required", TRAINING)
def test_parser__dry_run_with_and_without_a_rate(get_args, required):
    rates = [get_args([*required, *flag]).dry_run for flag in ([], ["--dry-run"], ["--dry_run", "1500"])]
    assert rates == [None, 1000.0, 1500.0]
    assert get_args(["--dry-run", *required]).dry_run == 1000.0


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_positive__names_flag_and_value(value):
    flags.positive(["--batch-size"], argparse.Namespace(batch_size=3))
    with pytest.raises(ValueError, match=f"--batch-size {value}: "):
        flags.positive(["--batch-size"], argparse.Namespace(batch_size=value))


def test_in_range__ends_belong_and_nan_does_not():
    for value in (0, 0.5, 1):
        flags.in_range("--moco-m", value, 0, 1)
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"--moco-m {value}: .*0, 1"):
            flags.in_range("--moco-m", value, 0, 1)


def test_meaning__leaves_out_only_place_speed_and_inputs():
    args = main_pretrain.get_args(["--method", "moco", *PRETRAIN])
    rest = {"shards", "output_dir", "resume", "device", "workers", "print_freq", "save_freq", "photometric", "max_bad"}
    rest |= {"cache_dir", "allow_pipe", "verify_shards", "max_pixels", "dry_run", "save_steps", "save_minutes", "keep"}
    rest |= {"dist_timeout", "tracker", "mirror"}
    rest |= {"accumulate", "compile", "replay", "init", "eval_shards", "eval_every", "eval_images", "eval_neighbours"}
    assert flags.meaning(args).keys() == vars(args).keys() - rest


@pytest.mark.parametrize("processes", [1, 2, 64])
def test_default_workers__shares_the_cores(monkeypatch, processes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for cores in (1, 2, 8, 96):
        monkeypatch.setattr(flags.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert 0 <= flags.default_workers() <= 8 and flags.default_workers() * processes <= cores


class Recording(flags.Flags):
    """Notes which flags are read."""

    def __init__(self, args):
        super().__init__(**vars(args))
        self.defaults, self.outside = args.defaults, args.outside

    def __getattribute__(self, name):
        function = sys._getframe(1).f_code.co_name
        if function not in {"check", "check_run_flags", "positive", "in_range", "meaning", "_check_same_run"}:
            READ.add(name)
        return super().__getattribute__(name)


READ = set()


@pytest.mark.parametrize("method", METHODS)
def test_main_pretrain__every_flag_that_is_parsed_is_read(images, tmp_path, monkeypatch, method):
    """A check alone does not count: the code that needs the flag must read it."""
    argv = [*tiny(method), "--shards", f"{images}/train", "--output-dir", str(tmp_path), "--epochs", "1", "--workers", "0"]
    argv += ["--eval-shards", f"{images}/val"]
    args = Recording(main_pretrain.get_args([*argv, "--device", "cpu", "--amp", "fp32"]))
    monkeypatch.setattr(main_pretrain, "get_args", lambda argv: args)
    READ.clear()
    flags = set(vars(args))
    main_pretrain.main()
    assert flags <= READ


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations__every_flag_that_is_parsed_is_read(images, tmp_path, monkeypatch, name):
    module = MODULES[name]
    args = Recording(module.get_args([str(word) for word in evaluation(name, images, tmp_path)[1:]]))
    monkeypatch.setattr(module, "get_args", lambda argv, source: args)
    READ.clear()
    module.main()
    assert set(vars(args)) - READ == {"device", "dist_timeout"}  # read before, by a parser of their own


def test_main_lincls__unknown_flag_in_a_process(tmp_path):
    with Run(tmp_path, ["lincls", "--shard", "x"]) as run:
        assert run.end() == 2
    assert run.said().count("\n") == 1 and run.said().startswith("main_lincls.py: error: ")
