"""The cases of bench/kernels.py: each op at the presets' shapes, its implementations, and the work that it must do.

An implementation takes the op's leaves, which are the tensors that get gradients, and returns its outputs; it holds
the other inputs itself.

    minimind   our kernel on a GPU; on a CPU the PyTorch form that minimind.ops uses there
    eager      plain PyTorch, the kernel's reference
    compiled   the same under torch.compile
    native     PyTorch's own fused function, if there is one
    liger      Liger-Kernel, if it is installed and the device is a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bench.common.timing import Function, Pass
from bench.operators import implementations as others
from minimind.config import ModelConfig
from minimind.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from minimind.kernels.linear_distillation import linear_distillation, linear_distillation_ref
from minimind.kernels.linear_log_probs import linear_log_probs, linear_log_probs_ref
from minimind.kernels.moe_experts import moe_experts, moe_experts_ref
from minimind.kernels.moe_routing import route
from minimind.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from minimind.kernels.rope import rope, rope_ref
from minimind.kernels.swiglu import swiglu, swiglu_ref
from minimind.rope import rope_cos_sin

DOCUMENT = 512  # tokens; positions restart
TEMPERATURE = 1.5  # of distillation


@dataclass(frozen=True)
class KernelWork:
    """The least that a pass must move or multiply: bytes if `unit` is GB/s, floating-point operations if TFLOP/s.
    split: False for losses that compute their gradient in the forward pass, whose passes cannot be judged apart."""

    unit: Literal["GB/s", "TFLOP/s"]
    forward: float
    backward: float
    split: bool = True

    def of_pass(self, which: Pass) -> float | None:
        if which == "both":
            return self.forward + self.backward
        return getattr(self, which) if self.split else None


@dataclass(frozen=True)
class Case:
    """One op at one shape. reference: plain PyTorch, which also gives the true values in float64."""

    op: str
    preset: str
    shape: str
    tokens: int
    dtype: torch.dtype
    leaves: Sequence[Tensor]
    reference: Function
    implementations: dict[str, Function]
    work: KernelWork


@dataclass(frozen=True)
class KernelSetting:
    """Shape, dtype and device of a case, and its random tensors."""

    config: ModelConfig
    tokens: int
    dtype: torch.dtype
    device: torch.device
    kernels: bool  # ours are the Triton kernels, not the PyTorch forms
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def bytes(self) -> int:
        """Bytes of one activation."""
        return self.dtype.itemsize

    def activation(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype).to(self.device)

    def parameter(self, *shape: int, mean: float = 0.0) -> Tensor:
        return (mean + 0.02 * torch.randn(shape, generator=self.generator)).to(self.device)


Parts = tuple[str, Sequence[Tensor], Function, dict[str, Function], KernelWork]


def norm_work(s: KernelSetting, addends: int) -> KernelWork:
    """Bytes of one RMSNorm of N rows of C. Forward: each addend and y, and the sum of two addends. Backward: x or the
    sum, dy, the sum's gradient if there is a sum, and dx, which both addends share."""
    row = s.tokens * s.config.hidden_size * s.bytes
    return KernelWork("GB/s", 2 * addends * row, (2 + addends) * row)


def rope_work(s: KernelSetting, normed: bool) -> KernelWork:
    """Bytes of N tokens of (H + 2 G) heads of D, read and written once; the norm's backward reads q and k again."""
    heads, kv_heads = s.config.num_attention_heads, s.config.num_key_value_heads
    head = s.tokens * s.config.head_dim * s.bytes
    packed = (heads + 2 * kv_heads) * head
    return KernelWork("GB/s", 2 * packed, 2 * packed + (heads + kv_heads) * head * normed)


def swiglu_work(s: KernelSetting) -> KernelWork:
    """Bytes. Forward: gate, up and y. Backward: the same three, dgate and dup."""
    half = s.tokens * s.config.intermediate_size * s.bytes
    return KernelWork("GB/s", 3 * half, 5 * half)


def head_work(s: KernelSetting, teacher: bool = False, split: bool = False) -> KernelWork:
    """Operations of [N, C] x [C, V]: one product forward (two with a teacher), two backward. Recomputation does not
    count."""
    product = 2 * s.tokens * s.config.hidden_size * s.config.vocab_size
    return KernelWork("TFLOP/s", product * (1 + teacher), 2 * product, split)


