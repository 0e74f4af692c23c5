"""Run the native operators of decoding on small shapes that reach every kernel, and compare with the reference.

    compute-sanitizer --tool racecheck python bench/native_check.py [--device auto]

Short enough to run under compute-sanitizer, as bench/card.py does. The exit status is 1 if a result is wrong.
tests/csrc tests the operators more thoroughly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from torch import Tensor

from bench.common.command import run
from minimind.config import ModelConfig
from minimind.inference.batch import DecodeBatch
from minimind.inference.decode.kv_cache import PagedCache
from minimind.inference.decode.reference import decode_attention_ref, rope_append_kv_ref, sample_ref
from minimind.inference.decode.step import DecodeWeights, decode_step
from minimind.inference.runner import Replica, Runner
from minimind.modeling import Model
from minimind.ops import native
from minimind.rope import rope_cos_sin
from minimind.utils.device import choose_device

FP8 = torch.float8_e4m3fn
PAGE = 16
LENGTHS = (1, 0, 65, 300)  # the last has three splits on a GPU
LONG = (24_600,)  # and with this one a warp fills its buffers again
ATTENTION = (
    (torch.bfloat16, torch.bfloat16, 64, LENGTHS),
    (torch.bfloat16, torch.bfloat16, 96, LENGTHS),
    (torch.float16, FP8, 80, LENGTHS),
    (torch.bfloat16, FP8, 128, LENGTHS),
    (torch.bfloat16, torch.bfloat16, 32, LONG),
    (torch.float32, torch.float32, 64, LENGTHS),
    (torch.bfloat16, torch.bfloat16, 6, LENGTHS),
)
APPEND = ((torch.bfloat16, torch.bfloat16, 96), (torch.float32, FP8, 64), (torch.float16, FP8, 6))
# dtype, of the matrices if not int8, of the cache; head size, QK norm, lengths
STEPS: tuple[tuple[torch.dtype, torch.dtype | None, torch.dtype, int, bool, tuple[int, ...]], ...] = (
    (torch.bfloat16, None, torch.bfloat16, 64, False, (200,)),
    (torch.bfloat16, None, torch.bfloat16, 96, True, LENGTHS),
    (torch.float32, None, torch.bfloat16, 80, False, (1, 130)),
    (torch.bfloat16, None, torch.bfloat16, 20, False, (3,) * 8),
    (torch.bfloat16, torch.int8, torch.bfloat16, 64, False, (200,)),
    (torch.bfloat16, torch.int8, torch.bfloat16, 96, True, LENGTHS),
    (torch.float32, torch.int8, torch.bfloat16, 80, False, (1, 130)),
    (torch.bfloat16, torch.int8, torch.bfloat16, 20, False, (3,) * 8),
)
VOCABULARIES = (33, 6400, 30_000)  # the last does not fit the shared memory of a GPU


@dataclass(frozen=True)
class NativeCase:
    """dtype: of the coarsest numbers. make: the arguments of both operators on a device."""

    name: str
    dtype: torch.dtype
    native: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Args:
    """Check every native operator."""

    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""


def both(case: NativeCase, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(native, reference) of every result, and of every argument since some are changed in place, on the CPU. The
    reference is computed on the CPU too, so that a sanitizer sees only our kernels and PyTorch's copies."""
    results = []
    for operator, place in ((case.native, device), (case.reference, torch.device("cpu"))):
        args = case.make(place)
        result = operator(*args)
        tensors = [result] if isinstance(result, Tensor) else list(result)
        results.append([t.cpu() for t in (*tensors, *args) if isinstance(t, Tensor)])
    return list(zip(*results, strict=True))


