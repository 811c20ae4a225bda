"""The benchmarks run and end with the line of JSON that programs read. The measured times are not tested: machines differ."""

import json
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
from helpers import forkserver
from shards_helpers import one_photograph, write_shards

from benchmarks import accumulate, input_pipeline, knn, plan, step
from benchmarks.input_pipeline import VIEWS, pil_chain
from methods import METHODS
from utils.run.cpu import peak_memory


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


def test_plan__ends_with_a_line_of_json(capsys, monkeypatch):
    """No worker keeps an order: 2 M images take no MB more than few, beside what a remote shard announces."""
    monkeypatch.setattr(step, "processes", forkserver)
    plan.main(["--images", "2e6", "--places", "local", "remote", "--workers", "2", "--processes", "8"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"2000000 local", "2000000 remote"}
    for found in result.values():
        assert 0 < found["first_step_s"] < 60 and found["node_mib"] < 2048
    assert result["2000000 local"]["worker_mib"] < 8


def test_step__also_measures_the_whole_loop(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "processes", forkserver)
    write_shards(tmp_path / "x", (5, 4), one_photograph)
    flags = ["--methods", "insdis", "-a", "tiny_resnet", "--size", "32", "--batch-size", "4", "--nce-k", "8", "--rounds", "1"]
    flags += ["--device", "cpu", "--shards", str(tmp_path / "x"), "--workers", "0"]
    with pytest.raises(SystemExit, match="2"):
        step.main([*flags, "--samples", "8"])
    assert "--samples 9" in capsys.readouterr().err.splitlines()[-1]
    step.main([*flags, "--samples", "9"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["insdis"]["loop_ms"] > 0


def test_knn__ends_with_a_line_of_json(capsys, monkeypatch):
    monkeypatch.setattr(step, "processes", forkserver)
    knn.main(["--images", "30000", "--queries", "512", "--width", "16", "--memory", "16", "--k", "20"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() == {"plain", "16"} and all(found["cpu_s"] > 0 for found in result.values())
    assert result["16"]["memory_mib"] < 32 < result["plain"]["memory_mib"]  # plain has 30000 x 512 similarities, 59 MiB


def test_accumulate__ends_with_a_line_of_json(capsys, monkeypatch):
    monkeypatch.setattr(step, "processes", forkserver)
    flags = ["--methods", "moco", "-a", "tiny_resnet", "--size", "32", "--batch-size", "8", "--moco-k", "64", "--device", "cpu"]
    accumulate.main([*flags, "--accumulate", "2", "--rounds", "2"])
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert all(found[name] > 0 for name in ("whole_ms", "slices_ms", "whole_mb", "slices_mb"))
    assert found["ratio"] == found["slices_ms"] / found["whole_ms"]
    assert found["memory_ratio"] == found["slices_mb"] / found["whole_mb"]
    with pytest.raises(SystemExit, match="2"):
        accumulate.main([*flags, "--accumulate", "3"])
    assert "--accumulate 3: must divide --batch-size 8" in capsys.readouterr().err.splitlines()[-1]


def test_pil_chain__has_the_operations_of_a_view():
    names = [type(operation).__name__ for operation in pil_chain(VIEWS["2x224"][0]).transforms]
    assert names == ["RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply", "RandomHorizontalFlip", "ToTensor",
                     "Normalize"]  # fmt: skip
    assert [(s.size, s.count) for s in VIEWS["2x224+4x112"]] == [(224, 2), (112, 4)]


def test_step__ends_with_a_line_of_json(capsys, monkeypatch):
    """All forms of some methods, each in a separate process. CMC's two forwards are of half networks."""
    monkeypatch.setattr(step, "processes", forkserver)
    flags = ["-a", "tiny_resnet", "--size", "64", "--batch-size", "4", "--moco-k", "64", "--rounds", "1", "--device", "cpu"]
    step.main([*flags, "--nce-k", "64", "--samples", "100", "--methods", "mosrep", "w2ssl", "cmc"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {case: r["forwards_per_image"] for case, r in result.items()} == {
        "mosrep": 3, "w2ssl": 2, "cmc": 2,
    }  # fmt: skip
    for r in result.values():
        assert all(r[name] > 0 for name in ("plain_ms", "default_ms", "watched_ms", "plain_mb", "default_mb"))
        assert r["ratio"] == r["default_ms"] / r["plain_ms"]
        assert r["health_share"] == pytest.approx((r["watched_ms"] - r["default_ms"]) / (100 * r["default_ms"]))


def test_peak_memory__is_not_the_parents():
    """A process that is started by a large one."""
    large = bytearray(2 * 10**9)
    large[::4096] = b"x" * len(large[::4096])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert 1e7 < pool.submit(peak_memory).result() < 1.5e9 < peak_memory()


def three_losses(name):
    """case -> the losses of three steps, in one form."""
    warnings.simplefilter("error")
    flags = step.get_args(["-a", "tiny_resnet", "--size", "64", "--batch-size", "4", "--moco-k", "64", "--amp", "fp32",
                           "--nce-k", "64", "--samples", "100"])  # fmt: skip
    found, losses = {}, []
    for module in set(METHODS.values()):  # the plain forms inherit it
        module.forward = recording(module.forward, losses)
    for case in step.CASES:
        here, there = multiprocessing.Pipe()
        for number in (*range(3), None):
            here.send(number)
        step.form(there, flags, case, name)
        found[case] = losses[:]
        losses.clear()
    return found


def recording(forward, losses):
    def recorded(self, *args):
        loss, stats = forward(self, *args)
        losses.append(loss.item())
        return loss, stats

    return recorded


@pytest.fixture(scope="module")
def all_forms():
    with ProcessPoolExecutor(2, forkserver(), max_tasks_per_child=1) as pool:
        return list(pool.map(three_losses, step.FORMS))


@pytest.mark.parametrize("case", step.CASES)
def test_step__all_forms_compute_the_same(all_forms, case):
    """In fp32 they differ by rounding alone, or the comparison would mean nothing. Watching changes nothing."""
    plain, default, watched = (form[case] for form in all_forms)
    assert watched == default
    assert len(plain) == len(default) == 3 and plain[0] != plain[2]
    for found, wanted, rounding in zip(default, plain, (1e-5, 2e-3, 2e-2), strict=True):  # each step magnifies it
        assert found == pytest.approx(wanted, rel=rounding)


def test_step__bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        step.main(["--rounds", "0"])
    assert "--rounds 0" in capsys.readouterr().err.splitlines()[-1]
