import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

import main_pretrain
from utils.data import index as index_module
from utils.data import index_file, indexing
from utils.data.index import load_index
from utils.data.index_file import write_index
from utils.data.tars import IMAGE_EXTENSIONS, TarSample, local_samples, open_tar, read_members, tar_samples
from utils.evaluation.session import check_classes


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes) pairs in this order; None for the bytes makes a directory."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def shard(path, count, label="{}", start=0):
    """A shard of `count` samples, numbered from `start`, with a made-up image and, unless it is None, a label."""
    members = []
    for i in range(start, start + count):
        members.append((f"{i:04d}.jpg", b"image %d" % i * (i + 1)))
        members += [] if label is None else [(f"{i:04d}.cls", label.format(i).encode())]
    return write_tar(path, members)


@pytest.fixture
def folder(tmp_path):
    """Shards without an index: 3, 4 and 5 samples with the labels 0 to 11, no index."""
    path = tmp_path / "shards"
    path.mkdir()
    for number, (start, count) in enumerate([(0, 3), (3, 4), (7, 5)]):
        shard(path / f"s-{number}.tar", count, start=start)
    return path


def names(index):
    return [s.name for s in index.shards]


def slow_samples(path):
    """The expected samples of local_samples, with the data of images and labels instead of their places."""
    groups = []
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            base = member.name.rsplit("/", 1)[-1]
            if not member.isfile() or "." not in base or base[0] == "." or base.index(".") == len(base) - 1:
                continue
            key = member.name[: len(member.name) - len(base) + base.index(".")]
            if not groups or groups[-1][0] != key:
                groups.append((key, {}))
            extension = base[base.index(".") + 1 :].lower()
            known = extension == "cls" or extension.rpartition(".")[2] in IMAGE_EXTENSIONS
            groups[-1][1][extension] = tar.extractfile(member).read() if known else None
    return [(key, members) for key, members in groups if any(e in IMAGE_EXTENSIONS for e in members)]


def read(path, sample):
    data = Path(path).read_bytes()
    return sample.key, {e: data[place[0] : sum(place)] if place else None for e, place in sample.members.items()}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_local_samples__agrees_with_tarfile(tmp_path, format):
    long = "d" * 90 + "/" + "k" * 60 + ("" if format == tarfile.USTAR_FORMAT else "x" * 300)
    members = [
        ("a", None), ("a/0.JPG", b"0" * 700), ("a/0.cls", b"3"), ("README", b"?"), ("a/.hidden.jpg", b"?"), ("a/0.json", b"{}"),
        ("b.c/0.seg.png", b"s"), ("b.c/0.png", b"p" * 512), ("no-image.cls", b"1"), (f"{long}.webp", b"w"),
        (f"{long}.cls", b"2"), ("ends-with.", b"?"), ("empty.jpeg", b""), ("a/0.jpg", b"comes again"),
    ]  # fmt: skip
    if format != tarfile.USTAR_FORMAT:
        members.append(("ü/日本.jpg", b"u"))
    path = write_tar(tmp_path / "x.tar", members, format)
    found = [read(path, sample) for sample in local_samples(path)]
    assert found == slow_samples(path)
    assert len(found) == len(members) - 9  # a directory, 3 other files, a group without image, 4 further members of a sample


def test_local_samples__extension_that_comes_again_opens_a_sample(tmp_path):
    members = [("x.jpg", b"1"), ("x.cls", b"0"), ("x.jpg", b"22"), ("x.cls", b"1")]
    path = write_tar(tmp_path / "x.tar", members)
    assert [read(path, s)[1] for s in local_samples(path)] == [{"jpg": b"1", "cls": b"0"}, {"jpg": b"22", "cls": b"1"}]


