"""The cases of bench/resources.py: every public op, forward and backward, at the presets' widths and few tokens, and
the parts of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.compilation import run_cases
from minimind.config import PRESETS, ModelConfig
from minimind.kernels.linear_cross_entropy import linear_cross_entropy
from minimind.kernels.linear_distillation import linear_distillation
from minimind.kernels.linear_log_probs import linear_log_probs
from minimind.kernels.moe_experts import moe_experts
from minimind.kernels.moe_routing import route
from minimind.kernels.rms_norm import add_rms_norm, rms_norm
from minimind.kernels.rope import rope
from minimind.kernels.swiglu import swiglu

TOKENS = 96
LARGE_VOCABULARY = 151936  # that of Qwen3, a possible teacher
Cases = dict[str, Callable[[], None]]

MANY_EXPERTS = ModelConfig(hidden_size=768, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=384)


def cases(dtype: torch.dtype, only: Sequence[str] = ("",)) -> Cases:
    """{name: a call of one op with activations of `dtype` and float32 weights}. Only cases whose name contains a word
    of `only`."""
    calls = run_cases.cases(dtype)  # first, so that a compilation of a run carries the run's name
    for name, config in PRESETS.items():
        calls |= _dense(name, config, dtype)
        if config.num_experts:
            calls |= _mixture(name, config, dtype)
    for size, kv_heads in ((64, 2), (80, 2), (96, 2), (96, 4), (128, 4)):
        calls |= _rope(size, kv_heads, dtype)
    for vocabulary in (ModelConfig.vocab_size, LARGE_VOCABULARY):
        calls |= _heads(vocabulary, dtype)
    calls |= _mixture("64 experts, top 8", MANY_EXPERTS, dtype)
    return {name: call for name, call in calls.items() if any(part in name for part in only)}


def _dense(name: str, config: ModelConfig, dtype: torch.dtype) -> Cases:
    size, eps = config.hidden_size, config.rms_norm_eps
    heads = config.num_attention_heads + 2 * config.num_key_value_heads

    def head_norm() -> None:
        packed = _leaf(1, TOKENS, heads, config.head_dim, dtype=dtype)
        _both_ways(rms_norm(packed[:, :, : config.num_attention_heads], _leaf(config.head_dim), eps))

    def add_norm() -> None:
        x, residual = _leaf(TOKENS, size, dtype=dtype), _leaf(TOKENS, size, dtype=dtype)
        _both_ways(*add_rms_norm(x, residual, _leaf(size), eps))

    return {
        f"rms_norm, {name}": lambda: _both_ways(rms_norm(_leaf(TOKENS, size, dtype=dtype), _leaf(size), eps)),
        f"rms_norm of heads, {name}": head_norm,
        f"add_rms_norm, {name}": add_norm,
        f"swiglu, {name}": lambda: _both_ways(swiglu(_leaf(TOKENS, 2 * config.intermediate_size, dtype=dtype))),
    }


def _rope(size: int, kv_heads: int, dtype: torch.dtype) -> Cases:
    def run(*weights: Tensor) -> None:
        qkv = _leaf(1, TOKENS, (8 + 2 * kv_heads) * size, dtype=dtype)
        cos, sin = torch.rand(TOKENS, size // 2), torch.rand(TOKENS, size // 2)
        _both_ways(*rope(qkv, cos, sin, torch.arange(TOKENS).unsqueeze(0), 8, kv_heads, *weights))

    return {
        f"rope, 8/{kv_heads} heads of {size}": run,
        f"rope with norm, 8/{kv_heads} heads of {size}": lambda: run(_leaf(size), _leaf(size)),
    }


def _heads(vocabulary: int, dtype: torch.dtype) -> Cases:
    """The losses of the linear head. The hidden size does not matter: cuBLAS multiplies, the kernels get logits."""
    name, size = f"vocabulary of {vocabulary}", 64

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x, weight = _leaf(TOKENS, size, dtype=dtype), _leaf(vocabulary, size)
        return x, weight, torch.randint(0, vocabulary, (TOKENS,))

    def cross_entropy() -> None:
        x, weight, targets = inputs()
        weights = torch.ones(TOKENS)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                _both_ways(linear_cross_entropy(x, weight, targets, weights, kernels=True))

    def log_probs(entropy: bool) -> None:
        x, weight, targets = inputs()
        _both_ways(*linear_log_probs(x, weight, targets, temperature=0.8, entropy=entropy, kernels=True))

    def distillation(beta: float) -> None:
        x, weight, _ = inputs()
        teacher = torch.randn(TOKENS, size).to(dtype), torch.randn(vocabulary, size)
        _both_ways(linear_distillation(x, weight, *teacher, temperature=1.5, beta=beta, kernels=True))

    return {
        f"linear_cross_entropy, {name}": cross_entropy,
        f"linear_log_probs, {name}": lambda: log_probs(False),
        f"linear_log_probs with entropy, {name}": lambda: log_probs(True),
        f"linear_distillation, forward KL, {name}": lambda: distillation(0.0),
        f"linear_distillation, reverse KL, {name}": lambda: distillation(1.0),
        f"linear_distillation, JSD, {name}": lambda: distillation(0.5),
    }


def _mixture(name: str, config: ModelConfig, dtype: torch.dtype) -> Cases:
    size, inter, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    top_k = config.num_experts_per_tok

    def call_route(sequences: int) -> None:
        logits, ids = _leaf(TOKENS, experts), torch.arange(TOKENS) * sequences // TOKENS
        routing = route(logits, top_k, config.norm_topk_prob, ids, sequences, torch.ones(TOKENS))
        _both_ways(routing.gates, routing.scores)

    def call_experts() -> None:
        x = _leaf(TOKENS, size, dtype=dtype)
        gate_up, down = _leaf(experts, 2 * inter, size), _leaf(experts, size, inter)
        order = torch.arange(TOKENS * top_k, dtype=torch.int32)
        offsets = torch.linspace(0, TOKENS * top_k, experts + 1).int()
        gates = _leaf(TOKENS, top_k)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                _both_ways(moe_experts(x, gate_up, down, gates, order, offsets))

    return {
        f"route, {name}": lambda: call_route(1),
        f"route of 3 sequences, {name}": lambda: call_route(3),
        f"moe_experts, {name}": call_experts,
    }


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _both_ways(*outputs: Tensor | None) -> None:
    """Also run the backward pass, if there is one."""
    differentiable = [out for out in outputs if out is not None and out.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(out) for out in differentiable])