def moe_work(s: KernelSetting) -> KernelWork:
    """Operations of K experts with three C x I matrices for each token; twice as many backward."""
    c = s.config
    forward = 6 * s.tokens * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size
    return KernelWork("TFLOP/s", forward, 2 * forward)


def _rms_norm(s: KernelSetting) -> Parts:
    size, eps = s.config.hidden_size, s.config.rms_norm_eps
    leaves = s.activation(s.tokens, size), s.parameter(size, mean=1.0)
    native = partial(others.native_rms_norm, eps=eps)
    implementations: dict[str, Function] = {
        "minimind": partial(rms_norm if s.kernels else rms_norm_ref, eps=eps),
        "native": native,
        "liger": partial(others.liger_rms_norm, eps=eps),
    }
    return f"C {size}", leaves, partial(rms_norm_ref, eps=eps), implementations, norm_work(s, 1)


def _add_rms_norm(s: KernelSetting) -> Parts:
    size, eps = s.config.hidden_size, s.config.rms_norm_eps
    leaves = s.activation(s.tokens, size), s.activation(s.tokens, size), s.parameter(size, mean=1.0)
    native = partial(others.native_add_rms_norm, eps=eps)
    implementations: dict[str, Function] = {
        "minimind": partial(add_rms_norm if s.kernels else add_rms_norm_ref, eps=eps),
        "native": native,
        "liger": partial(others.liger_add_rms_norm, eps=eps),
    }
    return f"C {size}", leaves, partial(add_rms_norm_ref, eps=eps), implementations, norm_work(s, 2)


