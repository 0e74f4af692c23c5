import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.moe_routing import route, route_ref
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand

SIZES = [(1, 1, 1), (1, 4, 2), (63, 4, 2), (300, 4, 1), (123, 64, 8), (507, 5, 3), (9, 256, 16)]  # N, E, K


def kernel(top_k, normalize):
    def gates_and_scores(logits):
        routing = route(logits, top_k, normalize)
        return routing.gates, routing.scores

    return gates_and_scores


def reference(top_k, normalize):
    return lambda logits: route_ref(logits, top_k, normalize)[::2]


def assert_sorted(routing, experts):
    """Check that order, inverse and offsets are those of a stable sort by expert id."""
    flat = routing.expert_ids.flatten()
    order = flat.argsort(stable=True)
    assert torch.equal(routing.order.long(), order)
    assert torch.equal(routing.inverse[order].long(), torch.arange(flat.numel(), device=DEVICE))
    ends = torch.bincount(flat, minlength=experts).cumsum(0)
    assert routing.offsets[0] == 0 and torch.equal(routing.offsets[1:].long(), ends)


def assert_ids_exist(ids, experts):
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens, experts, top_k", SIZES)
def test_gates_and_scores(tokens, experts, top_k, normalize, dtype):
    logits = rand(tokens, experts, scale=2).to(dtype)
    assert_contract(kernel(top_k, normalize), reference(top_k, normalize), [logits], ["gates", "scores", "dlogits"])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_output_alone_has_its_gradient(used, normalize):
    assert_contract(
        lambda x: kernel(2, normalize)(x)[used],
        lambda x: reference(2, normalize)(x)[used],
        [rand(63, 5)],
        [("gates", "scores")[used], "dlogits"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, experts, top_k", SIZES)
def test_order(tokens, experts, top_k, dtype):
    logits = rand(tokens, experts).to(dtype)  # bfloat16 has ties
    routing = route(logits, top_k, True)
    assert torch.equal(routing.expert_ids.long(), route_ref(logits, top_k, True)[1])
    assert_sorted(routing, experts)
    ints = (routing.expert_ids, routing.order, routing.inverse, routing.offsets, routing.counts)
    assert all(t.dtype == torch.int32 and not t.requires_grad for t in ints)


def test_ties_go_to_the_lowest_expert():
    routing = route(torch.zeros(150, 6, device=DEVICE), 3, False)
    assert torch.equal(routing.expert_ids, torch.arange(3, device=DEVICE).int().expand(150, 3))
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]], device=DEVICE)
    assert route(logits, 4, False).expert_ids.tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("wanted", [0, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_to_one_expert(wanted, top_k):
    logits = torch.zeros(200, 4, device=DEVICE)
    logits[:, wanted] = 5
    routing = route(logits, top_k, False)
    assert_sorted(routing, 4)
    assert routing.counts[0, wanted] == 200 and routing.counts.sum() == 200 * top_k


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_confident_logits(top_k, normalize):
    """The first expert's p is near 1, and most others are 0 in float32."""
    logits = rand(63, 8)
    logits[:, 3] += 20
    logits[::2, 5] += 150
    assert_contract(kernel(top_k, normalize), reference(top_k, normalize), [logits], ["gates", "scores", "dlogits"])


def test_a_single_normalised_gate_is_1_and_has_no_gradient():
    logits = rand(63, 4, scale=30).requires_grad_()
    gates = route(logits, 1, True).gates
    assert torch.equal(gates, torch.ones_like(gates))
    gates.backward(rand(63, 1, seed=1))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_counts():
    logits, mask = rand(507, 5), rand(507, seed=1) > -0.5
    sequence_ids = torch.arange(507, device=DEVICE) // 100
    sequence_ids[7], sequence_ids[9] = -1, 6  # belong to no sequence
    chosen = torch.zeros(507, 5, dtype=torch.int32, device=DEVICE)
    chosen.scatter_(1, route_ref(logits, 2, True)[1], 1)
    assert torch.equal(route(logits, 2, True).counts, chosen.sum(0, keepdim=True))
    for weights in (mask, mask.float(), mask.bfloat16() * 0.5, mask.long()):
        counts = route(logits, 2, True, mask=weights).counts
        assert torch.equal(counts, (chosen * mask[:, None]).sum(0, keepdim=True))
    for ids in (sequence_ids, sequence_ids.int()):
        for kept in (mask, torch.ones_like(mask)):
            routing = route(logits, 2, True, ids, 6, None if kept.all() else kept)
            expected = [(chosen * kept[:, None])[sequence_ids == s].sum(0) for s in range(6)]
            assert torch.equal(routing.counts, torch.stack(expected))
            assert_sorted(routing, 5)  # masked tokens are routed all the same


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
def test_a_row_that_is_not_finite_stays_in_bounds(normalize):
    logits, bad = rand(140, 6), float("nan") * torch.ones(6, device=DEVICE)
    rows = torch.tensor([3, 60, 61, 130], device=DEVICE)
    broken = logits.clone()
    broken[3], broken[60, 2], broken[61, 4], broken[130, :] = bad, bad[0], float("inf"), float("-inf")
    routing = route(broken, 3, normalize)
    assert_ids_exist(routing.expert_ids, 6)
    assert_sorted(routing, 6)
    assert routing.gates[rows].isnan().all()
    fine = torch.ones(140, dtype=torch.bool, device=DEVICE)
    fine[rows] = False
    expected = route(logits, 3, normalize)
    assert torch.equal(routing.gates[fine], expected.gates[fine])
    assert torch.equal(routing.expert_ids[fine], expected.expert_ids[fine])


def test_minus_infinity_shuts_an_expert_out():
    logits = rand(63, 5)
    logits[:, 2] = float("-inf")
    assert (route(logits, 4, True).expert_ids != 2).all()
    assert_contract(kernel(2, True), reference(2, True), [logits], ["gates", "scores", "dlogits"])


def test_no_tokens():
    logits = rand(0, 4).requires_grad_()
    routing = route(logits, 2, True, torch.zeros(0, dtype=torch.int64, device=DEVICE), 3)
    (routing.gates.sum() + routing.scores.sum()).backward()
    assert routing.gates.shape == (0, 2) and routing.order.shape == (0,) and logits.grad.shape == (0, 4)
    assert routing.offsets.tolist() == [0] * 5 and routing.counts.tolist() == [[0] * 4] * 3


def test_logits_with_strides():
    for logits in (rand(6, 140).t(), rand(140, 12)[:, ::2], rand(140, 12)[:, 3:9]):
        assert_contract(kernel(2, True), reference(2, True), [logits], ["gates", "scores", "dlogits"])
        assert_sorted(route(logits, 2, True), 6)
    spread, mask = rand(6).expand(140, 6), (torch.arange(280, device=DEVICE) % 3 == 0)[::2]
    for a, b in zip(route(spread, 2, True, mask=mask), route(spread.clone(), 2, True, mask=mask.clone()), strict=True):
        assert torch.equal(a, b)


def test_second_backward():
    assert_second_backward_agrees(kernel(2, True), [rand(70, 5)])


def test_reference_by_finite_differences():
    logits = rand(7, 5).double().requires_grad_()
    for normalize in (False, True):
        assert torch.autograd.gradcheck(reference(2, normalize), (logits,))


def test_opcheck():
    logits, ids = rand(9, 5), torch.arange(9, device=DEVICE) // 5
    for args in ((None, 1, None), (ids, 2, torch.ones(9, device=DEVICE))):
        torch.library.opcheck(torch.ops.minimind.moe_route, (logits.clone().requires_grad_(), 2, True, *args))
    routing = route(logits, 2, True)
    for dgates, dscores in ((rand(9, 2), rand(9, 5)), (None, rand(9, 5))):
        torch.library.opcheck(
            torch.ops.minimind.moe_route_backward,
            (dgates, dscores, routing.scores, routing.expert_ids, True, torch.float32),
        )


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: route(x, 6, True), "top_k is 6; with 5 experts a token can choose 1 to 5"),
        (lambda x: route(x, 0, True), "top_k is 0"),
        (lambda x: route(x.repeat(1, 4), 17, True), "choose 1 to 16"),
        (lambda x: route(x.repeat(1, 52), 2, True), "260 experts"),
        (lambda x: route(x[:, :0], 1, True), "0 experts"),
        (lambda x: route(x[0], 1, True), "logits has 1 dimensions"),
        (lambda x: route(x.double(), 2, True), "logits is torch.float64"),
        (lambda x: route(x, 2, True, None, 3), "give sequence_ids as well"),
        (lambda x: route(x, 2, True, None, 0), "sequences is 0"),
        (lambda x: route(x, 2, True, x[:, 0], 3), "sequence_ids is torch.float32"),
        (lambda x: route(x, 2, True, x[:4, 0].long(), 3), r"sequence_ids is \[4\]"),
        (lambda x: route(x, 2, True, mask=x), r"mask is \[9, 5\]"),
        (lambda x: route(x, 2, True, mask=x[:, 0].to("meta")), "mask is on meta"),
    ],
)
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad(rand(9, 5))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 300),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 16),
    levels=st.integers(1, 50),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_routing(tokens, experts, top_k, levels, normalize, seed):
    """Few levels of logits make many ties."""
    top_k = min(top_k, experts)
    logits = (rand(tokens, experts, seed=seed) * levels).round() / levels
    routing = route(logits, top_k, normalize)
    gates, expert_ids, scores = route_ref(logits, top_k, normalize)
    assert torch.equal(routing.expert_ids.long(), expert_ids)
    torch.testing.assert_close(routing.gates, gates)
    torch.testing.assert_close(routing.scores, scores)
    assert_sorted(routing, experts)
