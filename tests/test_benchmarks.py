"""The benchmarks run and end with the line of JSON that programs read. What they measure is not tested: machines differ."""

import json

import pytest
from shards_helpers import one_photograph, write_shards

from benchmarks import input_pipeline
from benchmarks.input_pipeline import VIEWS, pil_chain


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(input_pipeline, "find_spec", lambda name: None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("own", [True, False])
def test_input_pipeline__ends_with_a_line_of_json(tmp_path, capsys, no_dali, own):
    write_shards(tmp_path / "x", (5, 4), one_photograph)
    flags = ["--shards", str(tmp_path / "x"), "--workers", "2"] if own else ["--views", "2x224"]
    input_pipeline.main([*flags, "--images", "3", "--rounds", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    times = [result[name] for name in ("decode_ms", "pil_ms", "worker_ms", "all_cpu_ms")]
    assert all(time > 0 for time in times) and "dali_ms" not in result
    assert result["images_per_s"].keys() == ({"1", "2"} if own else set())


@pytest.mark.parametrize("flags, named", [(["--rounds", "0"], "--rounds 0"), (["--shards", "/nowhere"], "--shards /nowhere")])
def test_input_pipeline__bad_input_is_one_line(capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        input_pipeline.main(flags)
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_pil_chain__has_the_operations_of_a_view():
    names = [type(operation).__name__ for operation in pil_chain(VIEWS["2x224"][0]).transforms]
    assert names == ["RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply", "RandomHorizontalFlip", "ToTensor",
                     "Normalize"]  # fmt: skip
    assert [(s.size, s.count) for s in VIEWS["2x224+4x112"]] == [(224, 2), (112, 4)]
