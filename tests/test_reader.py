import dataclasses
import errno
import os
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from shards_helpers import member_at, name_classes, one_color, overwrite, write_members, write_shards

from utils.data import reader as reader_module
from utils.data import remote, shards, tars
from utils.data.index import load_index
from utils.data.reader import BadSample, Reader, RemoteShard, Sample
from utils.data.shards import epoch_plan
from utils.data.tars import IMAGE_EXTENSIONS
from utils.run.flags import RunError


@pytest.fixture
def five(tmp_path):
    return write_shards(tmp_path / "five", (3, 1, 4, 2, 5), label=lambda number: 100 + number)


def open_files(folder):
    """The files in a folder that this process has open."""
    links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link) and os.readlink(link).startswith(f"{folder}/")]


def slow_walk(index):
    """All samples through tarfile, in the order of the shards."""
    found = []
    for shard in index.shards:
        with tarfile.open(shard.path) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension.lower() in IMAGE_EXTENSIONS:
                    found.append(Sample(len(found), stem, tar.extractfile(member).read(), -1))
                elif extension == "cls" and found and found[-1].key == stem:
                    found[-1].label = int(tar.extractfile(member).read())
    return found


def bad(reader, number):
    """The error of a sample that cannot be used."""
    with pytest.raises(BadSample) as error:
        reader(number)
    assert sorted(error.value.record) == ["error", "key", "shard"]
    assert all(isinstance(text, str) and text for text in error.value.record.values())
    return error.value


@pytest.mark.parametrize("open_shards", [1, 2, 5, 128])
def test_reader__agrees_with_a_walk_through_the_tars(five, open_shards):
    expected, folder = slow_walk(five), os.path.dirname(five.shards[0].path)
    assert len(expected) == 15 and [sample.label for sample in expected] == list(range(100, 115))
    reader = Reader(five, open_shards)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(15), 3))
    for sample in [*order, *range(15)]:
        assert reader(sample) == expected[sample]
        assert len(open_files(folder)) <= open_shards
    assert len(open_files(folder)) == min(5, open_shards)
    reader.close()
    assert not open_files(folder)
    assert reader(14) == expected[14] and reader(0) == expected[0]  # it opens again
    del reader
    assert not open_files(folder)


def test_reader__expect_changes_nothing_for_local_shards(five):
    """Any sample of a local shard can be read at any time, any number of times."""
    expected, reader = slow_walk(five), Reader(five)
    for samples in ([3, 1, 2], [], range(15)):
        reader.expect(np.array(samples, int))
        for number in (14, 0, 0, 7, 3):
            assert reader(number) == reader(number, planned=False) == expected[number]
    reader.close()


def test_reader__shard_of(five):
    reader = Reader(five)
    assert [reader.shard_of(number) for number in range(15)] == [0] * 3 + [1] + [2] * 4 + [3] * 2 + [4] * 5


def test_reader__keeps_the_shards_used_last(five, monkeypatch):
    reader, opened, open_ = Reader(five, 2), [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(Path(path).name) or open_(path, *rest))
    for sample in (0, 3, 0, 4, 1, 2, 3):  # shards 0, 1, 0, 2, 0, 0, 1
        reader(sample)
    assert opened == ["000.tar", "001.tar", "002.tar", "001.tar"]


def test_reader__members_in_any_order_and_unknown_ones(tmp_path):
    a, b, c = one_color(1), one_color(2), one_color(3)
    write_members(tmp_path / "x.tar", [
        ("LICENSE", b"text"), ("a.cls", b" 7\n"), ("a.json", b"{}"), ("a.JPG", a),
        ("only.json", b"{}"), ("b.png", b), ("b.cls", b"5"), ("b.txt", b"3"), ("c.webp", c), ("c.cls", b"0"),
    ])  # fmt: skip
    index = load_index(str(tmp_path))
    assert index.total == 3
    reader = Reader(index)
    assert [reader(i) for i in range(3)] == [Sample(0, "a", a, 7), Sample(1, "b", b, 5), Sample(2, "c", c, 0)]
    reader.close()


def test_reader__keys_that_come_again_are_samples_of_their_own(tmp_path):
    """Side by side or far apart. A sample with two images has the first of them."""
    images = [one_color(i) for i in range(6)]
    write_members(tmp_path / "x.tar", [
        ("a.png", images[0]), ("a.cls", b"0"), ("a.png", images[1]), ("a.cls", b"1"), ("b.png", images[2]), ("b.cls", b"2"),
        ("a.png", images[3]), ("a.cls", b"3"), ("c.jpg", images[4]), ("c.png", images[5]), ("c.cls", b"4"),
    ])  # fmt: skip
    reader = Reader(load_index(str(tmp_path)))
    found = [reader(i) for i in range(reader.index.total)]
    assert found == [Sample(i, key, images[i], i) for i, key in enumerate("aabac")]
    reader.close()


