"""The lock of a run's folder: one run at a time, on file systems with and without locks, and none that a killed run keeps."""

import errno
import json
import os
import threading
import time

import pytest
from helpers import forkserver
from runs import EVALUATIONS, TWO, Run, ended, evaluation, pretrain, steps

from utils.run import lock, resume


@pytest.fixture(autouse=True)
def released(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    with lock.released():
        yield


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""
    monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))


def written(folder, host="node7", pid=4711, boot="another"):
    (folder / lock.NAME).write_text(json.dumps({"host": host, "pid": pid, "boot": boot}))


@pytest.fixture
def beating(tmp_path):
    """The process that has written the lock is alive. Its clock is years late."""
    stop, ticks = threading.Event(), iter(range(10**6))

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / lock.NAME, ns=(0, next(ticks)))

    written(tmp_path)
    threading.Thread(target=beat).start()
    yield
    stop.set()


def hold(folder, seconds):
    with lock.released():
        lock.take(folder)
        (folder / "taken").touch()
        time.sleep(seconds)


def holder(folder, seconds=60):
    """A process that has the lock."""
    process = forkserver().Process(target=hold, args=(folder, seconds))
    process.start()
    while not (folder / "taken").exists():
        time.sleep(0.02)
    return process


def test_take__names_the_other_process_and_is_free_when_that_is_killed(tmp_path, monkeypatch):
    other = holder(tmp_path)
    start, message = time.monotonic(), f"--output-dir {tmp_path}: process {other.pid} on {lock.socket.gethostname()} is run"
    with monkeypatch.context() as patch:
        patch.setattr(lock, "ENDING", 0.5)
        for ask in (lock.take, lock.check):
            with pytest.raises(ValueError, match=message):
                ask(tmp_path)
    other.kill()
    other.join()
    lock.check(tmp_path)
    lock.take(tmp_path)
    assert time.monotonic() - start < 30


def test_released__leaves_no_file(tmp_path):
    with lock.released():
        lock.take(tmp_path)
        assert (tmp_path / lock.NAME).exists()
    assert not list(tmp_path.iterdir())
    other = holder(tmp_path, 0.3)
    other.join(60)
    assert other.exitcode == 0 and not (tmp_path / lock.NAME).exists()


def test_take__a_live_process_of_another_host_is_refused(tmp_path, beating):
    """Though this machine's kernel gives the lock: the file server may have one for each machine."""
    with pytest.raises(ValueError, match="process 4711 on node7 is running in it"):
        lock.take(tmp_path)


def test_take__a_live_process_is_refused_without_locks(tmp_path, beating, no_locks):
    with pytest.raises(ValueError, match="process 4711 on node7 is running in it"):
        lock.take(tmp_path)


@pytest.mark.parametrize("boot", ["another", "this"])
def test_take__a_dead_process_does_not_keep_it_without_locks(tmp_path, no_locks, capsys, boot):
    """Nor does one of another host, or of this host before it started again."""
    written(tmp_path, boot=lock._boot() if boot == "this" else boot)
    lock.take(tmp_path)
    assert "process 4711 on node7; checking for 1 s whether it still runs" in capsys.readouterr().out
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "3", '{"pid": 1}'])
def test_take__a_file_of_nobody_is_taken_at_once(tmp_path, capsys, content):
    (tmp_path / lock.NAME).write_text(content)
    lock.take(tmp_path)
    assert capsys.readouterr().out == ""


IMPATIENT = "from utils.run import lock; lock.ENDING = 0.5"


@pytest.mark.parametrize("launch", [(), TWO])
def test_main_pretrain__a_second_start_in_one_folder_is_refused(images, tmp_path, monkeypatch, launch):
    """Only the first process of each takes part; a killed run leaves nothing that a third start would wait for."""
    out = tmp_path / "run"
    with Run(tmp_path, pretrain(images, out, "--epochs", "999", "--save-steps", "1"), launch) as first:
        first.until(lambda: len(steps(out)) >= 2)
        before = json.loads((out / "config.json").read_text())
        with Run(tmp_path, pretrain(images, out, "--epochs", "1000"), launch, before=IMPATIENT) as second:
            assert second.end() == 2
            assert second.said().count(": error: ") == 1 and f"error: --output-dir {out}: process " in second.said()
            assert "Traceback" not in second.said() and "5 steps per epoch" not in second.said()
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="is running in it"):
            patch.setattr(lock, "ENDING", 0.5)
            resume.open_run(out, "auto", dry=True)
        assert json.loads((out / "config.json").read_text()) == before
        assert len((out / "starts.jsonl").read_text().splitlines()) == 1
        first.kill()
    start = time.monotonic()
    resume.open_run(out, "auto")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations__a_folder_in_use_is_refused(images, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(lock, "ENDING", 0.1)
    other = holder(tmp_path)
    assert ended(evaluation(name, images, tmp_path)) == 2
    assert f"main_{name}.py: error: --output-dir {tmp_path}: process {other.pid} on " in capsys.readouterr().err
    other.kill()
    other.join()
    assert not list(tmp_path.rglob("result.json"))