@pytest.mark.parametrize("size", [0, 100, 700, 2048, 2100, 2560, 2600, 3072])
def test_local_samples__cut_short(tmp_path, size):
    """In a header, in a payload, and exactly between two members, which tarfile itself does not notice."""
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"0" * 1500), ("1.jpg", b"1" * 1500)])
    os.truncate(path, size)
    found = []
    with pytest.raises(tarfile.TarError):
        for sample in local_samples(path):
            found.append(read(path, sample))
    assert found == ([("0", {"jpg": b"0" * 1500})] if size >= 2048 else [])  # the whole samples before the corrupt part


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_tar_samples__stream_gives_what_the_file_gives(tmp_path, format):
    """Their positions are equal, and only images and labels are taken."""
    path, asked = tmp_path / "x.tar", []
    members = [
        ("a.cls", b"1"), ("b.cls", b"2"), ("b.pkl", b"evil"), ("b.jpg", b"B" * 900), ("c.jpg", b""), ("c.json", b"?"),
        ("d/e.PNG", b"E"), ("d/e.cls", b"3"), ("d/f.txt", b"?"),
    ]  # fmt: skip
    write_tar(path, members, format)

    def take(member, number):
        asked.append((member.name, number))
        return tar.extractfile(member).read()

    notes = []
    with open(path, "rb") as file, open_tar(file, "r|") as tar:
        members = read_members(tar, os.path.getsize(path))
        found = list(tar_samples(members, take, note=lambda *note: notes.append(note)))
    assert [(s.key, s.members) for s in found] == slow_samples(path)
    assert [s.image for s in found] == ["jpg", "jpg", "png"]
    assert notes == [("keys without an image (.cls)", "a"), ("keys without an image (.txt)", "d/f")]
    assert asked == [("a.cls", 0), ("b.cls", 0), ("b.jpg", 0), ("c.jpg", 1), ("d/e.PNG", 2), ("d/e.cls", 2)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_tar_samples__another_number_than_is_known(tmp_path, count):
    """If samples are missing, the last one may be incomplete and is not given."""
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"image") for i in range(3)])
    found = []
    with (
        open(path, "rb") as file,
        open_tar(file, "r|") as tar,
        pytest.raises(tarfile.TarError, match=f"{count}"),
    ):
        for sample in tar_samples(read_members(tar, os.path.getsize(path)), lambda member, _: None, count):
            found.append(sample.key)
    assert found == ["0", "1"]


def test_local_samples__sample_is_plain_data(folder):
    assert next(local_samples(str(folder / "s-0.tar"))) == TarSample("0000", {"jpg": (512, 7), "cls": (1536, 1)})


def test_load_index__foreign_shards_are_indexed_on_first_use(folder, monkeypatch):
    index = load_index(str(folder))
    for entry in index.shards:
        data = (folder / entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.samples == len(slow_samples(folder / entry.name))
        assert os.path.isabs(entry.path) and Path(entry.path).samefile(folder / entry.name)
    assert names(index) == ["s-0.tar", "s-1.tar", "s-2.tar"] and index.total == 12
    assert index.labelled and index.classes == tuple(str(c) for c in range(12))
    assert json.loads((folder / "index.json").read_text())["total"] == 12
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    monkeypatch.setattr(indexing, "local_samples", None)  # the second time nothing is scanned
    assert load_index(str(folder)) == index


def test_load_index__folder_that_cannot_be_written(folder, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(index_file, "atomic", refuse)
    assert load_index(str(folder)).total == 12
    out, err = capsys.readouterr()
    assert out == "" and err.count("warning: ") == 1 and "Permission denied" in err
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    "label, classes",
    [("0", ("0",)), (" 2\n", ("0", "1", "2")), (None, None), ("cat", None), ("", None), ("-1", None), ("²", None),
     ("123456789012", None)],
)  # fmt: skip
def test_load_index__classes_of_foreign_shards(tmp_path, label, classes):
    shard(tmp_path / "x.tar", 3, label)
    index = load_index(str(tmp_path))
    assert index.classes == classes and index.labelled == (classes is not None)


LABELS = [None, b"", b"-1", b"1.0", b"cat", b"\xff\0", b"1000000", b"1" * 9999, "1²".encode()]


@pytest.mark.parametrize("label", LABELS, ids=range(len(LABELS)))
def test_load_index__a_label_that_is_no_number_is_named(tmp_path, capsys, label):
    """The first one and their number. Each start knows them, and a probe prints them."""
    shard(tmp_path / "a.tar", 3)
    members = [("x.jpg", b"?"), ("x.cls", b"1"), ("d/y.jpg", b"?"), ("z.jpg", b"?")]
    write_tar(tmp_path / "b.tar", members + ([] if label is None else [("z.cls", label)]))
    index = load_index(str(tmp_path))
    assert index.classes is None and not index.labelled
    assert index.unlabelled == "2 of 6 have no .cls with a number from 0 to 999999, the first: d/y in b.tar"
    assert f"indexed without labels: of its images, {index.unlabelled}" in capsys.readouterr().err
    assert load_index(str(tmp_path)) == index and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="^--val-shards .*needs labels and of its images 2 of 6 have no .cls.*; pass labelled"):
        check_classes(("--val-shards", "x", index))


