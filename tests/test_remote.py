"""Shards on a server: the same samples as from a local folder, whatever breaks on the way."""

import http.server
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from shards_helpers import one_color, write_shards

from utils import loader, remote
from utils.flags import RunError
from utils.index import load_index
from utils.loader import evaluation_batches, load, training_batches
from utils.reader import Reader, RemoteShard
from utils.remote import RemoteError
from utils.views import ViewSpec

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZES, CPU, PLAIN = (10, 10, 10, 7), torch.device("cpu"), [ViewSpec("plain", 4)]
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens http:// with curl, which is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    write_shards(folder := tmp_path_factory.mktemp("shards"), SIZES)
    return folder


class Elsewhere:
    """Stands for webdataset's opener of http://far/: files of a folder, with faults. opened: the names, in order."""

    def __init__(self, folder):
        self.folder, self.opened, self.faults = folder, [], {}

    def __call__(self, url):
        name = url.rpartition("/")[2]
        self.opened.append(name)
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if fault == "refused":
            raise OSError("connection refused")
        data = (self.folder / name).read_bytes()
        return Broken(data[:fault], complains=fault is not None) if isinstance(fault, int) else io.BytesIO(data)


class Broken(io.BytesIO):
    """A stream that is cut off: as curl's, it may complain where it ends, or only when it is closed."""

    def __init__(self, data, complains):
        super().__init__(data)
        self.complains = complains and len(data) % 2

    def read(self, size=-1):
        data = super().read(size)
        if not data and self.complains:
            raise OSError("exit 18")
        return data


@pytest.fixture
def far(monkeypatch, folder):
    far = Elsewhere(folder)
    monkeypatch.setattr(remote, "gopen", far)
    monkeypatch.setattr(remote, "WAIT", 0.001)
    return far


def batches_of(index, world=1, workers=0, first_step=0, batch=4, epochs=2):
    """Everything in the global batches of these epochs, and the records of unusable samples."""
    parts = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader.dist, "rank", lambda rank=rank: rank)
            patch.setattr(loader.dist, "world", lambda: world)
            batches = training_batches(index, batch, 0, range(epochs), first_step=first_step)
            parts.append(list(load(index, PLAIN, batches, 0, workers, CPU)))
    steps = list(zip(*parts, strict=True))
    bytes_ = [torch.cat([b.views[0].flatten(1) for b in step]).numpy().tobytes() for step in steps]
    numbers = [(torch.cat([b.index for b in step]).tolist(), torch.cat([b.label for b in step]).tolist()) for step in steps]
    return bytes_, numbers, sorted((r["shard"], r["key"]) for step in steps for b in step for r in b.bad)


# names


@pytest.mark.parametrize("spec, tar, index", [
    ("https://host/a/b", None, "https://host/a/b/index.json"),
    ("https://host/a/b/", None, "https://host/a/b/index.json"),
    ("s3://bucket/index.json", None, "s3://bucket/index.json"),
    ("https://host/x-{000..002}.tar", "x-{000..002}.tar", "https://host/index.json"),
    ("https://host/x.tar?key=1&a=b", "x.tar", "https://host/index.json?key=1&a=b"),
    ("pipe:ssh host 'cat /data/x-{0..9}.tar'", "x-{0..9}.tar", "pipe:ssh host 'cat /data/index.json'"),
    ("pipe:aws s3 cp s3://b/x.tar -", "x.tar", "pipe:aws s3 cp s3://b/index.json -"),
])  # fmt: skip
def test_place__of_the_index(spec, tar, index):
    assert remote.is_remote(spec) and remote.tar_name(spec) == tar and remote.place(spec, "index.json") == index


@pytest.mark.parametrize("spec", ["/data/shards", "shards", "./a.tar", "x-{000..002}.tar", "C:/x", "../pipe", "a:b/c.tar"])
def test_is_remote__local_paths_are_not(spec):
    assert not remote.is_remote(spec)


@pytest.mark.parametrize("spec", ["http://far/x", "http://far/x/", "http://far/x/index.json", "http://far/x/00{0..3}.tar"])
def test_load_index__from_elsewhere(folder, far, spec):
    index, here = load_index(spec), load_index(str(folder))
    assert index.hash == here.hash and index.classes == here.classes and far.opened == ["index.json"]
    assert [shard.path for shard in index.shards] == [f"http://far/x/{shard.name}" for shard in here.shards]
    assert [shard.name for shard in load_index("http://far/x/00{2,0}.tar").shards] == ["002.tar", "000.tar"]


