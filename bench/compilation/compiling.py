"""Compile a kernel with Triton and ptxas, and read the resources of its machine code. No GPU is needed."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compilation.capture import Compilation
from bench.compilation.occupancy import CARDS, occupancy


@dataclass(frozen=True)
class Resources:
    """The resources of one program: registers and bytes of stack of a thread, bytes of shared memory. spilled: bytes of
    stores and loads together, as ptxas counts them. programs, occupancy, bound: see `Occupancy`. hmma, hgmma, ffma:
    instructions, counted in kernels with a matrix product."""

    case: str
    dtype: str
    arch: int
    module: str
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    stack: int
    shared: int
    programs: int
    occupancy: float
    bound: str
    multiplies_matrices: bool
    hmma: int
    hgmma: int
    ffma: int

    @property
    def problems(self) -> list[str]:
        """The reasons why this kernel must not ship; empty if it may."""
        reasons = []
        if self.spilled or self.stack:
            reasons.append(f"spills {self.spilled} bytes, stack of {self.stack}")
        limit = CARDS[self.arch].shared_per_program
        if self.shared > limit:
            reasons.append(f"needs {self.shared} bytes of shared memory, and the GPU has {limit}")
        elif not self.programs:
            reasons.append("not one program fits a multiprocessor")
        if self.multiplies_matrices and self.dtype != "fp32" and not self.hmma + self.hgmma:
            reasons.append("multiplies matrices without a tensor core")
        return reasons


def compile_one(job: Compilation) -> Resources | str:
    """The resources of `job`, or the first line of the compiler's error."""
    try:
        return _resources(job)
    except Exception as problem:  # a kernel that does not compile is a result, not the end of the run
        return f"{type(problem).__name__}: {(str(problem).strip() or 'no message').splitlines()[0]}"


def _resources(job: Compilation) -> Resources:
    compiled = _compile(job)
    with _cubin(compiled.asm["cubin"]) as path:
        usage = _tool("--dump-resource-usage", path)
        matrices = "tt.dot" in compiled.asm["ttir"]
        machine_code = _tool("--dump-sass", path) if matrices else ""
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump reports no resources: {usage!r}")
    registers, stack = int(match[1]), int(match[2])
    shared = compiled.metadata.shared
    fits = occupancy(job.arch, job.num_warps, registers, shared)
    return Resources(
        job.case, job.dtype, job.arch, job.module, job.kernel, job.num_warps, job.num_stages,
        registers, _spilled(job) if stack else 0, stack, shared, fits.programs, fits.share, fits.bound,
        matrices, *(_count(machine_code, name) for name in ("HMMA", "HGMMA", "FFMA")),
    )  # fmt: skip


def _compile(job: Compilation) -> Any:
    function = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(function, job.signature, job.constants, job.attributes)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def _spilled(job: Compilation) -> int:
    """Bytes of spills, for a kernel with a stack: from ptxas's log of a second compilation."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        _compile(job)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", log.getvalue()))


def _tool(option: str, path: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def _cubin(binary: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        yield file.name


def _count(machine_code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", machine_code))