def test_load_index__without_any_label_nothing_is_said(tmp_path, capsys):
    write_tar(tmp_path / "b.tar", [("x.jpg", b"?"), ("x.json", b"{}"), ("y.jpg", b"?")])
    index = load_index(str(tmp_path))
    assert index.classes is None and index.unlabelled == "" and "warning" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="^--val-shards x: an evaluation needs labels and these images have none; pass"):
        check_classes(("--val-shards", "x", index))


def test_load_index__labels_with_gaps_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "b.tar", [m for n in (17, 5, 900, 5) for m in ((f"{n}.jpg", b"?"), (f"{n}.cls", b"%d" % n))])
    assert len(load_index(str(tmp_path)).classes) == 901
    assert "3 labels from 5 to 900: of the 901 classes, 898 have no image here" in capsys.readouterr().err


# ---------------------------------------------------------------- tars of other kinds


def header_of(path, number):
    """The byte at which the header of the member `number` begins."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


def set_size(path, number, text, type_=tarfile.REGTYPE):
    """Write size and type of a member's header, and its checksum."""
    with open(path, "r+b") as file:
        file.seek(at := header_of(path, number))
        block = bytearray(file.read(512))
        block[124:136], block[156:157] = text, type_
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]
        file.seek(at)
        file.write(block)


BASE256 = (b"\xff" + (2**88 - 700).to_bytes(11, "big"), b"\x80" + b"\x7f" * 11, b"\x80" + bytes(5) + b"\1" + bytes(5))
SIZES = [*BASE256, b"-0000000700\0", b"hello world\0", b"\xc3\xa9" * 6, b"77777777777\0"]


