"""Indexing the shards of other code: parts, progress on disk, interruption, folders that are read-only."""

import json
import os
import time
from pathlib import Path

import pytest
from helpers import default_start_method, forkserver
from runs import FLAGS, TWO, Run, pretrain, steps
from shards_helpers import name_classes, one_photograph, write_members

import utils.data.index as index_module
from utils.data import index_file, indexing
from utils.data.index import index_part, load_index
from utils.run.dist import alive

SLOW = """
import time
import utils.data.index_file as index_file
class Slow:
    def __init__(self, *args):
        self.file = open(*args)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def read(self, size):
        time.sleep(0.3)
        return self.file.read(size)
index_file.open = Slow
"""


def released(folder, sizes=(12, 8, 12, 8)):
    """Shards in the format of MosRep's converter: .jpg and .cls, numbered from shards-00000.tar. Returns their pattern."""
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            members += [(f"{number:07d}.jpg", one_photograph(number)), (f"{number:07d}.cls", str(number % 2).encode())]
            number += 1
        write_members(folder / f"shards-{shard:05d}.tar", members)
    return f"{folder}/shards-{{00000..{len(sizes) - 1:05d}}}.tar"


def scans(monkeypatch):
    """The names of the shards that are scanned from now on."""
    names, scan = [], indexing._scan

    def counted(path, flag):
        names.append(path.name)
        return scan(path, flag)

    monkeypatch.setattr(indexing, "_scan", counted)
    return names


def left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tar"))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_index_part__all_parts_are_the_whole_index(tmp_path, monkeypatch, parts, capsys):
    spec, plain = released(tmp_path / "a"), released(tmp_path / "b")
    whole = load_index(plain)
    for part in range(parts):
        index_part(spec, "--shards", None, part, parts)
    assert all(name.startswith("index.json.scanned.") for name in left(tmp_path / "a"))
    names = scans(monkeypatch)
    index = load_index(spec)
    assert names == [] and index.hash == whole.hash and index.classes == ("0", "1")
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()
    assert left(tmp_path / "a") == left(tmp_path / "b") == ["index.json"]


def test_index_part__an_error_is_that_of_the_first_process(tmp_path):
    spec = released(tmp_path / "a")
    os.truncate(tmp_path / "a/shards-00001.tar", 5000)
    for part in range(2):
        index_part(spec, "--shards", None, part, 2)
    with pytest.raises(ValueError, match="^--shards .*shards-00001.tar: not a whole tar"):
        load_index(spec)


def test_load_index__an_incomplete_line_and_a_changed_shard_are_scanned_again(tmp_path, monkeypatch):
    spec = released(tmp_path / "a")
    expected = load_index(released(tmp_path / "b"))
    for part in range(2):
        index_part(spec, "--shards", None, part, 2)
    first, second = (tmp_path / f"a/index.json.scanned.{part}" for part in range(2))
    first.write_bytes(first.read_bytes()[:-20])  # of shard 2: a kill during the write
    os.utime(tmp_path / "a/shards-00001.tar", (1, 1))
    names = scans(monkeypatch)
    assert load_index(spec).hash == expected.hash
    assert names == ["shards-00001.tar", "shards-00002.tar"] and left(tmp_path / "a") == ["index.json"]


def test_main_pretrain__an_indexing_that_sigkill_interrupts_resumes(tmp_path, monkeypatch):
    """With two processes, and then again: the index is complete after the second start."""
    folder = tmp_path / "a"
    spec = released(folder)
    command = ["pretrain", *pretrain(tmp_path, tmp_path / "out")[1:], "--shards", spec]
    with Run(tmp_path, command, TWO, before=SLOW) as run:
        run.until(lambda: len(list(folder.glob("*.scanned.*"))) == 2)
        run.kill()
    assert left(folder) == ["index.json.scanned.0", "index.json.scanned.1"]
    names = scans(monkeypatch)
    assert load_index(spec).total == 40
    assert len(names) <= 2 and left(folder) == ["index.json"]


