"""Compare the attention of one decoding step over a paged cache with other implementations of it.

    python bench/decode_attention.py [--preset minimind2-small] [--batch 1 16 64] [--context 512 4096]

    minimind    torch.ops.minimind.decode_attention
    eager       plain PyTorch: gathers the pages, then scaled_dot_product_attention
    dense       scaled_dot_product_attention on a contiguous cache: an easier task, and PyTorch's best
    varlen      PyTorch's varlen_attn with a block table (GPU, torch >= 2.12)
    flash-attn  flash_attn_with_kvcache (GPU, the flash-attn package)

An implementation is timed only if its error against float64 is at most twice that of `eager` in the same dtype. The
rate is that of reading keys and values. The caches of several layers take turns, so that they are not read from the
processor's cache. Rows are added to decode_attention.csv in --out; the last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.record import append, as_dicts, check_columns, results_folder, stamp
from bench.common.timing import Step, Timing, first_line, limits, time_in_turns
from bench.operators.report import KernelRow, show
from minimind.config import PRESETS, ModelConfig
from minimind.ops import native
from minimind.ops.varlen import PAGED, varlen_attn
from minimind.utils.device import choose_device, choose_precision

PAGE = {"cpu": 16, "cuda": 256}  # tokens; flash-attn's pages must be multiples of 256


@dataclass(frozen=True)
class Args:
    """Compare implementations of decoding's attention."""

    preset: tuple[str, ...] = ("minimind2-small", "minimind3")
    """Presets whose head shapes are timed."""
    batch: tuple[int, ...] = (1, 16, 64)
    """Sequences."""
    context: tuple[int, ...] = (512, 4096)
    """Tokens in the cache of each sequence."""
    max_context: int | None = None
    """Tokens that our block table has room for, more than --context. They should cost nothing; their rows are
    marked."""
    repeat: int = 50
    """Timed runs of each implementation."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class AttentionCase:
    """q [B, H, D]; key, value [L, P, S, G, D], the caches of L layers with P pages of S tokens; table int32 [B, pages];
    lengths int32 [B], all equal to `context`; room: the table with additional columns; arrivals int32 [B H], zeros."""

    q: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor
    context: int
    room: Tensor
    arrivals: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def bytes_read(self) -> int:
        return 2 * self.context * len(self.q) * self.key.shape[3] * self.key.shape[4] * self.key.element_size()

    def to(self, dtype: torch.dtype) -> AttentionCase:
        moved = {name: getattr(self, name).to(dtype) for name in ("q", "key", "value")}
        return dataclasses.replace(self, **moved)


Implementation = Callable[[AttentionCase, int], Tensor]  # case, layer -> [B, H, D]


def make_case(
    config: ModelConfig,
    batch: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    max_context: int | None = None,
) -> AttentionCase:
    """The pages of a sequence are scattered, as after many requests. Enough layers for 64 MiB of cache, at most 8."""
    size, heads, dim = PAGE[device.type], config.num_key_value_heads, config.head_dim
    pages = -(-context // size)
    generator = torch.Generator(device).manual_seed(0)
    one = 2 * batch * pages * size * heads * dim * dtype.itemsize
    layers = max(1, min(8, -(-(64 << 20) // one)))
    shape = (layers, batch * pages, size, heads, dim)
    key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    q = torch.randn(batch, config.num_attention_heads, dim, generator=generator, device=device).to(dtype)
    table = torch.randperm(batch * pages, generator=generator, device=device).view(batch, pages).int()
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    more = max(0, -(-(max_context or 0) // size) - pages)
    room = F.pad(table, (0, more))
    arrivals = torch.zeros(q.shape[:2].numel(), dtype=torch.int32, device=device)
    return AttentionCase(q, key, value, table, lengths, context, room, arrivals)


def ours(case: AttentionCase, layer: int) -> Tensor:
    caches = (case.key[layer], case.value[layer])
    arguments = (case.q, *caches, case.room, case.lengths, case.scale, None, None, case.arrivals)
    return torch.ops.minimind.decode_attention(*arguments)


def eager(case: AttentionCase, layer: int) -> Tensor:
    k, v = (t[layer][case.table.long()].flatten(1, 2) for t in (case.key, case.value))
    return _sdpa(case, k, v)


def dense(case: AttentionCase, layer: int) -> Tensor:
    """The cache read in its order in memory: other numbers, the same work."""
    batch = case.q.shape[0]
    return _sdpa(case, *(t[layer].view(batch, -1, *t.shape[3:]) for t in (case.key, case.value)))


def _sdpa(case: AttentionCase, k: Tensor, v: Tensor) -> Tensor:
    """Needs no mask, since all lengths are equal."""
    k, v = (t[:, : case.context].transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(case.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def varlen(case: AttentionCase, layer: int) -> Tensor:
    batch = case.q.shape[0]
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=case.q.device)
    longest = case.table.shape[1] * case.key.shape[2]
    options: dict[str, Any] = {"enable_gqa": True, "seqused_k": case.lengths, "block_table": case.table}
    keys, values = case.key[layer], case.value[layer]
    return cast(Tensor, varlen_attn(case.q, keys, values, bounds, cast(Tensor, None), 1, longest, **options))


def flash(case: AttentionCase, layer: int) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        case.q[:, None],
        case.key[layer],
        case.value[layer],
        cache_seqlens=case.lengths,
        block_table=case.table,
        causal=True,
    )[:, 0]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "minimind": ours,
    "eager": eager,
    "dense": dense,
    "varlen": varlen,
    "flash-attn": flash,
}


def why_not(name: str, device: torch.device) -> str | None:
    """None if this implementation can run here, else one short reason."""
    if name == "minimind":
        return native.why_not(device)
    if name in ("varlen", "flash-attn") and device.type != "cuda":
        return "needs a GPU"
    if name == "varlen" and not PAGED:
        return "this torch has no paged varlen_attn"
    if name == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None


def error_ratio(name: str, case: AttentionCase) -> float:
    """The largest error against float64, divided by that of eager in the same dtype plus rounding."""
    truth = eager(case.to(torch.float64), 0)
    plain = (eager(case, 0).double() - truth).abs().max()
    result = IMPLEMENTATIONS[name](case, 0)
    if result.shape != truth.shape or not result.isfinite().all():
        return float("inf")
    error = (result.double() - truth).abs().max()
    return float(error / (plain + 2 * torch.finfo(torch.float32).eps * (1 + truth.abs().max())))


def compare(case: AttentionCase, repeat: int, blank: KernelRow, limit: float | None) -> list[KernelRow]:
    """A row for every implementation that can run here. blank: their common columns. limit: GB/s of a large copy."""
    rows, steps = {}, {}
    layers = case.key.shape[0]
    for name, implementation in IMPLEMENTATIONS.items():
        if why_not(name, case.q.device) is not None:
            continue
        row = dataclasses.replace(blank, contender=name)
        try:
            ratio = 0.0 if name == "dense" else error_ratio(name, case)
        except Exception as problem:  # an implementation that fails gets a row that says so
            rows[name] = dataclasses.replace(row, status="failed", reason=first_line(problem))
            continue
        if ratio > 2:
            reason = f"error {ratio:.3g} times plain PyTorch's; 2 is allowed"
            rows[name] = dataclasses.replace(row, status="refused", reason=reason, error_ratio=ratio)
        else:
            rows[name] = dataclasses.replace(row, error_ratio=None if name == "dense" else ratio)
            steps[name] = _all_layers(implementation, case, layers)
    timed = time_in_turns(steps, case.q.device, repeat)
    base = timed.get("minimind")
    for name, timing in timed.items():
        if not isinstance(timing, Timing):
            rows[name] = dataclasses.replace(rows[name], status="failed", reason=timing)
            continue
        rate = layers * case.bytes_read / timing.median / 1e9
        rows[name] = dataclasses.replace(
            rows[name], status="ok", milliseconds=timing.median / layers * 1e3, p20=timing.p20 / layers * 1e3,
            p80=timing.p80 / layers * 1e3, runs=timing.runs, rate=rate, unit="GB/s",
            share=rate / limit if limit else None,
            ratio=timing.median / base.median if isinstance(base, Timing) else None,
        )  # fmt: skip
    return list(rows.values())


def _all_layers(implementation: Implementation, case: AttentionCase, layers: int) -> Step:
    return Step(lambda: None, lambda _: [implementation(case, layer) for layer in range(layers)])


def main(args: Args) -> dict[str, Any]:
    check_at_least(1, batch=args.batch, context=args.context, repeat=args.repeat)
    check_choices("preset", args.preset, PRESETS)
    if args.max_context is not None and args.max_context < max(args.context):
        raise ValueError(f"--max-context {args.max_context}: less than --context {max(args.context)}")
    device = choose_device(args.device)
    dtype = choose_precision(device).compute_dtype
    columns = stamp(device, "torch", "triton")
    folder = results_folder(args.out, columns["device"])
    table = folder / "decode_attention.csv"
    check_columns(table, KernelRow)
    limit = limits(device, dtype)["GB/s"] if device.type == "cuda" else None
    for name in IMPLEMENTATIONS:
        if (reason := why_not(name, device)) is not None:
            print(f"without {name}: {reason}", file=sys.stderr)
    rows: list[KernelRow] = []
    for preset in args.preset:
        config = ModelConfig.preset(preset)
        for batch in args.batch:
            for context in args.context:
                case = make_case(config, batch, context, device, dtype, args.max_context)
                room = "" if args.max_context is None else f" room={args.max_context}"
                blank = KernelRow(
                    **columns, liger=None, op="decode_attention", preset=preset, tokens=context,
                    shape=f"B={batch} H={config.num_attention_heads} G={config.num_key_value_heads} "
                    f"D={config.head_dim}{room}", dtype=str(dtype).removeprefix("torch."), phase="forward",
                    contender="", status="ok",
                )  # fmt: skip
                new = compare(case, args.repeat, blank, limit)
                append(table, new)
                show(new, table_console())
                rows += new
    return {"csv": str(table), "rows": as_dicts(rows)}


if __name__ == "__main__":
    run(main, Args, __doc__)