@pytest.mark.parametrize("label", [None, "cat {}", ""])
def test_reader__no_label_is_minus_one(tmp_path, label):
    """A text label is none either: pre-training needs no labels."""
    index = write_shards(tmp_path / "x", (3,), label=lambda number: label and label.format(number))
    reader = Reader(index)
    assert [reader(i) for i in range(3)] == [Sample(i, f"{i:05d}", one_color(i), -1) for i in range(3)]
    reader.close()


def test_reader__some_samples_without_label(tmp_path):
    index = write_shards(tmp_path / "x", (3, 2), label=lambda number: None if number in (1, 4) else 9)
    reader = Reader(index)
    found = [reader(i) for i in range(5)]
    assert [sample.image for sample in found] == [one_color(i) for i in range(5)]
    assert found[1].label == found[4].label == -1
    reader.close()


@pytest.mark.parametrize("label", [None, "cat", "", "1.5", "0x1"])
def test_reader__no_number_where_the_index_has_classes(tmp_path, label):
    """Such a sample cannot be used; the others can."""
    write_shards(tmp_path / "x", (3, 2), label=lambda number: label if number in (2, 4) else 1)
    index = name_classes(tmp_path / "x", ["a", "b"])
    reader = Reader(index)
    for number, shard in ((2, 0), (4, 1)):
        error = bad(reader, number)
        assert error.record["shard"] == index.shards[shard].path and error.record["key"] == f"{number:05d}"
        assert "label" in error.record["error"] and error.following == number + 1
    assert [reader(i) for i in (0, 1, 3)] == [Sample(i, f"{i:05d}", one_color(i), 1) for i in (0, 1, 3)]
    reader.close()


@pytest.mark.parametrize("samples", [4, 6])
def test_reader__changed_shard(tmp_path, samples):
    index = write_shards(tmp_path / "x", (3, 5))
    write_shards(tmp_path / "y", (3, samples))
    os.replace(tmp_path / "y/001.tar", tmp_path / "x/001.tar")
    reader = Reader(index)
    assert reader(2).label == 2
    with pytest.raises(RunError, match=rf"001.tar holds {samples} samples, its index says 5"):
        reader(3)
    reader.close()


@pytest.mark.parametrize("when", ["before it is opened", "after it was opened"])
@pytest.mark.parametrize("size", [2 * 512, 3 * 512 + 20])  # sample 0 is whole; of sample 1 nothing is there, or a part
def test_reader__shard_cut_short(tmp_path, when, size):
    index = write_shards(tmp_path / "x", (3, 2), label=None)
    reader, path = Reader(index), index.shards[0].path
    if when == "after it was opened":
        reader(0)
    os.truncate(path, size)
    for number in (1, 2, 1):
        error = bad(reader, number)
        assert error.record["shard"] == path and error.record["key"] == f"sample {number}"
        assert error.following == (3 if when == "before it is opened" else number + 1)
    assert [reader(i).image for i in (0, 3, 4)] == [one_color(i) for i in (0, 3, 4)]
    reader.close()


@pytest.mark.parametrize("number", [4, 8, 9])
def test_reader__corrupt_header_costs_its_sample_alone(tmp_path, number):
    """First, in the middle, last. The samples after it keep their numbers, which follow from the end of the shard."""
    index = write_shards(tmp_path / "x", (4, 6, 2))
    path = index.shards[1].path
    overwrite(path, member_at(path, f"{number:05d}.png")[0], b"\xa5" * 512)
    reader = Reader(index, 1)
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(12), 2)).tolist():
        if i != number:
            assert reader(i) == Sample(i, f"{i:05d}", one_color(i), i % 3)
        else:
            error = bad(reader, i)
            assert error.record["shard"] == path and error.record["key"] == f"sample {i - 4}" and error.following == i + 1
            assert "corrupt" in error.record["error"]
    reader.close()


def test_reader__two_corrupt_headers_cost_what_lies_between(tmp_path):
    """The numbers of these samples are not known. A wrong image is never given."""
    index = write_shards(tmp_path / "x", (9, 2))
    path = index.shards[0].path
    for offset in [member_at(path, f"{number:05d}.png")[0] for number in (2, 6)]:
        overwrite(path, offset, b"\xa5" * 512)
    reader = Reader(index)
    assert [reader(i).key for i in (0, 1, 7, 8, 9)] == ["00000", "00001", "00007", "00008", "00009"]
    assert {bad(reader, i).following for i in range(2, 7)} == {7}
    reader.close()


