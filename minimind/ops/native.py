"""Loads the native operators (csrc/) at first use. `python -m minimind.ops` prints which were built.

native_build.py puts _native_cpu.so and _native_cuda.so into the package, and _native_build.json, which says why one of
them is missing. Loading them registers the operators of torch.ops.minimind.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minimind.ops.native_build import REPORT, ROOT, library_name, source_hash

PACKAGE = Path(__file__).parents[1]
_COST = "decoding runs in plain PyTorch, several times slower"


@dataclass(frozen=True)
class BuildInfo:
    """Compilers and targets of the libraries. missing: {"cpu" or "cuda": why it cannot be used}."""

    compiler: str
    cpu_kernels: tuple[str, ...]  # those that this processor runs, best first
    cpu_kernels_in_use: str
    threads: int
    cpu_kernels_refused: str  # why the system does not let kernels run that the processor has, or ""
    cuda_version: str
    cuda_architectures: tuple[int, ...]
    missing: dict[str, str]

    def summary(self, device: torch.device) -> str:
        """The build for `device` in one line."""
        if device.type == "cuda":
            return f"CUDA {self.cuda_version}, {_names(self.cuda_architectures)}"
        return f"{self.cpu_kernels_in_use} on {self.threads} threads, {self.compiler}"


@functools.cache
def why_not(device: torch.device) -> str | None:
    """None if operators on `device` run natively; else one line: what is missing, what it costs and what to do."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no native operators for {device.type}; {_COST}"
    reason = load().missing.get("cpu") or (load().missing.get("cuda") if device.type == "cuda" else None)
    if reason is None and device.type == "cuda":
        reason = _why_no_kernel(torch.cuda.get_device_capability(device))
    return None if reason is None else f"{reason}; {_COST}"


def report() -> str:
    """One line for C++ and one for CUDA: what was built, and why it is not used."""
    info, cpu, cuda = build_info(), None, None
    if info.compiler:
        kernels = ", ".join(info.cpu_kernels)
        used = f"{info.cpu_kernels_in_use} of {kernels}"
        cpu = "; ".join(filter(None, (info.compiler, used, info.cpu_kernels_refused, f"{info.threads} threads")))
    if _library("cuda").exists():
        version, architectures = _cuda_info()
        cuda = f"CUDA {version}; {_names(architectures)}"
    lines = []
    for name, part, built in (("C++", "cpu", cpu), ("CUDA", "cuda", cuda)):
        missing = info.missing.get(part)
        lines.append(f"{name}: " + "; not used: ".join(filter(None, (built, missing))))
    return "\n".join(lines)


def build_info() -> BuildInfo:
    """The build, with torch's current number of threads."""
    info = load()
    if "cpu" in info.missing:
        return info
    return _read_info(info.cuda_version, info.cuda_architectures, info.missing)


@functools.cache
def load() -> BuildInfo:
    """Load the libraries that work here, once."""
    missing = {part: reason for part in ("cpu", "cuda") if (reason := _why_not_loadable(part)) is not None}
    if "cpu" in missing:
        return BuildInfo("", (), "", 0, "", "", (), missing)
    torch.ops.load_library(str(_library("cpu")))
    _register_fakes()
    if "cuda" in missing:
        return _read_info("", (), missing)
    torch.ops.load_library(str(_library("cuda")))
    return _read_info(*_cuda_info(), missing)


def _library(part: str) -> Path:
    return PACKAGE / library_name(part)


def _why_not_loadable(part: str) -> str | None:
    if part == "cuda" and not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU"
    name = "the C++" if part == "cpu" else "the CUDA"
    if not (PACKAGE / REPORT).exists():
        return f"{name} operators are not built: `pip install -e .` in the repository does it"
    entry = _report(part)
    if entry["missing"] is not None or not _library(part).exists():
        return f"{name} operators are not built: {entry['missing'] or 'the file is gone'}"
    if (ROOT / "csrc").is_dir() and entry["sources"] != source_hash(ROOT, part):
        return f"{name} operators are older than csrc/; `python minimind/ops/native_build.py` rebuilds them"
    return _why_no_driver(entry["version"] or "0") if part == "cuda" else None


def _report(part: str) -> dict[str, str | None]:
    return json.loads((PACKAGE / REPORT).read_text(encoding="utf-8"))[part]


def _read_info(version: str, architectures: tuple[int, ...], missing: dict[str, str]) -> BuildInfo:
    function = ctypes.CDLL(str(_library("cpu"))).minimind_build_info
    function.restype = ctypes.c_char_p
    compiler, kernels, in_use, threads, refused = function().decode().split("|")
    names = tuple(kernels.split())
    return BuildInfo(compiler, names, in_use, int(threads), refused, version, architectures, missing)


def _cuda_info() -> tuple[str, tuple[int, ...]]:
    """(CUDA version, architectures), from the string in csrc/cuda/build_info.cpp. It is read from the file, since the
    library cannot be loaded without a GPU."""
    match = re.search(rb"\0(\d[\d.]*)\|(\d+(?: \d+)*)\0", _library("cuda").read_bytes())
    assert match is not None
    return match[1].decode(), tuple(map(int, match[2].split()))


def _names(architectures: tuple[int, ...]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)


def _why_no_driver(built_with: str) -> str | None:
    """The library contains its CUDA runtime, which does not work with a driver of an older major version."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))  # 1000 major + 10 minor
    if version.value // 1000 >= int(built_with.split(".")[0]):
        return None
    return f"the CUDA operators were built with CUDA {built_with}, the driver supports CUDA {version.value // 1000}"


def _why_no_kernel(capability: tuple[int, int]) -> str | None:
    """Machine code also runs on later minor versions of its architecture; the newest is included as PTX too."""
    built = load().cuda_architectures
    major, minor = capability
    if any(major == a // 10 and minor >= a % 10 for a in built) or 10 * major + minor >= max(built):
        return None
    return f"the CUDA operators were built for {_names(built)}, this GPU is sm_{major}{minor}"


def _register_fakes() -> None:
    """Register the shapes and dtypes of results, for torch.compile and meta tensors."""

    @torch.library.register_fake("minimind::rope_append_kv")
    def _(qkv: Tensor, cos, sin, positions, slots, key_cache: Tensor, value_cache, heads: int, *_) -> Tensor:
        return qkv.new_empty(qkv.shape[0], heads, key_cache.shape[3])

    @torch.library.register_fake("minimind::decode_attention")
    def _(q: Tensor, *_) -> Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("minimind::sample")
    def _(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
        return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(logits.shape[0])

    @torch.library.register_fake("minimind::prefill_step")
    def _(tokens: Tensor, last: Tensor, p, s, b, lengths, cos, sin, weights: list[Tensor], *_) -> Tensor:
        return tokens.new_empty(last.shape[0], weights[0].shape[0], dtype=torch.float32)

    @torch.library.register_fake("minimind::decode_step")
    def _(tokens: Tensor, positions, slots, block_table, lengths, cos, sin, weights: list[Tensor], *_) -> Tensor:
        return tokens.new_empty(tokens.shape[0], weights[0].shape[0], dtype=torch.float32)
