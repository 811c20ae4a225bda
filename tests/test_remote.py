"""Remote shards: the same samples, once each, after any broken connection; no command runs without --allow-pipe."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY
from shards_helpers import one_png, overwrite, write_members, write_shards

import main_pretrain
from utils.data import reader, remote, shards
from utils.data.index import Index, cache_path, load_index
from utils.data.loader import load_batches
from utils.data.reader import BadSample, Reader, RemoteShard
from utils.data.remote import RemoteError, copy, is_remote, place, tar_name
from utils.data.shards import epoch_plan, evaluation_plan, training_plan
from utils.data.views import moco_v2_view
from utils.run.flags import RunError
from utils.run.text import shown, shown_flags

# the machine may have fewer cores than a test starts workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

HOST = "https://host.example/folder"
SIZES = (7, 1, 9, 5)
TOTAL = sum(SIZES)
FIRST = np.cumsum([0, *SIZES]).tolist()
BATCH = 6  # two lanes, three steps
SPECS = [moco_v2_view("view", 8, (0.2, 1.0), count=2)]
LAYOUTS = [(1, 0), (1, 2), (2, 1)]  # processes, workers of each
NEEDS_CURL = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens http:// with curl, which is not installed")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 1e-4)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The shards as a local folder, which no test changes."""
    return write_shards(tmp_path_factory.mktemp("local"), SIZES, image=one_png)


@pytest.fixture
def folder(local, tmp_path):
    """A copy of the folder, for a test that corrupts it."""
    return Path(shutil.copytree(Path(local.shards[0].path).parent, tmp_path / "copy"))


class Stream(io.BytesIO):
    """Bytes in pieces, as from a socket, then the end or an error. Closing it early is an error too."""

    def __init__(self, data, error):
        super().__init__(data)
        self.error = error

    def read(self, size=-1):
        data = super().read(min(size, 900) if size >= 0 else 900)
        if not data and self.error:
            raise ConnectionResetError("reset by peer")
        return data

    def close(self):
        if self.error and not self.closed:
            super().close()
            raise OSError("exit 18")
        super().close()


class Elsewhere:
    """A replacement of webdataset's gopen: https://host.example/folder has the files of a folder.

    cuts: file name -> the results of the next openings: a number of bytes, None for all, or an error. always: the same for all
    openings. breaks: whether a cut is an error and not just an end.
    """

    def __init__(self, folder, record):
        self.folder, self.record, self.cuts, self.always, self.breaks = Path(folder), record, {}, {}, False
        self.streams = []

    def __call__(self, url):
        base, _, name = url.partition("?")[0].rpartition("/")
        assert base == HOST, url
        with open(self.record, "a") as file:  # a file, for the workers have copies of self
            file.write(name + "\n")
        cut = self.cuts[name].pop(0) if self.cuts.get(name) else self.always.get(name)
        if isinstance(cut, Exception):
            raise cut
        data = (self.folder / name).read_bytes()
        self.streams.append(Stream(data[:cut], self.breaks and cut is not None))
        return self.streams[-1]

    def opened(self):
        """How often each file was opened, by any process."""
        return Counter(self.record.read_text().split()) if self.record.exists() else Counter()


@pytest.fixture
def elsewhere(folder, tmp_path, monkeypatch):
    server = Elsewhere(folder, tmp_path / "opened")
    monkeypatch.setattr(remote, "gopen", server)
    return server


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of server.folder. server.cuts: as in Elsewhere, and a status such as -503.

    After the cut it breaks off, or, with server.stalls, sends a byte each so many seconds until server.over is set.
    """

    def do_GET(self):
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        self.server.asked.append(path.name)
        cuts = self.server.cuts.get(path.name)
        cut = cuts.pop(0) if cuts else None
        if not path.is_file() or (cut is not None and cut < 0):
            return self.send_error(-cut if path.is_file() else 404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut and self.server.stalls:
            with contextlib.suppress(OSError):
                while not self.server.over.wait(self.server.stalls):
                    self.wfile.write(b"x")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    """A real server on this machine; server.url is the folder's."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder, server.cuts, server.asked, server.daemon_threads = folder, {}, [], True
        server.stalls, server.over = 0, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def global_batches(index, world=1, workers=0, epochs=range(2), first_step=0, lanes=None):
    """The global batches of these processes and workers: views, sample ids, labels, records of unusable samples."""
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world):
            patch.setattr(shards.dist, "rank", lambda rank=rank: rank)
            patch.setattr(shards.dist, "world", lambda: world)
            batches = training_plan(index, BATCH, 0, epochs, lanes, first_step)
            processes.append(list(load_batches(index, SPECS, batches, 0, workers, torch.device("cpu"))))
    steps = list(zip(*processes, strict=True))
    return [
        (torch.cat([b.views[0] for b in step]), [n for b in step for n in b.sample_ids.tolist()],
         [n for b in step for n in b.labels.tolist()], [r for b in step for r in b.bad])
        for step in steps
    ]  # fmt: skip


def assert_same(steps, expected):
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        assert torch.equal(step[0], other[0]) and step[1:] == other[1:]


@pytest.fixture(scope="module")
def expected(local):
    """The batches of the local shards, by one process without workers."""
    return global_batches(local)


