"""Flash attention over packed documents on a GPU: the choice of an implementation, and the calls to it.

    torch    PyTorch's operator, whose kernels are FlashAttention 2 (Dao 2023, arXiv 2307.08691)
    flash2   the package flash-attn, with newer FlashAttention 2 kernels
    flash3   flash_attn_interface, FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608), for Hopper
    flash4   the package flash-attn-4, for Hopper and datacenter Blackwell

PyTorch puts 3 and 4 behind its own operator (torch.nn.attention.activate_flash_attention_impl), and flash-attn
registers operators of its own, so torch.compile traces into none of them. Importing PyTorch's operator imports
torch._dynamo, which takes 1.5 s; so it is imported only here, and only if there is CUDA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

AttentionName = Literal["auto", "torch", "flash2", "flash3", "flash4"]

varlen_attn: Any = None
TAKES_FEWER_HEADS = _HAS_PAGES = False  # plain bools, because torch.compile traces the code that reads them
if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn

    _OPTIONS = inspect.signature(varlen_attn).parameters
    TAKES_FEWER_HEADS = "enable_gqa" in _OPTIONS  # torch >= 2.12: fewer key heads than query heads
    _HAS_PAGES = "block_table" in _OPTIONS  # torch >= 2.13

PAGED = _HAS_PAGES
PAGE_MULTIPLE = 256  # flash attention takes pages of multiples of this
EXPAND = True  # repeat keys and values for each query head if PyTorch's operator may not support fewer
_flash2: Any = None  # flash-attn's function, if chosen
_chosen: AttentionName = "torch"


@dataclass(frozen=True)
class Package:
    """An attention package. title: for display; module: its Python module; install: how to install it; majors: the
    supported major compute capabilities; registered: its name in PyTorch's registry."""

    title: str
    module: str
    install: str
    majors: tuple[int, ...]
    registered: str | None = None


PACKAGES = {
    "flash2": Package("FlashAttention 2 of flash-attn", "flash_attn", "pip install flash-attn", (8, 9, 10, 12)),
    "flash3": Package(
        "FlashAttention 3", "flash_attn_interface", "build hopper/ of Dao-AILab/flash-attention", (9,), "FA3"
    ),
    "flash4": Package("FlashAttention 4", "flash_attn.cute.interface", "pip install flash-attn-4", (9, 10), "FA4"),
}
FASTER: dict[int, tuple[AttentionName, ...]] = {
    9: ("flash3", "flash4"),
    10: ("flash4",),
}  # faster than PyTorch's kernels, by major compute capability; on other GPUs those are as fast


class Bounds(NamedTuple):
    """Document boundaries among queries and keys, int32 [n + 1], and upper bounds of the documents' lengths."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


class Heads(NamedTuple):
    """Shape of a model's attention: numbers of query and key heads, head size, and dtype."""

    queries: int
    keys: int
    size: int
    dtype: torch.dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Causal attention within documents, on a GPU in 16 bit: q [N, H, D], k and v [M, H_kv, D] -> [N, H, D]. The last
    query of a document sees all of its keys."""
    if _flash2 is not None:
        return _flash2(q, k, v, *bounds, causal=True)
    options: dict[str, Any] = {}
    if TAKES_FEWER_HEADS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif EXPAND:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return varlen_attn(q, k, v, *bounds, window_size=(-1, 0), **options)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, used: Tensor, table: Tensor) -> Tensor:
    """causal_attention over a paged cache, keys and values [P, S, H_kv, D], read in place. used: int32 [n], the number
    of keys of each document; table: int32 [n, pages]. Requires PAGED; uses PyTorch's operator."""
    return varlen_attn(
        q, keys, values, *bounds, window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table, num_splits=1
    )


def choose(name: AttentionName, device: torch.device, heads: Heads) -> str:
    """Choose the implementation for the whole process; call it before anything is compiled.

    auto: the fastest one that is installed and passes a check on two short documents. Returns one line for the head of
    a run, "" if there is no choice. ValueError if the named implementation does not work here."""
    reason = why_none(device, heads.dtype)
    if reason is not None:
        if name != "auto":
            raise ValueError(f"--attention {name}: {reason}; drop the flag")
        return ""
    _use_torch(device, heads)
    major = torch.cuda.get_device_capability(device)[0]
    skipped = []
    for candidate in FASTER.get(major, ()) if name == "auto" else [name] if name != "torch" else []:
        reason = why_not(candidate, device) or _use_package(candidate, device, heads)
        if reason is None:
            return f"attention: {PACKAGES[candidate].title}"
        if name != "auto":
            raise ValueError(f"--attention {name}: {reason}; use --attention torch")
        skipped.append(f"; {PACKAGES[candidate].title} would be faster: {reason}")
    return "attention: FlashAttention 2 of PyTorch" + "".join(skipped)


