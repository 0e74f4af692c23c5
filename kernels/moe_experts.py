"""The experts of a mixture of experts: each is a SwiGLU MLP over the tokens that chose it.

    g, u = x_t Wg_e^T, x_t Wu_e^T         h = silu(g) * u        out_t = sum_k gates[t, k] h Wd_e^T,  e = ids[t, k]
    dh  = dout_t Wd_e                     dgates[t, k] = dh . h
    du  = gate dh silu(g)                 dg = gate dh u s (1 + g (1 - s))        with s = 1 / (1 + exp(-g))
    dx_t = sum_k (dg Wg_e + du Wu_e)      dWg_e = sum_t dg^T x_t    dWu_e likewise    dWd_e = sum_t dout_t^T (gate h)

x [N, C]; gate_up [E, 2 I, C], Wg above Wu; down [E, C, I]; gates [N, K]; order int32 [N * K] and offsets int32 [E + 1]
from moe_routing.route. The kernels of grouped_gemm.py compute the products and gather and scatter copies as they load
and store, as in ScatterMoE (arXiv 2403.08245). dgates follows from dh, so the experts' outputs are not kept; the
backward keeps g and u, [N * K, 2 I], in x.dtype.

The K copies of a token are written separately, [N * K, C], and then added. Adding them in place with atomics would need
a float32 output: for K = 2 one copy's addition would move as many bytes as both copies have in bfloat16. The order of
additions, and so the last bits, would also change from run to run. With K = 1 nothing needs to be added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.grouped_gemm import hidden, hidden_grad, scatter, weight_grad
from minimind.kernels.triton_support import check, check_tensors, kernel_op, on_host, rows_of


def moe_experts_ref(x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, expert_ids: Tensor) -> Tensor:
    """Run one expert after the other; expert_ids int [N, K]."""
    (tokens, size), top_k = x.shape, expert_ids.shape[1]
    copies = x.new_zeros(tokens * top_k, size)
    for expert in range(gate_up.shape[0]):
        chosen = (expert_ids.flatten() == expert).nonzero().squeeze(1)
        gate, up = F.linear(x[chosen // top_k], gate_up[expert].to(x.dtype)).chunk(2, dim=-1)
        copies = copies.index_copy(0, chosen, F.linear(F.silu(gate) * up, down[expert].to(x.dtype)))
    return (copies.view(tokens, top_k, size) * gates.to(x.dtype).unsqueeze(-1)).sum(dim=1)


@kernel_op("moe_experts")
def _moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    x, top_k = rows_of(x), gates.shape[1]
    h, saved = hidden(x, _weight(gate_up, x), order, offsets, top_k, save)
    out = scatter(h, _weight(down, x), order, offsets, top_k, gates.contiguous(), transposed=True)
    return out, _none(x) if saved is None else saved


@kernel_op("moe_experts_backward")
def _moe_experts_backward(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, order: Tensor, offsets: Tensor,
    saved: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dgate_up, ddown, dgates); needs: which of them to compute, the others have size 0."""
    dout, x, top_k = rows_of(dout), rows_of(x), gates.shape[1]
    d_saved, scaled, dgates = hidden_grad(
        dout, _weight(down, x), saved, order, offsets, gates.contiguous(),
        need_dgate_up=needs[0] or needs[1], need_scaled=needs[2], need_dgates=needs[3],
    )  # fmt: skip
    dx, dgate_up, ddown = _none(x), _none(gate_up), _none(down)
    if d_saved is not None and needs[0]:
        dx = scatter(d_saved, _weight(gate_up, x), order, offsets, top_k, None, transposed=False)
    if d_saved is not None and needs[1]:
        dgate_up = weight_grad(d_saved, x, order, offsets, top_k, False, gate_up.dtype)
    if scaled is not None:
        ddown = weight_grad(dout, scaled, order, offsets, top_k, True, down.dtype)
    return dx, dgate_up, ddown, _none(gates) if dgates is None else dgates.to(gates.dtype)


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype of the products; a float32 master weight is copied, in the forward and the backward."""
    return weight.to(x.dtype).contiguous()


def _none(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


@_moe_experts.register_fake
def _(x, gate_up, down, gates, order, offsets, save):
    saved = (order.shape[0], gate_up.shape[1]) if save else (0,)
    return x.new_empty(x.shape), x.new_empty(saved)


@_moe_experts_backward.register_fake
def _(dout, x, gate_up, down, gates, order, offsets, saved, needs):
    inputs = (x, gate_up, down, gates)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(inputs, needs, strict=True))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[1])


def _backward(ctx, dout, _dsaved):
    needs = list(ctx.needs_input_grad[:4])
    if dout is None:
        return (None,) * 7
    x, gate_up, down, gates, order, offsets, saved = ctx.saved_tensors
    check(saved.ndim == 2, "save is False, so nothing was kept for the backward; call the operator with True")
    grads = _moe_experts_backward(dout, x, gate_up, down, gates, order, offsets, saved, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


_moe_experts.register_autograd(_backward, setup_context=_save)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, order: Tensor, offsets: Tensor) -> None:
    check_tensors(x=x, gate_up=gate_up, down=down, gates=gates)
    check(x.ndim == 2 and x.shape[1] > 0, "x is {}; it must be [tokens, size]", list(x.shape))
    tokens, size = x.shape
    check(
        gate_up.ndim == 3 and gate_up.shape[0] > 0 and gate_up.shape[1] > 0 and gate_up.shape[1] % 2 == 0
        and gate_up.shape[2] == size,
        "gate_up is {}, and x needs [experts, 2 * intermediate, {}]", list(gate_up.shape), size,
    )  # fmt: skip
    experts, inter = gate_up.shape[0], gate_up.shape[1] // 2
    message = "gate_up has experts of {} x {} numbers; an expert must have fewer than 2^31"
    check(2 * inter * size < 2**31, message, 2 * inter, size)
    expected = [experts, size, inter]
    check(list(down.shape) == expected, "down is {}, and gate_up needs {}", list(down.shape), expected)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        message = "{} is {}; for x in {} it must be the same or torch.float32"
        check(weight.dtype in (x.dtype, torch.float32), message, name, weight.dtype, x.dtype)
    check(
        gates.ndim == 2 and gates.shape[0] == tokens and gates.shape[1] > 0,
        "gates is {}, and x needs [{}, choices]",
        list(gates.shape),
        tokens,
    )
    for name, tensor, length in (("order", order, gates.numel()), ("offsets", offsets, experts + 1)):
        check(
            tensor.shape == (length,) and tensor.dtype == torch.int32 and tensor.device == x.device,
            "{} is {} {} on {}; moe_routing.route makes torch.int32 [{}] on {}",
            name, tensor.dtype, list(tensor.shape), tensor.device, length, x.device,
        )  # fmt: skip
    if on_host(order):
        _check_sort(order, offsets)


def _check_sort(order: Tensor, offsets: Tensor) -> None:
    """ValueError for values that would make a kernel access memory outside its tensors."""
    copies = order.numel()
    check(
        bool((order.sort().values == torch.arange(copies, device=order.device)).all()),
        "order is not a permutation of the copies 0..{}; use that of moe_routing.route",
        copies - 1,
    )
    check(
        int(offsets[0]) == 0 and int(offsets[-1]) == copies and bool((offsets.diff() >= 0).all()),
        "offsets do not rise from 0 to the {} copies; use those of moe_routing.route",
        copies,
    )


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Run each token through its experts: sum over k of gates[t, k] * down_e(silu(gate_e x_t) * up_e x_t).

    x [N, C]: float32, bfloat16 or float16. gate_up [E, 2 I, C], down [E, C, I]: x.dtype, or float32, which is rounded
    to x.dtype first. gates [N, K], of any of these dtypes; order int32 [N * K] and offsets int32 [E + 1] from
    `moe_routing.route` -> [N, C] in x.dtype, contiguous. Each gradient has its tensor's dtype; the experts' are rounded
    once from float32 sums. Two runs give the same bits. Nothing is kept if no gradient is needed. ValueError for other
    input; bad values in order and offsets are found on CPU tensors, or with MINIMIND_CHECK=1.
    """
    _check(x, gate_up, down, gates, order, offsets)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, gates))
    return _moe_experts(x, gate_up, down, gates, order.contiguous(), offsets.contiguous(), save)[0]
