"""Unusable samples: one record of each, counted over all processes, and limited."""

import json

import pytest
from helpers import spawn

from utils.data.bad_samples import FILE, BadSamples
from utils.run import dist
from utils.run.flags import RunError


def record(key, shard="a.tar", error="why"):
    return {"shard": shard, "key": key, "error": error}


def written(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_bad_samples__each_once(tmp_path):
    """A sample has one record, for any number of reads and any error. One key in two shards is two samples."""
    bad = BadSamples(tmp_path, 100, 1.0)
    assert bad.add([]) == 0 and not (tmp_path / FILE).exists()
    assert bad.add([record("x"), record("y"), record("x")]) == 2
    assert bad.add([]) == 2
    assert bad.add([record("y", error="another"), record("x", shard="b.tar"), record("z")]) == 4
    assert bad.add([record("z"), record("x")]) == 4
    found = written(tmp_path)
    assert [(r["shard"], r["key"]) for r in found] == [("a.tar", "x"), ("a.tar", "y"), ("b.tar", "x"), ("a.tar", "z")]
    assert all(r["error"] in ("why", "another") for r in found)


STRANGE = ["a b", "ä/Ω", 'quote"', "line\nbreak", "\x85\u2028\x0b", "", "{}", "\udcff"]


def test_bad_samples__any_text_is_one_line_of_the_file(tmp_path):
    records = [record(text, shard=f"https://h/{text}.tar", error=text) for text in STRANGE]
    assert BadSamples(tmp_path, 100, 1.0).add(records) == len(STRANGE)
    assert (tmp_path / FILE).read_bytes().count(b"\n") == len(STRANGE) and written(tmp_path) == records
    assert BadSamples(tmp_path, 100, 1.0).add(records) == len(STRANGE) and written(tmp_path) == records


def test_bad_samples__adds_to_the_file_of_the_run(tmp_path):
    BadSamples(tmp_path, 100, 1.0).add([record("x"), record("y")])
    bad = BadSamples(tmp_path, 100, 1.0)
    assert bad.add([]) == 0  # the samples of an earlier start may have been fixed
    assert bad.add([record("y"), record("z")]) == 2
    assert written(tmp_path) == [record("x"), record("y"), record("z")]


@pytest.mark.parametrize("rest", ["{", '{"shard": "a.tar", "key": "y", "err', json.dumps(record("y"))])
def test_bad_samples__half_a_line_is_ignored(tmp_path, rest):
    """A killed run may leave it. Without its newline a line is not complete."""
    (tmp_path / FILE).write_text(json.dumps(record("x")) + "\n" + rest)
    assert BadSamples(tmp_path, 100, 1.0).add([record("x")]) == 1
    assert written(tmp_path) == [record("x")]


@pytest.mark.parametrize("odd", ["\0" * 512, "{", '{"shard": "a.tar", "key', "[3]", "3", "{}", '{"shard": [], "key": 1}'])
def test_bad_samples__a_line_that_is_no_record_is_passed_over(tmp_path, odd):
    """A power cut may leave NUL bytes, before a line too."""
    text = f"{json.dumps(record('x'))}\n{odd}\n" + "\0" * 99 + f"{json.dumps(record('y'))}\n" + "\0" * 512
    (tmp_path / FILE).write_text(text)
    assert BadSamples(tmp_path, 100, 1.0).add([record("y"), record("x"), record("z")]) == 3
    assert [line for line in written(tmp_path) if "error" in line] == [record("x"), record("y"), record("z")]


@pytest.mark.parametrize("rest", ["{", '{"shard": "a.tar", "key": "y", "err', json.dumps(record("y"))])
def test_bad_samples__half_a_line_does_not_spoil_the_next_one(tmp_path, rest):
    (tmp_path / FILE).write_text(json.dumps(record("x")) + "\n" + rest)
    for _ in range(2):
        assert BadSamples(tmp_path, 100, 1.0).add([record("y"), record("z")]) == 2
        assert written(tmp_path) == [record("x"), record("y"), record("z")]


def test_bad_samples__nothing_is_made_where_nothing_was_met(tmp_path):
    assert BadSamples(tmp_path / "nowhere", 100, 0.0).add([]) == 0 and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "images, share, most", [(100, 0.01, 1), (100, 0.05, 5), (40, 0.01, 0), (7, 0.5, 3), (50, 0.0, 0), (3, 1.0, 3)]
)
def test_bad_samples__no_more_than_allowed(tmp_path, images, share, most):
    """One more than the share allows ends the run, and has a record too."""
    bad = BadSamples(tmp_path, images, share)
    for n in range(most):
        assert bad.add([record(str(n))]) == n + 1
    with pytest.raises(RunError) as error:
        bad.add([record("one more"), record("another")])
    text = f"--max-bad {share}: {most + 2} of {images} images cannot be used, see {tmp_path / FILE}"
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
    assert [r["key"] for r in written(tmp_path)] == [*map(str, range(most)), "one more", "another"]


def test_bad_samples__samples_of_an_earlier_start_count_when_they_are_met_again(tmp_path):
    BadSamples(tmp_path, 100, 0.03).add([record(str(n)) for n in range(3)])
    again = BadSamples(tmp_path, 100, 0.03)
    assert again.add([record("2"), record("3")]) == 2
    with pytest.raises(RunError, match="4 of 100"):
        again.add([record("0"), record("1")])
    assert len(written(tmp_path)) == 4


def met_by(rank, step):
    """Both meet `both`; each has its own; in the last step only the second meets any."""
    steps = ([("both", "of 0"), (), ("later",), ()], [("of 1", "both"), ("of 1",), ("both",), ("a", "b", "c")])
    return [record(key, error=f"seen by {rank}") for key in steps[rank][step]]


def two_processes(folder):
    bad = BadSamples(folder, 100, 0.05)
    counts = [bad.add(met_by(dist.rank(), step)) for step in range(3)]
    again = BadSamples(folder, 100, 0.05).add([record("both"), record(f"of {dist.rank()}")])
    try:
        bad.add(met_by(dist.rank(), 3))
    except RunError as error:
        return counts, again, str(error)


def test_bad_samples__processes_agree(tmp_path):
    """They agree on the count and on the end of the run. The file has each sample once."""
    (first, second) = spawn(two_processes, tmp_path)
    assert first == second
    counts, again, text = first
    assert counts == [3, 3, 4] and again == 3 and text.startswith("--max-bad 0.05: 7 of 100")
    assert [r["key"] for r in written(tmp_path)] == ["both", "of 0", "of 1", "later", "a", "b", "c"]