def test_commands__shards_of_the_released_format_train_probe_and_resume_on_two_processes(tmp_path):
    """The second process waits for the indexing of the first longer than --dist-timeout."""
    spec, out = released(tmp_path / "a"), tmp_path / "out"
    command = [*pretrain(tmp_path, out), "--shards", spec, "--dist-timeout", "8", "--epochs"]
    slower = SLOW.replace("0.3", "2.1 * (dist.rank() == 0)") + "from utils.run import dist"
    with Run(tmp_path, [*command, "1"], TWO, before=slower) as first:
        assert first.end() == 0, first.said()
    with Run(tmp_path, [*command, "2"], TWO) as second:
        assert second.end() == 0, second.said()
    assert steps(out) == [(epoch, step) for epoch in (0, 1) for step in range(5)]
    ours = str(tmp_path / "b")
    load_index(released(tmp_path / "b"))
    name_classes(tmp_path / "b", ["dark", "light"])
    shards = ["--train-shards", ours, "--val-shards", spec, "--batch-size", "8", "--epochs", "1", "--size", "32"]
    with Run(tmp_path, ["lincls", *FLAGS, "--pretrained", out, *shards], TWO) as probe:
        assert probe.end() == 0, probe.said()
    assert probe.said().count("warning: --val-shards: its 2 classes are known as numbers only") == 1
    assert json.loads((out / "linear/result.json").read_text())["last"]["top1"] >= 0


def cli(argv, out):
    default_start_method()
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
    index_module.main(argv)


def run_cli(tmp_path, *argv):
    process = forkserver().Process(target=cli, args=([*map(str, argv)], tmp_path / "said"))
    process.start()
    process.join(60)
    return process.exitcode, (tmp_path / "said").read_text()


@pytest.mark.parametrize("jobs", [1, 3])
def test_main__indexes_a_folder_alone(tmp_path, jobs):
    released(tmp_path / "a")
    assert run_cli(tmp_path, "-j", jobs, tmp_path / "a") == (0, f"{tmp_path / 'a'}: 40 images in 4 shards, 2 classes\n")
    assert left(tmp_path / "a") == ["index.json"]
    assert run_cli(tmp_path, tmp_path / "nothing")[0] == 2


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """Shards in a folder that cannot be written."""
    spec, temporary, whole = released(tmp_path / "a"), indexing.tempfile.TemporaryFile, index_file.atomic

    def refuse(path):
        if Path(path) == tmp_path / "a":
            raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(indexing.tempfile, "TemporaryFile", lambda dir: refuse(dir) or temporary(dir=dir))
    monkeypatch.setattr(index_file, "atomic", lambda path: refuse(path.parent) or whole(path))
    return spec


def test_load_index__of_a_read_only_folder_is_in_cache_dir(tmp_path, monkeypatch, read_only, capsys):
    cache = str(tmp_path / "deep/cache")
    expected = load_index(released(tmp_path / "b")).hash
    names = scans(monkeypatch)
    index_part(read_only, "--shards", cache, 1, 2)
    assert load_index(read_only, cache_dir=cache).hash == expected and len(names) == 4
    (kept,) = (tmp_path / "deep/cache").iterdir()
    assert kept.name.endswith("-index.json") and left(tmp_path / "a") == [] and "warning" not in capsys.readouterr().err
    assert load_index(str(tmp_path / "a"), cache_dir=cache).hash == expected and len(names) == 4  # found again
    other = released(tmp_path / "c", (3,))
    assert load_index(other, cache_dir=cache).total == 3  # another folder's shards have an index of their own
    (tmp_path / "a/shards-00003.tar").unlink()
    with pytest.raises(ValueError, match=f"shards-00003.tar is missing, .*delete {kept} to index"):
        load_index(str(tmp_path / "a"), cache_dir=cache)


def test_load_index__of_a_read_only_folder_without_cache_dir_is_made_at_each_start(tmp_path, monkeypatch, read_only, capsys):
    names = scans(monkeypatch)
    for start in (1, 2):
        assert load_index(read_only).total == 40 and len(names) == 4 * start
        err = capsys.readouterr().err
        assert err.count("warning: ") == 1 and "Read-only file system" in err and "--cache-dir" in err


def test_describe__tells_that_it_advances(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(3 << 20))
    told = []
    monkeypatch.setattr(index_file.dist, "alive", lambda: told.append(time.monotonic()))
    index_file.describe(tmp_path / "x", 1)
    assert len(told) == 3
    alive()  # in one process: nothing