def wrong(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[str]:
    """A line for each tensor that differs by more than 4 units in the last place of the largest number."""
    lines = []
    for i, pair in enumerate(pairs):
        # rows of a cache that belong to no sequence are NaN on both sides
        a, b = (x.double().nan_to_num(1e9) for x in pair)
        eps = torch.finfo(FP8 if pair[0].dtype == FP8 else dtype).eps
        if (a - b).abs().max() > 4 * eps * b[b != 1e9].abs().max().clamp(min=1):
            lines.append(f"tensor {i}: off by {(a - b).abs().max():.3g}")
    return lines


def rand(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def attention(dtype: torch.dtype, cache: torch.dtype, dim: int, lengths: tuple[int, ...], device: torch.device) -> Any:
    batch, pages = len(lengths), -(-max(lengths) // PAGE)
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(3)).int().view(batch, pages)
    caches = [rand(batch * pages, PAGE, 2, dim, seed=i, device=device).to(cache) for i in (1, 2)]
    q = rand(batch, 8, dim, seed=0, device=device).to(dtype)
    scales = [torch.ones(2, device=device)] * 2 if cache == FP8 else [None, None]
    size = torch.tensor(lengths, dtype=torch.int32, device=device)
    return (q, *caches, table.to(device), size, dim**-0.5, *scales)


def append(dtype: torch.dtype, cache: torch.dtype, dim: int, device: torch.device) -> Any:
    qkv = rand(3, 12 * dim, seed=0, device=device).to(dtype)
    angles = rand(10, dim // 2, seed=1, device=device)
    positions = torch.tensor([0, 9, 3], dtype=torch.int32, device=device)
    slots = torch.tensor([5, -1, PAGE], device=device)
    caches = [torch.zeros(2, PAGE, 2, dim, device=device).to(cache) for _ in range(2)]
    weights = [torch.ones(dim, device=device)] * 2
    scales = [torch.ones(2, device=device)] * 2 if cache == FP8 else [None, None]
    return (qkv, angles.cos(), angles.sin(), positions, slots, *caches, 8, *weights, 1e-6, *scales)


def whole_step(
    dtype: torch.dtype, cache: torch.dtype, dim: int, qk_norm: bool, lengths: tuple[int, ...], device: torch.device
) -> Any:
    """One layer, since a second would amplify rounding. The cache's older tokens are noise."""
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=72, num_hidden_layers=1, intermediate_size=264, vocab_size=45, num_attention_heads=4,
        num_key_value_heads=2, head_dim=dim, qk_norm=qk_norm,
    )  # fmt: skip
    model = Model(config).eval().to(device)
    batch, pages = len(lengths), -(-max(lengths) // PAGE)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    size = torch.tensor(lengths, dtype=torch.int32)
    last = (size - 1).clamp(min=0).long()
    slots = torch.where(size > 0, table.gather(1, last[:, None] // PAGE)[:, 0] * PAGE + last % PAGE, -1)
    shape = (1, batch * pages, PAGE, 2, dim)
    caches = [rand(*shape, seed=i, device=device).to(cache) for i in (1, 2)]
    angles = rope_cos_sin(config, torch.arange(max(lengths), device=device))
    rows = [t.to(device) for t in (torch.arange(batch) + 3, last.int(), slots.long(), table, size)]
    return (model, dtype, *rows, *angles, *caches)


def native_step(weights_dtype: torch.dtype | None, model: Model, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    weights = DecodeWeights.from_model(model, dtype, weights_dtype)
    return decode_step(weights, weights.operands(), *inputs)


def step_by_layers(weights_dtype: torch.dtype | None, model: Model, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    """The same step as the engine runs it without native operators, in float32 with weights rounded to `dtype`, and
    then to `weights_dtype` unless it is None."""
    names = ("token", "position", "slot", "page_table", "length")
    tensors, caches = dict(zip(names, inputs, strict=False)), inputs[-2:]
    rows, pages = tensors["page_table"].shape
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype).float()
    batch = DecodeBatch(rows, pages, PAGE, model.config.vocab_size, model.device)
    replica = Replica(model, torch.float32)
    if weights_dtype is not None:
        replica.own_matrices()
        DecodeWeights.from_model(replica.model).round_matrices()
    runner = Runner(replica, PagedCache(*caches), batch, pages * PAGE, "reference")
    for name, tensor in tensors.items():
        batch.tensor[name].copy_(tensor)
    return runner._decode_layers(rows) * (tensors["length"] > 0)[:, None]


def choices(vocabulary: int, device: torch.device) -> Any:
    def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    history = torch.arange(3 * vocabulary, dtype=torch.int32, device=device).view(3, vocabulary) % 2
    return (
        rand(3, vocabulary, seed=0, device=device), column(0.0, 0.7, 1.0), column(0, 20, 0, dtype=torch.int32),
        column(1.0, 0.9, 0.5), column(0.0, 0.0, 0.1), column(1.2, 1.2, 1.0), column(0.3, 0.0, 0.0), history,
        column(1, 2, 3, dtype=torch.int64), column(0, 1, 2, dtype=torch.int64),
    )  # fmt: skip


def cases() -> Iterator[NativeCase]:
    ops = torch.ops.minimind
    for dtype, cache, dim, lengths in ATTENTION:
        name = f"decode_attention, {dtype} over {cache}, heads of {dim}"
        make = functools.partial(attention, dtype, cache, dim, lengths)
        yield NativeCase(name, dtype, ops.decode_attention, decode_attention_ref, make)
    for dtype, cache, dim in APPEND:
        name = f"rope_append_kv, {dtype} to {cache}, heads of {dim}"
        make = functools.partial(append, dtype, cache, dim)
        yield NativeCase(name, dtype, ops.rope_append_kv, rope_append_kv_ref, make)
    for dtype, weights, cache, dim, qk_norm, rows in STEPS:
        name = f"decode_step, {weights or dtype} over {cache}, heads of {dim}, {len(rows)} rows"
        make = functools.partial(whole_step, dtype, cache, dim, qk_norm, rows)
        native_form, reference = (functools.partial(step, weights) for step in (native_step, step_by_layers))
        yield NativeCase(name, torch.bfloat16, native_form, reference, make)
    for vocabulary in VOCABULARIES:
        make = functools.partial(choices, vocabulary)
        yield NativeCase(f"sample from {vocabulary} tokens", torch.float32, ops.sample, sample_ref, make)


def main(args: Args) -> int:
    """The exit status."""
    device, errors = choose_device(args.device), []
    if missing := native.why_not(device):
        raise ValueError(f"--device {device}: no native operators: {missing}")
    for case in cases():
        errors += [f"{case.name}: {line}" for line in wrong(both(case, device), case.dtype)]
    for line in errors:
        print(line)
    print(f"{len(errors)} wrong results")
    return 1 if errors else 0


if __name__ == "__main__":
    run(main, Args, __doc__)
