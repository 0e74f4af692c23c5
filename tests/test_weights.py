"""Loading and saving weights: upstream's names, exact round trips, and one-line errors."""

import json

import pytest
import torch

from minimind import ModelConfig, load_model
from minimind.modeling import Model
from minimind.weights import from_stock, save_weights, to_stock

CONFIGS = {
    "dense": ModelConfig(64, 2, 4, 2, 16, 96, 97),
    "qk_norm_untied": ModelConfig(64, 2, 4, 2, 16, 96, 97, qk_norm=True, tie_word_embeddings=False),
    "moe": ModelConfig(64, 2, 4, 2, 16, 96, 97, num_experts=3, num_shared_experts=2, moe_intermediate_size=48),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_names_round_trip_exactly(name):
    state = Model(CONFIGS[name]).state_dict()
    back = from_stock(to_stock(state, CONFIGS[name]), CONFIGS[name])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folder_opens_with_equal_logits(name, tmp_path):
    model = Model(CONFIGS[name]).eval()
    save_weights(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    ids = torch.randint(0, 97, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_stock_names_are_upstreams():
    names = set(to_stock(Model(CONFIGS["moe"]).state_dict(), CONFIGS["moe"]))
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.0.mlp.shared_experts.1.down_proj.weight",
        "model.norm.weight",
    } <= names


def test_pth_needs_a_config_and_takes_a_preset(tmp_path):
    config = ModelConfig.preset("nano")
    torch.save(to_stock(Model(config).state_dict(), config), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="pass config="):
        load_model(tmp_path / "w.pth")
    assert load_model(tmp_path / "w.pth", "nano").config == config
    with pytest.raises(ValueError, match="unknown preset"):
        load_model(tmp_path / "w.pth", "giant")


def test_wrong_weights_are_named(tmp_path):
    config = CONFIGS["dense"]
    stock = to_stock(Model(config).state_dict(), config)
    missing = {k: v for k, v in stock.items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        from_stock(missing, config)
    with pytest.raises(ValueError, match="1 tensors have no place in this config, such as 'stranger'"):
        from_stock({**stock, "stranger": torch.zeros(1)}, config)
    tied = {**stock, "lm_head.weight": stock["model.embed_tokens.weight"]}  # as upstream saves it
    assert "lm_head.weight" not in from_stock(tied, config)
    with pytest.raises(ValueError, match=r"lm_head\.weight' differs from the embedding, but the config ties the two"):
        from_stock({**tied, "lm_head.weight": tied["lm_head.weight"] + 1}, config)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is \[96, 64\]"):
        from_stock({**stock, "model.embed_tokens.weight": torch.zeros(96, 64)}, config)


def test_unreadable_files_are_named(tmp_path):
    for content, reason in (
        (b"not a zip file", "not a weight file, or it holds more"),
        (b"", r"not a readable weight file \(EOFError\)"),
    ):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken\.pth: .*{reason}"):
            load_model(tmp_path / "broken.pth", "nano")
    torch.save({"x": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth: refused"):
        load_model(tmp_path / "code.pth", "nano")
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[1]", '{"hidden_size": "wide"}', '{"hidden_size": -192}', '{"hidden_size": 192.5}',
        '{"num_key_value_heads": 0}', '{"num_attention_heads": 0}', '{"rope_scaling": "yarn"}', '{"num_experts": "4"}',
        '{"model_type": "granitemoe"}', '{"hidden_act": "gelu"}',
    ],
)  # fmt: skip
def test_a_broken_config_json_is_named_in_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not a valid model config \(.+\)") as caught:
        ModelConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_config_json_round_trips_and_reads_other_dialects():
    from minimind.config import PRESETS

    for config in PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    llama = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
             "num_hidden_layers": 8, "intermediate_size": 1408, "vocab_size": 6400, "rms_norm_eps": 1e-5,
             "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 32768}  # fmt: skip
    assert ModelConfig.from_dict(llama) == ModelConfig.preset("minimind2-small")
    for key in ("mscale", "mscale_all_dim", "truncate"):
        with pytest.raises(ValueError, match=f"rope_scaling: {key}=0.5 is not supported"):
            ModelConfig.from_dict({**llama, "rope_scaling": {"type": "yarn", "factor": 2, key: 0.5}})
    with pytest.raises(ValueError, match="hidden_act"):
        ModelConfig.from_dict({**llama, "hidden_act": "gelu"})
    with pytest.raises(ValueError, match="'linear' is not supported"):
        ModelConfig.from_dict({**llama, "rope_scaling": {"type": "linear", "factor": 2}})
    with pytest.raises(ValueError, match="multiple of"):
        ModelConfig.from_dict({**llama, "num_key_value_heads": 3})


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Qwen3Moe", "GraniteMoe"])
def test_missing_keys_have_transformers_defaults(kind):
    """Files may lack keys; a wrong default, such as RoPE's base, would fail silently."""
    transformers = pytest.importorskip("transformers", reason="install minimind[export] to compare with transformers")
    theirs = getattr(transformers, f"{kind}Config")(hidden_size=64, num_attention_heads=4)
    raw = {"hidden_size": 64, "num_attention_heads": 4, "model_type": theirs.model_type, "moe_intermediate_size": 48}
    granite = {"attention_multiplier": 0.25, "intermediate_size": 96} if kind == "GraniteMoe" else {}
    ours = ModelConfig.from_dict({**raw, **granite})
    theta = getattr(theirs, "rope_theta", None) or theirs.rope_parameters["rope_theta"]
    assert (ours.rope_theta, ours.rms_norm_eps) == (theta, theirs.rms_norm_eps)
    assert ours.tie_word_embeddings == bool(theirs.tie_word_embeddings)
    if not kind.startswith("Qwen"):
        assert ours.num_key_value_heads == 4


def test_a_path_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_weights(Model(CONFIGS["dense"]), tmp_path / "model")
    assert load_model("~/model").config == CONFIGS["dense"]
