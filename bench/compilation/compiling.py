"""One compilation by Triton and ptxas, and what its machine code needs. No GPU is asked."""

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
    """Of one program: registers of a thread, bytes of stack of a thread and of shared memory; spilled bytes are
    stores and loads together, as ptxas counts them. Instructions are counted for kernels with a matrix product."""

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
        """Why this must not ship; empty if it may."""
        found = []
        if self.spilled or self.stack:
            found.append(f"spills {self.spilled} bytes, stack of {self.stack}")
        limit = CARDS[self.arch].shared_per_program
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, and the card gives {limit}")
        elif not self.programs:
            found.append("not one program fits a multiprocessor")
        if self.multiplies_matrices and self.dtype != "fp32" and not self.hmma + self.hgmma:
            found.append("multiplies matrices without a tensor core")
        return found


def compile_one(job: Compilation) -> Resources | str:
    """What `job` needs, or the first line of the error that stopped it."""
    try:
        return _measure(job)
    except Exception as problem:  # whatever the compiler throws is a finding, not the end of the run
        return f"{type(problem).__name__}: {(str(problem).strip() or 'no message').splitlines()[0]}"


def _measure(job: Compilation) -> Resources:
    compiled = _compile(job)
    with _cubin(compiled.asm["cubin"]) as path:
        usage = _tool("--dump-resource-usage", path)
        matrices = "tt.dot" in compiled.asm["ttir"]
        machine_code = _tool("--dump-sass", path) if matrices else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no resources: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
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
    """Of a kernel with a stack: ptxas's own words, from compiling once more with its log shown."""
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
