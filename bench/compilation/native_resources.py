"""Registers, spills, shared memory and occupancy of the kernels of csrc/cuda, as nvcc reports them. No GPU is
needed."""

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

from bench.compilation.compiling import Resources
from bench.compilation.occupancy import occupancy

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
WARP, TILE_KEYS, STAGES, HEADS = 32, 16, 2, 8  # of csrc/cuda/attention_tensor_core.cuh
ATTENTION_WARPS, MAX_SPLITS = 4, 128
MATVEC_WARPS, MATVEC_SHARED, COLUMNS = (4, 96 * 1024, 2432)  # of csrc/cuda/matvec.cuh; the longest rows of the presets
SAMPLE_WARPS, EXCHANGE, SAMPLE_SHARED = 16, 896, 96 * 1024  # of csrc/cuda/sample.cuh
VOCABULARY = 6400
CACHES = ("float", "bf16", "fp16", "fp8")
BYTES = {"float": 4, "bf16": 2, "fp16": 2, "fp8": 1, "q8": 1}
NAMES = {"float": "fp32"}
VARIANTS = (  # every kernel that uses shared memory, by its name in C++
    *(
        ("tensor_core_kernel", (query, cache, str(dim)))
        for query in ("bf16", "fp16")
        for cache in (query, "fp8")
        for dim in (32, 64, 80, 96, 128)
    ),
    *(("cuda_core_kernel", (cache, chunks)) for cache in CACHES for chunks in "124"),
    *(("matvec_kernel", (weight, rows)) for weight in ("float", "bf16", "fp16", "q8") for rows in "1248"),
    ("sample_kernel", ()),
)


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    missing = [program for program in ("nvcc", "c++filt") if shutil.which(program) is None]
    return f"the kernels of csrc/cuda are not compiled: {' and '.join(missing)} not on PATH" if missing else None


def compile_all(archs: Sequence[int], jobs: int) -> list[Resources]:
    """Every kernel of csrc/cuda for every architecture. ValueError with nvcc's message if a file does not compile."""
    work = [(file, arch) for arch in archs for file in sorted(SOURCES.glob("*.cu"))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda job: _resources(job[0], job[1], Path(folder)), work))
    return sorted(itertools.chain.from_iterable(rows), key=lambda row: (row.arch, row.kernel, row.case))


def launch_of(
    kernel: str, arguments: Sequence[str], vocabulary: int = VOCABULARY, columns: int = COLUMNS
) -> tuple[int, int]:
    """(warps of a block, bytes of shared memory) of the launch in C++. vocabulary: for sampling; columns: of a matrix
    product."""
    if kernel == "tensor_core_kernel":
        cache, dim = BYTES[arguments[1]], int(arguments[2])
        ring = ATTENTION_WARPS * STAGES * 2 * TILE_KEYS * dim * cache
        return ATTENTION_WARPS, _attention(ring, dim, BYTES[arguments[0]])
    if kernel == "cuda_core_kernel":
        return ATTENTION_WARPS, _attention(0, 64 * int(arguments[1]), 4)
    if kernel == "sample_kernel":
        row = 4 * (vocabulary + -(-vocabulary // WARP))
        shared = EXCHANGE + row
        return SAMPLE_WARPS, shared if shared <= SAMPLE_SHARED else EXCHANGE
    if kernel == "matvec_kernel":
        chunk, rows = WARP * 16 // BYTES[arguments[0]], int(arguments[1])
        return MATVEC_WARPS, 4 * ((rows + 1) * -(-columns // chunk) * chunk + MATVEC_WARPS * rows)
    return {"rope_append_kv_kernel": 4}[kernel], 0


def _attention(loop: int, dim: int, query_bytes: int) -> int:
    """Bytes of shared memory: of the loop over keys or of the reduction after it, and of the queries."""
    warps = 4 * ATTENTION_WARPS * HEADS * (2 + dim + 4)
    splits = 4 * HEADS * (MAX_SPLITS + 1)
    return max(loop, warps, splits) + HEADS * dim * query_bytes


def _compile(file: Path, arch: int, folder: Path) -> tuple[str, str]:
    """(ptxas's report, the machine code), both with demangled names."""
    cubin = folder / f"{file.stem}-{arch}.cubin"
    options = ("-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin")
    command = ("nvcc", *options, str(file), "-o", str(cubin))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        first = result.stderr.strip().splitlines()[0]
        raise ValueError(f"{file.name} does not compile for sm_{arch}: {first}")
    return _demangle(result.stderr), _demangle(_run(knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)))


def _demangle(text: str) -> str:
    return _run("c++filt", text=text)


def _run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _resources(file: Path, arch: int, folder: Path) -> list[Resources]:
    report, machine_code = _compile(file, arch, folder)
    code = dict(re.findall(r"Function : (\S.*?)\n(.*?)(?=Function : |\Z)", machine_code, re.DOTALL))
    entry = re.compile(
        r"Compiling entry function '(?P<name>[^']+)' for.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    return [_row(file, arch, match, code[match["name"]]) for match in entry.finditer(report)]


def _row(file: Path, arch: int, match: re.Match[str], code: str) -> Resources:
    name = re.sub(r"minimind::(\w+::)*", "", match["name"].removeprefix("void "))
    kernel, arguments = re.match(r"(\w+)(?:<(.*)>)?", name).groups(default="")  # type: ignore[union-attr]
    parts = [part.strip() for part in arguments.split(",")] if arguments else []
    static = re.search(r"(\d+) bytes smem", match["rest"])
    warps, dynamic = launch_of(kernel, parts)
    registers, shared = int(match["registers"]), dynamic + (int(static[1]) if static else 0)
    fits = occupancy(arch, warps, registers, shared)
    types = [NAMES.get(part, part) for part in parts if part in BYTES]
    matrices = kernel == "tensor_core_kernel"
    return Resources(
        ", ".join(NAMES.get(part, part) for part in parts), types[0] if types else "", arch, f"csrc/cuda/{file.name}",
        kernel, warps, STAGES if matrices else 1, registers, int(match["stores"]) + int(match["loads"]),
        int(match["stack"]), shared, fits.programs, fits.share, fits.bound, matrices,
        *(len(re.findall(rf"\b{instruction}\b", code)) for instruction in ("HMMA", "HGMMA", "FFMA")),
    )  # fmt: skip
