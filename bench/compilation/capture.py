"""The launches that the kernels' public functions make, caught instead of run.

Every op is called forward and backward on small CPU tensors of the models' own widths, for an architecture that need
not be here. What it would launch goes through Triton's own argument binding up to the point where Triton would
compile; that compilation is written down. Results of the ops are whatever memory held.
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

# A100, RTX 3090's chip, RTX 4090, H100, RTX 5090
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 120: 170}


@dataclass(frozen=True)
class Compilation:
    """What Triton is asked to compile: the signature, constants and attributes are those of triton.compile."""

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
        what = (self.signature, self.constants, self.attributes, self.num_warps, self.num_stages)
        return f"{self.arch} {self.module}.{self.kernel} {what}"


class _Card:
    """A driver that knows its architecture and nothing else: the device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def capture(cases: dict[str, Callable[[], None]], arch: int, dtype: str) -> list[Compilation]:
    """The different compilations that running `cases` on an `arch` card would need, in the order they come."""
    if triton_support.interpreting():
        raise ValueError("TRITON_INTERPRET=1: interpreted kernels are never compiled; unset it")
    seen: dict[str, Compilation] = {}

    def remember(case: str, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        compilation = Compilation(
            case, dtype, arch, fn.module, fn.name,
            compile["signature"], compile["constants"], compile["configs"][0],
            compile["num_warps"], compile["num_stages"],
        )  # fmt: skip
        seen.setdefault(compilation.key, compilation)
        return True  # as if it had been compiled

    with pretending(arch, _bind):
        for case, run in cases.items():
            with mock.patch.object(knobs.runtime, "jit_cache_hook", functools.partial(remember, case)):
                run()
    return list(seen.values())


def _bind(kernel, grid, args, constants, num_warps, num_stages) -> None:
    kernel.warmup(*args, grid=grid, **constants, num_warps=num_warps, num_stages=num_stages)


@contextlib.contextmanager
def pretending(arch: int, run: Callable[..., None]) -> Iterator[None]:
    """CPU tensors look like those of an `arch` card to the modules that are imported, and `run` gets the launches."""
    answers: dict[str, Callable[..., Any]] = {
        "why_no_triton": lambda device: None,
        "on_host": lambda tensor: False,  # as on a card; and what the ops return means nothing here
        "architecture": lambda device: arch,
        "multiprocessors": lambda device: MULTIPROCESSORS[arch],
        "_run": run,
    }
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("minimind.")]
    driver.set_active(_Card(arch))  # for good: this process launches nothing
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            original = getattr(triton_support, name)
            for module in modules:  # by whatever name they imported it
                if getattr(module, name, None) is original:
                    stack.enter_context(mock.patch.object(module, name, answer))
        yield
