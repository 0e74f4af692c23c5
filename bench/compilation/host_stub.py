"""A machine without a GPU on which what torch.compile generates for a card runs, and its kernels do nothing.

Tensors are the CPU's. Inductor generates for them the code it would for a card, Triton kernels and Python that launches
them, and that Python is what runs. Replaced are the ends of it: a compiled kernel, Inductor's own and ours, is a Python
function that does nothing; so are matrix products and both directions of flash attention, whose Python operators stay.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.compilation.capture import Compilation, pretending
from minimind.kernels import triton_support


def import_ops(visible: bool) -> None:
    """Import the operators, registered so that torch.compile looks into them, or not. Once in a process."""
    assert "minimind.kernels.rms_norm" not in sys.modules, "imported too early"
    with mock.patch.object(triton_support, "seen_by_compiler", lambda: visible):
        importlib.import_module("minimind.modeling")


@dataclass
class LaunchCounts:
    """launches: of our kernels since it was set to 0, by whatever way; by_operators: those of them that an operator
    made, not generated code. sources: name and source of every kernel that Inductor gave to Triton."""

    launches: int = 0
    by_operators: int = 0
    sources: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def stubbed(arch: int) -> Iterator[LaunchCounts]:
    """Inside, torch.compile and our operators work as on an `arch` card, of which there is none."""
    import torch._inductor.config as settings
    from torch._dynamo.device_interface import CpuInterface
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.select_algorithm import extern_kernels
    from torch.nn.attention.varlen import varlen_attn
    from triton.runtime.jit import JITFunction

    from minimind.ops import attention, varlen

    found = LaunchCounts()

    def make_kernel(jit: Any, key: Any, signature: Any, device: int, *_: Any) -> _Kernel:
        kernel = jit.device_caches[device][0][key] = _Kernel(found)
        return kernel

    def make_launcher(_: Any, name: str, source: str, device_str: str = "cuda") -> _Launcher:
        found.sources.append((name, source))
        return _Launcher(found, ours="custom_kernel=True" in source)

    options = {"cpu_backend": "triton", "compile_threads": 1, "force_disable_caches": True}
    patches = [
        settings.patch(options),
        mock.patch.object(CpuInterface, "raise_if_triton_unavailable", lambda device=None: None),
        mock.patch.object(AsyncCompile, "triton", make_launcher),
        mock.patch.object(JITFunction, "_do_compile", make_kernel),
        mock.patch.object(extern_kernels, "mm", lambda a, b, *, out: out),
        mock.patch.object(varlen, "varlen_attn", varlen_attn),
        mock.patch.object(varlen, "TAKES_FEWER_HEADS", "enable_gqa" in inspect.signature(varlen_attn).parameters),
        mock.patch.object(
            attention, "_document_layout", lambda device, dtype, cu, longest, fused: attention.VarlenLayout(cu, longest)
        ),
        pretending(arch, triton_support._launch),
    ]
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _attention, "CPU")
    library.impl("_flash_attention_backward", _attention_backward, "CPU")
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield found


class _Kernel:
    """What Triton launches for an operator that torch.compile does not look into."""

    function = packed_metadata = None

    def __init__(self, found: LaunchCounts) -> None:
        self.found = found

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None:
        self.found.launches += 1
        self.found.by_operators += 1


class _Launcher:
    """What Inductor launches. As on a card there is a function behind the method."""

    def __init__(self, found: LaunchCounts, ours: bool) -> None:
        self.found, self.ours = found, ours

    def run(self, *arguments: Any, stream: int) -> None:
        self._launch(*arguments, stream=stream)

    def _launch(self, *_: Any, stream: int) -> None:
        self.found.launches += self.ours


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    nothing = torch.empty(0)
    sums = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), sums, nothing, nothing, nothing


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def compilations(found: LaunchCounts, arch: int, dtype: str) -> list[Compilation]:
    """What Triton is asked to compile of our kernels by the generated code."""
    from torch._inductor.codecache import PyCodeCache

    asked = []
    for name, source in found.sources:
        if "custom_kernel=True" not in source:
            continue
        kernel = getattr(PyCodeCache.load(source), name)
        (config,), meta = kernel.configs, kernel.triton_meta
        function = kernel.fn.__name__  # of the same source as ours
        asked.append(
            Compilation(
                name, dtype, arch, _home(function), function,
                meta["signature"], meta["constants"], meta["configs"][0], config.num_warps, config.num_stages,
            )
        )  # fmt: skip
    return asked


def _home(kernel: str) -> str:
    """The module that defines it."""
    modules = [m for name, m in sys.modules.items() if name.startswith("minimind.kernels.") and hasattr(m, kernel)]
    return str(getattr(modules[0], kernel).module)
