"""8-bit weights for decoding (csrc/cpu/int8.h, csrc/cuda/matvec.cuh), and their effect in plain PyTorch.

A weight is an integer in -127..127 times the scale of its row, max |w| / 127. On a CPU, activations are rounded to such
integers too before a product, with one scale for each group of 64 numbers of a row. Products within a group are summed
as integers, and the groups in float32. On a GPU activations are float32 and not rounded. Norms, routers, the embedding,
attention and the cache keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import ops
from minimind.modeling import Block, Linear, Model, MoE

WeightsDTypeName = Literal["auto", "int8"]

LARGEST = 127
GROUP = 64  # activations that share a scale
BLOCK = 16  # rows in a block of the packed form
ROW_UNIT = 16  # rows of the form for GPUs are padded to multiples of these numbers
_NOTHING = 1e-30  # a row or group without a larger number becomes zeros


def check_weights_dtype(dtype: torch.dtype | None, device: torch.device) -> None:
    """ValueError, one line, if decoding on `device` cannot use weights of this dtype. None: the compute dtype."""
    if dtype not in (None, torch.int8):
        raise ValueError(f"weights_dtype={dtype} must be None or torch.int8")
    if dtype is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"weights_dtype={dtype} needs a CPU or a CUDA GPU, not {device.type}: use weights_dtype=None")


def choose_weights_dtype(name: WeightsDTypeName, device: torch.device) -> torch.dtype | None:
    """The dtype that --weights-dtype names; None: the compute dtype. ValueError, one line, if `device` cannot decode
    with it."""
    if name == "auto":
        return None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--weights-dtype {name}: 8-bit weights need a CPU or a CUDA GPU, not {device}; drop the flag")
    return torch.int8


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [..., K] to (integers [..., K] in x's dtype, scales [..., 1]); integers * scales approximates x."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > _NOTHING, LARGEST / largest, 0.0)
    return (x * inverse).round(), largest / LARGEST


def packed_int8_shape(shape: torch.Size, gate_up: bool = False) -> tuple[int, ...]:
    """The shape of a packed matrix [..., N, K]: int32 [..., N / 16, K / 4 + 1, 16]. Each number holds four integers;
    the last row holds the scales. K is padded to a multiple of 64. A gate_up [2 I, K] becomes
    [..., I / 16, 2, K / 4 + 1, 16]."""
    *outer, n, k = shape
    blocks = (-(-n // 2 // BLOCK), 2) if gate_up else (-(-n // BLOCK),)
    return (*outer, *blocks, -(-k // GROUP) * GROUP // 4 + 1, BLOCK)


def pack_int8(weight: Tensor, out: Tensor, gate_up: bool = False) -> Tensor:
    """Pack weight [..., N, K], of any float dtype, into `out`, int32 of `packed_int8_shape`; returns it."""
    if gate_up:
        weight = weight.unflatten(-2, (2, -1))
    n, k = weight.shape[-2:]
    integers, scales = quantize(weight.float())
    to = out.transpose(-4, -3) if gate_up else out  # [..., N / 16, K / 4 + 1, 16]
    words = F.pad(integers.to(torch.int8), (0, -k % GROUP, 0, -n % BLOCK)).view(torch.int32)  # [..., N, K / 4]
    to[..., :-1, :].copy_(words.unflatten(-2, (-1, BLOCK)).transpose(-2, -1))
    scales = F.pad(scales.squeeze(-1), (0, -n % BLOCK)).contiguous()
    to[..., -1, :].copy_(scales.view(torch.int32).unflatten(-1, (-1, BLOCK)))
    return out


def int8_rows(weight: Tensor, into: Sequence[Tensor] = ()) -> list[Tensor]:
    """Weight [N, K], of any float dtype, as a GPU's step reads it: integers int8 [N, K padded with zeros to a multiple
    of 16] and scales float32 [N]. into: an earlier result for the same shape, whose memory is reused."""
    n, k = weight.shape
    integers, scales = quantize(weight.float())
    out = list(into) or [
        torch.zeros(n, -(-k // ROW_UNIT) * ROW_UNIT, dtype=torch.int8, device=weight.device),
        torch.empty(n, device=weight.device),
    ]
    out[0][:, :k].copy_(integers)
    out[1].copy_(scales.squeeze(-1))
    return out


def rounded_rows(weight: Tensor) -> Tensor:
    """weight [..., N, K] rounded to 8 bits, in its own dtype."""
    integers, scales = quantize(weight.float())
    return (integers * scales).to(weight.dtype)


def rounded_activations(x: Tensor) -> Tensor:
    """x [..., K] rounded as decoding rounds it before a product, in its own dtype."""
    k = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    integers, scales = quantize(F.pad(wide, (0, -k % GROUP)).unflatten(-1, (-1, GROUP)))
    return (integers * scales).flatten(-2)[..., :k].to(x.dtype)


@contextmanager
def rounded_weights(model: Model, activations: bool | None = None) -> Iterator[None]:
    """A context in which the model rounds its matrices as decoding with 8-bit weights does, and computes in float32.
    This covers its forward passes and `head_weight`. The model is restored at the end. activations: round them too;
    None: on a CPU, where decoding does."""
    activations = model.device.type == "cpu" if activations is None else activations
    with ExitStack() as stack, torch.no_grad():
        stack.callback(setattr, model, "compute_dtype", model.compute_dtype)
        model.compute_dtype = torch.float32
        _untie(model, stack)
        experts = [layer.mlp for layer in cast(Iterable[Block], model.layers) if isinstance(layer.mlp, MoE)]
        for moe in experts:
            _replace(moe.gate_up_proj, stack)
            _replace(moe.down_proj, stack)
            if activations:
                moe.forward = MethodType(_experts_forward, moe)  # type: ignore[method-assign]
                stack.callback(moe.__dict__.pop, "forward")
        routers = [moe.router for moe in experts]
        for module in model.modules():
            if isinstance(module, Linear) and not any(module is router for router in routers):
                _replace(module.weight, stack)
                if activations and module is not model.lm_head:
                    stack.callback(module.register_forward_pre_hook(_round_input).remove)
        if activations:
            stack.callback(model.norm.register_forward_hook(_round_output).remove)
        yield


def _untie(model: Model, stack: ExitStack) -> None:
    """Give the model its own head, so that rounding it does not change the embedding."""
    if model.lm_head is None:
        head = Linear(model.config.hidden_size, model.config.vocab_size)
        head.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone(), requires_grad=False)
        model.lm_head = head
        stack.callback(setattr, model, "lm_head", None)


def _replace(weight: Tensor, stack: ExitStack) -> None:
    before = weight.data
    weight.data = rounded_rows(before)
    stack.callback(setattr, weight, "data", before)


def _round_input(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return rounded_activations(inputs[0]), *inputs[1:]


def _round_output(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return rounded_activations(output[0]), output[1]


def _experts_forward(moe: MoE, x: Tensor, *report: Any) -> tuple[Tensor, None]:
    """MoE.forward without its report, on rounded activations."""
    flat = x.flatten(0, 1)
    routing = ops.route(moe.router(flat), moe.config.num_experts_per_tok, moe.config.norm_topk_prob)
    out = torch.zeros_like(flat)
    rounded = rounded_activations(flat)
    for expert, (gate_up, down) in enumerate(zip(moe.gate_up_proj, moe.down_proj, strict=True)):
        rows, choice = (routing.expert_ids == expert).nonzero(as_tuple=True)
        hidden = rounded_activations(ops.swiglu(F.linear(rounded[rows], gate_up)))
        out.index_add_(0, rows, F.linear(hidden, down) * routing.gates[rows, choice, None])
    for shared in moe.shared_experts:
        out = out + shared(flat)
    return out.view_as(x), None