def _rope(s: KernelSetting, normed: bool) -> Parts:
    c = s.config
    heads, kv_heads, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    leaves = [s.activation(1, s.tokens, (heads + 2 * kv_heads) * size)]
    if normed:
        leaves += [s.parameter(size, mean=1.0), s.parameter(size, mean=1.0)]
    ids = (torch.arange(s.tokens, device=s.device) % DOCUMENT).unsqueeze(0)
    cos, sin = rope_cos_sin(c, torch.arange(DOCUMENT, device=s.device))
    wide_cos, wide_sin = (torch.cat((t, t), dim=-1)[ids] for t in (cos, sin))
    eps = c.rms_norm_eps

    def reference(qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> tuple[Tensor, ...]:
        return rope_ref(qkv, cos, sin, ids, heads, kv_heads, q, k, eps)

    def native(qkv: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return others.native_rope(qkv, cos, sin, ids, heads, kv_heads, q, k, eps)

    def ours(qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> tuple[Tensor, ...]:
        return rope(qkv, cos, sin, ids, heads, kv_heads, q, k, eps)

    def liger(qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> tuple[Tensor, ...]:
        return others.liger_rope(qkv, wide_cos, wide_sin, heads, kv_heads, q, k, eps)

    implementations: dict[str, Function] = {"minimind": ours if s.kernels else reference, "liger": liger}
    if normed:
        implementations["native"] = native
    return f"D {size}, {heads}/{kv_heads} heads", leaves, reference, implementations, rope_work(s, normed)


def _swiglu(s: KernelSetting) -> Parts:
    size = s.config.intermediate_size
    implementations: dict[str, Function] = {
        "minimind": swiglu if s.kernels else swiglu_ref,
        "liger": others.liger_swiglu,
    }
    return f"I {size}", [s.activation(s.tokens, 2 * size)], swiglu_ref, implementations, swiglu_work(s)


def _head(s: KernelSetting) -> tuple[str, list[Tensor], Tensor]:
    """(shape, x and the weight, targets)"""
    size, vocabulary = s.config.hidden_size, s.config.vocab_size
    targets = torch.randint(0, vocabulary, (s.tokens,), generator=s.generator).to(s.device)
    return f"C {size}, V {vocabulary}", [s.activation(s.tokens, size), s.parameter(vocabulary, size)], targets


def _linear_cross_entropy(s: KernelSetting) -> Parts:
    shape, leaves, targets = _head(s)
    implementations: dict[str, Function] = {
        "minimind": partial(linear_cross_entropy, targets=targets, kernels=s.kernels),
        "native": partial(others.native_linear_cross_entropy, targets=targets),
        "liger": partial(others.liger_linear_cross_entropy, targets=targets),
    }
    reference = partial(linear_cross_entropy_ref, targets=targets)
    return shape, leaves, reference, implementations, head_work(s)


def _linear_log_probs(s: KernelSetting) -> Parts:
    shape, leaves, targets = _head(s)
    implementations: dict[str, Function] = {
        "minimind": lambda x, weight: linear_log_probs(x, weight, targets, kernels=s.kernels)[0],
        "native": partial(others.native_linear_log_probs, targets=targets),
        "liger": partial(others.liger_linear_log_probs, targets=targets),
    }

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return linear_log_probs_ref(x, weight, targets)[0]

    return shape, leaves, reference, implementations, head_work(s, split=True)


def _linear_distillation(s: KernelSetting) -> Parts:
    """Forward KL from a teacher of the same size."""
    (shape, leaves, _), (_, (teacher_x, teacher_weight), _) = _head(s), _head(s)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        teacher = teacher_x.to(x.dtype), teacher_weight.to(weight.dtype)
        return linear_distillation_ref(x, weight, *teacher, temperature=TEMPERATURE)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        teacher = teacher_x, teacher_weight
        return linear_distillation(x, weight, *teacher, temperature=TEMPERATURE, kernels=s.kernels)

    def liger(x: Tensor, weight: Tensor) -> Tensor:
        return others.liger_linear_distillation(x, weight, teacher_x, teacher_weight, TEMPERATURE)

    implementations: dict[str, Function] = {"minimind": ours, "liger": liger}
    return shape, leaves, reference, implementations, head_work(s, teacher=True)


def _moe(s: KernelSetting) -> Parts:
    """From the router's logits to the layer's output, including the sorting. The eager form is upstream's loop."""
    c = s.config
    experts, top_k, inter = c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
    normalize = c.norm_topk_prob
    leaves = [
        s.activation(s.tokens, c.hidden_size),
        s.activation(s.tokens, experts).float(),
        s.parameter(experts, 2 * inter, c.hidden_size),
        s.parameter(experts, c.hidden_size, inter),
    ]

    def reference(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_experts_ref(x, gate_up, down, *others.choose(logits, top_k, normalize))

    def ours(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = route(logits, top_k, normalize)
        return moe_experts(x, gate_up, down, routing.gates, routing.order, routing.offsets)

    native = partial(others.native_moe, top_k=top_k, normalize=normalize)
    implementations: dict[str, Function] = {
        "minimind": ours if s.kernels else native,
        "native": native,
        "liger": partial(others.liger_moe, top_k=top_k, normalize=normalize),
    }
    shape = f"C {c.hidden_size}, I {inter}, {experts} experts, top {top_k}"
    return shape, leaves, reference, implementations, moe_work(s)


BUILDERS: dict[str, Callable[[KernelSetting], Parts]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": partial(_rope, normed=False),
    "rope_qk_norm": partial(_rope, normed=True),
    "swiglu": _swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_log_probs": _linear_log_probs,
    "linear_distillation": _linear_distillation,
    "moe": _moe,
}


def applies(op: str, config: ModelConfig) -> bool:
    """Whether a model of this shape uses the op."""
    if op in ("rope", "rope_qk_norm"):
        return config.qk_norm == (op == "rope_qk_norm")
    return bool(config.num_experts) if op == "moe" else True


def build(
    op: str,
    preset: str,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = True,
    kernels: bool | None = None,
) -> Case:
    """The case on `device`, with every implementation that can run here. kernels: whether ours are the Triton kernels;
    None: on a GPU."""
    cuda = device.type == "cuda"
    setting = KernelSetting(ModelConfig.preset(preset), tokens, dtype, device, cuda if kernels is None else kernels)
    shape, leaves, reference, implementations, work = BUILDERS[op](setting)
    if not cuda:  # ours is PyTorch's fused form there, and Liger has none
        implementations = {"minimind": implementations["minimind"]}
    elif not others.has_liger():
        implementations.pop("liger")
    if op.startswith("linear") and not others.has_native_head():
        implementations.pop("native", None)
    implementations["eager"] = reference
    if compiled:
        implementations["compiled"] = torch.compile(reference, dynamic=False)
    ready = [leaf.requires_grad_() for leaf in leaves]
    return Case(op, preset, shape, tokens, dtype, ready, reference, implementations, work)
