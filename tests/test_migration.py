"""docs/migration.md: every command line of ours is parsed by the real parsers, and every flag of theirs is told apart."""

import re
import shlex
from pathlib import Path

import pytest
import test_launchers
from helpers import tiny
from runs import FLAGS

import imagenet2wds
import main_lincls
import main_pretrain
from methods import METHODS
from utils.run import checkpoint
from utils.run.old_flags import OLD

project = test_launchers.project
PAGE = (Path(__file__).parent.parent / "docs/migration.md").read_text()


def tables(head):
    """The rows of the tables with this first column: a list of cells each."""
    rows, inside = [], False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        inside = cells[0] == head or (inside and line.startswith("|"))
        if inside and cells[0] != head and not set(line) <= set("|- "):
            rows.append(cells)
    return rows


def quoted(cell):
    return re.findall("`([^`]+)`", cell)


COMMANDS = [quoted(row[1])[0] for row in tables("theirs")]
FLAGS_OF_THEIRS = tables("their flag")


def test_page__is_read():
    assert len(COMMANDS) > 25 and len(FLAGS_OF_THEIRS) > 45


@pytest.mark.parametrize("command", COMMANDS)
def test_commands__are_parsed(project, command):
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    program, script, *argv = words[len(variables) :]
    if script == "imagenet2wds.py":
        imagenet2wds.get_args(argv)
        return
    assert program == "bash"
    if checkpoint_file := variables.get("CHECKPOINT"):
        test_launchers.write(project / checkpoint_file)
    if output := variables.get("OUTPUT"):
        test_launchers.write(project / output / "checkpoint_latest.pth.tar")
    args = test_launchers.dry_run(project, script, *argv, **variables)
    assert args.method == re.search("_(.*).sh", script)[1]
    if "bash pretrain" in command and args.method in ("cmc", "insdis"):
        assert args.amp == ("bf16" if "--amp bf16" in command else "fp32")


@pytest.fixture(scope="module")
def known():
    """Every flag of our training and probe."""
    texts = []
    for method in METHODS:
        for get_args in (main_pretrain.get_args, main_lincls.get_args):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: texts.append(text))
                get_args(["--method", method, "--help"])
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", " ".join(texts)))


@pytest.mark.parametrize("row", FLAGS_OF_THEIRS, ids=lambda row: row[0][:30])
def test_flags__are_refused_with_our_name_or_work(known, row):
    theirs = [re.split("[ =]", flag)[0].replace("_", "-") for flag in quoted(row[0])]
    ours = [word for text in quoted(row[1]) for word in text.split() if word.startswith("-")]
    assert set(ours) <= known
    for flag in theirs:
        assert (flag in OLD) != (flag in known)
        if flag in known:
            assert row[1].startswith("the same") or flag in ours
    refused = " ".join(OLD[flag] for flag in theirs if flag in OLD)
    assert not theirs or set(theirs) & known or all(flag in refused for flag in ours)


def test_flags__the_page_has_all_that_are_refused():
    listed = {re.split("[ =]", flag)[0].replace("_", "-") for row in FLAGS_OF_THEIRS for flag in quoted(row[0])}
    assert OLD.keys() - listed == {"--multiprocessing-distributed"} and "--multiprocessing-distributed" in PAGE


# Their commands, as their READMEs and scripts write them, given to our entry points
THEIRS = {
    "mosrep": (main_pretrain, "-m mosrep --train-data /d/train --train-num-samples 1281167 -b 64 -j 8 --lr 0.03 --shift-pix 48 "
               "--global-scale 0.2 1.0 --multi-crop --wd 1e-4 --cos --exp-folder e --exp-name n --amp"),
    "w2ssl": (main_pretrain, "--moco-m-cos --crop-min=.2 --dist-url tcp://localhost:10109 --multiprocessing-distributed "
              "--world-size 1 --rank 0 --print-freq 1000 --batch-size 512 --epochs 200 --loss_crop 1.0 DIR"),
    "w2ssl probe": (main_lincls, "-a resnet50 --batch-size 256 --epochs 100 --dist-url tcp://localhost:10016"
                    "--multiprocessing-distributed --world-size 1 --rank 0 --pretrained checkpoint_0199.pth.tar DIR"),
    "cmc": (main_pretrain, "--model resnet50v1 --batch_size 128 --num_workers 24 --data_folder d --model_path m --amp"),
    "im": (main_pretrain, "--batch_size 128 --IM --IM_type IM --view YCbCr --softmax"),
    "moco-v1": (main_pretrain, "--batch_size 128 --num_workers 24 --nce_k 16384 --softmax --moco"),
    "probe": (main_lincls, "--dataset imagenet --data_folder d --model_path a --model alexnet --learning_rate 0.1 --layer 5"),
    "mosrep probe": (main_lincls, "--pretrain CHECKPOINT_DIR --train-data t --val-data v -b 512 -j 8 --lr 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_commands_of_theirs__end_in_one_line_with_our_flags(name, capsys):
    entry, command = THEIRS[name]
    with pytest.raises(SystemExit) as stop:
        entry.get_args(command.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "flags of other code: " in line
    for flag in re.findall(r"(?<=\s)--?[A-Za-z][\w-]*", f" {command}"):
        if flag.replace("_", "-") in OLD:
            assert f" {flag.replace('_', '-')} is {OLD[flag.replace('_', '-')]}" in line
    for flag in re.findall(r"(?<= is )--?[a-z][a-z-]*", line):
        assert flag in PAGE


def test_cmc__a_run_of_another_precision_resumes(images, tmp_path, capsys):
    """Before fp32 was the default, a run had bf16 or fp16."""
    argv = ["--shards", f"{images}/train", "--output-dir", str(tmp_path), "--epochs"]
    flags = [flag for flag in FLAGS if flag not in ("--amp", "fp32")]
    main_pretrain.main([*tiny("cmc"), *flags, *argv, "2", "--save-freq", "1", "--amp", "bf16"])
    path = tmp_path / "checkpoint_0000.pth.tar"
    assert checkpoint.read(path, "--resume")["flags"]["amp"] == "bf16"
    main_pretrain.main([*tiny("cmc"), *flags, *argv, "2", "--resume", str(path)])
    assert "warning: --amp was bf16 in checkpoint_0000.pth.tar, is now fp32" in capsys.readouterr().out
    main_pretrain.main([*tiny("cmc"), *flags, *argv, "2", "--resume", "auto"])  # all its epochs are done
    assert checkpoint.read(tmp_path / checkpoint.LATEST, "--resume")["epoch"] == 2


def test_cmc__trains_on_images_without_labels(images, tmp_path):
    """As on the unlabelled part of STL-10."""
    argv = ["--shards", f"{images}/plain", "--nce-t", "0.1", "--epochs", "2", "--output-dir", str(tmp_path)]
    main_pretrain.main([*tiny("cmc"), *FLAGS, *argv])
    saved = checkpoint.read(tmp_path / checkpoint.LATEST, "--resume")
    assert (saved["flags"]["nce_t"], saved["epoch"]) == (0.1, 2)
