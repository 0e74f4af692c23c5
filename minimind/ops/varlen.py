"""Flash attention over packed documents, on a GPU: which implementation runs, and the calls to it.

    torch    PyTorch's operator, whose kernels are FlashAttention 2 (Dao 2023, arXiv 2307.08691)
    flash2   the package flash-attn, newer kernels of the same
    flash3   flash_attn_interface, FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608), for Hopper
    flash4   the package flash-attn-4, for Hopper and datacenter Blackwell

PyTorch itself puts 3 and 4 behind its operator (torch.nn.attention.activate_flash_attention_impl), and flash-attn
registers its own operators, so torch.compile looks into none of them. Importing PyTorch's operator brings in
torch._dynamo, 1.5 s of every start. So it is imported here alone, and only where there is CUDA.
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
TAKES_FEWER_HEADS = _HAS_PAGES = False  # bools, not a lookup: torch.compile traces what reads them
if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn

    _OPTIONS = inspect.signature(varlen_attn).parameters
    TAKES_FEWER_HEADS = "enable_gqa" in _OPTIONS  # torch >= 2.12: fewer key heads than query heads
    _HAS_PAGES = "block_table" in _OPTIONS  # torch >= 2.13

PAGED = _HAS_PAGES
PAGE_MULTIPLE = 256  # flash attention takes pages of multiples of this
EXPAND = True  # keys and values for every query head, where PyTorch's operator does not say that it takes fewer
_flash2: Any = None  # flash-attn's function, where that was chosen
_taken: AttentionName = "torch"


@dataclass(frozen=True)
class Package:
    """title: for people; module: what is imported; install: how to get it; majors: of the compute capabilities it is
    for; registered: its name in PyTorch's registry."""

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
}  # than PyTorch's kernels, by major; elsewhere those are as good


class Bounds(NamedTuple):
    """int32 [n + 1]: where documents begin among the queries and among the keys; no document is longer."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


class Heads(NamedTuple):
    """What a model's attention is: query and key heads, their size, the dtype it computes in."""

    queries: int
    keys: int
    size: int
    dtype: torch.dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """q [N, H, D], k and v [M, H_kv, D] -> [N, H, D], 16-bit, on a GPU; the last query of a document sees all of its
    keys."""
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
    """The same over a cache's pages [P, S, H_kv, D], read where they lie; used: int32 [n], keys of each document;
    table: int32 [n, pages]. PyTorch's operator; only where PAGED."""
    return varlen_attn(
        q, keys, values, *bounds, window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table, num_splits=1
    )


def choose(name: AttentionName, device: torch.device, heads: Heads) -> str:
    """Take an implementation for the whole process, before anything is compiled; auto: the fastest that is installed
    and computes two short documents rightly. -> one line for the head of a run, empty where there is no such choice.
    ValueError where a name cannot be met."""
    reason = why_none(device, heads.dtype)
    if reason is not None:
        if name != "auto":
            raise ValueError(f"--attention {name}: {reason}; drop the flag")
        return ""
    _take_torch(device, heads)
    major = torch.cuda.get_device_capability(device)[0]
    passed_over = []
    for candidate in FASTER.get(major, ()) if name == "auto" else [name] if name != "torch" else []:
        reason = why_not(candidate, device) or _take(candidate, device, heads)
        if reason is None:
            return f"attention: {PACKAGES[candidate].title}"
        if name != "auto":
            raise ValueError(f"--attention {name}: {reason}; use --attention torch")
        passed_over.append(f"; {PACKAGES[candidate].title} would be faster: {reason}")
    return "attention: FlashAttention 2 of PyTorch" + "".join(passed_over)


def taken() -> AttentionName:
    """The implementation that runs."""
    return _taken


def why_none(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no flash attention over documents runs here, in one line; None where it does."""
    if device.type != "cuda" or varlen_attn is None:
        return f"flash attention over documents needs a GPU, and this is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes 16-bit numbers, and the run computes in {dtype}"
    return None


def why_not(name: str, device: torch.device) -> str | None:
    """None if the package is there and made for `device`, else one short reason."""
    package = PACKAGES[name]
    major, minor = torch.cuda.get_device_capability(device)
    if major not in package.majors:
        made_for = " and ".join(f"{m}.x" for m in package.majors)
        return f"it is for compute capability {made_for}, and this GPU has {major}.{minor}"
    if not _installed(package.module):
        return f"{package.module} is not installed ({package.install})"
    if package.registered is not None and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} does not take it"
    return None


@functools.cache
def learn_heads(device: torch.device, heads: Heads) -> None:
    """Where PyTorch's operator does not say whether it takes fewer key heads (torch 2.11), find out, once."""
    global EXPAND
    if EXPAND and not TAKES_FEWER_HEADS and why_none(device, heads.dtype) is None:
        EXPAND = False
        EXPAND = problem(device, heads) is not None


def problem(device: torch.device, heads: Heads) -> str | None:
    """What is wrong with `causal_attention` forward and backward on two short documents, in one line, or None."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # of torchrun, not yet the current one
        return _problem(device, heads)


def _problem(device: torch.device, heads: Heads) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(33, count, heads.size) for count in (heads.queries, heads.keys, heads.keys)]
    leaves = [torch.randn(s, generator=generator, device=device, dtype=heads.dtype) for s in shapes]
    starts = torch.tensor([0, 9, 33], dtype=torch.int32, device=device)
    bounds = Bounds(starts, starts, 24, 24)
    try:
        found = _with_gradients(lambda q, k, v: causal_attention(q, k, v, bounds), leaves)
    except Exception as error:  # whatever another package throws
        return f"it fails here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    expected = _with_gradients(_plain, [leaf.float() for leaf in leaves])
    for mine, true in zip(found, expected, strict=True):
        if not (mine.float() - true).abs().max() <= 0.05 * true.abs().max():
            return "it computes something else here"
    return None


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two documents of `problem`, one after the other."""
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


def _take_torch(device: torch.device, heads: Heads) -> None:
    global _flash2, _taken, PAGED
    _flash2, _taken, PAGED = None, "torch", _HAS_PAGES
    if getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    learn_heads(device, heads)


def _take(name: AttentionName, device: torch.device, heads: Heads) -> str | None:
    """Make the calls go to a package that `why_not` lets pass. A reason if it then does not work: all is as before."""
    global _flash2, _taken, PAGED
    package = PACKAGES[name]
    try:
        if package.registered is None:
            _flash2 = importlib.import_module(package.module).flash_attn_varlen_func
        else:
            torch.nn.attention.activate_flash_attention_impl(package.registered)
    except Exception as error:  # a package built for another version fails in its own ways
        reason = f"it does not load: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    else:
        found = problem(device, heads)
        if found is None:
            # of FlashAttention 4, PyTorch has pages on Blackwell only
            _taken = name
            PAGED = _HAS_PAGES and (name != "flash4" or torch.cuda.get_device_capability(device)[0] >= 10)
            return None
        reason = found
    _take_torch(device, heads)
    return reason


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