def test_reader__corrupt_label_header(tmp_path):
    """The image before it is whole. Without its label it can be used only where the index has no classes."""
    for labelled in (False, True):
        index = write_shards(tmp_path / f"{labelled}", (3, 2), label=lambda number: 0)
        index = dataclasses.replace(index, classes=("a",) if labelled else None)
        path = index.shards[0].path
        overwrite(path, member_at(path, "00001.cls")[0], bytes([7]) * 512)
        reader = Reader(index)
        assert reader(0).image == one_color(0)
        if labelled:
            assert bad(reader, 1).record["key"] == "00001" and "label" in bad(reader, 1).record["error"]
        else:
            assert reader(1) == Sample(1, "00001", one_color(1), -1)
        assert reader(2).image == one_color(2) and reader(3).image == one_color(3)
        reader.close()


def test_reader__a_corrupt_shard_is_read_through_once(tmp_path, monkeypatch):
    """It is not searched again, although other shards have been opened since."""
    index, scanned = write_shards(tmp_path / "x", (5, 5)), []
    os.truncate(index.shards[0].path, 6 * 512)
    scan = reader_module.local_samples
    monkeypatch.setattr(
        reader_module, "local_samples", lambda path, **more: scanned.append(Path(path).name) or scan(path, **more)
    )
    reader = Reader(index, 1)
    for number in (3, 7, 4, 8, 2):
        assert reader(number).sample_id == number if number > 4 else bad(reader, number)
    assert scanned == ["000.tar", "001.tar"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("where", ["open", "pread"])
def test_reader__an_error_that_passes_costs_nothing(tmp_path, monkeypatch, number, where):
    """At the opening of a shard, or after it: a server has replaced the file."""
    monkeypatch.setattr(remote, "WAIT", 1e-4)
    index, fails, function = write_shards(tmp_path / "x", (3, 2)), [1] * (4 if where == "open" else 1), getattr(os, where)

    def failing(*args):
        if fails and (where == "pread" or str(args[0]).endswith(".tar")):
            raise OSError(fails.pop() and number, "it passes")
        return function(*args)

    monkeypatch.setattr(os, where, failing)
    reader = Reader(index)
    assert [reader(i).image for i in range(5)] == [one_color(i) for i in range(5)] and not fails
    reader.close()


@pytest.mark.parametrize("where, following", [("open", 3), ("pread", 2)])
def test_reader__an_error_that_stays_costs_what_it_must(tmp_path, monkeypatch, where, following):
    """A shard that cannot be opened, or a sample that cannot be read. Other shards are not touched."""
    monkeypatch.setattr(remote, "WAIT", 1e-4)
    index, function = write_shards(tmp_path / "x", (3, 2)), getattr(os, where)
    reader = Reader(index)

    def failing(first, *rest):
        if str(first if where == "open" else os.readlink(f"/proc/self/fd/{first}")).endswith("000.tar"):
            raise OSError(errno.EIO, "it stays")
        return function(first, *rest)

    monkeypatch.setattr(os, where, failing)
    error = bad(reader, 1)
    assert error.following == following and "it stays" in error.record["error"]
    assert reader(3).image == one_color(3)
    reader.close()


def test_reader__too_many_open_files_are_not_the_shards_fault(tmp_path, monkeypatch):
    index, function = write_shards(tmp_path / "x", (3,)), os.open

    def failing(path, *rest):
        if str(path).endswith(".tar"):
            raise OSError(errno.EMFILE, "Too many open files")
        return function(path, *rest)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(RunError, match="too many open files; .*ulimit -n"):
        Reader(index)(0)


@pytest.mark.parametrize("label", [2, 3, 900, -1, "1.0"])
def test_reader__a_label_that_is_no_class_is_a_bad_sample(tmp_path, label):
    write_shards(tmp_path / "x", (3, 2), label=lambda number: label if number == 2 else 1)
    index = name_classes(tmp_path / "x", ["a", "b"])
    reader = Reader(index)
    error = bad(reader, 2)
    assert error.record["key"] == "00002" and "label" in error.record["error"] and error.following == 3
    assert reader(1).label == reader(3).label == 1
    reader.close()


def test_reader__shard_gone(tmp_path):
    index = write_shards(tmp_path / "x", (2, 2))
    os.remove(index.shards[0].path)
    reader = Reader(index)
    assert bad(reader, 0).record["shard"] == index.shards[0].path and reader(2).image == one_color(2)
    reader.close()


def spied_file(path, ranges):
    """An open file that records (start, end) of each read."""

    class Spy:
        def __init__(self):
            self.file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
            self.name, self.mode = str(path), "rb"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            start = self.file.tell()
            data = self.file.read(size)
            ranges.append((start, start + len(data)))
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    return Spy()


OTHERS = [("x.pkl", b"\x80\x04.." * 251), ("x.pth", b"evil" * 77), ("x.json", b'{"a": 1}' * 99), ("x.pyd", b"e" * 2000)]


@pytest.fixture
def mixed(tmp_path):
    """A shard with unknown members in its samples. Their sizes are not multiples of a tar block."""
    members = []
    for i in range(3):
        members += [*OTHERS[: i + 1], ("x.png", one_color(i)), ("x.cls", b"%d" % i), *OTHERS[i + 1 :], ("LICENSE", b"?" * 900)]
        members = [(name.replace("x.", f"{i}."), data) for name, data in members]
    members.append(("alone.pkl", b"evil" * 200))
    write_members(tmp_path / "x.tar", members)
    return load_index(str(tmp_path))


def payloads(index):
    """{name: (start, end)}"""
    with tarfile.open(index.shards[0].path) as tar:
        return {member.name: (member.offset_data, member.offset_data + member.size) for member in tar}


def test_reader__nothing_but_images_and_labels_is_read(mixed, monkeypatch):
    ranges, pread, extracted = [], os.pread, []
    places = payloads(mixed)
    monkeypatch.setattr(tars, "open", lambda path, mode: spied_file(path, ranges), raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda self, member: extracted.append(member))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: ranges.append((at, at + size)) or pread(fd, size, at))
    reader = Reader(mixed)
    assert [reader(i) for i in range(3)] == [Sample(i, str(i), one_color(i), i) for i in range(3)]
    reader.close()
    assert not extracted and len(places) == 20 and len(ranges) > 40
    for name, (start, end) in places.items():
        read = [(a, b) for a, b in ranges if a < end and b > start]
        wanted = name.endswith((".png", ".cls"))
        assert read == [(start, end)] if wanted else not read, name


