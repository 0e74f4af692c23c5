"""Adapters against the dense weights they stand for and against peft; what they keep, save and refuse."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind import ModelConfig, load_model, ops
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
from minimind.lora_files import adapter_config, adapter_state, load_adapter, save_adapter
from minimind.modeling import Linear, Model
from minimind.weights import from_stock, save_weights, to_stock
from tests.conftest import documents_batch
from tests.kernels.contract import error

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
SHAPES = {
    "dense": TINY,
    "qk_norm": {**TINY, "qk_norm": True},
    "moe": {**TINY, **MOE, "num_shared_experts": 2},
}
DOCUMENTS = [[1, 99, 28], [63, 65]]
EPS = torch.finfo(torch.float32).eps
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(shape: str = "dense", **changes) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(**{**SHAPES[shape], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def with_adapter(model: Model, config: LoRAConfig, name: str = "default", seed: int = 1) -> Model:
    """An adapter whose B is not 0, so that it does something."""
    add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, linear in lora_linears(model):
            if name in linear.adapters:
                b = linear.adapter(name).B
                b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return model


def batch():
    return documents_batch(DOCUMENTS, 128, 97)


def logits_of(model: Model) -> torch.Tensor:
    ids, cu = batch()
    return model(ids, cu_seqlens=cu).logits


def matrices(model: Model, name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) by upstream's module name."""
    state = adapter_state(model, name)
    modules = [k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")]
    return {
        m.removeprefix("base_model.model."): (state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"])
        for m in modules
    }


def dense(model: Model, scale: float, *names: str) -> Model:
    """A plain float64 model with W + scale * B A, made module by module under upstream's names."""
    state = {k: v.detach().double() for k, v in model.state_dict().items() if ".adapters." not in k}
    stock = to_stock(state, model.config)
    for name in names or ("default",):
        for module, (a, b) in matrices(model, name).items():
            stock[f"{module}.weight"] = stock[f"{module}.weight"] + scale * (b.double() @ a.double())
    plain = Model(model.config).double().eval()
    plain.load_state_dict(from_stock(stock, model.config))
    return plain


def within(value: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> bool:
    """The numerics contract: no more than twice the error of plain PyTorch, and rounding."""
    return error(value, truth) <= 2 * error(plain, truth) + 4 * EPS * (1 + truth.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(shape):
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
        assert (
            not adapter.B.any() and adapter.A.abs().max() <= width**-0.5
        )  # peft: Kaiming uniform, a = sqrt 5
        assert adapter.A.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_are_those_of_the_dense_weights(shape, rslora, ops_mode):
    """And dA = s B^T dW, dB = s dW A^T, with dW of the dense model, in float64."""
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
        truth, plain = through_dense(dense(model, scale)), through_dense(dense(model, scale).float())
    logits = logits_of(model)
    logits.backward(grad)
    mine = {"logits": logits.detach()}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, value in adapter_state(model, state=grads).items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        mine[f"{module} {side}"] = value
    assert mine.keys() == truth.keys()
    for key, value in truth.items():
        assert within(mine[key], plain[key], value), key


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_packed_projection_keeps_its_input_once_and_nothing_for_frozen_weights(dropout):
    parts = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    linear = LoRALinear(torch.nn.Parameter(torch.randn(64, 32), False), parts)
    linear.adapters["a"] = Adapter(linear.weight, parts, LoRAConfig(rank=4, dropout=dropout))
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
    low, inputs = (
        3 * 50 * 3 * 4,
        x.numel() * (2 if dropout else 1),
    )  # A x; x, or what is left of it and the draw
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
    assert logits.dtype == torch.bfloat16 and within(logits, logits_of(plain), truth)
    logits.float().square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize(("shape", "recompute"), [("dense", False), ("moe", True)])
def test_compiled_whole_and_recomputed_it_draws_the_same_dropout(shape, recompute):
    """A block that is run again must draw the numbers that it drew the first time."""
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
    assert within(logits_of(model), before, truth)
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
    """With the active adapters merged, merged already or not; the model saved stays as it is."""
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
    assert within(logits_of(model), logits_of(plain.float()), truth)
    merge_adapter(model)
    assert within(logits_of(model), logits_of(plain.float()), truth)


PARTS = [("q_proj", "v_proj"), ("up_proj",), ("layers.1.self_attn.k_proj", "o_proj"), None]


@pytest.mark.parametrize("targets", PARTS)
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_saved_adapters_open_as_they_were(shape, targets, tmp_path):
    model = with_adapter(
        make(shape), LoRAConfig(rank=3, alpha=5.0, dropout=0.1, targets=targets, rslora=True)
    )
    save_adapter(model, tmp_path, base_model="runs/sft")
    again = make(shape)
    config = load_adapter(again, tmp_path, "other")
    assert torch.equal(logits_of(again), logits_of(model))
    assert adapter_config(again, "other") == adapter_config(model) == config
    assert not any(p.requires_grad for p in again.parameters())
    saved, state = load_file(tmp_path / "adapter_model.safetensors"), adapter_state(again, "other")
    assert saved.keys() == state.keys() and all(torch.equal(saved[k], v) for k, v in state.items())
    load_adapter(again, tmp_path, "more", trainable=True)
    assert all(".adapters.more." in n for n, p in again.named_parameters() if p.requires_grad)


def test_names_on_disk_are_pefts(tmp_path):
    model = with_adapter(make(), LoRAConfig(rank=4, targets=("q_proj", "up_proj")))
    save_adapter(model, tmp_path)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight": shape
        for layer in range(2)
        for module, rows in (("self_attn.q_proj", 64), ("mlp.up_proj", 96))
        for side, shape in (("A", (4, 64)), ("B", (rows, 4)))
    }
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["r"] == 4 and raw["lora_alpha"] == 16
    assert raw["target_modules"] == ["q_proj", "up_proj"] and raw["task_type"] == "CAUSAL_LM"


def llama_of(model: Model):
    transformers = pytest.importorskip("transformers", reason="install minimind[export]: compares with peft")
    cfg = model.config
    config = transformers.LlamaConfig(
        **{**TINY, "max_position_embeddings": 512}, rms_norm_eps=cfg.rms_norm_eps, tie_word_embeddings=True,
        attn_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    stock = to_stock(model.state_dict(), cfg)
    llama.load_state_dict({**stock, "lm_head.weight": stock["model.embed_tokens.weight"]})
    return llama


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(ALL), ["up_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft_both_ways(targets, rslora, tmp_path):
    peft = pytest.importorskip("peft", reason="install minimind[dev]: compares adapters with peft")
    model = make()
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama_of(model), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    plain = theirs(ids).logits
    ours = copy.deepcopy(model)
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama_of(model), tmp_path / "ours").eval()
    assert torch.equal(back(ids).logits, plain)
    truth = theirs.double()(ids).logits
    assert (truth - llama_of(model).double()(ids).logits).abs().max() > 0.1  # the adapter does something
    assert within(ours(ids).logits, plain, truth)


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
    with pytest.raises(
        ValueError, match=r"target 'w1': this model has no such projection; choose from q_proj"
    ):
        add_adapter(model, LoRAConfig(targets=("q_proj", "w1")))
    with pytest.raises(ValueError, match="'lm_head'"):
        add_adapter(model, LoRAConfig(targets=("lm_head",)))
    assert not lora_linears(model) and all(p.requires_grad for p in model.parameters())
    add_adapter(model, LoRAConfig(), "a")
    with pytest.raises(ValueError, match="'a' exists already"):
        add_adapter(model, LoRAConfig(), "a")
    with pytest.raises(ValueError, match="no adapter 'b' in this model; it has a"):
        set_adapters(model, ["a", "b"])
    with pytest.raises(ValueError, match="without dots"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(bias="all"), "bias='all' is not supported"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(a_later_invention=7), "a_later_invention=7"),
        (dict(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (dict(r=0), "rank=0"),
        (dict(lora_alpha="much"), "much"),
    ],
)
def test_what_peft_knows_beyond_lora_is_refused_by_name(change, message, tmp_path):
    save_adapter(with_adapter(make(), LoRAConfig()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}") as problem:
        load_adapter(make(), tmp_path)
    assert "\n" not in str(problem.value)


def test_adapters_of_another_model_are_refused(tmp_path):
    save_adapter(with_adapter(make(), LoRAConfig(targets=("q_proj",))), tmp_path)
    for changes, message in (
        (dict(hidden_size=48), r"\(8, 64\).*need.*\(8, 48\).*another model"),
        (dict(num_hidden_layers=1), r"layers\.1\..*this model has 1 layers"),
        (dict(num_hidden_layers=3), r"nothing for model\.layers\.2\.self_attn\.q_proj"),
    ):
        model = make(**changes)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert not lora_linears(model)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    for old, new, message in (
        ("self_attn.q_proj", "mlp.experts.0.up_proj", "routed experts take no adapter"),
        ("self_attn.q_proj", "self_attn.w_proj", "which this model has not"),
        ("lora_A", "lora_embedding_A", "no LoRA matrix"),
        ("lora_A", "lora_B", r"need \{'A'"),
    ):
        save_file({k.replace(old, new): v for k, v in state.items()}, weights)
        with pytest.raises(ValueError, match=message):
            load_adapter(make(), tmp_path)
    weights.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_adapter(make(), tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_adapter(make(), tmp_path)
    with pytest.raises(ValueError, match="give the folder of a LoRA adapter"):
        load_adapter(make(), tmp_path / "absent")


def test_replicated_and_sharded_adapters_train_as_one_does():
    script = Path(__file__).with_name("lora_ranks.py")
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    answer = subprocess.run(
        [sys.executable, *arguments],
        cwd=script.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
