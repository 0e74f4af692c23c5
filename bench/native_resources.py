"""Registers, spills, shared memory and occupancy of the kernels of csrc/cuda, in nvcc's own words. No GPU is asked."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton import knobs

from bench.compiling import Resources
from bench.occupancy import occupancy

SOURCES = Path(__file__).parents[1] / "csrc/cuda"
WARP, TILE_KEYS, STAGES, HEADS = 32, 16, 2, 8  # of csrc/cuda/attention_tensor_core.cuh
ATTENTION_WARPS = 4
VOCABULARY = 6400
BYTES = {"float": 4, "bf16": 2, "fp16": 2, "fp8": 1}
NAMES = {"float": "fp32"}


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    missing = [program for program in ("nvcc", "c++filt") if shutil.which(program) is None]
    return f"csrc/cuda is left out: {' and '.join(missing)} not on PATH" if missing else None


def measure(archs: Sequence[int], jobs: int) -> list[Resources]:
    """Every kernel of csrc/cuda for every architecture. ValueError with nvcc's words if a file does not compile."""
    work = [(file, arch) for arch in archs for file in sorted(SOURCES.glob("*.cu"))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda job: _measure(job[0], job[1], Path(folder)), work))
    return sorted(itertools.chain.from_iterable(found), key=lambda row: (row.arch, row.kernel, row.case))


def launch_of(kernel: str, arguments: Sequence[str]) -> tuple[int, int]:
    """(warps of a block, bytes of dynamic shared memory) as the C++ launches it; sampling for a vocabulary of 6400."""
    if kernel == "tensor_core_kernel":
        cache, dim = BYTES[arguments[1]], int(arguments[2])
        ring = ATTENTION_WARPS * STAGES * 2 * TILE_KEYS * dim * cache
        return ATTENTION_WARPS, max(ring, _warp_results(dim))
    if kernel == "cuda_core_kernel":
        return ATTENTION_WARPS, _warp_results(64 * int(arguments[1]))
    if kernel == "sample_kernel":
        return 16, 4 * (VOCABULARY + VOCABULARY // WARP)
    return {"merge_splits_kernel": 8, "rope_append_kv_kernel": 4}[kernel], 0


def _warp_results(dim: int) -> int:
    return 4 * ATTENTION_WARPS * HEADS * (2 + dim + 4)


def _compile(file: Path, arch: int, folder: Path) -> tuple[str, str]:
    """(ptxas's report, the machine code), both with readable names."""
    cubin = folder / f"{file.stem}-{arch}.cubin"
    options = ("-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin")
    command = ("nvcc", *options, str(file), "-o", str(cubin))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        first = result.stderr.strip().splitlines()[0]
        raise ValueError(f"{file.name} does not compile for sm_{arch}: {first}")
    return _readable(result.stderr), _readable(_run(knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)))


def _readable(text: str) -> str:
    return _run("c++filt", text=text)


def _run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _measure(file: Path, arch: int, folder: Path) -> list[Resources]:
    report, machine_code = _compile(file, arch, folder)
    code = dict(re.findall(r"Function : (\S.*?)\n(.*?)(?=Function : |\Z)", machine_code, re.DOTALL))
    entry = re.compile(
        r"Compiling entry function '(?P<name>[^']+)' for.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    return [_row(file, arch, found, code[found["name"]]) for found in entry.finditer(report)]


def _row(file: Path, arch: int, found: re.Match[str], code: str) -> Resources:
    name = re.sub(r"minimind::(\w+::)*", "", found["name"].removeprefix("void "))
    kernel, arguments = re.match(r"(\w+)(?:<(.*)>)?", name).groups(default="")  # type: ignore[union-attr]
    parts = [part.strip() for part in arguments.split(",")] if arguments else []
    static = re.search(r"(\d+) bytes smem", found["rest"])
    warps, dynamic = launch_of(kernel, parts)
    registers, shared = int(found["registers"]), dynamic + (int(static[1]) if static else 0)
    fits = occupancy(arch, warps, registers, shared)
    types = [NAMES.get(part, part) for part in parts if part in BYTES]
    matrices = kernel == "tensor_core_kernel"
    return Resources(
        ", ".join(NAMES.get(part, part) for part in parts), types[0] if types else "", arch, f"csrc/cuda/{file.name}",
        kernel, warps, STAGES if matrices else 1, registers, int(found["stores"]) + int(found["loads"]),
        int(found["stack"]), shared, fits.programs, fits.share, fits.bound, matrices,
        *(len(re.findall(rf"\b{instruction}\b", code)) for instruction in ("HMMA", "HGMMA", "FFMA")),
    )  # fmt: skip
