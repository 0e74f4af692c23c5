"""Run the code that torch.compile generates for a GPU on a machine without one, with kernels that do nothing.

For CPU tensors, Inductor generates the code that it would for a GPU: Triton kernels and the Python that launches them.
Only that Python runs. All compiled kernels, Inductor's and ours, are replaced by a Python function that does nothing.
So are matrix products and flash attention, forward and backward, but PyTorch's Python operators around them stay.
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
    """Import the operators, registered so that torch.compile can look into them (visible) or not. Call it once,
    first."""
    assert "minimind.kernels.rms_norm" not in sys.modules, "imported too early"
    with mock.patch.object(triton_support, "seen_by_compiler", lambda: visible):
        importlib.import_module("minimind.modeling")


@dataclass
class LaunchCounts:
    """launches: all launches of our kernels since the count was reset. by_operators: those that an operator made
    instead of generated code. sources: name and source of every kernel that Inductor gave to Triton."""

    launches: int = 0
    by_operators: int = 0
    sources: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def stubbed(arch: int) -> Iterator[LaunchCounts]:
    """A context in which torch.compile and our operators work as if on an `arch` GPU."""
    import torch._inductor.config as settings
    from torch._dynamo.device_interface import CpuInterface
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.select_algorithm import extern_kernels
    from torch.nn.attention.varlen import varlen_attn
    from triton.runtime.jit import JITFunction

    from minimind.ops import attention, varlen

    counts = LaunchCounts()

    def make_kernel(jit: Any, key: Any, signature: Any, device: int, *_: Any) -> _Kernel:
        kernel = jit.device_caches[device][0][key] = _Kernel(counts)
        return kernel

    def make_launcher(_: Any, name: str, source: str, device_str: str = "cuda") -> _Launcher:
        counts.sources.append((name, source))
        return _Launcher(counts, ours="custom_kernel=True" in source)

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
        yield counts


class _Kernel:
    """A compiled kernel that an operator launches."""

    function = packed_metadata = None

    def __init__(self, counts: LaunchCounts) -> None:
        self.counts = counts

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None:
        self.counts.launches += 1
        self.counts.by_operators += 1


class _Launcher:
    """A compiled kernel that Inductor's code launches. As on a GPU, its method calls another function."""

    def __init__(self, counts: LaunchCounts, ours: bool) -> None:
        self.counts, self.ours = counts, ours

    def run(self, *arguments: Any, stream: int) -> None:
        self._launch(*arguments, stream=stream)

    def _launch(self, *_: Any, stream: int) -> None:
        self.counts.launches += self.ours


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    nothing = torch.empty(0)
    sums = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), sums, nothing, nothing, nothing


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def requested_compilations(counts: LaunchCounts, arch: int, dtype: str) -> list[Compilation]:
    """The compilations of our kernels that the generated code requests."""
    from torch._inductor.codecache import PyCodeCache

    compilations = []
    for name, source in counts.sources:
        if "custom_kernel=True" not in source:
            continue
        kernel = getattr(PyCodeCache.load(source), name)
        (config,), meta = kernel.configs, kernel.triton_meta
        function = kernel.fn.__name__  # the name of our kernel, whose source Inductor copied
        compilations.append(
            Compilation(
                name, dtype, arch, _home(function), function,
                meta["signature"], meta["constants"], meta["configs"][0], config.num_warps, config.num_stages,
            )
        )  # fmt: skip
    return compilations


def _home(kernel: str) -> str:
    """The module that defines this kernel."""
    modules = [m for name, m in sys.modules.items() if name.startswith("minimind.kernels.") and hasattr(m, kernel)]
    return str(getattr(modules[0], kernel).module)