@pytest.mark.parametrize("spec, message", [
    ("gopher://far/x", "nothing opens gopher:"),
    ("pipe:cat /data/x.tar", "pass --allow-pipe"),
    ("http://far/x/009.tar", "009.tar is not in http://far/x/index.json"),
    ("http://far/nothing/{", "no index.json can be read there"),
])  # fmt: skip
def test_load_index__of_what_cannot_be_opened_is_one_line(tmp_path, far, spec, message):
    if "nothing/" in spec:
        far.faults["index.json"] = ["refused"] * 9
    with pytest.raises(ValueError, match=message) as caught:
        load_index(spec, "--shards")
    assert str(caught.value).startswith(f"--shards {spec}: ") and "\n" not in str(caught.value)


def test_load_index__a_pipe_must_name_a_tar_and_is_not_run_without_leave(tmp_path):
    with pytest.raises(ValueError, match="names no tar"):
        load_index("pipe:ls", allow_pipe=True)
    with pytest.raises(ValueError, match="pass --allow-pipe"):
        load_index(f"pipe:touch {tmp_path}/ran; cat {tmp_path}/x.tar")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["$(touch ran).tar", "a;b.tar", "-rf.tar", "a b.tar", "../x.tar", "a/b.tar", "x`id`.tar", "", "'.tar"]
)
def test_load_index__a_name_from_elsewhere_is_a_plain_name(folder, monkeypatch, name):
    """It becomes part of a command."""
    content = json.loads((folder / "index.json").read_text())
    content["shards"][1]["name"] = name
    monkeypatch.setattr(remote, "gopen", lambda url: io.BytesIO(json.dumps(content).encode()))
    with pytest.raises(ValueError, match="not a readable index"):
        load_index("http://far/x")


def test_open__s3_is_the_aws_command(folder, tmp_path, monkeypatch):
    aws = tmp_path / "aws"
    aws.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat {folder}/"${{4##*/}}"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert batches_of(load_index("s3://bucket/x")) == batches_of(load_index(str(folder)))
    assert (tmp_path / "calls").read_text().splitlines()[0] == "s3 cp --quiet s3://bucket/x/index.json -"


# the same samples


@pytest.mark.parametrize("world, workers, first_step", [(1, 0, 0), (1, 2, 0), (2, 1, 0), (4, 0, 0), (1, 0, 5), (2, 2, 8)])
def test_load__remote_is_local(folder, far, world, workers, first_step):
    expected = batches_of(load_index(str(folder)), first_step=first_step)
    assert batches_of(load_index("http://far/x"), world, workers, first_step) == expected and expected[2] == []


@pytest.mark.parametrize("cache", [False, True])
def test_load__evaluation_from_elsewhere(folder, far, tmp_path, cache):
    index, seen = load_index("http://far/x", cache_dir=str(tmp_path / "cache") if cache else None), []
    for batch in load(index, PLAIN, evaluation_batches(index, 5), 0, 0, CPU):
        assert batch.label.tolist() == [number % 3 for number in batch.index.tolist()] and not batch.bad
        seen += batch.index.tolist()
    assert seen == list(range(37)) and far.opened == ["index.json", "000.tar", "001.tar", "002.tar", "003.tar"]


def test_remote_shard__holds_no_more_than_is_wanted_and_reads_no_further(folder, far):
    shard = load_index("http://far/x").shards[0]
    there = RemoteShard(shard, np.isin(np.arange(10), (2, 4, 5)))
    assert there.read(4).key == "00004" and set(there.held) == {2} and there.source
    assert there.read(5).key == "00005" and there.source is None and there.passed == 6  # nothing is wanted behind it
    assert there.read(2).members["png"] == one_color(2) and not there.held


def test_load__pipes_are_run_with_leave(folder):
    spec = f"pipe:cat {folder}/00{{0..3}}.tar"
    assert batches_of(load_index(spec, allow_pipe=True), workers=2) == batches_of(load_index(str(folder)))


# faults


def test_load__an_open_that_fails_twice_and_then_works(folder, far):
    far.faults = {name: ["refused", "refused"] for name in ("index.json", "000.tar", "002.tar")}
    assert batches_of(load_index("http://far/x")) == batches_of(load_index(str(folder)))


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1024, 1536, 2048, 2049, 5 * 2048, 9 * 2048 + 1024, 10 * 2048, 10 * 2048 + 1])
def test_load__a_stream_cut_anywhere_goes_on_behind_the_last_sample(folder, far, cut):
    """A sample has 2048 bytes: header and image, header and label. The end of a tar follows the tenth."""
    far.faults = {"000.tar": [cut, cut + 1, "refused", cut], "001.tar": [cut]}
    assert batches_of(load_index("http://far/x"), epochs=1) == batches_of(load_index(str(folder)), epochs=1)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1)])
