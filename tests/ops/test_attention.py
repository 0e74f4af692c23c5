"""Attention over packed documents: each implementation against a mask, by the numerics contract."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.ops import attention, native, varlen
from minimind.ops import document_attention as operator
from minimind.ops.attention import (
    CausalLayout,
    DocumentLayout,
    MaskLayout,
    SharedPrefix,
    SharedPrefixLayout,
    VarlenLayout,
    _CopyToDocuments,
    attention_name,
    make_layout,
)
from minimind.ops.document_attention import document_attention, make_stacks
from tests.conftest import documents_batch
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand, run

CPU = torch.device("cpu")
NAMES = ["out", "dq", "dk", "dv"]
LENGTHS = [1, 100, 27, 63, 1, 123, 16, 15, 64, 97, 5]
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="this operator is the CPU's")


def boundaries(lengths: list[int], empty: int = 0) -> torch.Tensor:
    """cu_seqlens with this many empty documents at the end."""
    ends = np.cumsum([0, *lengths]).tolist()
    return torch.tensor(ends + [ends[-1]] * empty, dtype=torch.int32)


def masked(q, k, v, cu_seqlens):
    layout = make_layout(1, q.shape[0], q.device, q.dtype, cu_seqlens, fused=False)
    assert isinstance(layout, MaskLayout)
    return layout.attend(q[None], k[None], v[None])[0]


def heads(tokens: int, query: int, groups: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((tokens, query, size), (tokens, groups, size), (tokens, groups, size))
    return [rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    """The operator uses all threads for its tiles; other tests run on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "stacked"])
def form(request, monkeypatch):
    """Run with csrc/'s and with PyTorch's implementation of the operator."""
    if request.param == "native":
        reason = native.why_not(CPU)
        if reason is not None:
            pytest.skip(reason)
    else:
        monkeypatch.setattr(operator, "runs_natively", lambda q: False)
    return request.param


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 96])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [63], [40, 40, 40]])
def test_documents(form, lengths, size, dtype):
    assert operator.runs_natively(torch.empty(1, 1, size, dtype=dtype)) == (form == "native")
    cu = boundaries(lengths, empty=3)
    assert_contract(
        lambda q, k, v: document_attention(q, k, v, cu),
        lambda q, k, v: masked(q, k, v, cu),
        heads(sum(lengths), 4, 2, size, dtype),
        NAMES,
    )


@cpu_only
def test_long_documents_and_one_key_head_each(form):
    """Several tiles with all remainders; as many key heads as query heads; eight query heads per key head."""
    for lengths, query, groups in (([512, 49, 95, 144], 2, 2), ([257, 1, 2], 8, 1)):
        cu = boundaries(lengths)
        assert_contract(
            lambda q, k, v, cu=cu: document_attention(q, k, v, cu),
            lambda q, k, v, cu=cu: masked(q, k, v, cu),
            heads(sum(lengths), query, groups, 16, torch.bfloat16),
            NAMES,
        )


@cpu_only
def test_steep_scores(form):
    """All probabilities but one are 0, and padding must have no effect even if exp overflows. Scores of tens of
    thousands are rounded by thousandths, and so are the odds of two similar ones."""
    q, k, v = heads(sum(LENGTHS), 4, 2, 16, torch.float32)
    cu = boundaries(LENGTHS)
    assert_contract(
        lambda q, k, v: document_attention(q, k, v, cu),
        lambda q, k, v: masked(q, k, v, cu),
        [q * 100, k * 100, v],
        NAMES,
        terms=sum(LENGTHS),
    )


