"""csrc/cuda compiled for the CPU under the emulator of tests/csrc/emulator: torch.ops.minimind_emulated."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
NAMESPACE = "minimind_emulated"
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("g++")


def sources() -> list[Path]:
    return [ROOT / "csrc/register.cpp", EMULATOR / "cuda_emulator.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def compile_objects(files: Sequence[Path], folder: Path, *flags: str) -> list[str]:
    """Each of `files` as C++ with MINIMIND_EMULATE, two at a time; the object files."""
    assert COMPILER is not None
    common = (
        COMPILER, "-std=c++17", "-fPIC", "-x", "c++", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-DMINIMIND_EMULATE",
        f'-DMINIMIND_NAMESPACE="{NAMESPACE}"', f"-I{EMULATOR}", f"-I{ROOT / 'csrc/cuda'}", f"-I{TORCH / 'include'}",
        *flags,
    )  # fmt: skip

    def compile_one(file: Path) -> str:
        target = str(folder / f"{file.stem}.o")
        _run(*common, "-c", str(file), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, files))


def build_library(folder: Path, *flags: str) -> Path:
    """The operators as a library for torch.ops.load_library."""
    library = folder / "libminimind_emulated.so"
    objects = compile_objects(sources(), folder, *flags)
    _run(str(COMPILER), "-shared", "-o", str(library), *objects, *flags, f"-L{TORCH / 'lib'}", "-ltorch_cpu")
    return library


def build_program(main: Path, folder: Path, *flags: str) -> Path:
    """A program without torch: `main`, the emulator and the kernels."""
    program = folder / main.stem
    kernels = [ROOT / f"csrc/cuda/decode_attention_{name}.cu" for name in ("bf16", "fp16", "fp32")]
    objects = compile_objects([main, EMULATOR / "cuda_emulator.cpp", *kernels], folder, *flags)
    _run(str(COMPILER), "-o", str(program), *objects, *flags)
    return program


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-4000:]}"
