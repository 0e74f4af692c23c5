"""Adapters against the equivalent dense weights: results, memory, sums and errors."""

import sys
from pathlib import Path

import pytest
import torch

from minimind import load_model, ops
from minimind.lora import (
    Adapter,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    lora_linears,
    merge_adapter,
    projections,
    remove_adapters,
    set_adapters,
    unmerge_adapter,
)
from minimind.lora_files import adapter_config, adapter_state
from minimind.modeling import Linear, Model
from minimind.weights import save_weights, to_stock
from tests.adapted import SHAPES, batch, dense, logits_of, make, matrices, with_adapter
from tests.kernels.contract import assert_within, moved
from tests.training.runs import finish


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_adapter_changes_nothing_and_only_it_trains(shape):
    model = make(shape)
    before, names = logits_of(model), [n for n, _ in model.named_parameters()]
    add_adapter(model, LoRAConfig(rank=4))
    assert torch.equal(logits_of(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()} - set(names)
    assert trained and all(n.endswith((".adapters.default.A", ".adapters.default.B")) for n in trained)
    for _, linear in lora_linears(model):
        adapter = linear.adapter("default")
        width = adapter.A.shape[1]
        assert not adapter.B.any() and adapter.A.abs().max() <= width**-0.5  # peft: Kaiming uniform, a = sqrt 5
        assert adapter.A.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_are_those_of_the_dense_weights(shape, rslora, ops_mode):
    """Logits agree, and dA = s B^T dW, dB = s dW A^T with the dense model's dW in float64. The adapter sums its
    products in another order, over 256 tokens."""
    model = with_adapter(make(shape), LoRAConfig(rank=4, alpha=6.0, rslora=rslora))
    scale = 6 / 2 if rslora else 6 / 4
    pairs = matrices(model)
    grad = torch.randn(2, 128, 97, generator=torch.Generator().manual_seed(5))

    def through_dense(plain: Model) -> dict[str, torch.Tensor]:
        logits = logits_of(plain)
        logits.backward(grad.to(logits.dtype))
        dweights = to_stock({k: p.grad for k, p in plain.named_parameters()}, plain.config)
        found = {"logits": logits.detach()}
        for module, (a, b) in pairs.items():
            dw = dweights[f"{module}.weight"]
            found[f"{module} A"], found[f"{module} B"] = scale * b.t().to(dw) @ dw, scale * dw @ a.t().to(dw)
        return found

    with ops.using("reference"):
        exact, single = dense(model, scale), dense(model, scale).float()
        truth, plain, off = map(through_dense, (exact, single, moved(single, terms=256)))
    logits = logits_of(model)
    logits.backward(grad)
    mine = {"logits": logits.detach()}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(grads, strict=False)  # to have them under peft's names, part by part
    for key, value in adapter_state(model).items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        mine[f"{module} {side}"] = value
    assert mine.keys() == truth.keys()
    for key, value in truth.items():
        assert_within(mine[key], plain[key], value, key, off[key])


def test_dora_gives_the_rows_their_lengths():
    """y, dx, dA, dB and dM are autograd's of M (W + s B A) x / |W + s B A|, the length a constant; merged as well."""
    generator = torch.Generator().manual_seed(0)
    weight, x, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((48, 32), (5, 32), (5, 48))
    )
    parts = {"q_proj": 32, "k_proj": 8, "v_proj": 8}
    linear = LoRALinear(torch.nn.Parameter(weight, False), parts)
    weights = linear.by_part(linear.weight)
    config = LoRAConfig(rank=4, alpha=6.0, dora=True)
    adapter = linear.adapters["a"] = Adapter({part: weights[part] for part in ("q_proj", "v_proj")}, config)
    x.requires_grad_()
    linear.active = ("a",)
    torch.testing.assert_close(linear(x), x @ weight.T)
    with torch.no_grad():
        adapter.B.normal_(generator=generator)
        adapter.M.mul_(1 + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64))
    rows = []
    for part, frozen in weights.items():
        if part in adapter.parts:
            a, b = adapter.split(adapter.A, adapter.B)[part]
            changed = frozen + 1.5 * b @ a
            frozen = adapter.by_part(adapter.M)[part][:, None] * changed / changed.detach().norm(dim=1, keepdim=True)
        rows.append(frozen)
    dense = torch.cat(rows)
    leaves = [x, adapter.A, adapter.B, adapter.M]
    expected = torch.autograd.grad(x @ dense.T, leaves, grad)
    y = linear(x)
    torch.testing.assert_close(y, x @ dense.T)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), expected)
    torch.testing.assert_close(linear.merged(), dense.detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_dora_adapter_changes_nothing(shape):
    model = make(shape)
    before = logits_of(model)
    add_adapter(model, LoRAConfig(rank=4, dora=True))
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_packed_projection_keeps_its_input_once_and_nothing_for_frozen_weights(dropout):
    parts = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    linear = LoRALinear(torch.nn.Parameter(torch.randn(64, 32), False), parts)
    linear.adapters["a"] = Adapter(linear.by_part(linear.weight), LoRAConfig(rank=4, dropout=dropout))
    linear.active = ("a",)
    own = {p.untyped_storage().data_ptr() for p in linear.parameters()}
    x, kept = torch.randn(3, 50, 32, requires_grad=True), {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = linear(x)
    low, inputs = (3 * 50 * 3 * 4, x.numel() * (2 if dropout else 1))  # A x; x, or what is left of it and the draw
    assert sum(kept.values()) == low + inputs
    assert (x.untyped_storage().data_ptr() in kept) == (dropout == 0)  # with dropout only what is left of it
    y.sum().backward()
    assert linear.weight.grad is None and x.grad is not None


def test_frozen_projections_keep_no_input():
    """SwiGLU keeps gate and up [T, 192]; what it makes of them [T, 96] is kept only for an adapter of down_proj."""
    kept: dict[int, int] = {}

    def keep(t):
        kept[t.data_ptr()] = t.numel()
        return t

    inputs = []
    for targets in (("o_proj",), ("o_proj", "down_proj")):
        model = with_adapter(make(), LoRAConfig(targets=targets))
        kept.clear()
        with ops.using("reference"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits_of(model)
        inputs.append(list(kept.values()).count(2 * 128 * 96))
    assert inputs[1] - inputs[0] == 2, inputs  # one a layer


def test_bf16_computes_over_float32_adapters_as_the_dense_weights_do():
    model = with_adapter(make(), LoRAConfig(rank=4))
    truth, plain = logits_of(dense(model, 4.0)), dense(model, 4.0).float()
    model.compute_dtype = plain.compute_dtype = torch.bfloat16
    logits = logits_of(model)
    assert logits.dtype == torch.bfloat16
    assert_within(logits, logits_of(plain), truth)
    logits.float().square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}


@pytest.mark.heavy
@pytest.mark.parametrize(("shape", "recompute"), [("dense", False), ("moe", True)])
def test_compiled_whole_and_recomputed_it_draws_the_same_dropout(shape, recompute):
    """A recomputed block must draw the same random numbers as the first time."""
    ids, cu = batch()
    found = []
    for fancy in (False, True):
        model = with_adapter(make(shape), LoRAConfig(rank=4, dropout=0.3)).train()
        run = model
        if fancy:
            model.recompute = recompute
            torch.compiler.reset()
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(7)
        out = run(ids, cu_seqlens=cu)
        (out.logits.square().mean() + out.aux_loss).backward()
        found.append((out.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_recomputed_without_a_compiler_it_draws_the_same_dropout():
    ids, cu = batch()
    found = []
    for recompute in (False, True):
        model = with_adapter(make(), LoRAConfig(rank=4, dropout=0.3)).train()
        model.recompute = recompute
        torch.manual_seed(7)
        model(ids, cu_seqlens=cu).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_merged_weights_compute_the_same_and_the_frozen_ones_come_back(tmp_path):
    model = with_adapter(make("moe"), LoRAConfig(rank=4))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    plain = dense(model, 4.0)
    truth, before = logits_of(plain), logits_of(model)
    merge_adapter(model)
    assert_within(logits_of(model), before, truth)
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        set_adapters(model, [])
    unmerge_adapter(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits_of(model), before)

    merge_adapter(model)
    merged = logits_of(model)
    remove_adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    save_weights(model, tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path)), merged)


def test_weights_are_saved_as_they_count(tmp_path):
    """Saved weights have the active adapters merged, whether they were merged before or not; the model does not
    change."""
    model = make("moe")
    base = logits_of(model)
    with_adapter(model, LoRAConfig(rank=4))
    before = logits_of(model)
    save_weights(model, tmp_path / "active")
    assert torch.equal(logits_of(model), before) and lora_linears(model)
    set_adapters(model, [])
    save_weights(model, tmp_path / "base")
    set_adapters(model, ["default"])
    merge_adapter(model)
    save_weights(model, tmp_path / "merged")
    merged = logits_of(model)
    assert not torch.equal(base, merged)
    for name, logits in (("active", merged), ("merged", merged), ("base", base)):
        assert torch.equal(logits_of(load_model(tmp_path / name)), logits), name


def test_removed_without_merging_the_base_is_left():
    model = make()
    before = logits_of(model)
    with_adapter(model, LoRAConfig())
    assert not torch.equal(logits_of(model), before)
    remove_adapters(model)
    assert torch.equal(logits_of(model), before) and not lora_linears(model)
    assert isinstance(model.layers[0].self_attn.qkv_proj, Linear)


def test_several_adapters_add_up_and_can_be_switched():
    model = make()
    base = logits_of(model)
    with_adapter(model, LoRAConfig(rank=4, targets=("q_proj", "down_proj")), "a", seed=1)
    only_a = logits_of(model)
    with_adapter(model, LoRAConfig(rank=2, alpha=2.0, targets=("k_proj", "q_proj")), "b", seed=2)
    only_b = logits_of(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapters.b." in n
    }
    set_adapters(model, ["a"])
    assert torch.equal(logits_of(model), only_a) and not torch.equal(only_a, only_b)
    set_adapters(model, [])
    assert torch.equal(logits_of(model), base)
    set_adapters(model, ["a", "b"])
    both = dense(model, 4.0, "a")
    extra = dense(model, 1.0, "b")  # W + B A; what b adds is its difference from W
    plain = Model(model.config).double()
    plain.load_state_dict({k: v.double() for k, v in model.state_dict().items() if ".adapters." not in k})
    summed = {k: v + extra.state_dict()[k] - plain.state_dict()[k] for k, v in both.state_dict().items()}
    plain.load_state_dict(summed)
    truth = logits_of(plain)
    assert_within(logits_of(model), logits_of(plain.float()), truth)
    merge_adapter(model)
    assert_within(logits_of(model), logits_of(plain.float()), truth)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "rank=0: must be at least 1"),
        (dict(alpha=0), "alpha=0: must be above 0"),
        (dict(dropout=1.0), r"dropout=1\.0"),
        (dict(targets=()), "targets are empty"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_targets_and_names_that_do_not_exist_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"target 'w1': this model has no such projection; choose from q_proj"):
        add_adapter(model, LoRAConfig(targets=("q_proj", "w1")))
    with pytest.raises(ValueError, match="'lm_head'"):
        add_adapter(model, LoRAConfig(targets=("lm_head",)))
    assert not lora_linears(model) and all(p.requires_grad for p in model.parameters())
    add_adapter(model, LoRAConfig(), "a")
    with pytest.raises(ValueError, match="'a' exists already"):
        add_adapter(model, LoRAConfig(), "a")
    with pytest.raises(ValueError, match="no adapter 'b' in this model; it has a"):
        set_adapters(model, ["a", "b"])
    with pytest.raises(ValueError, match="must not be empty or contain dots"):
        add_adapter(model, LoRAConfig(), "a.b")


def test_routed_experts_are_refused_and_shared_ones_are_adapted():
    only_routed = make("moe", num_shared_experts=0)
    with pytest.raises(ValueError, match="'gate_proj': routed experts take no adapter"):
        add_adapter(only_routed, LoRAConfig(targets=("gate_proj",)))
    with pytest.raises(ValueError, match=r"'experts\.0\.up_proj': routed experts take no adapter"):
        add_adapter(make("moe"), LoRAConfig(targets=("experts.0.up_proj",)))
    assert {n.split(".", 3)[3] for n in projections(only_routed)} == {f"self_attn.{c}_proj" for c in "qkvo"}
    model = make("moe")
    add_adapter(model, LoRAConfig(targets=("gate_proj",)))
    assert adapter_config(model).targets == ("shared_experts.0.gate_proj", "shared_experts.1.gate_proj")


def test_replicated_and_sharded_adapters_train_as_one_does():
    finish([sys.executable, str(Path(__file__).with_name("lora_ranks.py"))], processes=2)
