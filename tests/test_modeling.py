"""The model against itself (packed, padded, one document at a time), against transformers, and its accounting."""

import pytest
import torch
import torch.nn.functional as F

from minimind import ModelConfig, ops
from minimind.config import YarnScaling
from minimind.modeling import Model
from minimind.weights import to_stock
from tests.conftest import documents_batch, routing_of

# Float32 sums taken in another order: up to 3e-6 on logits here (AVX512); other CPUs get three times that.
ROUNDING = 1e-5

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(
    num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=48, router_aux_loss_coef=0.1
)
SHAPES = {
    "dense": TINY,
    "qk_norm": {**TINY, "qk_norm": True},
    "untied": {**TINY, "tie_word_embeddings": False},
    "moe_sequence": {**TINY, **MOE},
    "moe_batch": {**TINY, **MOE, "router_aux_loss_level": "batch"},
}
DOCUMENTS = [[1, 99, 28], [63, 65], [128], [17, 1, 1, 50, 59]]


def make(shape: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model(ModelConfig(**SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that mistakes show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pieces_of(ids, cu):
    flat = ids.flatten()
    return [flat[a:b] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_padded_and_single_documents_agree(shape, ops_mode):
    model = make(shape)
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    documents = pieces_of(ids, cu)
    packed = model(ids, cu_seqlens=cu).logits.flatten(0, 1)
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=ROUNDING)

    longest = max(len(d) for d in documents)
    for side in ("right", "left"):
        padded = torch.zeros(len(documents), longest, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, document in enumerate(documents):
            where = slice(0, len(document)) if side == "right" else slice(longest - len(document), longest)
            padded[row, where], mask[row, where] = document, 1
        logits = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], alone, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_and_padded_losses_and_gradients_agree(shape, ops_mode):
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    documents = pieces_of(ids, cu)
    targets = torch.randint(0, 97, (4, 128), generator=torch.Generator().manual_seed(1))
    longest = max(len(d) for d in documents)
    padded = torch.zeros(len(documents), longest, dtype=torch.int64)
    padded_targets = torch.full_like(padded, -100)
    for row, (document, target) in enumerate(zip(documents, pieces_of(targets, cu), strict=True)):
        padded[row, : len(document)], padded_targets[row, : len(document)] = document, target

    results = []
    for batch, goal, how in (
        (ids, targets, {"cu_seqlens": cu}),
        (padded, padded_targets, {"attention_mask": padded_targets.ne(-100)}),
    ):
        model = make(shape)
        out = model(batch, return_logits=False, **how)
        loss = ops.linear_cross_entropy(out.hidden_states.flatten(0, 1), model.head_weight, goal.flatten())
        total = loss / goal.ne(-100).sum() + out.aux_loss
        total.backward()
        results.append((total, {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for key, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][key], rtol=1e-4, atol=2e-7, msg=key)


@pytest.mark.parametrize(("shape", "compiled"), [("dense", False), ("moe_sequence", False), ("moe_sequence", True)])
def test_recomputed_blocks_keep_less_and_give_the_same_gradients(shape, compiled):
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    found = []
    for recompute in (False, True):
        model, kept = make(shape).train(), []
        model.recompute = recompute
        torch.compiler.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            out = run(ids, cu_seqlens=cu)
        (out.logits.square().mean() + out.aux_loss).backward()
        found.append((sum(kept), {name: p.grad for name, p in model.named_parameters()}))
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-5, atol=1e-7, msg=name)
    assert compiled or found[1][0] < 0.5 * found[0][0]


def test_reference_and_fused_agree_for_every_shape():
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    for shape in SHAPES:
        model, outputs = make(shape), []
        for mode in ("reference", "fused"):
            with ops.using(mode):
                out = model(ids, cu_seqlens=cu)
            outputs.append((out.logits, out.aux_loss))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=ROUNDING)


def test_later_tokens_and_other_documents_do_not_matter(ops_mode):
    model = make("dense")
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    before = model(ids, cu_seqlens=cu).logits
    changed = ids.clone()
    changed[0, 50:] = (changed[0, 50:] + 1) % 97  # within the second document of row 0, and all after it
    after = model(changed, cu_seqlens=cu).logits
    torch.testing.assert_close(before[0, :50], after[0, :50], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-6)
    assert (before[0, 50:100] - after[0, 50:100]).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("case", ["random", "all_to_one", "one_token"])
def test_moe_experts_equal_a_loop_over_experts(top_k, case):
    generator = torch.Generator().manual_seed(0)
    tokens = 1 if case == "one_token" else 123
    x = torch.randn(tokens, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    gate_up = torch.randn(4, 48, 32, generator=generator, dtype=torch.float64).mul(0.2).requires_grad_()
    down = torch.randn(4, 32, 24, generator=generator, dtype=torch.float64).mul(0.2).requires_grad_()
    order = torch.rand(tokens, 4, generator=generator).argsort(dim=1)
    if case == "all_to_one":
        order = torch.arange(4).expand(tokens, 4).contiguous()  # with top_k = 1 three experts get nothing
    ids, gates = order[:, :top_k], torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    inputs = [t.detach().float().requires_grad_() for t in (x, gate_up, down)]
    out = ops.moe_experts(*inputs, routing_of(ids, gates.float(), experts=4))

    truth = torch.zeros(tokens, 32, dtype=torch.float64)
    for e in range(4):
        gate, up = (x @ gate_up[e].t()).chunk(2, dim=1)
        weight = (gates * (ids == e)).sum(dim=1, keepdim=True)
        truth = truth + weight * ((F.silu(gate) * up) @ down[e].t())
    grad = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    out.backward(grad.float())
    truth.backward(grad)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    for mine, exact in zip(inputs, (x, gate_up, down), strict=True):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_tokens_per_expert_and_balanced_loss():
    model = make("moe_sequence")
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    out = model(ids, cu_seqlens=cu)
    assert out.tokens_per_expert.shape == (2, 4)
    assert out.tokens_per_expert.sum(dim=1).tolist() == [ids.numel() * 2] * 2
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.router.weight.zero_()  # a router that knows nothing: probabilities are equal
    assert model(ids, cu_seqlens=cu).aux_loss.item() == pytest.approx(2 * 0.1, rel=1e-5)  # layers * coef


def test_the_router_scores_in_float32_whatever_the_compute_dtype(monkeypatch):
    model, scored, route = make("moe_sequence"), [], ops.route
    model.compute_dtype = torch.bfloat16
    monkeypatch.setattr(ops, "route", lambda logits, *rest: scored.append(logits) or route(logits, *rest))
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    model(ids, cu_seqlens=cu)
    assert len(scored) == 2
    for logits in scored:  # not bfloat16's numbers in a wider dtype
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_bf16_compute_keeps_fp32_masters():
    model = make("qk_norm")
    model.compute_dtype = torch.bfloat16
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    out = model(ids, cu_seqlens=cu, return_logits=False)
    assert out.hidden_states.dtype == torch.bfloat16
    ops.linear_cross_entropy(out.hidden_states.flatten(0, 1), model.head_weight, ids.flatten()).backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_costs_the_model_reports():
    model = make("dense")
    per_layer = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 3 * 64 * 96
    matrices = 97 * 64 + 2 * per_layer
    attention = 2 * (2 * 2 * 4 * 16 * 100) // 2  # layers * (scores and values) * heads * dim * context, half
    assert model.flops_per_token(100, training=False) == 2 * matrices + attention
    assert model.flops_per_token(100) == 3 * model.flops_per_token(100, training=False)
    assert model.kv_bytes_per_token() == 2 * 2 * 2 * 16 * 2
    assert make("untied").flops_per_token(100) == model.flops_per_token(100)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_yarn", "qwen3_moe"])
def test_equal_to_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="install minimind[export] to compare with transformers")
    shape = dict(TINY, max_position_embeddings=512, rms_norm_eps=1e-6)
    theirs = {**shape, "tie_word_embeddings": True, "attention_bias": False}
    rope: dict = {"rope_type": "default", "rope_theta": 1e6}
    if kind == "llama":
        ours = ModelConfig(**shape)
        build = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    else:
        ours = ModelConfig(**shape, qk_norm=True)
        build = (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
    if kind == "qwen3_yarn":
        yarn = dict(factor=4.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0)
        ours = ModelConfig(**shape, qk_norm=True, rope_scaling=YarnScaling(**yarn, attention_factor=None))
        rope = {"rope_type": "yarn", "rope_theta": 1e6, **yarn}
    if kind == "qwen3_moe":
        moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
        ours = ModelConfig(**shape, qk_norm=True, **moe)
        theirs |= dict(moe, norm_topk_prob=True, decoder_sparse_step=1)
        build = (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM)
    torch.manual_seed(0)
    model = Model(ours)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = build[0](**theirs, rope_parameters=rope, attn_implementation="eager")
    peer = build[1](config).eval()
    _load_into_peer(peer, to_stock(model.state_dict(), ours))
    ids = torch.randint(0, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peer(ids).logits, rtol=0, atol=ROUNDING)


def _load_into_peer(peer, state):
    """transformers >= 5 stacks a MoE's experts in memory, as we do; fill whichever names it has."""
    names = peer.state_dict().keys()
    state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    for name in [n for n in names if n not in state]:
        prefix, _, leaf = name.rpartition(".")
        experts = range(4)
        parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
        state[name] = torch.stack(
            [torch.cat([state[f"{prefix}.{e}.{part}.weight"] for part in parts]) for e in experts]
        )
    peer.load_state_dict({n: state[n] for n in names})
