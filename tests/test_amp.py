"""Which dtype `--amp` means on which device."""

from pathlib import Path

import pytest
import torch

from utils.learning import amp

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("native, dtype", [(True, "bf16"), (False, "fp32")])
def test_resolve__auto_on_a_cpu_takes_bf16_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setattr(amp, "cpu_computes_bf16", lambda: native)
    assert amp.resolve("auto", CPU) == dtype


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_cpu_computes_bf16__is_what_the_kernel_says():
    assert amp.cpu_computes_bf16() == ("avx512_bf16" in Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize("native, dtype", [(True, "bf16"), (False, "fp16")])
def test_resolve__auto_on_cuda_takes_fp16_where_bf16_is_emulated(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert amp.resolve("auto", CUDA) == dtype


def test_resolve__fp16_without_cuda_is_refused():
    with pytest.raises(ValueError, match="--amp fp16: needs a CUDA device"):
        amp.resolve("fp16", CPU)


@pytest.mark.parametrize("dtype, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast__computes_in_that_dtype(dtype, expected):
    with amp.autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
