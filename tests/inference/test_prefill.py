import dataclasses
import itertools
import sys

import pytest
import torch

from minimind import modeling
from minimind.inference import prefill
from minimind.inference import runner as runner_module
from minimind.inference.batch import DecodeBatch
from minimind.inference.decode.kv_cache import FLOAT8, PagedCache
from minimind.inference.prefill import ChunkAttention, pack_chunks, pack_rows
from minimind.inference.requests import SamplingParams
from minimind.inference.runner import Replica, Runner, graph_sizes
from minimind.inference.scheduler import Chunk, SequenceState
from minimind.ops import native, varlen
from tests.inference.decode.cases import needs_native
from tests.inference.small import small_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()


def sequence_of(tokens, pages):
    out = SequenceState(0, 0, 1, tokens)
    out.pages = pages
    return out


def runner_of(model, dtype=torch.float32, page_size=4, kv_dtype=None, backend="reference", weights_dtype=None):
    config = model.config  # NaN in tests: what is not written shows
    cache = PagedCache.allocate(config, 32, page_size, kv_dtype or dtype, CPU)
    batch = DecodeBatch(4, 16, page_size, config.vocab_size, CPU)
    return Runner(Replica(model, dtype), cache, batch, 128, backend, weights_dtype=weights_dtype), cache


