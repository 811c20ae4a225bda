"""--mirror: copies of a run that are whole or do not count, a run that never waits for them, and a machine that is lost."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import spawn
from runs import Run, ended, metrics, pretrain, same, steps, without_clock

from utils.run import checkpoint, lock, mirror, resume
from utils.run.mirror import BESIDE, MARK, Mirror
from utils.run.saver import Saver, write


@pytest.fixture(autouse=True)
def detached(monkeypatch):
    monkeypatch.setattr(mirror, "PATIENCE", 0.1)
    with lock.released():
        yield
    mirror._mirror = None


def content(epoch, step=0, value=0.0):
    return {"epoch": epoch, "step": step, "state_dict": {"w": torch.full((1000,), value)}}


def saved(folder, *places, value=0.0):
    """A folder with these checkpoints, and metrics."""
    folder.mkdir(exist_ok=True)
    for place in places:
        write(folder / checkpoint.name_of(*place), content(*place, value))
    (folder / "metrics.jsonl").write_text(f"{places}\n")
    return folder


def copied(folder, target, how="auto"):
    """Attach, copy once, detach."""
    mirror.attach(folder, str(target), how)
    with mirror.copied_at_the_end():
        pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_mirror__follows_the_folder(tmp_path):
    """Each save is copied; what --keep deletes here is deleted there; a fresh folder gets the newest and the other files."""
    here, there = tmp_path / "run", tmp_path / "copy"
    here.mkdir()
    mirror.attach(here, str(there), None)
    keeper = Saver(here, 2, 0)
    with mirror.copied_at_the_end():
        for step in (1, 2, 3):
            (here / "metrics.jsonl").write_text("line\n" * step)
            keeper.save(content(0, step, step))
            keeper.wait()
    files = {path.name: path.read_bytes() for path in here.iterdir() if path.name != checkpoint.LATEST}
    found = {path.name: path.read_bytes() for path in there.iterdir()}
    kept = [checkpoint.name_of(0, step) for step in (2, 3)]
    assert sorted(found) == sorted([*files, *(name + BESIDE for name in kept)]) and set(kept) <= set(found)
    assert all(found[name] == text for name, text in files.items())

    other = tmp_path / "another machine"
    other.mkdir()
    mirror.attach(other, str(there), "auto")
    assert checkpoint.newest(other, "").content["step"] == 3
    assert (other / "metrics.jsonl").read_text() == "line\n" * 3 and (other / MARK).read_text() == (here / MARK).read_text()


@pytest.mark.parametrize("damage", ["cut", "no sha256", "changed", "half a sha256"])
def test_fetch__a_copy_that_is_not_whole_is_not_taken(tmp_path, damage, capsys):
    here, there = saved(tmp_path / "run", (0, 1), (0, 2)), tmp_path / "copy"
    copied(here, there)
    newest = there / checkpoint.name_of(0, 2)
    beside, data = newest.with_name(newest.name + BESIDE), newest.read_bytes()
    if damage == "no sha256":
        beside.unlink()
    elif damage == "half a sha256":
        beside.write_text(beside.read_text()[:30])
    else:
        newest.write_bytes(data[:-100] if damage == "cut" else data.replace(b"\0" * 64, b"\1" * 64, 1))
    (tmp_path / "new").mkdir()
    mirror.attach(tmp_path / "new", str(there), "auto")
    assert names(tmp_path / "new") == [checkpoint.name_of(0, 1), "metrics.jsonl", MARK]
    assert ("is not whole" in capsys.readouterr().out) == (damage != "no sha256")

    (there / checkpoint.name_of(0, 1)).write_bytes(b"")
    beside.write_text("0")
    (tmp_path / "newer").mkdir()
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole; pass another place"):
        mirror.attach(tmp_path / "newer", str(there), "auto")


def test_copy__that_ends_in_the_middle_leaves_no_checkpoint_there(tmp_path, monkeypatch):
    """A machine that is lost during a copy: files without their sha256, which the next copy replaces or deletes."""
    here, there = saved(tmp_path / "run", (0, 1)), tmp_path / "copy"
    copied(here, there)
    saved(here, (0, 2))
    half = Mirror(here, str(there))
    half.claim(False)
    monkeypatch.setattr(half.copies.files, "pipe_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        half._copy()
    (there / f".{checkpoint.name_of(0, 1)}.tmp").write_text("of an earlier loss")
    assert (there / checkpoint.name_of(0, 2)).exists()
    (tmp_path / "new").mkdir()
    mirror.attach(tmp_path / "new", str(there), "auto")
    assert checkpoint.newest(tmp_path / "new", "").content["step"] == 1
    copied(here, there)
    both = [checkpoint.name_of(0, step) for step in (1, 2)]
    assert [name for name in names(there) if "checkpoint" in name] == sorted([*both, *(name + BESIDE for name in both)])


def test_copy__a_new_machine_keeps_the_epochs_that_stay_and_deletes_what_was_left_behind(tmp_path):
    """--keep 1; every second epoch stays. The new machine has the newest checkpoint only. Later it resumes an earlier one."""
    here, there, new = saved(tmp_path / "run", (1, 0), (2, 0), (3, 0), (3, 1), (3, 2)), tmp_path / "copy", tmp_path / "new"
    copied(here, there)

    def train_on(folder, *place):
        folder.mkdir(exist_ok=True)
        mirror.attach(folder, str(there), "auto")
        with mirror.copied_at_the_end():
            (keeper := Saver(folder, 1, 0, 2)).save(content(*place))
            keeper.wait()
        return {checkpoint.place_of(path) for path in there.glob("checkpoint_*.tar")}

    assert train_on(new, 3, 3) == {(2, 0), (3, 3)}
    (new / checkpoint.name_of(3, 3)).rename(new / "abandoned_checkpoint_0003_000003.pth.tar")  # as resume.begin does
    mirror.attach(new, str(there), None)
    with mirror.copied_at_the_end():
        (keeper := Saver(new, 1, 0, 2)).save(content(2, 1))
        keeper.wait()
    assert {checkpoint.place_of(path) for path in there.glob("checkpoint_*.tar")} == {(2, 0), (2, 1)}


def test_copy__metrics_are_not_older_than_a_checkpoint_there(tmp_path, monkeypatch):
    """A save during a copy is for the next copy: the metrics may have been copied before its lines were written."""
    here = saved(tmp_path / "run", (0, 1))
    copy = Mirror(here, str(tmp_path / "copy"))
    copy.claim(False)
    real = copy.copies.files.put_file

    def put(source, target):
        real(source, target)
        if "metrics" in source:
            saved(here, (0, 2))

    monkeypatch.setattr(copy.copies.files, "put_file", put)
    copy._copy()
    assert checkpoint.name_of(0, 1) in names(tmp_path / "copy") and checkpoint.name_of(0, 2) not in names(tmp_path / "copy")
    copy._copy()
    assert checkpoint.name_of(0, 2) in names(tmp_path / "copy")
    assert (tmp_path / "copy/metrics.jsonl").read_text() == (here / "metrics.jsonl").read_text()


def test_copy__a_checkpoint_that_was_written_again_is_copied_again(tmp_path):
    here, there = saved(tmp_path / "run", (1, 0)), tmp_path / "copy"
    copied(here, there)
    saved(here, (1, 0), value=5.0)
    copied(here, there)
    shutil.rmtree(here)
    here.mkdir()
    mirror.attach(here, str(there), "auto")
    assert checkpoint.newest(here, "").content["state_dict"]["w"][0] == 5


def test_attach__a_later_copy_is_taken_and_an_earlier_one_is_not(tmp_path):
    here, there = saved(tmp_path / "run", (0, 2)), tmp_path / "copy"
    copied(here, there)
    late = tmp_path / "late"
    shutil.copytree(here, late)
    saved(here, (0, 3))
    copied(here, there)
    mirror.attach(late, str(there), "auto")
    assert checkpoint.newest(late, "").content["step"] == 3
    saved(late, (0, 4))
    mirror.attach(late, str(there), "auto")
    assert checkpoint.newest(late, "").content["step"] == 4


def test_attach__refuses_a_place_of_another_run(tmp_path):
    there = tmp_path / "copy"
    copied(saved(tmp_path / "run", (0, 2)), there)
    other, new = saved(tmp_path / "other", (5, 0)), saved(tmp_path / "new")
    before = names(there)
    for how in ("auto", None):
        with pytest.raises(ValueError, match=f"--mirror {there}: holds another run than {other}; pass another place"):
            mirror.attach(other, str(there), how)
    with pytest.raises(ValueError, match="holds a run already; pass --resume auto"):
        mirror.attach(new, str(there), None)
    assert names(there) == before
    for target, message in ((new, "is --output-dir itself"), (tmp_path / "no/disk", "no is no folder; make it, or mount"),
                            ("s4://x/y", "Protocol not known: s4")):  # fmt: skip
        with pytest.raises(ValueError, match=f"--mirror {target}: .*{message}"):
            mirror.attach(new, str(target), "auto")


def test_attach__a_place_that_does_not_answer(tmp_path, capsys):
    """An empty folder: an error, or the run would start again. A folder with checkpoints: a warning. No password is shown."""
    new, used, target = saved(tmp_path / "new"), saved(tmp_path / "used", (0, 1)), "ftp://me:secret@127.0.0.1:9/x"
    with pytest.raises(
        ValueError, match=r"--mirror ftp://\*\*\*@127.0.0.1:9/x: cannot be used \(ConnectionRefused.*, and may hold"
    ):
        mirror.attach(new, target, "auto")
    mirror.attach(used, target, "auto")
    mirror.push(3, 0)
    with mirror.copied_at_the_end():
        mirror._mirror.warn(ValueError("other"))
    said = capsys.readouterr().out
    assert said.count("ConnectionRefusedError") == 2  # once as it happens, once at the end
    assert "lacks the last save" in said and "ValueError: other" in said and "secret" not in said


def test_attach__dry_changes_nothing(tmp_path):
    copied(saved(tmp_path / "run", (0, 2)), tmp_path / "copy")
    (tmp_path / "new").mkdir()
    for target in ("copy", "nothing yet"):
        mirror.attach(tmp_path / "new", str(tmp_path / target), "auto", dry=True)
    assert names(tmp_path / "new") == [] and not (tmp_path / "nothing yet").exists() and mirror._mirror is None


@pytest.fixture
def gate(monkeypatch):
    """Holds every copy of a file until it is set."""
    from fsspec.implementations.local import LocalFileSystem

    gate, real = threading.Event(), LocalFileSystem.put_file
    monkeypatch.setattr(LocalFileSystem, "put_file", lambda *args, **more: (gate.wait(20), real(*args, **more))[1])
    yield gate
    gate.set()


def test_push__nobody_waits_for_a_slow_place(tmp_path, gate, monkeypatch, capsys):
    here = saved(tmp_path / "run")
    gate.set()
    mirror.attach(here, str(tmp_path / "copy"), None)
    gate.clear()
    keeper, start = Saver(here, 1, 0), time.monotonic()
    for step in (1, 2, 3):
        keeper.save(content(0, step))
        keeper.wait()
    assert time.monotonic() - start < 5 and names(tmp_path / "copy") == [MARK]
    monkeypatch.setattr(mirror, "SLOW", 0)
    mirror.push(3, 0)
    monkeypatch.setattr(mirror, "LAST", 0.3)
    with mirror.copied_at_the_end():
        pass
    said = capsys.readouterr().out
    assert "a copy takes longer than 0 s" in said and "waiting for the last copy" in said
    assert f"lacks the last save (not done in 0 s); it is in {here}" in said.replace("0.3", "0")


def test_push__each_kind_of_failure_is_one_warning_and_the_next_save_tries_again(tmp_path, monkeypatch, capsys):
    from fsspec.implementations.local import LocalFileSystem

    here, failures, real = saved(tmp_path / "run"), [], LocalFileSystem.put_file
    mirror.attach(here, str(tmp_path / "copy"), None)

    def fails(self, *args, **more):
        if len(failures) == 5:
            return real(self, *args, **more)
        failures.append(
            OSError(28, "No space left on device") if len(failures) % 2 else PermissionError(13, "Permission denied")
        )
        raise failures[-1]

    monkeypatch.setattr(LocalFileSystem, "put_file", fails)
    for step in range(1, 6):
        write(here / checkpoint.name_of(0, step), content(0, step))
        mirror.push(3, 0)
        with mirror._mirror.changed:
            assert mirror._mirror.changed.wait_for(lambda: mirror._mirror.done == mirror._mirror.asked, 20)
    with mirror.copied_at_the_end():
        pass
    said = capsys.readouterr().out
    assert said.count("No space left") == said.count("Permission denied") == 1 and "lacks" not in said and len(failures) == 5
    assert checkpoint.name_of(0, 5) + BESIDE in names(tmp_path / "copy")


def read_elsewhere(folder):
    """Each process looks for the checkpoint in a folder of its own, as nodes do that share no file system."""
    path = Path(folder) / os.environ["RANK"] / checkpoint.name_of(0, 1)
    return resume.read_together(path, "--resume")["state_dict"]["w"][0].item()


@pytest.mark.parametrize("second", ["nothing", "another run's", "the same"])
def test_read_together__a_node_without_the_checkpoint_gets_that_of_the_first(tmp_path, second):
    saved(tmp_path / "0", (0, 1), value=7.0)
    if second != "nothing":
        saved(tmp_path / "1", (0, 1), value=3.0 if "another" in second else 7.0)
    assert spawn(read_elsewhere, str(tmp_path)) == [7.0, 7.0]


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """(a mirror, the variables that it needs, a function that lists it)"""
    if request.param == "folder":
        yield str(tmp_path / "copy"), {}, lambda: names(tmp_path / "copy") if (tmp_path / "copy").exists() else []
        return
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}", "AWS_ACCESS_KEY_ID": "a",
                 "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    files = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=variables["AWS_ENDPOINT_URL"], use_listings_cache=False,
                              skip_instance_cache=True)  # fmt: skip
    files.mkdir("bucket")
    yield "s3://bucket/runs/one", variables, lambda: [path.rpartition("/")[2] for path in files.find("bucket/runs/one")]
    server.stop()


STUCK = """
import time
real = main_pretrain.optim.lr_at
main_pretrain.optim.lr_at = lambda lr, at, *more: time.sleep(999) if at > 1.3 else real(lr, at, *more)
"""  # before the third step of the second epoch


def test_main_pretrain__a_lost_machine_resumes_from_its_mirror(images, tmp_path, place):
    """SIGKILL in the middle of an epoch, and the folder is gone: the run in a new folder ends as one without a loss."""
    target, variables, listed = place
    flags = ["--epochs", "2", "--save-steps", "2"]
    lost, new, whole = tmp_path / "lost", tmp_path / "new", tmp_path / "whole"
    assert not ended(pretrain(images, whole, *flags))
    with Run(tmp_path, pretrain(images, lost, *flags, "--mirror", target), before=STUCK, **variables) as first:
        first.until(lambda: checkpoint.name_of(1, 1) + BESIDE in listed() and steps(lost)[-1] == (1, 1))
        first.kill()
    shutil.rmtree(lost)
    with Run(tmp_path, pretrain(images, new, *flags, "--mirror", target), **variables) as second:
        assert second.end() == 0, second.said()
        assert f"copying {checkpoint.name_of(1, 1)} from --mirror" in second.said()
        assert "epochs 1 (from its step 1) to 2" in second.said()
    assert steps(new) == steps(whole) and without_clock(metrics(new)) == without_clock(metrics(whole))
    assert same(checkpoint.find(new, "").content["state_dict"], checkpoint.find(whole, "").content["state_dict"])
    assert checkpoint.name_of(2, 0) + BESIDE in listed() and "report.html" in listed()