@cpu_only
def test_autocast_rounds_nothing(form):
    inputs, cu = heads(sum(LENGTHS), 4, 2, 16, torch.float32), boundaries(LENGTHS)
    plain = run(lambda q, k, v: document_attention(q, k, v, cu), inputs, None, grads=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(lambda q, k, v: document_attention(q, k, v, cu), inputs, None, grads=True)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@cpu_only
def test_second_backward_and_opcheck(form):
    inputs, cu = heads(12, 4, 2, 16, torch.float32), boundaries([1, 7, 4])
    assert_second_backward_agrees(lambda q, k, v: document_attention(q, k, v, cu), inputs)
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.minimind.document_attention, (*leaves, cu))
    plain = [t.detach() for t in (leaves[0], *leaves)]
    torch.library.opcheck(torch.ops.minimind.document_attention_backward, (*plain, cu))


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_that_share_their_beginning(form, dtype):
    """Twice a prompt with two answers, and a single document, against the mask of visible tokens."""
    parts = [(0, 37, 20, 63), (120, 1, 1, 100), (222, 15, 0, 0)]  # begin, length of the prompt and of each answer
    total, sees, rows, ends = 237, torch.zeros(237, 237, dtype=torch.bool), [], [0]
    for begin, prompt, first, second in parts:
        shared = list(range(begin, begin + prompt))
        for answer in (
            [*range(begin + prompt, begin + prompt + first)],
            [*range(begin + prompt + first, begin + prompt + first + second)],
        ):
            document = shared + answer
            for i, token in enumerate(document if answer or not first else []):
                sees[token, document[: i + 1]] = True
            rows += document if answer or not first else []
            ends.append(len(rows))
    shared_prefix = SharedPrefix(torch.tensor(rows), torch.tensor(ends, dtype=torch.int32), places_of(rows, total))
    layout = make_layout(1, total, CPU, dtype, boundaries([total]), shared_prefix=shared_prefix)
    assert isinstance(layout, SharedPrefixLayout) and isinstance(layout.documents, DocumentLayout)
    plain = make_layout(1, total, CPU, dtype, boundaries([total]), fused=False, shared_prefix=shared_prefix)
    mask = MaskLayout(sees[None, None])
    assert isinstance(plain, MaskLayout) and torch.equal(plain.mask, mask.mask)
    assert_contract(
        lambda q, k, v: layout.attend(q[None], k[None], v[None])[0],
        lambda q, k, v: mask.attend(q[None], k[None], v[None])[0],
        heads(total, 4, 2, 64, dtype),
        NAMES,
    )


def places_of(rows: list[int], tokens: int) -> torch.Tensor:
    found = [[i for i, row in enumerate(rows) if row == token] for token in range(tokens)]
    most = max(map(len, found))
    return torch.tensor([some + [-1] * (most - len(some)) for some in found])


