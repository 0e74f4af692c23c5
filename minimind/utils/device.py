"""Which device, and the one explicit precision policy."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

PrecisionName = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Precision:
    """Weights are float32 masters always; `compute_dtype` is what matrix products run in."""

    compute_dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        name = "bf16" if self.compute_dtype == torch.bfloat16 else "fp32"
        return f"fp32 master weights, {name} compute ({self.reason})"


def choose_device(requested: str) -> torch.device:
    """'auto' takes CUDA when there is one, else the CPU. A device asked for by name that is not there raises."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {requested}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {requested}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu"
        )
    return device


def choose_precision(device: torch.device, requested: PrecisionName = "auto") -> Precision:
    if requested == "fp32":
        return Precision(torch.float32, "asked for by --precision")
    native, reason = _native_bf16(device)
    if requested == "bf16":
        return Precision(torch.bfloat16, "asked for by --precision" + ("" if native else f"; slow, {reason}"))
    return Precision(torch.bfloat16 if native else torch.float32, reason)


def keep_sums_float32() -> None:
    """cuBLAS may cut a long sum, as a weight's gradient over 32768 tokens, and add its parts in 16 bits: not here."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    """As the system calls it: 'AMD Ryzen 7 7700X 8-Core Processor', or 'CPU' where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or "CPU"


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"sm_{major}{minor} {'has' if major >= 8 else 'lacks'} bf16 tensor cores"
    if device.type == "cpu":
        for probe, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
            supported = getattr(torch.cpu, probe, None)
            if supported is not None and supported():
                if _onednn_takes_bf16():
                    return True, f"this CPU has {name}"
                return False, f"this CPU has {name}, but ONEDNN_MAX_CPU_ISA keeps oneDNN from it"
        return False, "PyTorch reports no bf16 instructions on this CPU"
    raise ValueError(f"no precision policy for {device}")


def _onednn_takes_bf16() -> bool:
    """Whether oneDNN, which computes the products, may use the instructions: an environment variable can forbid it."""
    found = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return found is None or found()