def chosen() -> AttentionName:
    """The implementation in use."""
    return _chosen


def why_none(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash attention over documents does not run here, in one line; None if it does."""
    if device.type != "cuda" or varlen_attn is None:
        return f"flash attention over documents needs a GPU, and this is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention needs 16-bit numbers, and the run computes in {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"flash attention needs compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def why_not(name: str, device: torch.device) -> str | None:
    """None if the package is installed and supports `device`, else one short reason."""
    package = PACKAGES[name]
    major, minor = torch.cuda.get_device_capability(device)
    if major not in package.majors:
        made_for = " and ".join(f"{m}.x" for m in package.majors)
        return f"it supports compute capability {made_for}, and this GPU has {major}.{minor}"
    if not _installed(package.module):
        return f"{package.module} is not installed ({package.install})"
    if package.registered is not None and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} does not support it"
    return None


@functools.cache
def detect_grouped_heads(device: torch.device, heads: Heads) -> None:
    """Find out, once, whether PyTorch's operator supports fewer key heads; torch 2.11 does not say so."""
    global EXPAND
    if EXPAND and not TAKES_FEWER_HEADS and why_none(device, heads.dtype) is None:
        EXPAND = False
        EXPAND = problem(device, heads) is not None


def problem(device: torch.device, heads: Heads) -> str | None:
    """Check `causal_attention` forward and backward on two short documents: None, or the problem in one line."""
    # under torchrun the device may not be the current one yet
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _problem(device, heads)


def _problem(device: torch.device, heads: Heads) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(33, count, heads.size) for count in (heads.queries, heads.keys, heads.keys)]
    leaves = [torch.randn(s, generator=generator, device=device, dtype=heads.dtype) for s in shapes]
    starts = torch.tensor([0, 9, 33], dtype=torch.int32, device=device)
    bounds = Bounds(starts, starts, 24, 24)
    try:
        actual = _with_gradients(lambda q, k, v: causal_attention(q, k, v, bounds), leaves)
    except Exception as error:  # another package may raise anything
        return f"it fails here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    expected = _with_gradients(_plain, [leaf.float() for leaf in leaves])
    for value, true in zip(actual, expected, strict=True):
        if not (value.float() - true).abs().max() <= 0.05 * true.abs().max():
            return "it gives wrong results here"
    return None


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over the two documents of `problem`."""
    parts = []
    for document in (slice(0, 9), slice(9, 33)):
        q_rows, k_rows, v_rows = (x[document].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _with_gradients(attention: Any, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out).to(out))
    return [out.detach(), *gradients]


def _use_torch(device: torch.device, heads: Heads) -> None:
    global _flash2, _chosen, PAGED
    _flash2, _chosen, PAGED = None, "torch", _HAS_PAGES
    if getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    detect_grouped_heads(device, heads)


def _use_package(name: AttentionName, device: torch.device, heads: Heads) -> str | None:
    """Use a package that passed `why_not`. If it fails the check, return the reason and use PyTorch's operator
    again."""
    global _flash2, _chosen, PAGED
    package = PACKAGES[name]
    try:
        if package.registered is None:
            _flash2 = importlib.import_module(package.module).flash_attn_varlen_func
        else:
            torch.nn.attention.activate_flash_attention_impl(package.registered)
    except Exception as error:  # a package built for another version may raise anything
        reason = f"it does not load: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    else:
        failure = problem(device, heads)
        if failure is None:
            # with FlashAttention 4, PyTorch supports pages on Blackwell only
            _chosen = name
            PAGED = _HAS_PAGES and (name != "flash4" or torch.cuda.get_device_capability(device)[0] >= 10)
            return None
        reason = failure
    _use_torch(device, heads)
    return reason


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