class Plain:
    """Attention whose result is an exact sum."""

    def attend(self, q, k, v):
        return q + k + v


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_a_beginning_are_added_up_in_float32_and_in_order(dtype):
    """Forty documents with one prompt, and padding that nothing is read from."""
    rows = list(range(10)) + [*range(8), 8] * 39 + [0] * 64
    places = places_of(rows[:-64], 10)
    layout = SharedPrefixLayout(torch.tensor(rows, device=DEVICE), places.to(DEVICE), Plain())
    weight = rand(1, 10, 4, 8, seed=1).to(dtype)
    copies = rand(len(rows) - 64, 4, 8, seed=2).to(dtype)

    def gradient(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x = torch.zeros(10, 4, 8, dtype=dtype, device=DEVICE, requires_grad=True)
        read = _CopyToDocuments.apply(x, layout.rows, layout.places)
        (read[:-64] * copies.to(dtype)).sum().backward()
        q, k, v = (torch.ones(1, *x.shape, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(3))
        (layout.attend(q, k, v) * weight.to(dtype)).sum().backward()
        return x.grad, q.grad, k.grad, v.grad

    torch.use_deterministic_algorithms(True)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            mine = gradient(dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    called = {event.key for event in recorded.key_averages()}
    assert not {name for name in called if "index_add" in name or "index_put" in name or "scatter" in name}
    for grad, truth in zip(mine, gradient(torch.float64), strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_stacks_waste_little():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.2, 0.8, 500).astype(int), 1, 512)
    stacks = make_stacks(np.concatenate(([0], np.cumsum(lengths))))
    assert sum(s.documents * s.length**2 for s in stacks) < 1.4 * (lengths**2).sum()
    assert len(stacks) < 20
    taken = torch.cat([s.tokens for s in stacks])
    assert torch.equal(taken.sort().values, torch.arange(int(lengths.sum())))


def test_which_form_runs():
    cu = boundaries([8, 8])
    cuda = torch.device("cuda")
    assert isinstance(make_layout(2, 8, CPU, torch.float32, cu), DocumentLayout)
    assert isinstance(make_layout(2, 8, CPU, torch.float32, cu, fused=False), MaskLayout)
    assert isinstance(make_layout(2, 8, CPU, torch.float32), CausalLayout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
        patch.setattr(attention, "before_sm_80", lambda: False)
        assert isinstance(make_layout(2, 8, cuda, torch.bfloat16, cu), VarlenLayout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_the_name_is_that_of_the_layout(monkeypatch, fused, dtype):
    """The name that benchmarks and a run's versions.json record."""
    monkeypatch.setattr(varlen, "_chosen", "flash3")
    monkeypatch.setattr(attention, "before_sm_80", lambda: False)
    names = {MaskLayout: "masked", DocumentLayout: "documents", VarlenLayout: "flash3"}
    layout = make_layout(1, 8, torch.device("cpu"), dtype, torch.tensor([0, 3, 8]), fused=fused)
    assert attention_name(torch.device("cpu"), dtype, fused) == names[type(layout)]
    on_a_gpu = VarlenLayout if fused and dtype == torch.bfloat16 else MaskLayout
    assert attention_name(torch.device("cuda"), dtype, fused) == names[on_a_gpu]


@pytest.mark.parametrize("with_gqa", [False, True])
def test_calls_of_flash_attention(monkeypatch, with_gqa):
    """A stand-in for PyTorch's varlen_attn, which does not run on a CPU, with either of its signatures."""
    cu = boundaries(LENGTHS, empty=5)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, **options):
        assert cu_q is cu_k and max_q == max_k >= max(LENGTHS) and window_size == (-1, 0)
        assert options == ({"enable_gqa": True} if with_gqa else {})
        assert with_gqa or k.shape == v.shape == q.shape
        return masked(q, k, v, cu_q)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "TAKES_FEWER_HEADS", with_gqa)
    q, k, v = heads(sum(LENGTHS), 4, 2, 16, torch.float32)
    out = VarlenLayout(cu, 128).attend(q[None], k[None], v[None])[0]
    torch.testing.assert_close(out, masked(q, k, v, cu))


@pytest.mark.parametrize("with_gqa", [False, True])
def test_the_choice_of_flash_attention_does_not_break_a_graph(monkeypatch, with_gqa):
    def varlen_attn(q, k, v, *bounds, window_size, enable_gqa=False):
        return q * k.mean() + v.mean() * bounds[-1]

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "TAKES_FEWER_HEADS", with_gqa)
    q, k, v = (x[None] for x in heads(sum(LENGTHS), 4, 2, 16, torch.float32))
    layout = VarlenLayout(boundaries(LENGTHS), 128)
    compiled = torch.compile(layout.attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), layout.attend(q, k, v))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: flash attention over documents")
@pytest.mark.parametrize("size, groups", [(64, 2), (80, 2), (96, 4), (128, 2)])
def test_varlen_on_a_gpu(size, groups):
    cu = boundaries(LENGTHS, empty=9).to(DEVICE)
    layout = VarlenLayout(cu, 128)
    assert_contract(
        lambda q, k, v: layout.attend(q[None], k[None], v[None])[0],
        lambda q, k, v: masked(q, k, v, cu),
        heads(sum(LENGTHS), 8, groups, size, torch.bfloat16),
        NAMES,
    )


@cpu_only
def test_a_compiled_model_is_compiled_once():
    """Batches of other documents, padded to one number of boundaries, need no second compilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=97, num_experts=4, moe_intermediate_size=16, router_aux_loss_coef=0.1,
    )  # fmt: skip
    model = Model(config)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ([[64], [1, 63]], [[10, 20, 34], [64]], [[1, 1, 62], [32, 32]]):
        ids, cu = documents_batch(lengths, 64, 97)
        cu = torch.cat((cu, cu[-1:].expand(8 - len(cu))))
        out, expected = (m(ids, cu_seqlens=cu, return_logits=False) for m in (compiled, model))
        torch.testing.assert_close(out.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
        (out.hidden_states.square().mean() + out.aux_loss).backward()
    assert counter.frame_count == 1
    assert ops.get_mode() == "fused"