def far(index):
    """The same shards, as remote files."""
    there = [dataclasses.replace(shard, path=f"file://{shard.path}") for shard in index.shards]
    return dataclasses.replace(index, shards=tuple(there))


def test_reader__nothing_but_images_and_labels_is_taken_of_a_stream(mixed, monkeypatch):
    """Of these, only the announced samples."""
    taken, extract = [], tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda self, member: taken.append(member.name) or extract(self, member))
    reader = Reader(far(mixed))
    reader.expect(np.array([2, 0]))
    assert [reader(i) for i in (2, 0)] == [Sample(i, str(i), one_color(i), i) for i in (2, 0)]
    assert sorted(taken) == ["0.cls", "0.png", "2.cls", "2.png"]
    reader.close()


def most_held(monkeypatch, index, pool, batch, lanes, parts):
    """The most images that a worker's reader holds at a time, over two epochs."""
    monkeypatch.setattr(shards, "POOL", pool)
    alive, most, next_ = weakref.WeakSet(), [0], RemoteShard._next

    def watched(self):
        alive.add(self)
        most[0] = max(most[0], sum(len(shard.held) for shard in alive) + 1)
        return next_(self)

    monkeypatch.setattr(RemoteShard, "_next", watched)
    for part in range(parts):
        reader = Reader(index)
        for epoch in range(2):
            mine = np.array_split(epoch_plan(index, batch, 0, epoch, lanes), parts, axis=1)[part].ravel()
            lane_of_place = np.array_split(np.arange(batch) * lanes // batch, parts)[part]
            reader.expect(mine, np.tile(lane_of_place, len(mine) // len(lane_of_place)))
            assert all(reader(int(n)).image == b"%d" % n for n in mine)
        assert not any(shard.held for shard in alive)
        reader.close()
        alive.clear()
    return most[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 remote shards of 10 samples."""
    return far(write_shards(tmp_path_factory.mktemp("many"), [10] * 40, image=lambda number: b"%d" % number, label=None))


@pytest.mark.parametrize("pool, parts", [(64, 16), (64, 8), (64, 1), (128, 16), (16, 16)])
def test_reader__holds_its_part_of_the_pool(monkeypatch, many, pool, parts):
    """A worker holds the pool of its own lanes, also where two of them meet in a shard."""
    assert most_held(monkeypatch, many, pool, 16, 16, parts) <= pool // parts + 1


def test_reader__one_lane_holds_the_pool_and_the_shard_it_enters_in(monkeypatch, many):
    assert most_held(monkeypatch, many, 64, 16, 1, 1) <= 64 + 10 + 1


def test_reader__pool_is_bounded():
    assert shards.POOL < 5000


@pytest.mark.parametrize("lanes", [4, 16])
def test_reader__one_worker_holds_no_more_than_the_pool(monkeypatch, many, lanes):
    assert most_held(monkeypatch, many, 64, 16, lanes, 1) <= 64 + 1