@pytest.mark.parametrize("size", SIZES, ids=range(len(SIZES)))
@pytest.mark.parametrize("number", [0, 1, 4])
def test_local_samples__a_size_that_cannot_be_right(tmp_path, size, number):
    """Negative, huge, or no number: it is damage, as any corrupt header. The other samples are read."""
    path = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in ((f"{n}.jpg", b"%d" % n * 600), (f"{n}.cls", b"1"))])
    set_size(path, number, size)
    damages = []
    found = dict(read(path, sample) for sample in local_samples(path, damages=damages))
    for n in {0, 1, 2} - {number // 2}:
        assert found[str(n)] == {"jpg": b"%d" % n * 600, "cls": b"1"}
    assert len(damages) == 1 and (str(number // 2) in found) == (number == 1)
    with pytest.raises(ValueError, match="^--shards .*x.tar: not a whole tar .*; copy it again") as error:
        load_index(str(tmp_path))
    assert "\n" not in str(error.value)
    with open(path, "rb") as file, pytest.raises(tarfile.TarError):  # as a stream
        list(tar_samples(read_members(open_tar(file, "r|"), os.path.getsize(path)), lambda member, _: None, 3))


@pytest.mark.parametrize("size", ["-600", "99999999999999999999", "x", "1e3"])
@pytest.mark.parametrize("kind", ["size", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major"])
def test_local_samples__pax_headers_that_cannot_be_right(tmp_path, kind, size):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size, info.pax_headers = 600, {kind: size, "GNU.sparse.minor": "0"} if n == 1 else {}
            tar.addfile(info, io.BytesIO(b"%d" % n * 600))
    found = [sample.key for sample in local_samples(tmp_path / "x.tar", damages=[])]
    assert found[0] == "0" and found[-1] == "2"


@pytest.mark.parametrize("type_", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_local_samples__a_long_name_does_not_ask_for_all_memory(tmp_path, type_):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"0"), ("1.jpg", b"1"), ("2.jpg", b"2")])
    set_size(path, 1, b"\x80" + bytes(3) + b"\1" + bytes(7), type_)
    assert [sample.key for sample in local_samples(path, damages=[])] == ["0", "2"]


@pytest.mark.parametrize("kind, fix", [(tarfile.LNKTYPE, "hard"), (tarfile.SYMTYPE, "symbolic")])
def test_load_index__links_to_images_are_refused(tmp_path, kind, fix):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for n, type_ in enumerate([tarfile.REGTYPE, tarfile.SYMTYPE, kind, kind]):
            info = tarfile.TarInfo("latest" if n == 1 else f"d/{n}.jpg")  # a link beside the images does not matter
            info.type, info.linkname, info.size = type_, "d/0.jpg", 5 if type_ == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"image"))
    with pytest.raises(
        ValueError, match="^--shards .*: 2 images or labels of x.tar are links, the first: d/2.jpg .*--hard-deref"
    ):
        load_index(str(tmp_path))


def test_load_index__a_sparse_image_is_refused(tmp_path):
    """If holes are left out, the bytes of the tar differ from those of the file."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size, info.pax_headers = 5, {"GNU.sparse.map": "0,5", "GNU.sparse.size": "9000"}
        tar.addfile(info, io.BytesIO(b"image"))
    with pytest.raises(ValueError, match="^--shards .*x.tar: has a sparse file; pack it again without --sparse$"):
        load_index(str(tmp_path))


@pytest.mark.parametrize("rest", ["tar", b"x", bytes(9999) + b"x"])
def test_load_index__data_after_the_end_is_refused(tmp_path, rest):
    """A reader that stops at the end would lose the second tar in silence."""
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"0")])
    more = write_tar(tmp_path / "other", [("1.jpg", b"1")]).read_bytes() if rest == "tar" else rest
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(ValueError, match="^--shards .*x.tar: has data after its end at byte 1024, such as a second tar; pack"):
        load_index(str(tmp_path))


@pytest.mark.parametrize(
    "name, spec", [("a.tar", ""), ("a.tar.gz", ""), ("a.tgz", ""), ("a.tar.gz", "a.tar.gz"), ("a.tar", "*.tar")]
)
def test_load_index__a_compressed_tar_is_refused(tmp_path, name, spec):
    (tmp_path / name).write_bytes(gzip.compress(write_tar(tmp_path / "x", [("0.jpg", b"0")]).read_bytes()))
    with pytest.raises(ValueError, match=f"^--shards {tmp_path}.*{name}.* is compressed.*; unpack it"):
        load_index(f"{tmp_path}/{spec}" if spec else str(tmp_path))


def test_load_index__a_compressed_tar_beside_the_unpacked_one(tmp_path):
    shard(tmp_path / "a.tar", 3)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "a.tar.sha256").write_bytes(b"")
    assert load_index(str(tmp_path)).total == 3


def left_out(folder, members, capsys):
    """The images of each sample, and the left-out files."""
    path = write_tar(folder / "x.tar", members)
    load_index(str(folder))
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "leaves out" in line]
    found = [(sample.key, sample.image) for sample in local_samples(path)]
    return found, sorted(line.partition("leaves out ")[2] for line in lines)


def test_load_index__names_with_dots(tmp_path, capsys):
    """The key ends at the first dot. An image with more dots in its extension is used if its key has no other image."""
    names = [
        "a.jpg",
        "s.input.jpg",
        "s.cls",
        "t.seg.png",
        "t.jpg",
        "22.05.png",
        "22.06.png",
        "22.07.png",
        ".hid.jpg",
        "._a.jpg",
    ]
    found, lines = left_out(tmp_path, [(name, b"?") for name in names], capsys)
    assert found == [("a", "jpg"), ("s", "input.jpg"), ("t", "jpg"), ("22", "05.png")]
    assert lines == [
        "1 images beside the .jpg of their key, the first: t.seg.png in x.tar",
        "2 files without a key or an extension, the first: .hid.jpg in x.tar",
        "2 images beside the .05.png of their key, the first: 22.06.png in x.tar",
    ]


def test_load_index__every_image_is_used_or_counted(tmp_path, capsys):
    names = [
        "a.pgm",
        "b.jfif",
        "c.jpe",
        "d.pbm",
        "e.PNM",
        "f.pgm",
        "f.jpg",
        "g.avif",
        "g.cls",
        "h.jp2",
        "i.tga",
        "j.avif",
        "j.cls",
        "k",
    ]
    found, lines = left_out(tmp_path, [(name, b"?") for name in names], capsys)
    assert found == [("a", "pgm"), ("b", "jfif"), ("c", "jpe"), ("d", "pbm"), ("e", "pnm"), ("f", "jpg")]
    assert lines == [
        "1 files without a key or an extension, the first: k in x.tar",
        "1 images beside the .jpg of their key, the first: f.pgm in x.tar",
        "1 keys without an image (.jp2), the first: h in x.tar",
        "1 keys without an image (.tga), the first: i in x.tar",
        "2 keys without an image (.avif .cls), the first: g in x.tar",
    ]


def test_load_index__many_kinds_of_other_files_are_a_few_lines(tmp_path, capsys):
    members = [("a.jpg", b"?")] + [(f"{n}\n{'k' * 90}.e{n}", b"?") for n in range(500)]
    found, lines = left_out(tmp_path, members, capsys)
    assert len(found) == 1 and len(lines) == 6 and "500 names" in " ".join(lines) and max(map(len, lines)) < 300


@pytest.mark.parametrize(
    "spec, expected",
    [("", [0, 1, 2]), ("index.json", [0, 1, 2]), ("s-1.tar", [1]), ("s-*.tar", [0, 1, 2]), ("s-[02].tar", [0, 2]),
     ("s-{1..2}.tar", [1, 2]), ("s-{2,0}.tar", [2, 0]), ("s-{0,*}.tar", [0, 1, 2])],
)  # fmt: skip
def test_load_index__subset_takes_the_entries_of_the_index(folder, monkeypatch, spec, expected):
    whole = load_index(str(folder))
    monkeypatch.setattr(index_module, "index_folder", None)  # nothing is computed again
    index = load_index(f"{folder}/{spec}")
    assert index.shards == tuple(whole.shards[i] for i in expected) and index.classes == whole.classes
    assert (index.hash == whole.hash) == (expected == [0, 1, 2])


def test_load_index__relative_path(folder, monkeypatch):
    whole = load_index(str(folder))
    monkeypatch.chdir(folder)
    assert load_index(".") == load_index("s-*.tar") == whole


def test_index__hash_is_of_the_content_not_the_place(folder, tmp_path):
    here = load_index(str(folder))
    there = load_index(str(shutil.copytree(folder, tmp_path / "copy")))
    assert here != there and here.hash == there.hash
    write_index(tmp_path / "copy", json.loads((folder / "index.json").read_text())["shards"], ("a", "b"))
    assert load_index(str(tmp_path / "copy")).hash != here.hash


def test_index__hash_changes_with_a_byte_of_a_shard_and_with_their_order(folder):
    before = load_index(str(folder)).hash
    in_another_order = load_index(f"{folder}/s-{{2,1,0}}.tar")
    assert in_another_order.total == 12 and in_another_order.hash != before
    data = bytearray((folder / "s-1.tar").read_bytes())
    data[512] ^= 1  # the first byte of the first image: sizes and names stay
    (folder / "s-1.tar").write_bytes(data)
    (folder / "index.json").unlink()
    assert load_index(str(folder)).hash != before


def edit_index(folder, change):
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


BROKEN = {
    "shard changed size": (lambda f: os.truncate(f / "s-1.tar", 5), "", r"s-1.tar has 5 bytes, its index says \d+; copy"),
    "shard gone": (lambda f: (f / "s-1.tar").unlink(), "", "s-1.tar is missing, its index says"),
    "shard gone, pattern": (lambda f: (f / "s-1.tar").unlink(), "s-{0..2}.tar", "s-1.tar is missing; pass"),
    "shard new": (lambda f: shard(f / "t.tar", 2), "", "t.tar is not in .*index.json; delete"),
    "shard new, pattern": (lambda f: shard(f / "t.tar", 2), "t.tar", "t.tar is not in .*index.json; delete"),
    "empty glob": (lambda f: None, "u-*.tar", r"u-\*.tar: no such file or folder; pass"),
    "brace beyond": (lambda f: None, "s-{2..9}.tar", "s-3.tar is missing; pass"),
    "brace open": (lambda f: None, "s-{0..2.tar", "a brace is not closed; write"),
    "several folders": (lambda f: shard(f.parent / "t.tar", 2), "{.,..}/*.tar", "several folders; put"),
    "no such folder": (lambda f: None, "nowhere", "nowhere: no such file or folder; pass"),
    "no such index": (lambda f: (f / "index.json").unlink(), "index.json", "no such file or folder; pass"),
    "index cut": (lambda f: os.truncate(f / "index.json", 50), "", "index.json: not a readable index .*; delete it"),
    "index a list": (lambda f: (f / "index.json").write_text("[]"), "", "not a readable index"),
    "index without classes": (lambda f: edit_index(f, lambda c: c.pop("classes")), "", "not a readable index"),
    "index with odd classes": (lambda f: edit_index(f, lambda c: c.update(classes=5)), "", "not a readable index"),
    "index with odd count": (lambda f: edit_index(f, lambda c: c["shards"][0].update(samples="x")), "", "not a readable index"),
    "index names elsewhere": (lambda f: edit_index(f, lambda c: c["shards"][0].update(name="/x/y.tar")), "", "not a readable"),
    "index empty": (lambda f: edit_index(f, lambda c: [s.update(samples=0) for s in c["shards"]]), "", "no images in these"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_load_index__bad_input_is_one_clear_line(folder, case):
    load_index(str(folder))
    break_, spec, message = BROKEN[case]
    break_(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_index(f"{folder}/{spec}", "--val-shards")
    assert str(error.value).startswith(f"--val-shards {folder}") and "\n" not in str(error.value)


@pytest.mark.parametrize("case", BROKEN)
def test_load_index__bad_input_ends_a_run_with_code_2(folder, tmp_path, capsys, case):
    load_index(str(folder))
    break_, spec, message = BROKEN[case]
    break_(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(
            ["--method", "moco", "--shards", f"{folder}/{spec}", "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"main_pretrain.py: error: --shards {folder}") and re.search(message, err)


@pytest.mark.parametrize("size", [700, 2048, 3000])
def test_load_index__foreign_shard_cut_short(folder, size):
    """In a payload, between two members, in the end of the archive; at last a whole shard of another size."""
    assert size < (folder / "s-1.tar").stat().st_size
    os.truncate(folder / "s-1.tar", size)
    with pytest.raises(ValueError, match="^--shards .*s-1.tar: not a whole tar .*; copy it again"):
        load_index(str(folder))
    assert not (folder / "index.json").exists()


def test_load_index__foreign_shards_without_an_image(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.cls", b"1"), ("notes.txt", b"?")])
    with pytest.raises(ValueError, match="^--shards .*: no images in these shards; pass others$"):
        load_index(str(tmp_path))


def test_load_index__names_as_tar_writes_them_for_a_folder(tmp_path):
    """`tar -C FOLDER -cf x.tar .` puts ./ before every name and packs the folders too."""
    members = [("./", None), ("./a/", None), ("./a/0.PNG", b"p"), ("./a/0.cls", b"1"), ("./b.d/", None)]
    members.append(("./b.d/0.Jpeg", b"j" * 600))
    path = write_tar(tmp_path / "x.tar", members)
    assert [read(path, s)[1] for s in local_samples(path)] == [{"png": b"p", "cls": b"1"}, {"jpeg": b"j" * 600}]
    assert load_index(str(path)).total == 2 and (tmp_path / "index.json").exists()


@pytest.mark.parametrize("data", [b"", b"no tar" * 999, bytes(99) + b"x"])
def test_load_index__foreign_file_that_is_no_tar(folder, data):
    (folder / "t.tar").write_bytes(data)
    with pytest.raises(ValueError, match="--shards .*t.tar: not a whole tar .*; copy it again"):
        load_index(str(folder))
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize("splits, expected", [(["test", "train"], "train"), (["test"], "test"), ([], "a folder of shards")])
def test_load_index__folder_of_splits(tmp_path, splits, expected):
    for split in splits:
        (tmp_path / split).mkdir()
        shard(tmp_path / split / "x.tar", 1)
    with pytest.raises(ValueError, match=f"no shards .* in it; pass .*{expected}"):
        load_index(str(tmp_path))


def test_load_index__keys_without_an_image_are_named(tmp_path, capsys):
    """They are no samples. One warning for each kind says so."""
    write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("1.jpg", b"?"), ("1.cls", b"0"), ("d/2.cls", b"1"), ("3.txt", b"?")])
    shard(tmp_path / "b.tar", 2)
    index = load_index(str(tmp_path))
    assert [s.samples for s in index.shards] == [1, 2] and index.classes == ("0", "1")
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "warning" in line]
    kinds = ["2 keys without an image (.cls), the first: 0", "1 keys without an image (.txt), the first: 3"]
    assert lines == [f"warning: --shards {tmp_path}: leaves out {kind} in a.tar" for kind in kinds]


def test_load_index__verify_shards_compares_every_byte(folder):
    whole = load_index(str(folder), verify_shards=True)
    assert whole == load_index(str(folder))
    data = bytearray((folder / "s-1.tar").read_bytes())
    data[512] ^= 1  # the first byte of the first image: sizes and names stay
    (folder / "s-1.tar").write_bytes(data)
    assert load_index(str(folder)) == whole
    assert load_index(f"{folder}/s-{{0,2}}.tar", verify_shards=True).total == 8  # the others are good
    with pytest.raises(ValueError, match="^--val-shards .*/s-1.tar: its sha256 differs from its index; copy it again"):
        load_index(str(folder), "--val-shards", verify_shards=True)
