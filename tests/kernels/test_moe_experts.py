import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.moe_experts import moe_experts, moe_experts_ref
from minimind.kernels.moe_routing import route, route_ref
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand, run

NAMES = ["out", "dx", "dgate_up", "ddown", "dgates"]
# N, E, K, C, I: tiles that are not full in any direction, then tiles that are
SIZES = [(1, 4, 2, 50, 37), (63, 4, 2, 50, 37), (123, 4, 1, 64, 64), (2, 1, 1, 1, 1)]


def weights(experts, size, inter, dtype):
    return (
        rand(experts, 2 * inter, size, seed=1, scale=size**-0.5).to(dtype),
        rand(experts, size, inter, seed=2, scale=inter**-0.5).to(dtype),
    )


def case(tokens, experts, top_k, size, inter, dtype, logits=None):
    """([x, gate_up, down, gates], routing)"""
    routing = route(rand(tokens, experts, seed=3) if logits is None else logits, top_k, False)
    x = rand(tokens, size).to(dtype)
    return [x, *weights(experts, size, inter, dtype), routing.gates], routing


def assert_experts(inputs, routing, names=NAMES):
    assert_contract(
        lambda x, gate_up, down, gates: moe_experts(x, gate_up, down, gates, routing.order, routing.offsets),
        lambda x, gate_up, down, gates: moe_experts_ref(x, gate_up, down, gates, routing.expert_ids),
        inputs,
        names,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_moe_experts(sizes, dtype):
    assert_experts(*case(*sizes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(dtype):
    assert_experts(*case(70, 2, 2, 140, 72, dtype))


def test_float16():
    assert_experts(*case(63, 4, 2, 50, 37, torch.float16))


@pytest.mark.heavy
def test_64_experts():
    assert_experts(*case(3, 64, 8, 24, 16, torch.bfloat16))


@pytest.mark.slow
def test_64_experts_float32():
    assert_experts(*case(63, 64, 8, 72, 40, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted, top_k", [(0, 1), (2, 2)])
def test_all_tokens_to_one_expert(wanted, top_k, dtype):
    """Experts without tokens (three with one choice, two with two) have gradients of exactly 0."""
    logits = torch.zeros(140, 4, device=DEVICE)
    logits[:, wanted] = 5
    inputs, routing = case(140, 4, top_k, 40, 24, dtype, logits)
    assert_experts(inputs, routing)
    leaves = [t.detach().requires_grad_() for t in inputs]
    moe_experts(*leaves, routing.order, routing.offsets).float().pow(2).sum().backward()
    unused = [e for e in range(4) if e not in routing.expert_ids]
    assert len(unused) == 4 - top_k
    for grad in (leaves[1].grad[unused], leaves[2].grad[unused]):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k, normalize", [(1, False), (2, False), (2, True)])
def test_from_router_logits_to_output(top_k, normalize, dtype):
    def kernel(logits, x, gate_up, down):
        routing = route(logits, top_k, normalize)
        return moe_experts(x, gate_up, down, routing.gates, routing.order, routing.offsets)

    def reference(logits, x, gate_up, down):
        gates, expert_ids, _ = route_ref(logits, top_k, normalize)
        return moe_experts_ref(x, gate_up, down, gates, expert_ids)

    inputs = [rand(63, 4, seed=3), rand(63, 48).to(dtype), *weights(4, 48, 40, dtype)]
    seeds_in_dtype = [inputs[1], inputs[0], *inputs[2:]]  # the contract rounds to the dtype of the first
    assert_contract(
        lambda x, logits, *w: kernel(logits, x, *w),
        lambda x, logits, *w: reference(logits, x, *w),
        seeds_in_dtype,
        ["out", "dx", "dlogits", "dgate_up", "ddown"],
    )


def test_float32_weights_keep_their_float32_gradients():
    inputs, routing = case(63, 4, 2, 50, 37, torch.bfloat16)
    masters = [t.float() for t in weights(4, 50, 37, torch.float32)]
    assert_experts([inputs[0], *masters, inputs[3]], routing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    (_, gate_up, down, gates), routing = case(63, 4, 2, 50, 37, dtype)
    spread = gates.repeat_interleave(2, dim=1)[:, ::2]
    for x in (rand(50, 63).to(dtype).t(), rand(63, 80).to(dtype)[:, 11:61]):
        assert_experts([x, gate_up, down, spread], routing)
    x = rand(63, 50).to(dtype)
    assert_experts([x, gate_up.mT.contiguous().mT, down.mT.contiguous().mT, gates], routing)
    x, sort = rand(50).to(dtype).expand(63, 50), (routing.order, routing.offsets)
    same = moe_experts(x.clone(), gate_up, down, gates, *sort)
    assert torch.equal(moe_experts(x, gate_up, down, gates, *sort), same)


def test_an_expanded_output_gradient():
    inputs, routing = case(63, 4, 2, 50, 37, torch.float32)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = moe_experts(*leaves, routing.order, routing.offsets)
    spread = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), spread, strict=True):
        assert torch.equal(a, b)


def test_only_some_inputs_need_a_gradient():
    inputs, routing = case(20, 4, 2, 20, 17, torch.float32)

    def function(*tensors):
        return moe_experts(*tensors, routing.order, routing.offsets)

    everything = run(function, inputs, None, grads=True)[1:]
    for wanted in ((0,), (1,), (2, 3)):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        out = function(*leaves)
        out.backward(rand(*out.shape, seed=99))
        for i, (leaf, grad) in enumerate(zip(leaves, everything, strict=True)):
            assert torch.equal(leaf.grad, grad) if i in wanted else leaf.grad is None


def test_tensors_kept_for_the_backward():
    inputs, routing = case(63, 4, 2, 50, 37, torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_experts(*leaves, routing.order, routing.offsets)
    given_to_it = {t.data_ptr() for t in (*leaves, routing.order, routing.offsets)}
    new = [t for t in saved if t.data_ptr() not in given_to_it]
    assert [(t.shape, t.dtype) for t in new] == [((126, 74), torch.bfloat16)]
    args = [t.detach() for t in leaves]
    assert torch.ops.minimind.moe_experts(*args, routing.order, routing.offsets, False)[1].numel() == 0


def test_nothing_is_kept_where_no_gradient_can_come(monkeypatch):
    inputs, routing = case(9, 4, 2, 24, 16, torch.float32)
    leaves = [t.detach().requires_grad_() for t in inputs]
    saves = []
    original = torch.ops.minimind.moe_experts
    monkeypatch.setattr(
        "minimind.kernels.moe_experts._moe_experts", lambda *args: saves.append(args[-1]) or original(*args)
    )
    with_grad = moe_experts(*leaves, routing.order, routing.offsets)
    with torch.no_grad():
        without = moe_experts(*leaves, routing.order, routing.offsets)
    moe_experts(*(t.detach() for t in leaves), routing.order, routing.offsets)
    assert saves == [True, False, False] and torch.equal(with_grad, without)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_with_its_token_and_its_expert(dtype):
    """Tiles reach past an expert's rows, and values there must not enter sums, not even times 0."""
    (x, gate_up, down, gates), routing = case(63, 4, 1, 50, 37, dtype)
    first = routing.order[routing.offsets[2]].item()  # behind the last row of expert 1
    x[first] = float("nan")
    leaves = [t.detach().requires_grad_() for t in (x, gate_up, down, gates)]
    out = moe_experts(*leaves, routing.order, routing.offsets)
    out.backward(torch.ones_like(out))
    for rows in (out, leaves[0].grad, leaves[3].grad):
        assert rows[first].isnan().all() and rows.isnan().any(dim=1).sum() == 1
    for grads in (leaves[1].grad, leaves[2].grad):
        assert grads.flatten(1).isnan().any(dim=1).tolist() == [False, False, True, False]


def test_large_preactivations():
    """silu saturates to 0 or its argument where exp would overflow in one direction."""
    inputs, routing = case(63, 4, 2, 50, 37, torch.float32)
    assert_experts([inputs[0], inputs[1] * 200, *inputs[2:]], routing)


def test_no_tokens():
    inputs, routing = case(0, 4, 2, 50, 37, torch.float32)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = moe_experts(*leaves, routing.order, routing.offsets)
    out.sum().backward()
    assert out.shape == (0, 50) and leaves[0].grad.shape == (0, 50) and leaves[3].grad.shape == (0, 2)
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in leaves[1:3])


def test_second_backward_and_two_runs_agree():
    inputs, routing = case(63, 4, 2, 50, 37, torch.bfloat16)

    def function(*tensors):
        return moe_experts(*tensors, routing.order, routing.offsets)

    assert_second_backward_agrees(function, inputs)
    for a, b in zip(run(function, inputs, None, True), run(function, inputs, None, True), strict=True):
        assert torch.equal(a, b)


def test_reference_by_finite_differences():
    inputs, routing = case(5, 3, 2, 4, 3, torch.float32)
    leaves = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: moe_experts_ref(*t, routing.expert_ids), leaves)


def test_opcheck():
    inputs, routing = case(5, 3, 2, 8, 6, torch.float32)
    leaves = [t.detach().requires_grad_() for t in inputs]
    sort = routing.order, routing.offsets
    torch.library.opcheck(torch.ops.minimind.moe_experts, (*leaves, *sort, True))
    dout, saved = rand(5, 8), rand(10, 12)
    torch.library.opcheck(
        torch.ops.minimind.moe_experts_backward,
        (dout, *(t.detach() for t in inputs), *sort, saved, [True, False, True, True]),
    )


def test_a_backward_for_which_nothing_was_kept_is_refused():
    inputs, routing = case(5, 3, 2, 8, 6, torch.float32)
    x = inputs[0].requires_grad_()
    out, _ = torch.ops.minimind.moe_experts(x, *inputs[1:], routing.order, routing.offsets, False)
    with pytest.raises(ValueError, match="save is False"):
        out.sum().backward()


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x, w, d, g, o, f: moe_experts(x.double(), w, d, g, o, f), "x is torch.float64"),
        (lambda x, w, d, g, o, f: moe_experts(x[0], w, d, g, o, f), r"x is \[8\]"),
        (lambda x, w, d, g, o, f: moe_experts(x, w[:, :5], d, g, o, f), r"gate_up is \[3, 5, 8\]"),
        (lambda x, w, d, g, o, f: moe_experts(x, w[:, :, :7], d, g, o, f), r"needs \[experts, 2 \* inter"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d[:, :, :5], g, o, f), r"down is .* needs \[3, 8, 6\]"),
        (lambda x, w, d, g, o, f: moe_experts(x, w.bfloat16(), d, g, o, f), "gate_up is torch.bfloat16"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d.half(), g, o, f), "down is torch.float16"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d, g[:4], o, f), r"gates is \[4, 2\]"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d, g, o[:9], f), r"order is torch.int32 \[9\]"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d, g, o.long(), f), "order is torch.int64"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d, g, o, f[:3]), "offsets is"),
        (lambda x, w, d, g, o, f: moe_experts(x, w, d, g, o, f.to("meta")), "offsets is .* on meta"),
        (lambda x, w, d, g, o, f: moe_experts(x, w.to("meta"), d, g, o, f), "gate_up is on meta"),
    ],
)
def test_bad_input_is_refused(bad, message):
    inputs, routing = case(5, 3, 2, 8, 6, torch.float32)
    with pytest.raises(ValueError, match=message):
        bad(*inputs, routing.order, routing.offsets)


@pytest.mark.parametrize(
    "place, number, message",
    [(0, 10, "order is not a permutation"), (0, -1, "order is not a permutation"), (1, 11, "offsets do not rise")],
)
def test_a_sort_with_indices_out_of_range_is_refused(monkeypatch, place, number, message):
    monkeypatch.setenv("MINIMIND_CHECK", "1")
    inputs, routing = case(5, 3, 2, 8, 6, torch.float32)
    sort = [routing.order.clone(), routing.offsets.clone()]
    sort[place][-1] = number
    with pytest.raises(ValueError, match=message):
        moe_experts(*inputs, *sort)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 140), experts=st.integers(1, 9), top_k=st.integers(1, 4), size=st.integers(1, 140),
    inter=st.integers(1, 140), dtype=st.sampled_from(DTYPES), skew=st.integers(0, 4),
)  # fmt: skip
def test_any_size(tokens, experts, top_k, size, inter, dtype, skew):
    logits = rand(tokens, experts, seed=3) - skew * torch.arange(experts, device=DEVICE)
    assert_experts(*case(tokens, experts, min(top_k, experts), size, inter, dtype, logits))
