"""Intel AMX in tests: the processor's own, or an emulator of its instructions (amx_emulator.cpp)."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

from minimind.ops import native
from minimind.ops.native_build import cxx
from tests.csrc import forms

EMULATOR = Path(__file__).parent / "amx_emulator.cpp"
HERE = "amx" in native.build_info().cpu_kernels  # permission is asked for once a process, which this call has done


@functools.cache
def why_not() -> str | None:
    """Why the kernels of AMX cannot run here, not even emulated; None if they can."""
    if HERE:
        return None
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "AMX's instructions are emulated on x86-64 with Linux only"
    if "avx512_bf16" not in native.build_info().cpu_kernels:
        return "kernels of AMX use AVX-512 with bfloat16 too, which this processor or build does not have"
    compiler = cxx()
    if compiler is None:
        return "no C++ compiler"
    source = 'int main() { asm volatile("tilerelease" ::); }'
    command = [compiler, *forms.flags(forms.X86)["amx"], "-x", "c++", "-c", "-", "-o", os.devnull]
    known = subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0
    return None if known else "this compiler or its assembler does not know AMX"


def build_emulator(folder: Path) -> Path:
    """The emulator as a library in `folder`."""
    library = folder / "amx_emulator.so"
    options = ["-std=c++17", "-O3", "-mfma", "-mavx2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([str(cxx()), *options, str(EMULATOR), "-o", str(library)], check=True)
    return library


def environment(folder: Path) -> dict[str, str]:
    """Variables of a child process in which the native operators take their kernels of AMX."""
    emulated = {} if HERE else {"LD_PRELOAD": str(build_emulator(folder))}
    return {**emulated, "MINIMIND_CPU_KERNELS": "amx"}
