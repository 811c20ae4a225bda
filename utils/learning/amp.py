"""Mixed precision: the dtype of the encoders. Losses and logits are always float32."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def resolve(flag: str, device: torch.device) -> str:
    """`auto` -> bf16 on devices with native bf16, else fp16 on CUDA (with a loss scaler), else fp32."""
    if flag == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16: needs a CUDA device and its loss scaler, not {device.type}; pass --amp auto")
    if flag != "auto":
        return flag
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_computes_bf16() else "fp32"


def cpu_computes_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # not yet in torch 2.9
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of every encoder forward."""
    return torch.autocast(device.type, DTYPES[amp], enabled=DTYPES[amp] is not None)


def scaler(amp: str) -> torch.amp.GradScaler:
    """The loss scaler of fp16; it changes nothing for the other dtypes."""
    return torch.amp.GradScaler("cuda", enabled=amp == "fp16")
