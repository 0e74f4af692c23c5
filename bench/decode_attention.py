"""The attention of one decoding step over a paged cache, beside its peers: the operator alone.

    python bench/decode_attention.py [--preset minimind2-small] [--batch 1 16 64] [--context 512 4096]

minimind    minimind.inference.decode.ops.decode_attention, native
eager       plain PyTorch: pages gathered, then scaled_dot_product_attention
dense       scaled_dot_product_attention on a cache that needs no gathering: not the same task, the best PyTorch has
varlen      PyTorch's varlen_attn with a block table (a GPU, torch >= 2.12)
flash-attn  flash_attn_with_kvcache (a GPU, the flash-attn package)

A contender is timed only when its error against float64 is at most twice that of `eager` in the same dtype. The rate is
that of keys and values read; caches of several layers take turns, so that they do not come from the cache of the
processor. Rows are added to decode_attention.csv in --out; the last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench.common.timing import Step, Timing, first_line, limits, measure
from bench.operators.report import KernelRow, append, check_columns, show, slug
from minimind.config import PRESETS, ModelConfig
from minimind.inference.decode import ops as decode_ops
from minimind.ops import native
from minimind.ops.varlen import PAGED, varlen_attn
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.stdio import command_line

PAGE = {"cpu": 16, "cuda": 256}  # tokens; flash-attn's paged form takes multiples of 256 only


@dataclass(frozen=True)
class Args:
    """Measure the attention operator of decoding."""

    preset: tuple[str, ...] = ("minimind2-small", "minimind3")
    """Shapes of the heads."""
    batch: tuple[int, ...] = (1, 16, 64)
    """Sequences."""
    context: tuple[int, ...] = (512, 4096)
    """Tokens in the cache of each."""
    max_context: int | None = None
    """Tokens that our block table has room for, more than --context. They should cost nothing; rows name them."""
    repeat: int = 50
    """Timed runs of each contender."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class AttentionCase:
    """q [B, H, D]; key, value [L, P, S, G, D], L layers' caches; table int32 [B, pages]; lengths int32 [B], all of them
    `context`; room: the table with more columns; arrivals int32 [B H], zeros."""

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


Contender = Callable[[AttentionCase, int], Tensor]  # case, layer -> [B, H, D]


def make_case(
    config: ModelConfig,
    batch: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    max_context: int | None = None,
) -> AttentionCase:
    """Pages of a sequence lie scattered, as they do after requests have come and gone. Enough layers that together they
    are 64 MiB, at most 8."""
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
    return decode_ops.decode_attention(case.q, *caches, case.room, case.lengths, case.scale, arrivals=case.arrivals)


def eager(case: AttentionCase, layer: int) -> Tensor:
    k, v = (t[layer][case.table.long()].flatten(1, 2) for t in (case.key, case.value))
    return _sdpa(case, k, v)


def dense(case: AttentionCase, layer: int) -> Tensor:
    """The cache read in the order in which it lies: other numbers, the same work."""
    batch = case.q.shape[0]
    return _sdpa(case, *(t[layer].view(batch, -1, *t.shape[3:]) for t in (case.key, case.value)))


def _sdpa(case: AttentionCase, k: Tensor, v: Tensor) -> Tensor:
    """All lengths are equal here, which spares it a mask."""
    k, v = (t[:, : case.context].transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(case.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def varlen(case: AttentionCase, layer: int) -> Tensor:
    batch = case.q.shape[0]
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=case.q.device)
    longest = case.table.shape[1] * case.key.shape[2]
    options: dict[str, Any] = {"enable_gqa": True, "seqused_k": case.lengths, "block_table": case.table}
    found = varlen_attn(case.q, case.key[layer], case.value[layer], bounds, cast(Tensor, None), 1, longest, **options)
    return cast(Tensor, found)


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


CONTENDERS: dict[str, Contender] = {
    "minimind": ours,
    "eager": eager,
    "dense": dense,
    "varlen": varlen,
    "flash-attn": flash,
}


def why_not(name: str, device: torch.device) -> str | None:
    """None if this contender can run here, else one short reason."""
    if name == "minimind":
        return native.why_not(device)
    if name in ("varlen", "flash-attn") and device.type != "cuda":
        return "it needs a GPU"
    if name == "varlen" and not PAGED:
        return "this torch has no paged form"
    if name == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None


def error_ratio(name: str, case: AttentionCase) -> float:
    """Largest error against float64, over eager's in the same dtype plus rounding."""
    truth = eager(case.to(torch.float64), 0)
    plain = (eager(case, 0).double() - truth).abs().max()
    mine = CONTENDERS[name](case, 0)
    if mine.shape != truth.shape or not mine.isfinite().all():
        return float("inf")
    error = (mine.double() - truth).abs().max()
    return float(error / (plain + 2 * torch.finfo(torch.float32).eps * (1 + truth.abs().max())))


def run(case: AttentionCase, repeat: int, blank: KernelRow, limit: float | None) -> list[KernelRow]:
    """A row for every contender that can run here; `blank` has what they share. limit: GB/s that this device copies."""
    rows, steps = {}, {}
    layers = case.key.shape[0]
    for name, contender in CONTENDERS.items():
        if why_not(name, case.q.device) is not None:
            continue
        row = dataclasses.replace(blank, contender=name)
        try:
            ratio = 0.0 if name == "dense" else error_ratio(name, case)
        except Exception as problem:  # a peer that fails is a row that says so
            rows[name] = dataclasses.replace(row, status="failed", reason=first_line(problem))
            continue
        if ratio > 2:
            reason = f"error {ratio:.3g} times plain PyTorch's; 2 is allowed"
            rows[name] = dataclasses.replace(row, status="refused", reason=reason, error_ratio=ratio)
        else:
            rows[name] = dataclasses.replace(row, error_ratio=None if name == "dense" else ratio)
            steps[name] = _all_layers(contender, case, layers)
    timed = measure(steps, case.q.device, repeat)
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


def _all_layers(contender: Contender, case: AttentionCase, layers: int) -> Step:
    return Step(lambda: None, lambda _: [contender(case, layer) for layer in range(layers)])


def main(args: Args) -> dict[str, Any]:
    for flag, values in (("batch", args.batch), ("context", args.context), ("repeat", (args.repeat,))):
        for value in values or (0,):
            if value < 1:
                raise ValueError(f"--{flag} {value}: counts from 1")
    for name in args.preset:
        if name not in PRESETS:
            raise ValueError(f"--preset {name}: unknown; choose from {', '.join(PRESETS)}")
    if args.max_context is not None and args.max_context < max(args.context):
        raise ValueError(f"--max-context {args.max_context}: less than --context {max(args.context)}")
    device = choose_device(args.device)
    dtype = choose_precision(device).compute_dtype
    found = versions(describe_device(device))
    stamp = {name: found[name] for name in ("device", "commit", "torch", "triton")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    table = folder / "decode_attention.csv"
    check_columns(table)
    limit = limits(device, dtype)["GB/s"] if device.type == "cuda" else None
    for name in CONTENDERS:
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
                    **stamp, liger=None, op="decode_attention", preset=preset, tokens=context,
                    shape=f"B={batch} H={config.num_attention_heads} G={config.num_key_value_heads} "
                    f"D={config.head_dim}{room}", dtype=str(dtype).removeprefix("torch."), phase="forward",
                    contender="", status="ok",
                )  # fmt: skip
                new = run(case, args.repeat, blank, limit)
                append(table, new)
                show(new, Console(width=None if sys.stdout.isatty() else 120))
                rows += new
    return {"csv": str(table), "rows": [dataclasses.asdict(row) for row in rows]}


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
