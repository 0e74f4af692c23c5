"""Adapters on disk: round trips, exchange with peft, and errors."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind.lora import TARGETS, LoRAConfig, lora_linears
from minimind.lora_files import (
    adapter_config,
    adapter_state,
    base_mismatch,
    find_base,
    load_adapter,
    names_base_only,
    save_adapter,
)
from minimind.modeling import Model
from minimind.weights import fingerprint, save_weights, to_stock
from tests.adapted import TINY, logits_of, make, with_adapter
from tests.kernels.contract import assert_within

PARTS = [("q_proj", "v_proj"), ("up_proj",), ("layers.1.self_attn.k_proj", "o_proj"), None]


@pytest.mark.parametrize("targets", PARTS)
@pytest.mark.parametrize(("shape", "dora"), [("dense", False), ("dense", True), ("moe", False)])
def test_saved_adapters_open_as_they_were(shape, dora, targets, tmp_path):
    config = LoRAConfig(rank=3, alpha=5.0, dropout=0.1, targets=targets, rslora=True, dora=dora)
    model = with_adapter(make(shape), config)
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
        **{**TINY, "max_position_embeddings": 512},
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=True,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    stock = to_stock(model.state_dict(), cfg)
    llama.load_state_dict({**stock, "lm_head.weight": stock["model.embed_tokens.weight"]})
    return llama


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(TARGETS), ["up_proj"]])
@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (True, True)])
def test_equal_to_peft_both_ways(targets, rslora, dora, tmp_path):
    peft = pytest.importorskip("peft", reason="install minimind[dev]: compares adapters with peft")
    model = make()
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, use_rslora=rslora, use_dora=dora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(llama_of(model), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
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
    assert_within(ours(ids).logits, plain, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(trainable_token_indices=[5]), "trainable_token_indices"),
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
def test_pefts_other_settings_are_refused_by_name(change, message, tmp_path):
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
        ("self_attn.q_proj", "self_attn.w_proj", "not a projection of this model"),
        ("lora_A", "lora_embedding_A", "not a LoRA matrix"),
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


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a base and an adapter trained on it, which records the base by a relative path."""
    place = tmp_path / "project"
    base, folder = place / "runs/sft/checkpoints/step-00000002", place / "runs/lora/checkpoints/step-00000001"
    save_weights(make(), base)
    monkeypatch.chdir(place)
    relative = base.relative_to(place)
    save_adapter(with_adapter(make(), LoRAConfig()), folder, base_model=relative, base_fingerprint=fingerprint(base))
    other = tmp_path / "elsewhere"
    save_weights(make("qk_norm"), other / relative)
    monkeypatch.chdir(other)
    return place, base, folder


def without_note(folder, base):
    """Make an adapter of an old version, without base_model.json: only the run has a hash of the base."""
    (folder / "base_model.json").unlink()
    config = folder / "adapter_config.json"
    raw = json.loads(config.read_text()) | {"base_model_name_or_path": "runs/sft/checkpoints/step-00000002"}
    config.write_text(json.dumps(raw))
    (folder.parents[1] / "config.json").write_text(json.dumps({"stage": "lora", "weights": fingerprint(base)}))


@pytest.mark.parametrize("noted", [True, False])
def test_an_adapter_finds_the_base_that_it_was_trained_on(noted, project, tmp_path):
    """The base is found whatever lies under the same relative path, and after the project was moved."""
    place, base, folder = project
    if not noted:
        without_note(folder, base)
    assert find_base(folder).resolve() == base
    place.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / folder.relative_to(place)
    assert find_base(moved).resolve() == tmp_path / "moved" / base.relative_to(place)


@pytest.mark.parametrize("noted", [True, False])
def test_another_model_in_the_bases_place_is_refused(noted, project):
    _, base, folder = project
    if not noted:
        without_note(folder, base)
    known = fingerprint(base)
    save_weights(make("qk_norm"), base)
    message = rf"step-00000001: trained on {known}, but .*step-00000002 holds step-00000002 \w+; give --model BASE"
    with pytest.raises(ValueError, match=message):
        find_base(folder)
    assert "trained on" in base_mismatch(folder, base)


def test_a_base_recorded_only_by_name_is_detected(project):
    """peft's adapters record a relative name, which may mean another model in another working directory."""
    _, base, folder = project
    assert not names_base_only(folder)
    without_note(folder, base)
    assert not names_base_only(folder)
    (folder.parents[1] / "config.json").unlink()
    assert names_base_only(folder)
