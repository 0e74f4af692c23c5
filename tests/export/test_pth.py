"""Upstream's .pth files: written files have upstream's names, shapes and dtypes; upstream's own files can be read."""

import json
from pathlib import Path

import pytest
import torch

from minimind import ModelConfig, load_model
from minimind.export.command import export_pth, pth_state
from tests.export.small import CONFIGS, EXPERTS, model_of
from tests.test_golden import load_case

# Names and shapes of the files that upstream's own code saved; float32 each.
UPSTREAM = json.loads((Path(__file__).parent / "upstream_pth.json").read_text(encoding="utf-8"))


def equal(model, other) -> bool:
    state = other.state_dict()
    return state.keys() == model.state_dict().keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_file_is_upstreams(name, tmp_path):
    case, tensors, model = load_case(name, tmp_path)
    export_pth(model, tmp_path / "ours.pth")
    state = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == UPSTREAM[name]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for key in UPSTREAM[name]:
        assert torch.equal(state[key], tensors[f"weights/{key.replace('lm_head', 'model.embed_tokens')}"]), key
    assert equal(load_model(tmp_path / "ours.pth", case["config"]), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_number_is_in_the_file_once(dtype, tmp_path):
    model = model_of(CONFIGS["granitemoe"])
    export_pth(model, tmp_path / "m.pth", dtype)
    assert (tmp_path / "m.pth").stat().st_size < dtype.itemsize * model.num_parameters() + 30_000
    back = load_model(tmp_path / "m.pth", model.config)
    rounded = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_ddp_and_compile_are_read(prefix, tmp_path):
    model = model_of(CONFIGS["qwen3moe"])
    torch.save({prefix + name: tensor for name, tensor in pth_state(model).items()}, tmp_path / "m.pth")
    assert equal(load_model(tmp_path / "m.pth", model.config), model)


def test_compiled_blocks_and_buffers_are_read(tmp_path):
    """torch.compile of single layers puts its name in the middle; early upstream files hold the RoPE tables."""
    model = model_of(CONFIGS["llama"])
    state = {name.replace(".mlp.", "._orig_mod.mlp."): t for name, t in pth_state(model).items()}
    torch.save({**state, "model.freqs_cos": torch.zeros(8, 32)}, tmp_path / "m.pth")
    assert equal(load_model(tmp_path / "m.pth", model.config), model)


def test_upstreams_file_for_resuming_is_read(tmp_path):
    model = model_of(CONFIGS["llama"])
    torch.save({"model": pth_state(model), "epoch": 1, "step": 20, "wandb_id": "x"}, tmp_path / "m.pth")
    assert equal(load_model(tmp_path / "m.pth", model.config), model)
    torch.save({"epoch": 1}, tmp_path / "n.pth")
    with pytest.raises(ValueError, match=r"n\.pth: holds a dict, expected a dict of tensors"):
        load_model(tmp_path / "n.pth", model.config)


def test_code_in_a_file_is_refused(tmp_path):
    torch.save({"model.norm.weight": torch.ones(2), "run": print}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m\.pth: refused: not a weight file, or it holds more than tensors"):
        load_model(tmp_path / "m.pth", "nano")


@pytest.mark.parametrize(
    "config, message",
    [
        (CONFIGS["llama, untied"], "ties the output head"),
        (ModelConfig(**EXPERTS, num_shared_experts=1, qk_norm=True), "both QK-norm and shared experts"),
    ],
)
def test_models_that_upstream_lacks(config, message):
    with pytest.raises(ValueError, match=message):
        pth_state(model_of(config))