def samples_of(index):
    """Key, image and label of every sample, by tarfile."""
    found = []
    for shard in index.shards:
        with tarfile.open(shard.path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        found += [(n[:-4], members[n], int(members[n[:-4] + ".cls"])) for n in members if n.endswith(".png")]
    return found


def taken(reader, number, planned=True):
    sample = reader(number, planned)
    assert sample.sample_id == number
    return sample.key, sample.image, sample.label


# ---------------------------------------------------------------- the same as local shards


@pytest.mark.parametrize("world, workers", [*LAYOUTS, (3, 0), (2, 2)])
def test_load_batches__remote_shards_give_what_local_ones_give(local, expected, elsewhere, world, workers):
    index = load_index(HOST)
    assert index.hash == local.hash and all(shard.path.startswith(HOST) for shard in index.shards)
    assert_same(global_batches(index, world, workers), expected)


@pytest.mark.parametrize("world, workers", LAYOUTS)
def test_load_batches__a_command_gives_what_local_shards_give(local, expected, folder, world, workers):
    index = load_index(f"pipe:cat {folder}/{{000..003}}.tar", allow_pipe=True)
    assert index.hash == local.hash and index.shards[2].path == f"pipe:cat {folder}/002.tar"
    assert_same(global_batches(index, world, workers), expected)


@NEEDS_CURL
@pytest.mark.parametrize("world, workers", LAYOUTS)
def test_load_batches__a_server_gives_what_local_shards_give(expected, server, world, workers):
    index = load_index(server.url)
    assert_same(global_batches(index, world, workers), expected)
    assert {name for name in server.asked if name != "index.json"} == {shard.name for shard in index.shards}


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__remote_shards_resumed_at_any_step(expected, elsewhere, workers):
    index = load_index(HOST)
    for epoch in range(2):
        for step in range(3) if workers == 0 else (1,):
            rest = global_batches(index, 1, workers, range(epoch, 2), step)
            assert_same(rest, expected[3 * epoch + step :])


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_load_batches__a_remote_shard_is_opened_once_an_epoch(elsewhere, lanes):
    """Once for each lane that meets another one in it."""
    index = load_index(HOST)
    for epoch in range(4):
        elsewhere.record.unlink()
        global_batches(index, epochs=range(epoch, epoch + 1), lanes=lanes)
        opened = elsewhere.opened()
        assert len(opened) <= sum(opened.values()) <= len(opened) + (lanes if lanes > 1 else 0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__evaluation_of_remote_shards(local, elsewhere, tmp_path, workers, cached):
    index = load_index(HOST, cache_dir=str(tmp_path / "cache") if cached else None)
    there, here = (
        list(load_batches(which, SPECS, evaluation_plan(which, 4), 0, workers, torch.device("cpu"))) for which in (index, local)
    )
    assert [n for batch in there for n in batch.sample_ids.tolist()] == list(range(TOTAL))
    for batch, other in zip(there, here, strict=True):
        assert torch.equal(batch.views[0], other.views[0]) and torch.equal(batch.labels, other.labels) and batch.bad == []


def test_remote_shard__holds_wanted_samples_and_reads_no_further(local, elsewhere):
    known, shard = samples_of(local)[8:], load_index(HOST).shards[2]
    there = RemoteShard(shard, np.isin(np.arange(9), (2, 4, 5)))
    assert there.read(4).key == known[4][0] and set(there.held) == {2} and there.passed == 5
    source = there.source
    assert there.read(5).key == known[5][0] and there.source is None and there.passed == 6  # no later sample is wanted
    assert source.stream.closed and source.size < shard.bytes
    assert there.read(2).members["png"] == known[2][1] and not there.held and elsewhere.opened()["002.tar"] == 1


@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed"])
def test_reader__remote_samples_in_any_order_and_out_of_turn(local, elsewhere, order):
    known, index = samples_of(local), load_index(HOST)
    numbers = {"forwards": range(TOTAL), "backwards": range(TOTAL)[::-1]}.get(
        order, np.random.default_rng(3).permutation(TOTAL)
    )
    stream = Reader(index)
    stream.expect(np.array(numbers[:15]))  # the other samples are not held
    for number in numbers[:15]:
        assert taken(stream, int(number)) == known[number]
        other = (int(number) * 5 + 2) % TOTAL
        assert taken(stream, other, planned=False) == known[other]
    stream.expect(np.array(numbers[15:]))
    assert [taken(stream, int(number)) for number in numbers[15:]] == [known[number] for number in numbers[15:]]
    stream.close()


def test_reader__leaves_no_process_behind(folder):
    """This includes commands that were stopped early."""
    index = load_index(f"pipe:cat {folder}/{{000..003}}.tar", allow_pipe=True)
    stream = Reader(index)
    stream.expect(np.array([0, 5, 7, 8, 20]))
    for number in (0, 8):
        stream(number)
    stream(10, False)
    stream.close()
    del stream
    assert_no_child()


def assert_no_child():
    children = [Path(path).read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    states = [Path(f"/proc/{pid}/cmdline").read_text() for pids in children for pid in pids]
    assert not [s for s in states if "cat" in s or "curl" in s or "sleep" in s or not s]  # a zombie has no command line


# ---------------------------------------------------------------- the index of remote shards


@pytest.mark.parametrize("spec, names", [
    ("{}", "0123"), ("{}/", "0123"), ("{}/index.json", "0123"), ("{}/{{000..003}}.tar", "0123"),
    ("{}/{{001..002}}.tar", "12"), ("{}/{{002,000}}.tar", "20"), ("{}/001.tar", "1"), ("{}/{{001..002}}.tar?key=a.b", "12"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["fake", pytest.param("curl", marks=NEEDS_CURL)])
def test_load_index__of_a_url(request, local, how, spec, names):
    place = request.getfixturevalue("elsewhere" if how == "fake" else "server")
    base = HOST if how == "fake" else place.url
    index = load_index(spec.format(base))
    query = "".join(spec.partition("?")[1:])
    assert [shard.path for shard in index.shards] == [f"{base}/00{n}.tar{query}" for n in names]
    for shard, n in zip(index.shards, names, strict=True):
        assert dataclasses.replace(shard, path="") == dataclasses.replace(local.shards[int(n)], path="")
    assert index.classes == local.classes


def test_load_index__of_a_command(local, folder):
    index = load_index(f"pipe:cat < '{folder}/{{000..002}}.tar' | cat", allow_pipe=True)
    assert [shard.path for shard in index.shards] == [f"pipe:cat < '{folder}/00{n}.tar' | cat" for n in range(3)]
    assert index.total == 17 and index.classes == local.classes


def fails(spec, **flags):
    with pytest.raises(ValueError) as error:
        load_index(spec, "--val-shards", **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_index__no_index_there(elsewhere):
    (elsewhere.folder / "index.json").unlink()
    assert fails(HOST).startswith(f"--val-shards {HOST}: no index.json can be read there (")
    assert elsewhere.opened() == {"index.json": remote.TRIES}
    command = f"pipe:cat {elsewhere.folder}/{{000..003}}.tar"
    elsewhere.record.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "gopen", remote.gopen_schemes["pipe"])
        assert fails(command, allow_pipe=True).startswith(f"--val-shards {command}: no index.json can be read there (")


@NEEDS_CURL
def test_load_index__no_index_on_a_server(server):
    (server.folder / "index.json").unlink()
    assert fails(server.url).startswith(f"--val-shards {server.url}: no index.json can be read there (")


@pytest.mark.parametrize("spec", ["{}/{{002..004}}.tar", "{}/004.tar"])
def test_load_index__a_remote_shard_that_is_not_in_the_index(elsewhere, spec):
    shutil.copy(elsewhere.folder / "000.tar", elsewhere.folder / "004.tar")
    assert f"{spec.format(HOST)}: 004.tar is not in {HOST}/index.json" in fails(spec.format(HOST))


def test_load_index__a_brace_that_is_not_closed_elsewhere(elsewhere):
    assert fails(f"{HOST}/{{000..003.tar").startswith(f"--val-shards {HOST}/{{000..003.tar: ")


NAMES = ["../000.tar", "a/000.tar", "/etc/000.tar", "..", ".", "", "000.tar;touch x", "$(touch x).tar", "`touch x`.tar",
         "-o.tar", "--output=x.tar", "a b.tar", "000.tar\n", "a'b.tar", 'a"b.tar', "a|b.tar", "a&b.tar", "a>b.tar", "~.tar",
         "a\\b.tar", "{a,b}.tar", "*.tar", "a?b.tar", "a#b.tar", "a%2fb.tar", 3, None, ["000.tar"]]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_load_index__names_that_are_no_plain_names_are_refused(elsewhere, monkeypatch, name):
    """They become a part of a command or a URL."""
    path = elsewhere.folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][2]["name"] = name
    path.write_text(json.dumps(content))
    assert f"--val-shards {HOST}/index.json: not a readable index" in fails(HOST)
    monkeypatch.setattr(remote, "gopen", remote.gopen_schemes["pipe"])
    command = f"pipe:cd {elsewhere.folder} && cat {elsewhere.folder}/{{000..001}}.tar"
    assert "not a readable index" in fails(command, allow_pipe=True)
    assert not (elsewhere.folder / "x").exists()


@pytest.mark.parametrize("name", ["a-b_c.d+e@f=g.tar", "train-000000.tar", "0"])
def test_load_index__plain_names_are_taken(elsewhere, name):
    path = elsewhere.folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][2]["name"] = name
    path.write_text(json.dumps(content))
    assert load_index(HOST).shards[-2].name == name


@pytest.mark.parametrize("content", ["", "<html>not here</html>", "[]", "{}", '{"classes": null, "shards": [{}]}'])
def test_load_index__something_else_lies_there(elsewhere, content):
    (elsewhere.folder / "index.json").write_text(content)
    assert f"{HOST}/index.json: not a readable index" in fails(HOST)


def test_load_index__a_command_is_not_run_unless_it_is_allowed(folder, tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/{{000..003}}.tar"
    text = fails(command)
    assert text.startswith(f"--val-shards {command}: ") and "--allow-pipe" in text
    assert not (tmp_path / "ran").exists()
    assert load_index(command, allow_pipe=True).total == TOTAL and (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["pipe:", "pipe:cat", "pipe:touch {}/ran; cat /data/*.tgz"])
def test_load_index__a_command_that_names_no_tar(tmp_path, command):
    command = command.format(tmp_path)
    assert fails(command, allow_pipe=True).startswith(f"--val-shards {command}: names no tar")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("scheme", ["ftp2", "azure", "x-y+z"])
def test_load_index__unknown_scheme(scheme):
    text = fails(f"{scheme}://host/folder")
    assert text.startswith(f"--val-shards {scheme}://host/folder: unknown scheme {scheme}:") and "https" in text
    assert "__default__" not in text


@pytest.mark.parametrize("spec", ["s3://bucket/a b/{000..003}.tar", "s3://bucket/$(touch x)", "s3://bucket/folder"])
def test_load_index__s3_is_read_with_aws(folder, tmp_path, monkeypatch, expected, spec):
    """`aws s3 cp --quiet URL -`, without a shell. This aws records its arguments and copies the local file."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/aws"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/arguments\nexec cat {folder}/"${{4##*/}}"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert_same(global_batches(load_index(spec)), expected)
    arguments = np.array((tmp_path / "arguments").read_text().splitlines()).reshape(-1, 5)
    assert {tuple(row) for row in arguments[:, [0, 1, 2, 4]].tolist()} == {("s3", "cp", "--quiet", "-")}
    base = spec.removesuffix("/{000..003}.tar")
    assert set(arguments[:, 3].tolist()) == {f"{base}/{name}" for name in ["index.json", *[f"00{n}.tar" for n in range(4)]]}
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("spec, remote", [
    ("https://a/b", True), ("http://a", True), ("s3://a/b", True), ("gs://a", True), ("pipe:cat a.tar", True),
    ("pipe:", True), ("x+y://a", True), ("/a/b", False), ("a/b.tar", False), ("./pipe/x", False), ("../pipe", False),
    ("a:b/c.tar", False), ("C:/data", False), ("", False), ("data/https://x", False),
])  # fmt: skip
def test_is_remote(spec, remote):
    assert is_remote(spec) == remote


@pytest.mark.parametrize("spec, tar, there", [
    ("https://h/a", None, "https://h/a/N"),
    ("https://h/a/", None, "https://h/a/N"),
    ("https://h/a/index.json", None, "https://h/a/N"),
    ("https://h/t-{00..11}.tar", "t-{00..11}.tar", "https://h/N"),
    ("https://h/t.tar?x=1&y=2", "t.tar", "https://h/N?x=1&y=2"),
    ("https://h/t.tar.gz", None, "https://h/t.tar.gz/N"),
    ("https://h/my.tarballs", None, "https://h/my.tarballs/N"),
    ("pipe:ssh host cat /d/t-{00..11}.tar", "t-{00..11}.tar", "pipe:ssh host cat /d/N"),
    ("pipe:ssh host 'cat /d/{0,1}.tar' | pv", "{0,1}.tar", "pipe:ssh host 'cat /d/N' | pv"),
    ("pipe:cat t.tar", "t.tar", "pipe:cat N"),
    ("pipe:get --file=t.tar --quiet", "t.tar", "pipe:get --file=N --quiet"),
])  # fmt: skip
def test_place__of_a_file_beside_it(spec, tar, there):
    assert tar_name(spec) == tar and place(spec, "N") == there


# ---------------------------------------------------------------- retries


def failing(times, error):
    """A function that raises this error so many times, and then returns how often it was called."""
    calls = []

    def work():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return work


def test_retried__waits_longer_and_longer_and_says_so(monkeypatch, capsys):
    waits, clock = [], [0.0]
    monkeypatch.setattr(remote, "WAIT", 1.0)
    monkeypatch.setattr(remote.time, "sleep", lambda s: waits.append(s) or clock.append(clock[-1] + s))
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[-1])
    assert remote.retried(failing(0, RemoteError("no")), "https://h/a", (RemoteError,)) == 1 and waits == []
    assert remote.retried(failing(4, RemoteError("HTTP status 503")), "https://u:p@h/a?k=v", (RemoteError,)) == 5
    assert waits == [1, 2, 4, 8]
    lines = [f"waiting for https://***@h/a?*** (HTTP status 503), try {n} of 5" for n in (3, 4, 5)]
    assert capsys.readouterr().err.splitlines() == lines
    with pytest.raises(RemoteError):
        remote.retried(failing(5, RemoteError("no")), "https://h/a", (RemoteError,))
    waits.clear()
    for error in (RemoteError("HTTP status 401", final=True), FileNotFoundError("gone"), PermissionError("no")):
        with pytest.raises(type(error)):
            remote.retried(failing(1, error), "https://h/a", (RemoteError, OSError))
    assert waits == []


def test_retried__too_few_file_descriptors_are_not_the_shards_fault():
    for number in (errno.EMFILE, errno.ENFILE):
        with pytest.raises(RunError, match="too many open files.*ulimit -n"):
            remote.retried(failing(9, OSError(number, "x")), "/a.tar", (OSError,))


ERRORS = [FileNotFoundError("curl"), ConnectionRefusedError("refused"), OSError("exit 22"), ValueError("no")]


def test_reader__an_opening_that_fails_and_then_works(local, elsewhere):
    index = load_index(HOST)
    elsewhere.cuts = {shard.name: [*np.random.default_rng(0).permutation(ERRORS)] for shard in index.shards}
    stream = Reader(index)
    stream.expect(np.arange(TOTAL))
    assert [taken(stream, number) for number in range(TOTAL)] == samples_of(local)
    assert all(elsewhere.opened()[shard.name] == 5 for shard in index.shards)
    stream.close()


@NEEDS_CURL
@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__a_server_that_fails_twice_and_then_works(server, expected, workers):
    index = load_index(server.url)
    server.cuts = {"000.tar": [-503, -503], "002.tar": [3000, 5000]}
    assert_same(global_batches(index, 1, workers, epochs=range(1)), expected[:3])
    assert not server.cuts["000.tar"] and not server.cuts["002.tar"]


def test_load_index__an_index_that_comes_at_the_last_try(local, elsewhere):
    """It contains nothing of the failed tries."""
    elsewhere.breaks, elsewhere.cuts = True, {"index.json": [0, 10, 50, ERRORS[1]]}
    assert load_index(HOST).hash == local.hash


def members_of(path):
    """(offset of the header, offset of the data, end of the data, end of its padding) of each member."""
    with tarfile.open(path) as tar:
        return [(m.offset, m.offset_data, m.offset_data + m.size, m.offset_data + -(-m.size // 512) * 512) for m in tar]


def positions(path):
    """The places of a shard where breaks may differ: around each part of each member, and at the end."""
    size = os.path.getsize(path)
    parts = [p for member in members_of(path) for p in member] + [(m[0] + m[1]) // 2 for m in members_of(path)]
    end = members_of(path)[-1][3]
    around = {p + d for p in [*parts, end + 512, end + 1024, size] for d in (-1, 0, 1)}
    return sorted(p for p in around if 0 <= p < size)


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks"])
@pytest.mark.parametrize("wanted", ["all", "some", "last"])
def test_reader__a_connection_that_is_dropped_anywhere_loses_and_repeats_nothing(local, elsewhere, breaks, wanted):
    """Between the members of a sample, within each, and after the last. The next connection resumes there."""
    known, index, elsewhere.breaks = samples_of(local), load_index(HOST), breaks
    numbers = {"all": range(17, 22), "some": (18, 20), "last": (21,)}[wanted]
    places = positions(local.shards[3].path)
    assert len(places) > 100
    for cut in places:
        elsewhere.cuts = {"003.tar": [cut]}
        stream = Reader(index)
        stream.expect(np.array(numbers))
        assert [taken(stream, number) for number in numbers] == [known[number] for number in numbers], cut
        assert all(opened.closed for opened in elsewhere.streams)
        stream.close()


def test_reader__a_stream_that_breaks_off_again_and_again_comes_to_its_end(local, elsewhere):
    """More often than it may fail in one place. No retry starts over."""
    known, index = samples_of(local), load_index(HOST)
    cuts = [p for member in members_of(local.shards[2].path) for p in (member[0] + 700, member[2] + 513)]
    elsewhere.cuts = {"002.tar": sorted(cuts)}
    assert len(cuts) > 2 * remote.TRIES
    stream = Reader(index)
    stream.expect(np.arange(TOTAL))
    assert [taken(stream, number) for number in range(8, 17)] == known[8:17]
    assert not elsewhere.cuts["002.tar"]
    stream.close()


@pytest.mark.parametrize("world, workers", LAYOUTS)
def test_load_batches__dropped_connections_change_no_batch(elsewhere, expected, world, workers):
    index = load_index(HOST)
    elsewhere.cuts = {"000.tar": [1500, 6000, 0], "002.tar": [9000, 2048, 700], "003.tar": [ERRORS[2], 10000]}
    assert_same(global_batches(index, world, workers), expected)


# ---------------------------------------------------------------- servers that are slow or refuse


@NEEDS_CURL
@pytest.mark.parametrize("every", [30, 0.05], ids=["silent", "trickle"])
def test_reader__a_server_that_stalls_in_mid_shard_is_asked_again(local, server, monkeypatch, capfd, every):
    """No byte, or a byte now and then. The next connection continues after the last sample, and no process is left."""
    monkeypatch.setattr(remote, "STALL", 0.6)
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    index, server.stalls = load_index(server.url), every
    server.cuts = {"002.tar": [9000, 15000]}
    stream = Reader(index)
    stream.expect(np.arange(8, 17))
    assert [taken(stream, number) for number in range(8, 17)] == samples_of(local)[8:17]
    assert server.asked.count("002.tar") == 3
    stream.close()
    assert_no_child()
    lines = capfd.readouterr().err
    assert every < 1 or f"waiting for {server.url}/002.tar (no data for 0 seconds)" in lines
    assert f"waiting for {server.url}/002.tar (gives no data, or almost none, for 1 seconds), try 2 of 5" in lines


def test_copy__a_command_that_stalls_or_does_not_end(monkeypatch, folder):
    """All of its processes are ended."""
    monkeypatch.setattr(remote, "STALL", 0.1)
    monkeypatch.setattr(remote, "TRIES", 2)
    start = time.monotonic()
    with pytest.raises(RemoteError, match="gives no data"):
        copy(f"pipe:cat {folder}/000.tar; sleep 600 | sleep 601", io.BytesIO())
    with pytest.raises(RemoteError, match="does not end"):
        copy(f"pipe:cat {folder}/000.tar; exec >&-; sleep 602", io.BytesIO())
    assert time.monotonic() - start < 20
    assert_no_child()


def test_source__time_without_a_reader_is_no_stall(monkeypatch, folder):
    """A slow training leaves a stream alone for minutes."""
    monkeypatch.setattr(remote, "STALL", 0.3)
    source, got = remote.Source(f"pipe:cat {folder}/002.tar"), b""
    for _ in range(4):
        got += source.read(2000)
        time.sleep(0.2)
    while data := source.read(100):
        got += data
    source.close()
    assert got == (folder / "002.tar").read_bytes()


@NEEDS_CURL
@pytest.mark.parametrize(
    "status, asked", [(400, 1), (401, 1), (403, 1), (404, 1), (410, 1), (408, 5), (429, 5), (500, 5), (503, 5)]
)
def test_load_index__a_server_that_refuses(server, monkeypatch, capsys, status, asked):
    """4xx but for 408 and 429 end at once. The others are asked again, and a line says so."""
    monkeypatch.setattr(remote, "PATIENCE", 0)
    server.cuts = {"index.json": [-status] * 9}
    assert f"{server.url}: no index.json can be read there (HTTP status {status})" in fails(server.url)
    assert len(server.asked) == asked
    lines = [line for line in capsys.readouterr().err.splitlines() if "no data" not in line]
    assert lines == [f"waiting for {server.url}/index.json (HTTP status {status}), try {n} of 5" for n in range(2, asked + 1)]


@NEEDS_CURL
def test_reader__a_shard_that_is_forbidden_is_asked_for_once(local, server):
    index = load_index(server.url)
    server.cuts = {"001.tar": [-403] * 9}
    stream = Reader(index)
    stream.expect(np.arange(TOTAL))
    with pytest.raises(BadSample, match=f"{server.url}/001.tar: sample 0: .*HTTP status 403") as error:
        stream(7)
    assert error.value.following == 8 and server.asked.count("001.tar") == 1
    stream.close()


def test_copy__more_than_is_expected_is_not_read_to_its_end(monkeypatch):
    """A server may send forever."""
    monkeypatch.setattr(remote, "MOST", 10**6)
    with pytest.raises(RemoteError, match="has more than 1000000 bytes"):
        copy("pipe:yes", io.BytesIO())
    with pytest.raises(RunError, match="differs from its index"):
        copy("pipe:yes", file := io.BytesIO(), (1000, "0" * 64))
    assert len(file.getvalue()) <= 1000 + remote.BLOCK


# ---------------------------------------------------------------- passwords

SECRETS = ["https://me:pa@ss@host/a/{000..003}.tar", "https://tok3n@host/a", "https://host/a.tar?X-Sig=pass&y=tok3n#pass",
           "pipe:curl -u me:pass https://host/a.tar", "pipe:curl -H 'Authorization: Bearer tok3n' https://h/a.tar?k=pass",
           "pipe:get --secret=pa@ss --api-key tok3n a.tar", "x s3://me:pass@b/a.tar: error"]  # fmt: skip


@pytest.mark.parametrize("spec", SECRETS)
def test_shown__hides_passwords(spec):
    text = shown(spec)
    assert "***" in text and not any(secret in text for secret in ("pass", "pa@", "ss@", "tok3n")) and "a" in text
    assert shown(text) == text
    assert shown_flags({"shards": spec, "size": 5}) == {"shards": text, "size": 5}


@pytest.mark.parametrize("spec", ["/data/a b", "https://host/a/{000..003}.tar", "s-?.tar", "pipe:ssh host cat /d/t.tar", "a@b",
                                  "pipe:cat < '/d/{000..002}.tar' | cat", "s3://bucket/a@b", "/data/token/x?y"])  # fmt: skip
def test_shown__changes_nothing_else(spec):
    assert shown(spec) == spec


@NEEDS_CURL
def test_load_index__a_password_is_in_no_message_and_no_record(server, monkeypatch, capsys):
    """It is sent to the server nevertheless."""
    monkeypatch.setattr(remote, "PATIENCE", 0)
    spec = server.url.replace("//", "//me:s3cret@") + "/{000..003}.tar?sig=s3cret"
    index, texts = load_index(spec), []
    assert all(shard.path.count("s3cret") == 2 for shard in index.shards)
    server.cuts = {"index.json": [-503] * 9, "001.tar": [-503] * 9, "000.tar": [-401]}
    texts.append(fails(spec))
    stream = Reader(index)
    stream.expect(np.arange(TOTAL))
    for number in (0, 7):
        with pytest.raises(BadSample) as error:
            stream(number)
        texts += [str(error.value), *error.value.record.values()]
    flipped(server.folder / "002.tar")
    with pytest.raises(RunError) as changed:
        stream(16)
    (server.folder / "index.json").write_text("{}")
    texts += [str(changed.value), fails(spec), fails(spec.replace("003", "009")), *capsys.readouterr()]
    assert not [text for text in texts if "s3cret" in text] and "503" in texts[-1]
    stream.close()


# ---------------------------------------------------------------- shards that always end early


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks"])
def test_reader__a_stream_that_always_ends_early_ends_its_shard(local, elsewhere, breaks):
    """Samples before the end can be read, an incomplete one never. The next one to try is in the next shard."""
    known, index, elsewhere.breaks = samples_of(local), load_index(HOST), breaks
    members = members_of(local.shards[3].path)  # image, label, image, label ...
    for cut in positions(local.shards[3].path)[::7]:
        elsewhere.always = {"003.tar": cut}
        stream, usable = Reader(index), []
        stream.expect(np.arange(17, TOTAL))
        for number in range(17, TOTAL):
            try:
                assert taken(stream, number) == known[number]
                usable.append(True)
            except BadSample as error:
                usable.append(False)
                assert error.record["shard"] == f"{HOST}/003.tar" and error.record["key"] == f"sample {number - 17}"
                assert "cannot be read further" in error.record["error"] and error.following == TOTAL
        whole = [cut >= members[2 * n + 1][2] for n in range(5)]
        and_next = [n < 4 and cut >= members[2 * n + 2][1] for n in range(5)]  # with the next header
        assert usable == sorted(usable, reverse=True)
        assert all(a <= u <= w for a, u, w in zip(and_next, usable, whole, strict=True)), cut
        before = elsewhere.opened()["003.tar"]
        for number in (17, 21):  # the same out of order, without another search
            if usable[number - 17]:
                assert taken(stream, number, planned=False) == known[number]
            else:
                with pytest.raises(BadSample):
                    stream(number, False)
        assert elsewhere.opened()["003.tar"] - before <= usable[0]
        stream.close()


def lost_after(local, n, cut):
    """The samples that such a stream loses: from the first one without a header after it."""
    members = members_of(local.shards[n].path)
    starts = [members[2 * k + 2][1] for k in range(SIZES[n] - 1)] + [local.shards[n].bytes]
    return [FIRST[n] + k for k in range(SIZES[n]) if starts[k] > cut]


@pytest.mark.parametrize("world, workers", [*LAYOUTS, (1, 3)])
def test_load_batches__samples_after_an_early_end_are_replaced_from_the_next_shard(local, elsewhere, world, workers):
    """The batches do not depend on processes and workers, and each lost sample has a record."""
    elsewhere.always = {"000.tar": 6000, "003.tar": 9000}
    index = load_index(HOST)
    lost = lost_after(local, 0, 6000) + lost_after(local, 3, 9000)
    assert 2 < len(lost) < 11 and 0 not in lost and 17 not in lost
    following = {number: 7 if number < 7 else 0 for number in lost}  # of the last shard, the first
    steps = global_batches(index, world, workers)
    plans = [row for epoch in range(2) for row in epoch_plan(index, BATCH, 0, epoch).tolist()]
    for (_, numbers, labels, bad), plan in zip(steps, plans, strict=True):
        assert numbers == [following.get(number, number) for number in plan]
        assert labels == [number % 3 for number in numbers]
        shard = {number: int(np.searchsorted(FIRST, number, side="right")) - 1 for number in plan}
        met = [(f"{HOST}/{shard[n]:03d}.tar", f"sample {n - FIRST[shard[n]]}") for n in plan if n in lost]
        assert [(record["shard"], record["key"]) for record in bad] == met
    assert_same(steps, once(index, tuple(elsewhere.always.items())))


@functools.cache
def once(index: Index, faults):
    """The batches of one process without workers."""
    return global_batches(index)


@pytest.mark.parametrize("name", ["001.tar", "003.tar"])
def test_load_batches__a_shard_that_is_gone_is_replaced_as_a_whole(elsewhere, name):
    index = load_index(HOST)
    (elsewhere.folder / name).unlink()
    one, two = (global_batches(index, 1, workers) for workers in (0, 2))
    assert_same(two, one)
    keys = {(record["shard"], record["key"]) for step in one for record in step[3]}
    assert keys and {shard for shard, _ in keys} == {f"{HOST}/{name}"}


# ---------------------------------------------------------------- shards that differ from the index


def flipped(path):
    """Change a byte of a pixel in its first image. The tar keeps its length and structure."""
    start, end = members_of(path)[0][1:3]
    data = path.read_bytes()
    overwrite(path, (start + end) // 2, bytes([data[(start + end) // 2] ^ 1]))


def longer(path):
    with open(path, "ab") as file:
        file.write(bytes(10240))


def other(path):
    """Another shard of as many samples and as many bytes."""
    with tarfile.open(path) as tar:
        members = [(member.name.replace("0", "x"), tar.extractfile(member).read()) for member in tar]
    size = path.stat().st_size
    write_members(path, members)
    assert path.stat().st_size == size


@pytest.mark.parametrize("change", [flipped, longer, other])
@pytest.mark.parametrize("numbers", [range(8, 17), (8, 16), (16,)], ids=["all", "two", "last"])
def test_reader__another_shard_than_the_index_says_ends_the_run(elsewhere, change, numbers):
    index = load_index(HOST)
    change(elsewhere.folder / "002.tar")
    stream = Reader(index)
    stream.expect(np.array(numbers))
    with pytest.raises(RunError, match=f"^{HOST}/002.tar differs from its index in size or sha256"):
        for number in numbers:
            stream(number)
    stream.close()


def why_it_ends(index, workers):
    """The text of the RunError that ends the training."""
    try:
        global_batches(index, 1, workers)
    except RunError as error:
        return str(error.with_traceback(None))  # the traceback would keep the loader alive
    pytest.fail("the run continues")


@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches__another_shard_than_the_index_says_ends_the_run(elsewhere, workers):
    index = load_index(HOST)
    flipped(elsewhere.folder / "002.tar")
    text = why_it_ends(index, workers)
    assert text.startswith(f"{HOST}/002.tar differs from its index") and "\n" not in text


@pytest.mark.parametrize("cached", [False, True])
def test_reader__a_shorter_shard_passes_for_one_that_breaks_off(elsewhere, tmp_path, cached):
    """Its last sample may be incomplete. A cache keeps nothing of it."""
    index = load_index(HOST, cache_dir=str(tmp_path / "cache") if cached else None)
    with tarfile.open(elsewhere.folder / "002.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()[-1:]) for member in tar]
    write_members(elsewhere.folder / "002.tar", members)
    size = (elsewhere.folder / "002.tar").stat().st_size
    stream = Reader(index)
    stream.expect(np.array([16]))
    with pytest.raises(BadSample, match=f"{HOST}/002.tar: sample 8: .*ends after {size} of {index.shards[2].bytes} bytes"):
        stream(16)
    assert elsewhere.opened()["002.tar"] == remote.TRIES and files_of(tmp_path / "cache") == []
    stream.close()


@pytest.mark.parametrize("samples", [8, 10])
def test_reader__another_number_of_samples_is_never_taken_for_the_right_one(elsewhere, tmp_path, samples):
    index = load_index(HOST)
    write_shards(tmp_path / "y", (1, samples), image=one_png)
    os.replace(tmp_path / "y/001.tar", elsewhere.folder / "002.tar")
    stream = Reader(index)
    stream.expect(np.array([16]))
    with pytest.raises(BadSample if samples == 8 else (RunError, BadSample)) as error:
        stream(16)
    assert f"{HOST}/002.tar" in str(error.value)
    stream.close()


# ---------------------------------------------------------------- copies


def files_of(path):
    return sorted(file.name for file in path.rglob("*")) if path.exists() else []


@pytest.mark.parametrize("workers", [0, 1])
def test_cache_dir__a_shard_is_fetched_once_and_then_the_server_may_go(expected, elsewhere, tmp_path, workers):
    index = load_index(HOST, cache_dir=str(tmp_path / "deep/cache"))
    assert_same(global_batches(index, 1, workers), expected)
    assert elsewhere.opened() == {"index.json": 1, **{shard.name: 1 for shard in index.shards}}
    assert files_of(tmp_path / "deep/cache") == sorted(f"{shard.sha256[:16]}-{shard.name}" for shard in index.shards)
    for shard in index.shards:
        copied = (tmp_path / "deep/cache" / f"{shard.sha256[:16]}-{shard.name}").read_bytes()
        assert hashlib.sha256(copied).hexdigest() == shard.sha256
    elsewhere.always = dict.fromkeys(elsewhere.opened(), OSError("gone"))
    assert_same(global_batches(index, 1, workers), expected)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 1)])
def test_cache_dir__several_readers_share_it(expected, elsewhere, tmp_path, world, workers):
    assert_same(global_batches(load_index(HOST, cache_dir=str(tmp_path / "cache")), world, workers), expected)
    assert len(files_of(tmp_path / "cache")) == 4


@NEEDS_CURL
def test_cache_dir__of_a_server(expected, server, tmp_path):
    server.cuts = {"002.tar": [5000, -503]}
    index = load_index(server.url, cache_dir=str(tmp_path / "cache"))
    assert_same(global_batches(index), expected)
    assert Counter(server.asked) == {"index.json": 1, "000.tar": 1, "001.tar": 1, "002.tar": 3, "003.tar": 1}


def test_cache_dir__shards_of_one_name_do_not_meet(local, elsewhere, tmp_path, folder):
    """Training and validation may share a folder."""
    index = load_index(HOST, cache_dir=str(tmp_path / "cache"))
    other = write_shards(tmp_path / "y", SIZES, image=lambda number: one_png(number + 30))
    assert taken(Reader(index), 3) == samples_of(local)[3]
    elsewhere.folder = tmp_path / "y"
    again = load_index(HOST, cache_dir=str(tmp_path / "cache"))
    assert taken(Reader(again), 3) == samples_of(other)[3] != samples_of(local)[3]


def test_cache_dir__a_part_of_a_copy_is_not_taken_for_it(local, elsewhere, tmp_path):
    index = load_index(HOST, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    half = tmp_path / "cache" / f"{index.shards[2].sha256[:16]}-002.tar"
    half.write_bytes((elsewhere.folder / "002.tar").read_bytes()[:5000])
    assert taken(Reader(index), 9) == samples_of(local)[9] and half.stat().st_size == index.shards[2].bytes


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks"])
@pytest.mark.parametrize("cut", [0, 512, 5000, -512])
def test_cache_dir__nothing_is_left_of_a_download_that_breaks(elsewhere, tmp_path, cut, breaks):
    index, elsewhere.breaks = load_index(HOST, cache_dir=str(tmp_path / "cache")), breaks
    elsewhere.always = {"002.tar": cut}
    cache, stream = Reader(index), Reader(dataclasses.replace(index, cache_dir=None))
    stream.expect(np.array([16]))
    for reader_ in (cache, stream):
        with pytest.raises(BadSample) as error:
            reader_(16)
        assert error.value.record["shard"] == f"{HOST}/002.tar" and error.value.following == 17
    assert files_of(tmp_path / "cache") == [] and elsewhere.opened()["002.tar"] == 2 * remote.TRIES
    cache.close()
    stream.close()


def test_cache_dir__nothing_is_left_of_a_download_that_is_stopped(elsewhere, tmp_path, monkeypatch):
    index = load_index(HOST, cache_dir=str(tmp_path / "cache"))
    reads = iter([b"some", b"bytes", KeyboardInterrupt()])

    def read(self, size):
        if isinstance(item := next(reads), BaseException):
            raise item
        assert (
            len(files_of(tmp_path / "cache")) == 1
            and not (tmp_path / "cache" / f"{index.shards[2].sha256[:16]}-002.tar").exists()
        )
        return item

    monkeypatch.setattr(Stream, "read", read)
    with pytest.raises(KeyboardInterrupt):
        Reader(index)(9)
    assert files_of(tmp_path / "cache") == []


@pytest.mark.parametrize("change", [flipped, longer, other])
def test_cache_dir__another_shard_than_the_index_says_ends_the_run(elsewhere, tmp_path, change):
    """It is fetched again first, in case the transfer corrupted it, and nothing of it is kept."""
    index = load_index(HOST, cache_dir=str(tmp_path / "cache"))
    change(elsewhere.folder / "002.tar")
    with pytest.raises(RunError, match=f"^{HOST}/002.tar differs from its index"):
        Reader(index)(9)
    assert files_of(tmp_path / "cache") == [] and elsewhere.opened()["002.tar"] == remote.TRIES


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["below a file", "a file", "full"])
def test_cache_dir__a_folder_that_takes_nothing_ends_the_run(elsewhere, tmp_path, monkeypatch, where, workers):
    (tmp_path / "file").write_text("")
    cache = tmp_path / {"below a file": "file/cache", "a file": "file", "full": "cache"}[where]
    if where == "full":

        def full(url, file, expected=None):
            file.write(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(reader, "copy", full)
    index = load_index(HOST, cache_dir=str(cache))
    text = why_it_ends(index, workers)
    assert text.startswith(f"--cache-dir {cache}: cannot store 00") and "\n" not in text
    assert files_of(cache) == [] and (where != "full" or "No space left" in text)


def test_cache_dir__a_copy_is_verified_when_asked(local, elsewhere, tmp_path, capsys):
    """One that has changed is removed, and its shard is read again."""
    cache = str(tmp_path / "cache")
    index = load_index(HOST, cache_dir=cache)
    for number in (3, 9):
        taken(Reader(index), number)
    damaged = cache_path(index.shards[2], cache)
    flipped(damaged)
    assert load_index(HOST, cache_dir=cache) == index and len(files_of(Path(cache))) == 2
    assert load_index(HOST, cache_dir=cache, verify_shards=True) == index
    assert files_of(Path(cache)) == [cache_path(index.shards[0], cache).name]
    assert f"warning: {damaged}: its sha256 differs from its index" in capsys.readouterr().err
    assert taken(Reader(index), 8) == samples_of(local)[8]


HOSTILE = [("sha256", "../../../../x"), ("sha256", "0" * 63), ("sha256", "G" * 64), ("sha256", "/" * 64), ("sha256", 5),
           ("samples", -1), ("samples", 2**70), ("samples", 1.0), ("samples", True), ("samples", "9"), ("bytes", -5),
           ("bytes", 2**60), ("bytes", None), ("name", "x" * 300), ("name", "\udcff.tar")]  # fmt: skip


@pytest.mark.parametrize("field, value", HOSTILE)
def test_load_index__every_field_of_a_shard_is_checked(elsewhere, tmp_path, field, value):
    """Above all sha256, which becomes a part of a path in --cache-dir. The message names the field, not its value."""
    path = elsewhere.folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][2][field] = value
    path.write_text(json.dumps(content))
    for spec in (HOST, str(elsewhere.folder)):
        text = fails(spec, cache_dir=str(tmp_path / "cache"))
        assert "not a readable index" in text and "shard 2" in text and field in text and len(text) < 300 + len(spec)
        assert len(str(value)) < 9 or str(value) not in text


ODD = ['{"shards": [], "classes": [3]}', '{"shards": {}, "classes": null}', '{"shards": [3], "classes": null}', "[" * 100000,
       '{"shards": [], "classes": null, "unlabelled": 3}', '{"shards": ' + "9" * 5000 + "}", '"\\ud800"', "1e999"]  # fmt: skip


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_load_index__odd_content_is_one_short_line(elsewhere, content):
    (elsewhere.folder / "index.json").write_text(content)
    text = fails(HOST)
    assert "not a readable index" in text and len(text) < 300 and content not in text


def test_load_index__two_shards_of_one_name(elsewhere):
    path = elsewhere.folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][1]["name"] = content["shards"][0]["name"]
    path.write_text(json.dumps(content))
    assert "two shards have one name" in fails(HOST)


def test_cache_dir__changes_nothing_for_local_shards(folder, expected, tmp_path):
    index = load_index(str(folder), cache_dir=str(tmp_path / "cache"))
    assert_same(global_batches(index), expected)
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- copy


@pytest.mark.parametrize("breaks", [False, True])
def test_copy__is_whole_or_an_error(elsewhere, breaks):
    elsewhere.breaks = breaks
    data = (elsewhere.folder / "000.tar").read_bytes()
    expected = len(data), hashlib.sha256(data).hexdigest()
    for cuts in ([], [100], [5000, 0, OSError("x"), 9000]):
        elsewhere.cuts, file = {"000.tar": list(cuts)}, io.BytesIO(b"what was there before" * 2000)
        copy(f"{HOST}/000.tar", file, expected)
        assert file.getvalue() == data
    elsewhere.always = {"000.tar": 5000}
    with pytest.raises(RemoteError):
        copy(f"{HOST}/000.tar", io.BytesIO(), expected)
    elsewhere.always = {}
    with pytest.raises(RemoteError, match=f"^ends after {expected[0]} of {expected[0] + 1} bytes"):
        copy(f"{HOST}/000.tar", io.BytesIO(), (expected[0] + 1, expected[1]))
    for wrong in ((expected[0] - 1, expected[1]), (expected[0], "0" * 64)):
        with pytest.raises(RunError, match=f"{HOST}/000.tar differs from its index"):
            copy(f"{HOST}/000.tar", io.BytesIO(), wrong)


@pytest.mark.parametrize("code", [1, 22, 255])
def test_copy__a_command_that_fails_at_its_end_has_failed(folder, code):
    """Even after much output: it may be incomplete."""
    with pytest.raises(RemoteError, match=f"exit {code}"):
        copy(f"pipe:cat {folder}/000.tar; exit {code}", io.BytesIO())


# ---------------------------------------------------------------- whole runs


FLAGS = ["--method", "moco", *TINY, "--device", "cpu", "--amp", "fp32", "--workers", "0", "--size", "32", "--epochs", "1"]


def test_main_pretrain__remote_shards_train_the_same_weights(elsewhere, tmp_path):
    """With copies too. Checkpoints contain no path of a shard."""
    saved = []
    for name, spec in (("local", str(elsewhere.folder)), ("remote", HOST), ("cached", HOST), ("cached again", HOST)):
        cache = ["--cache-dir", str(tmp_path / "cache")] if "cached" in name else []
        main_pretrain.main([*FLAGS, "--shards", spec, "--output-dir", str(tmp_path / name), *cache])
        saved.append(torch.load(tmp_path / name / "checkpoint_latest.pth.tar", weights_only=True))
    for other in saved[1:]:
        assert other["index"] == saved[0]["index"]
        assert all(torch.equal(other["state_dict"][k], v) for k, v in saved[0]["state_dict"].items())


def ends(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main([*FLAGS, *map(str, flags)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@NEEDS_CURL
def test_main_pretrain__a_server_that_is_down_is_one_line(server, tmp_path, capsys):
    server.server_close()
    line = ends(capsys, "--shards", server.url, "--output-dir", tmp_path / "run")
    assert line.startswith(f"main_pretrain.py: error: --shards {server.url}: no index.json can be read there")
    assert not (tmp_path / "run").exists()


def test_main_pretrain__no_waiting_for_a_server_that_is_there(elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "WAIT", 30.0)
    start = time.monotonic()
    main_pretrain.main([*FLAGS, "--shards", HOST, "--output-dir", str(tmp_path / "run")])
    assert time.monotonic() - start < 25


def test_main_pretrain__errors_of_a_remote_run_are_one_line(elsewhere, tmp_path, capsys):
    """A command without --allow-pipe, a full cache, a shard that differs from its index."""
    line = ends(capsys, "--shards", f"pipe:touch {tmp_path}/ran; cat a.tar", "--output-dir", tmp_path / "a")
    assert "--allow-pipe" in line and not (tmp_path / "ran").exists()
    line = ends(capsys, "--shards", HOST, "--output-dir", tmp_path / "b", "--cache-dir", elsewhere.record)
    assert f"error: --cache-dir {elsewhere.record}: " in line
    flipped(elsewhere.folder / "002.tar")
    line = ends(capsys, "--shards", HOST, "--output-dir", tmp_path / "c", "--max-bad", 0.5)
    assert f"error: {HOST}/002.tar differs from its index" in line
    assert not list(tmp_path.glob("[abc]/checkpoint*"))


def test_main_pretrain__a_shard_that_cannot_be_read_is_recorded(elsewhere, tmp_path, capsys):
    elsewhere.always = {"001.tar": 600}
    main_pretrain.main([*FLAGS, "--shards", HOST, "--output-dir", str(tmp_path), "--max-bad", "0.1", "--batch-size", "22",
                        "--moco-k", "22"])  # fmt: skip
    (record,) = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert record["shard"] == f"{HOST}/001.tar" and record["key"] == "sample 0"
    assert "unusable images 1" in capsys.readouterr().out
