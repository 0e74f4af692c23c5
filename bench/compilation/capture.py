"""Capture the compilations that calls of the kernels' public functions would need, without launching anything.

The ops are called forward and backward on small CPU tensors, as if on a GPU of any architecture. A launch goes through
Triton's own argument binding up to the point where Triton would compile, and the compilation is recorded. The results
of the ops are undefined.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minimind.kernels import triton_support

# V100, T4, A100, RTX 3090's chip, RTX 4090, H100, RTX 5090
MULTIPROCESSORS = {70: 80, 75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 120: 170}


@dataclass(frozen=True)
class Compilation:
    """A request to Triton's compiler. signature, constants, attributes: as triton.compile takes them."""

    case: str
    dtype: str
    arch: int
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """Equal for compilations that give the same machine code."""
        options = (self.signature, self.constants, self.attributes, self.num_warps, self.num_stages)
        return f"{self.arch} {self.module}.{self.kernel} {options}"


class _Card:
    """A driver that knows only its architecture, which is also the number of its device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def capture(cases: dict[str, Callable[[], None]], arch: int, dtype: str) -> list[Compilation]:
    """The different compilations that running `cases` on an `arch` GPU would need, in order."""
    if triton_support.interpreting():
        raise ValueError("TRITON_INTERPRET=1: interpreted kernels are never compiled; unset it")
    compilations: dict[str, Compilation] = {}

    def remember(case: str, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        compilation = Compilation(
            case, dtype, arch, fn.module, fn.name,
            compile["signature"], compile["constants"], compile["configs"][0],
            compile["num_warps"], compile["num_stages"],
        )  # fmt: skip
        compilations.setdefault(compilation.key, compilation)
        return True  # as if it had been compiled

    with pretending(arch, _bind):
        for case, run in cases.items():
            with mock.patch.object(knobs.runtime, "jit_cache_hook", functools.partial(remember, case)):
                run()
    return list(compilations.values())


def _bind(kernel, grid, args, constants, num_warps, num_stages) -> None:
    kernel.warmup(*args, grid=grid, **constants, num_warps=num_warps, num_stages=num_stages)


@contextlib.contextmanager
def pretending(arch: int, run: Callable[..., None]) -> Iterator[None]:
    """A context in which CPU tensors look like those of an `arch` GPU to all imported modules; `run` gets the
    launches."""
    answers: dict[str, Callable[..., Any]] = {
        "why_no_triton": lambda device: None,
        "on_host": lambda tensor: False,  # as on a GPU; the results of the ops are undefined
        "architecture": lambda device: arch,
        "multiprocessors": lambda device: MULTIPROCESSORS[arch],
        "_run": run,
    }
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("minimind.")]
    driver.set_active(_Card(arch))  # permanently: this process never launches anything
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            original = getattr(triton_support, name)
            for module in modules:
                if getattr(module, name, None) is original:
                    stack.enter_context(mock.patch.object(module, name, answer))
        yield
