"""Triton, where there is one, and the one door through which its kernels are launched.

The kernel files import `triton`, `tl` and `jit` from here, so that they can be read, and their references used, where
Triton is not installed. A kernel's tile sizes come from a frozen table, one entry per architecture that needs its own.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

# Contraction of a multiplication and an addition: Triton 3.10 changes its default, and 3.9 warns about that.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else lambda f: f


ARCHITECTURES = (80, 86, 89, 90, 120)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Config = TypeVar("Config")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors and is for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """None when Triton can run kernels on tensors of `device`, else one short reason."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return None
        return f"the kernels need compute capability 8.0, and this device has {major}.{minor}"
    if device.type == "cpu" and interpreting():
        return None
    return f"triton has no {device.type} backend"


@functools.cache
def architecture(device: torch.device) -> int:
    """The newest of ARCHITECTURES that `device` runs: 86 for compute capability 8.6; 80 for the interpreter."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max(a for a in ARCHITECTURES if a <= 10 * major + minor)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 2 for the interpreter, so that tests see programs that loop."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def seen_by_compiler() -> bool:
    """Whether torch.compile is to look into the operators: where there is a GPU to compile for. Elsewhere the first
    such operator would import torch._dynamo, 1.5 s of every start, and Triton's interpreter cannot be traced."""
    return triton is not None and not interpreting() and torch.cuda.is_available()


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make of a function that launches kernels and writes to none of its arguments the operator minimind::`name`.

    Where torch.compile looks into it, the launches stand in the code that it generates, each a fifth of the host's time
    that a call of the operator takes there (bench/host_time.py, docs/kernels.md), and what else the function does is
    fused with its neighbours. The losses of the head run outside compiled models: torch.library.custom_op is theirs."""
    make = torch.library.triton_op if seen_by_compiler() else torch.library.custom_op
    return make(f"minimind::{name}", mutates_args=())


def config_for(table: Mapping[int, Config], device: torch.device) -> Config:
    """The table's entry for the newest architecture that is not newer than the device's."""
    arch = architecture(device)
    return table[max(a for a in table if a <= arch)]


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **constants: Any
) -> None:
    """kernel[grid](*args, **constants). bench/resources.py replaces `_run` to see what would be launched."""
    if all(grid):
        _run(kernel, grid, args, constants, num_warps, num_stages)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict, num_warps: int, num_stages: int) -> None:
    first = next(a for a in args if isinstance(a, Tensor))
    device = first.device
    if type(first) not in (Tensor, torch.nn.Parameter):  # torch.compile traces: note the launch
        traced = torch.library.wrap_triton(kernel)
        traced[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


_run: Callable[..., None] = _launch


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1: tl.arange takes no other length."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """x as [N, size] with the last dimension contiguous: a view where one row stride reaches every row, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def own_precision(device: torch.device) -> torch.autocast:
    """Products inside are in the dtype of what they are given: PyTorch's autocast, which a caller may have on, would
    round some of an op's float32 steps and miss those with `out=`."""
    return torch.autocast(device.type, enabled=False)


def on_host(tensor: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, or with MINIMIND_CHECK=1, which makes the host wait for the device;
    not while torch.compile traces, which has no values."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("MINIMIND_CHECK") == "1"


def check(condition: bool, message: str, *values: object) -> None:
    """Refuse bad input before anything is launched; each {} of the message takes one of `values`.

    Only then: a size or factor that is printed while torch.compile traces would be compiled in, or break the graph."""
    if not condition:
        raise ValueError(message.format(*values))


def check_tensors(**tensors: Tensor | None) -> None:
    """Floating-point tensors of a supported dtype, on one device that runs the kernels."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        message = "{} is {}; the kernels take float32, bfloat16 and float16"
        check(tensor.dtype in FLOATS, message, name, tensor.dtype)
        device = tensor.device
        if first is None:
            first = name, tensor
            reason = why_no_triton(device)
            message = "{} is on {}: {}; use ops mode 'reference' or 'fused'"
            check(reason is None, message, name, device, reason)
        message = "{} is on {} and {} on {}; move them to one device"
        check(device == first[1].device, message, name, device, first[0], first[1].device)
