"""Access to Triton: optional import, launches, registration of operators, tables of tile sizes, and input checks.

Kernel files import `triton`, `tl` and `jit` from here, so they can be imported, and their references used, without
Triton. A kernel's tile sizes come from a frozen table, with an entry for each architecture that needs its own.
"""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

# Fused multiply-add: Triton 3.10 changes the default, and 3.9 warns about it.
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
OLDEST = (7, 0)  # compute capability for which Triton compiles these kernels
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Config = TypeVar("Config")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """None if Triton can run kernels on `device`, else one short reason."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= OLDEST:
            return None
        return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, and this device has {major}.{minor}"
    if device.type == "cpu" and interpreting():
        return None
    return f"triton has no {device.type} backend"


def before_sm_80() -> bool:
    """Whether the current GPU is older than compute capability 8.0. It then lacks what FlashAttention needs, and for it
    Triton multiplies 16-bit matrices without tensor cores, with spills (docs/kernels.md)."""
    return torch.cuda.get_device_capability() < (8, 0)


if torch.cuda.is_available():  # not needed elsewhere, and the decorator imports torch._dynamo, which takes 1.5 s
    before_sm_80 = torch.compiler.assume_constant_result(before_sm_80)


@functools.cache
def architecture(device: torch.device) -> int:
    """The newest of ARCHITECTURES that `device` supports: 86 for compute capability 8.6, 80 for the interpreter and for
    older GPUs, which have the tiles of 80."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 2 for the interpreter, so that tests cover programs that loop."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def seen_by_compiler() -> bool:
    """Whether torch.compile traces into the operators, which needs a GPU. Without one the first such operator would
    import torch._dynamo, which takes 1.5 s, and Triton's interpreter cannot be traced."""
    return triton is not None and not interpreting() and torch.cuda.is_available()


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels and does not modify its arguments as the operator minimind::`name`.

    When torch.compile traces into it, generated code launches the kernels directly, which takes a fifth of the host
    time of a call of the operator (bench/host_time.py, docs/kernels.md), and the function's other operations are fused
    with their neighbours. The losses of the head run outside compiled models and use torch.library.custom_op."""
    make = torch.library.triton_op if seen_by_compiler() else torch.library.custom_op
    return make(f"minimind::{name}", mutates_args=())


def config_for(table: Mapping[int, Config], device: torch.device) -> Config:
    """The table's entry for the newest architecture that is not newer than the device's, else the oldest entry."""
    arch = architecture(device)
    return table[max((a for a in table if a <= arch), default=min(table))]


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **constants: Any
) -> None:
    """Launch kernel[grid](*args, **constants). bench/resources.py replaces `_run` to record launches."""
    if all(grid):
        _run(kernel, grid, args, constants, num_warps, num_stages)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict, num_warps: int, num_stages: int) -> None:
    first = next(a for a in args if isinstance(a, Tensor))
    device = first.device
    if type(first) not in (Tensor, torch.nn.Parameter):  # torch.compile is tracing: record the launch
        traced = torch.library.wrap_triton(kernel)
        traced[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


_run: Callable[..., None] = _launch


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n >= 1; tl.arange needs such a length."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """x as [N, size] with a contiguous last dimension: a view if one stride reaches all rows, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def own_precision(device: torch.device) -> torch.autocast:
    """Turn autocast off, so that products run in the dtype of their inputs. A caller's autocast would round some of an
    op's float32 steps, and ignore those with `out=`."""
    return torch.autocast(device.type, enabled=False)


def on_host(tensor: Tensor) -> bool:
    """Whether values may be read: on a CPU, or with MINIMIND_CHECK=1, which makes the host wait for the device. Never
    while torch.compile traces, since there are no values."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("MINIMIND_CHECK") == "1"


def check(condition: bool, message: str, *values: object) -> None:
    """ValueError unless `condition`; each {} of the message is filled from `values`.

    The message is formatted only on failure: formatting a size while torch.compile traces would make it a constant or
    break the graph."""
    if not condition:
        raise ValueError(message.format(*values))


def check_tensors(**tensors: Tensor | None) -> None:
    """ValueError unless all tensors have a supported dtype and are on one device that runs the kernels."""
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


def kernels_fingerprint() -> str:
    """A hash of the kernels' source files, for the cache of torch.compile: it keeps kernels with their tile sizes, but
    its own key covers the source of an operator's function only, not of those that it calls."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