@pytest.fixture
def native_prompts(monkeypatch):
    """Prompts go through the native step on any processor."""
    monkeypatch.setattr(runner_module, "native_prompt_rows", lambda *_: 1 << 20)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("variant", ["dense", "moe", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("native_prompts")
def test_chunks_of_several_prompts_give_the_logits_of_whole_forwards(backend, variant, dtype):
    model = small_model(variant, vocab_size=50)
    runner, cache = runner_of(model, dtype, backend=backend)
    a, b, c = (
        sequence_of(TOKENS[0][:17], [9, 3, 20, 5, 0]),
        sequence_of(TOKENS[1][:6], [7, 1]),
        sequence_of(TOKENS[2][:30], [2, 8, 4, 31, 30, 29, 28, 27]),
    )
    steps = [
        [Chunk(a, 0, 5, False), Chunk(b, 0, 6, True)],
        [Chunk(a, 5, 6, False), Chunk(c, 0, 20, False)],
        [Chunk(a, 6, 17, True), Chunk(c, 20, 30, True)],
    ]
    logits = torch.cat([runner.prefill(chunks) for chunks in steps])
    assert logits.dtype == torch.float32
    used = sum((len(s.tokens) + 3) // 4 for s in (a, b, c))
    assert cache.k[0, :, 0, 0, 0].isfinite().sum() == used  # first rows of just those pages

    def forward(tokens, mode):
        model.double() if mode is None else model.float()
        model.compute_dtype = mode
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].double()

    for row, s in zip(logits, (b, a, c), strict=True):
        truth, plain = forward(s.tokens, None), forward(s.tokens, dtype)
        eps = 16 * torch.finfo(dtype).eps * truth.abs().max()
        assert (row - truth).abs().max() <= 2 * (plain - truth).abs().max() + eps
    model.float()


@needs_native
@pytest.mark.usefixtures("native_prompts")
@pytest.mark.parametrize("weights_dtype", [None, torch.int8])
@pytest.mark.parametrize("variant", ["qk_norm, untied", "moe"])
def test_a_prompt_is_the_same_bit_for_bit_however_it_is_cut(variant, weights_dtype):
    """In chunks, beside other prompts, and token by token as if it were decoded."""
    model = small_model(variant, vocab_size=50)
    tokens, pages = TOKENS[0][:23], [9, 3, 20, 5, 0, 6]
    other = sequence_of(TOKENS[1][:6], [7, 1])
    found = []
    for cuts in ([0, 23], [0, 9, 22, 23], range(24)):
        runner, cache = runner_of(model, torch.bfloat16, kv_dtype=FLOAT8, backend="native", weights_dtype=weights_dtype)
        s = sequence_of(tokens, pages)
        for start, end in itertools.pairwise(cuts):
            others = [Chunk(other, 0, 6, True)] if start == 9 else []
            logits = runner.prefill([*others, Chunk(s, start, end, end == 23)])
            assert len(logits) == len(others) + (end == 23)
        written = cache.k[:, pages].flatten(1, 2)[:, :23]
        found.append((logits[-1], written.view(torch.uint8)))
    assert found[0][0].isfinite().all()
    for logits, written in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(written, found[0][1])
    s = sequence_of(tokens, pages)
    s.computed = 23
    runner._batch.join(s, SamplingParams(), seed=0)
    runner._batch.append(0, torch.tensor([tokens[-1]]), torch.zeros(1))
    assert torch.equal(runner.decode()[0], found[0][0])


@needs_native
def test_more_tokens_than_the_step_takes_go_through_the_layers(monkeypatch):
    on_x86 = native.build_info().cpu_kernels_in_use.startswith(("avx", "amx"))
    assert runner_module.native_prompt_rows(CPU) == (sys.maxsize if on_x86 else 0)
    monkeypatch.setattr(runner_module, "native_prompt_rows", lambda *_: 8)
    runner, _ = runner_of(small_model(vocab_size=50), backend="native")
    calls = []
    step = runner_module.prefill_step
    monkeypatch.setattr(runner_module, "prefill_step", lambda *a: calls.append(len(a[2].token)) or step(*a))
    s = sequence_of(TOKENS[0][:17], [9, 3, 20, 5, 0])
    runner.prefill([Chunk(s, 0, 9, False)])
    runner.prefill([Chunk(s, 9, 17, True)])
    assert calls == [8]


def test_pack_rows():
    a, b = sequence_of(list(range(10, 19)), [5, 2, 7]), sequence_of([30, 31], [1])
    rows = pack_rows([Chunk(a, 3, 7, False), Chunk(b, 0, 2, True)], 4)
    assert rows.token.tolist() == [13, 14, 15, 16, 30, 31]
    assert rows.position.tolist() == [3, 4, 5, 6, 0, 1] and rows.length.tolist() == [4, 5, 6, 7, 1, 2]
    assert rows.slot.tolist() == [23, 8, 9, 10, 4, 5]
    assert rows.page_table.tolist() == [[5, 2, 7]] * 4 + [[1, 0, 0]] * 2
    assert rows.last.tolist() == [5]
    assert [t.dtype for t in rows] == [torch.int64, *[torch.int32] * 2, torch.int64, *[torch.int32] * 2]


def test_rows_with_a_long_context_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr(prefill, "ROWS_TIMES_CONTEXT", 1)
    a, b = sequence_of(list(range(100)), list(range(25))), sequence_of(list(range(50)), list(range(25, 38)))
    rows = pack_rows([Chunk(a, 0, 64, False), Chunk(b, 0, 50, True), Chunk(a, 64, 100, True)], 4)
    parts = list(rows.parts())
    assert [len(part.token) for part in parts] == [64, 64, 22]
    assert [part.last.tolist() for part in parts] == [[], [49], [21]]
    for whole, *cut in zip(rows, *parts, strict=True):
        assert torch.equal(torch.cat(cut), whole) or whole is rows.last
    monkeypatch.undo()
    assert len(list(rows.parts())) == 1


def test_pack_chunks():
    a, b = sequence_of(list(range(10, 19)), [5, 2, 7]), sequence_of([30, 31], [1])
    prompts = pack_chunks([Chunk(a, 3, 7, False), Chunk(b, 0, 2, True)], 4, CPU)
    assert prompts.token.tolist() == [13, 14, 15, 16, 30, 31]
    assert prompts.position.tolist() == [3, 4, 5, 6, 0, 1]
    assert prompts.slot.tolist() == [23, 8, 9, 10, 4, 5]
    assert prompts.context.tolist() == [20, 21, 22, 23, 8, 9, 10, 4, 5]
    assert prompts.last.tolist() == [5]
    assert prompts.bounds == [(0, 4, 0, 7), (4, 6, 7, 9)]
    assert not prompts.fresh
    assert pack_chunks([Chunk(b, 0, 2, True)], 4, CPU).fresh


def fake_varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False, seqused_k=None,
                     block_table=None, num_splits=None):  # fmt: skip
    """torch's varlen_attn as documented, in float64, one sequence at a time."""
    assert window_size == (-1, 0)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.empty_like(q)
    for i in range(len(cu_q) - 1):
        rows = q[cu_q[i] : cu_q[i + 1]]
        if block_table is None:
            keys, values = (x[cu_k[i] : cu_k[i + 1]] for x in (k, v))
        else:
            assert block_table.dtype == seqused_k.dtype == torch.int32
            keys, values = (x[block_table[i].long()].flatten(0, 1)[: seqused_k[i]] for x in (k, v))
        assert len(rows) <= max_q and len(keys) <= max_k
        repeats = q.shape[1] // keys.shape[1]
        assert repeats == 1 or enable_gqa
        keys, values = (x.double().repeat_interleave(repeats, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", rows.double(), keys) * q.shape[-1] ** -0.5
        hidden = torch.ones(len(rows), len(keys)).tril(len(keys) - len(rows)) == 0
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[cu_q[i] : cu_q[i + 1]] = torch.einsum("hqk,khd->qhd", p, values).to(q.dtype)
    return out


@pytest.mark.parametrize("gqa", [True, False])
def test_flash_attention_gets_the_arguments_it_documents(monkeypatch, gqa):
    """Without a GPU, the kernel is replaced by an implementation of its documentation."""
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(varlen, "TAKES_FEWER_HEADS", gqa)
    a, b = sequence_of([1] * 9, [5, 2, 7]), sequence_of([1] * 2, [1])
    prompts = pack_chunks([Chunk(a, 3, 9, True), Chunk(b, 0, 2, True)], 4, CPU)
    table = torch.tensor([[5, 2, 7], [1, 0, 0]], dtype=torch.int32)
    attention = ChunkAttention(dataclasses.replace(prompts, page_table=table))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 4, 16, generator=generator)
    cache = torch.randn(2, 8, 4, 2, 16, generator=generator)
    k, v = (x.flatten(0, 1)[prompts.context] for x in cache)
    expected = attention.sdpa(q, k, v)
    eps = 64 * torch.finfo(torch.float32).eps
    assert (attention.varlen(q, k, v) - expected).abs().max() <= eps
    assert (attention.paged_varlen(q, *cache) - expected).abs().max() <= eps


def test_inference_computes_no_load_balance_loss(monkeypatch):
    """It would cost a dozen unused launches per layer."""
    monkeypatch.setattr(modeling, "load_balance_loss", None)
    runner, _ = runner_of(small_model("moe", vocab_size=50))
    s = sequence_of(TOKENS[0][:9], [3, 1, 0])
    assert runner.prefill([Chunk(s, 0, 9, True)]).isfinite().all()
    s.computed = 9
    runner._batch.join(s, SamplingParams(), seed=0)
    assert runner._decode_layers(1).shape == (1, 50)


def test_rows_beyond_the_batch_change_nothing():
    """A CUDA graph runs more rows than the batch has."""
    model = small_model("moe", vocab_size=50)
    runner, cache = runner_of(model)
    for tokens, pages in zip(TOKENS, ([3, 1, 0], [2, 7, 5], [4, 6, 8]), strict=True):
        s = sequence_of(tokens[:9], pages)
        runner.prefill([Chunk(s, 0, 9, True)])
        s.computed = 9
        runner._batch.join(s, SamplingParams(), seed=0)
    runner._batch.leave(runner._batch.sequences[2])
    runner._batch.append(0, torch.tensor([7, 8]), torch.zeros(2))
    runner._batch.advance()
    before = cache.k.clone()
    exact, padded = runner._decode_layers(2), runner._decode_layers(4)
    assert torch.allclose(padded[:2], exact, rtol=0, atol=64 * torch.finfo(torch.float32).eps * exact.abs().max())
    changed = (cache.k != before) & ~(cache.k.isnan() & before.isnan())
    assert changed.flatten(2).any(-1).any(0).nonzero().flatten().tolist() == [0, 5]


def test_graph_sizes():
    assert graph_sizes(1) == [1]
    assert graph_sizes(8) == [8, 4, 2, 1]
    assert graph_sizes(12) == [12, 8, 4, 2, 1]
