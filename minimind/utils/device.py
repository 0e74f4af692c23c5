"""Choose the device and the precision."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The precision policy: float32 master weights always, matrix products in `compute_dtype`; with float16 the loss is
    scaled (training.optim.LossScaler)."""

    compute_dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.compute_dtype)

    def __str__(self) -> str:
        scaling = ", dynamic loss scaling" if self.compute_dtype == torch.float16 else ""
        return f"fp32 master weights, {self.name} compute{scaling} ({self.reason})"


def choose_device(requested: str) -> torch.device:
    """The device for auto, cpu, cuda, cuda:N or mps. "auto" is CUDA if there is a GPU, else the CPU. Raises ValueError
    if the device does not exist."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {requested}: choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {requested}: PyTorch sees no Apple GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {requested}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu"
        )
    return device


def choose_precision(device: torch.device, requested: PrecisionName = "auto") -> Precision:
    """The precision to compute in: "auto" is bf16 if the device has instructions for it, else fp16 on a GPU with tensor
    cores (from compute capability 7.0), else fp32."""
    if requested == "fp32":
        return Precision(torch.float32, "set by --precision")
    if requested == "fp16":
        slow = "; slow on a CPU" if device.type == "cpu" else ""
        return Precision(torch.float16, f"set by --precision{slow}")
    native, reason = _native_bf16(device)
    if requested == "bf16":
        return Precision(torch.bfloat16, "set by --precision" + ("" if native else f"; slow, {reason}"))
    if native:
        return Precision(torch.bfloat16, reason)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return Precision(torch.float16, f"{reason}, but has those for fp16")
    return Precision(torch.float32, reason)


def keep_sums_float32() -> None:
    """Keep cuBLAS from adding partial sums in 16 bits, as it may for long sums (a weight's gradient over 32768
    tokens)."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def describe_device(device: torch.device) -> str:
    """The name of the device, with memory (GPU) or threads and instructions (CPU)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "mps":
        return f"Apple GPU of {platform.processor() or platform.machine()}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    """The system's name, such as 'AMD Ryzen 7 7700X 8-Core Processor', or 'CPU' if it has none. Virtual machines may
    hide the number, 'AMD EPYC'; then family and model follow, which tell the generations apart."""
    parts = [line.partition(":") for line in _cpuinfo()]
    values = {name.strip(): value.strip() for name, _, value in reversed(parts)}
    name = values.get("model name") or platform.processor() or "CPU"
    if any(c.isdigit() for c in name) or not {"cpu family", "model"} <= values.keys():
        return name
    return f"{name} family {values['cpu family']} model {values['model']}"


def _cpuinfo() -> list[str]:
    """The lines of Linux's /proc/cpuinfo; none elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"sm_{major}{minor} {'has' if major >= 8 else 'lacks'} bf16 tensor cores"
    if device.type == "cpu":
        name = _bf16_instructions()
        if name is None:
            return False, "PyTorch reports no bf16 instructions on this CPU"
        if _onednn_takes_bf16():
            return True, f"this CPU has {name}"
        kept = "PyTorch's oneDNN does not use them" if _is_arm() else "ONEDNN_MAX_CPU_ISA keeps oneDNN from it"
        return False, f"this CPU has {name}, but {kept}"
    if device.type == "mps":
        return False, "nobody has tried bf16 on mps yet"
    raise ValueError(f"no precision policy for {device}")


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _bf16_instructions() -> str | None:
    """The processor's instructions for products of bf16 matrices; None without any."""
    if _is_arm():
        return "ARM's bf16 instructions" if _arm_has_bf16() else None
    for probe, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return name
    return None


def _arm_has_bf16() -> bool:
    """As PyTorch says, or where an older one does not say, as Linux lists it."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if "bf16" in capabilities:
        return bool(capabilities["bf16"])
    return any("bf16" in line.split() for line in _cpuinfo() if line.startswith("Features"))


def _onednn_takes_bf16() -> bool:
    """Whether oneDNN, which computes matrix products, may use the instructions. ONEDNN_MAX_CPU_ISA can forbid it, and
    PyTorch for ARM may come without oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported() if supported is not None else not _is_arm()