def test_load__a_stream_that_always_ends_early_gives_its_places_to_the_next_shard(folder, far, world, workers):
    far.faults = {"001.tar": [6 * 2048] * 10**4}
    planned = batches_of(load_index(str(folder)), epochs=1)[1]
    _, numbers, bad = batches_of(load_index("http://far/x"), world, workers, epochs=1)
    # the sixth sample is whole, but it may have had more members
    assert [n for n, _ in numbers] == [[20 if 15 <= i < 20 else i for i in step] for step, _ in planned]
    assert {shard for shard, _ in bad} == {"http://far/x/001.tar"}
    assert {key for _, key in bad} <= {f"sample {i}" for i in range(5, 10)}


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"bytes": 10240}])
def test_load__a_shard_that_is_not_the_one_of_the_index_ends_the_run(folder, far, change):
    index = load_index("http://far/x")
    index = replace(index, shards=(*index.shards[:2], replace(index.shards[2], **change), index.shards[3]))
    with pytest.raises(RunError, match="http://far/x/002.tar is not what its index says"):
        batches_of(index, workers=2)


def test_reader__a_neighbour_does_not_disturb_the_pass(folder, far):
    """A sample that is read out of turn is read by a stream of its own."""
    there = Reader(load_index("http://far/x"))
    there.expect(np.array([0, 3, 7]))
    assert there(3).key == "00003"
    assert there(7, planned=False).key == "00007" and there(0, planned=False).key == "00000"
    assert [there(n).image for n in (0, 7)] == [one_color(0), one_color(7)]
    there.close()


# copies


def test_cache_dir__is_filled_once_with_what_was_checked(folder, far, tmp_path):
    cache = tmp_path / "deep" / "cache"
    far.faults = {"001.tar": [3000, "refused"]}
    index, expected = load_index("http://far/x", cache_dir=str(cache)), batches_of(load_index(str(folder)))
    assert batches_of(index, workers=2) == expected
    assert sorted(path.name.split("-")[1] for path in cache.iterdir()) == ["000.tar", "001.tar", "002.tar", "003.tar"]
    far.faults = {f"{i:03d}.tar": ["refused"] * 10**4 for i in range(4)}
    assert batches_of(index, world=2, workers=1) == expected  # nothing is opened any more


def test_cache_dir__nothing_is_left_of_a_copy_that_breaks(folder, far, tmp_path):
    far.faults = {"000.tar": [2048 * 6] * 10**4}
    index = load_index("http://far/x", cache_dir=str(tmp_path / "cache"))
    numbers = [n for step, _ in batches_of(index, epochs=1)[1] for n in step]
    assert not set(numbers) & set(range(10)) and 10 in numbers
    assert [path.name.split("-")[1] for path in sorted(tmp_path.joinpath("cache").iterdir())].count("000.tar") == 0


def test_cache_dir__that_cannot_be_written_ends_the_run(folder, far, tmp_path):
    (tmp_path / "file").write_text("")
    index = load_index("http://far/x", cache_dir=str(tmp_path / "file"))
    with pytest.raises(RunError, match="--cache-dir .*file: cannot take 00"):
        batches_of(index)


def test_copy__says_why_after_its_tries(far):
    far.faults = {"000.tar": ["refused"] * 9}
    with pytest.raises(RemoteError, match="http://far/x/000.tar: connection refused"):
        remote.copy("http://far/x/000.tar", io.BytesIO())
    assert far.opened == ["000.tar"] * remote.TRIES
    far.faults, file = {"000.tar": ["refused", 100]}, io.BytesIO()
    expected = (far.folder / "000.tar").read_bytes()
    shard = load_index(str(far.folder)).shards[0]
    remote.copy("http://far/x/000.tar", file, (shard.bytes, shard.sha256))
    assert file.getvalue() == expected


# a real server


class Dropping(http.server.SimpleHTTPRequestHandler):
    """Drops the connection in the middle of the first two answers for each tar."""

    answers = {}

    def log_message(self, *_):
        pass

    def copyfile(self, source, output):
        n = Dropping.answers[self.path] = Dropping.answers.get(self.path, 0) + 1
        data = source.read()
        output.write(data[: len(data) * n // 3] if self.path.endswith(".tar") and n < 3 else data)


@needs_curl
@pytest.mark.parametrize("workers", [0, 2])
def test_load__over_http_with_dropped_connections(folder, monkeypatch, workers):
    monkeypatch.setattr(remote, "WAIT", 0.01)
    Dropping.answers.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Dropping, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = load_index(f"http://127.0.0.1:{server.server_port}")
        found = batches_of(index, workers=workers)
        server.shutdown()
    assert found == batches_of(load_index(str(folder))) and max(Dropping.answers.values()) > 2


@needs_curl
def test_load_index__from_a_server_that_is_down(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    with pytest.raises(ValueError, match="--shards http://127.0.0.1:9/x: no index.json can be read there"):
        load_index("http://127.0.0.1:9/x")
