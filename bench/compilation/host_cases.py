"""The cases of bench/host_time.py: compiled models and ops, in the process of one form of our operators."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.common.worker import Handler
from bench.compilation import host_stub

TOKENS = 64
SHRINK = 8  # the presets' widths are divided by it: no kernel runs, but allocating memory takes time
CALLS = (1, 9)  # calls of an op in two graphs; their difference is the time of eight calls
_STUBS = contextlib.ExitStack()  # left when the process ends
Case = Callable[[], tuple[float, float]]  # -> seconds of the host in one forward and one backward pass


def start(visible: bool, arch: int) -> Handler:
    """In a process of its own: (case, runs) -> seconds of (forward, backward) for each run; with 0 runs, compile the
    case and return how many of our kernels it launches. visible: whether torch.compile looks into our operators."""
    host_stub.import_ops(visible)
    torch.set_num_threads(1)
    counts = _STUBS.enter_context(host_stub.stubbed(arch))
    cases: dict[str, Case] = {}

    def answer(request: tuple[str, int]) -> Any:
        name, runs = request
        if runs:
            return _timed(cases[name], runs)
        cases[name] = _make(name)
        cases[name]()  # compiles
        counts.launches = 0
        cases[name]()
        return counts.launches

    return answer


def _timed(case: Case, runs: int) -> list[tuple[float, float]]:
    gc.collect()
    gc.disable()
    try:
        return [case() for _ in range(runs)]
    finally:
        gc.enable()


def _make(name: str) -> Case:
    """A whole model for the name of a preset, or an op for `OP PRESET CALLS`. Earlier compilations are dropped."""
    from minimind.config import PRESETS

    torch.compiler.reset()
    if name in PRESETS:
        return _model(PRESETS[name])
    op, preset, calls = name.split()
    return _op(op, PRESETS[preset], int(calls))


def _small(config: Any) -> Any:
    """The config with smaller widths and the same number of layers, heads and experts."""
    widths = ("hidden_size", "head_dim", "intermediate_size", "moe_intermediate_size")
    return replace(config, vocab_size=64, **{name: getattr(config, name) // SHRINK for name in widths})


def _model(config: Any) -> Case:
    from minimind import ops
    from minimind.modeling import Model

    model = Model(_small(config))
    model.compute_dtype = torch.bfloat16
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    bounds = torch.tensor([0, TOKENS // 3, TOKENS], dtype=torch.int32)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)

    def forward() -> list[Tensor]:
        with ops.using("kernels"):
            out = compiled(ids, cu_seqlens=bounds, attention_mask=mask, return_logits=False)
        return [out.hidden_states, out.aux_loss]

    return _both_ways(forward, model.zero_grad)


def _op(op: str, config: Any, calls: int) -> Case:
    function, leaves = _ops(_small(config))[op]
    inputs = [leaves() for _ in range(calls)]
    compiled = torch.compile(
        lambda calls: [out for call in calls for out in function(*call)], fullgraph=True, dynamic=False
    )

    def clear() -> None:
        for call in inputs:
            for leaf in call:
                leaf.grad = None

    return _both_ways(lambda: compiled(inputs), clear)


def _both_ways(forward: Callable[[], list[Tensor]], clear: Callable[[], Any]) -> Case:
    seeds: list[Tensor] = []

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        outputs = [out for out in forward() if out.requires_grad]
        middle = time.perf_counter()
        if not seeds:
            seeds.extend(torch.ones_like(out) for out in outputs)
        backward = time.perf_counter()
        torch.autograd.backward(outputs, seeds)
        end = time.perf_counter()
        clear()
        return middle - start, end - backward

    return run


def _ops(config: Any) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[[], list[Tensor]]]]:
    """Name -> (the op, function that makes its inputs)."""
    from minimind.kernels.moe_experts import moe_experts
    from minimind.kernels.moe_routing import route
    from minimind.kernels.rms_norm import add_rms_norm, rms_norm
    from minimind.kernels.rope import rope
    from minimind.kernels.swiglu import swiglu

    size, dim, inter = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    experts, top_k = config.num_experts or 4, config.num_experts_per_tok or 2
    gain = torch.ones(size)
    tables = torch.rand(2, TOKENS, dim // 2)
    positions = torch.arange(TOKENS).unsqueeze(0)
    order = torch.arange(TOKENS * top_k, dtype=torch.int32)
    offsets = torch.linspace(0, TOKENS * top_k, experts + 1).int()

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.rand(shape, dtype=dtype).requires_grad_()

    def hidden() -> Tensor:
        return leaf(1, TOKENS, size)

    def routed(logits: Tensor) -> tuple[Tensor, ...]:
        routing = route(logits, top_k, True)
        return routing.gates, routing.scores

    def mixed(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (moe_experts(*inputs, order, offsets),)

    return {
        "rms_norm": (lambda x: (rms_norm(x, gain, 1e-5),), lambda: [hidden()]),
        "add_rms_norm": (lambda x, y: add_rms_norm(x, y, gain, 1e-5), lambda: [hidden(), hidden()]),
        "rope": (
            lambda qkv: rope(qkv, *tables, positions, heads, kv_heads),
            lambda: [leaf(1, TOKENS, (heads + 2 * kv_heads) * dim)],
        ),
        "swiglu": (lambda x: (swiglu(x),), lambda: [leaf(1, TOKENS, 2 * inter)]),
        "moe_route": (routed, lambda: [leaf(TOKENS, experts, dtype=torch.float32)]),
        "moe_experts": (
            mixed,
            lambda: [
                leaf(TOKENS, size),
                leaf(experts, 2 * inter, size),
                leaf(experts, size, inter),
                leaf(TOKENS, top_k),
            ],
        ),
    }


OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "moe_route", "moe_experts")
