"""Logits, losses and gradient norms that upstream MiniMind's own code produced (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minimind import ModelConfig, load_model, ops
from minimind.weights import to_stock
from tests.kernels.contract import assert_within, versions

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))

# MiniMind2's MoE training loss ran part of its sum in fp16 upstream: loose there, as its fp16 eps is 1e-3.
TRAIN_RTOL = {"minimind2_moe": 1e-3}


def load_case(name: str, tmp_path: Path):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        case = json.loads(file.metadata()["case"])
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # upstream's files carry the tied copy
    torch.save(weights, tmp_path / "upstream.pth")
    return case, tensors, load_model(tmp_path / "upstream.pth", case["config"])


@torch.no_grad()
def assert_rounds_alike(logits, model, golden):
    """Ours and upstream's logits are each near the float64 logits, within the error of float32 sums of 128 products."""
    mine = logits(model)
    with ops.using("reference"):
        truth, off = (logits(versions(model, terms=128)[version]) for version in ("truth", "moved"))
    for value in (mine, golden):
        assert_within(value, off.float(), truth)


def test_every_case_is_here():
    assert len(CASES) == 6


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path, ops_mode):
    _, tensors, model = load_case(name, tmp_path)
    assert_rounds_alike(lambda m: m(tensors["input_ids"].long()).logits, model, tensors["logits"])


@pytest.mark.parametrize("name", [name for name in CASES if "yarn" in name])
def test_yarn_at_3000_tokens(name, tmp_path, ops_mode):
    _, tensors, model = load_case(name, tmp_path)
    ids = tensors["long_input_ids"].long()
    assert_rounds_alike(lambda m: m(ids).logits[:, -4:], model, tensors["long_last4_logits"])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_norms(name, tmp_path, ops_mode):
    case, tensors, model = load_case(name, tmp_path)
    ids = tensors["input_ids"].long()
    out = model(ids, return_logits=False)
    hidden, targets = out.hidden_states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    loss = ops.linear_cross_entropy(hidden, model.head_weight, targets) / targets.numel()
    (loss + out.aux_loss).backward()

    rtol = TRAIN_RTOL.get(name, 2e-6)
    assert loss.item() == pytest.approx(case["train_loss"], rel=rtol)
    assert out.aux_loss.item() == pytest.approx(case["aux_loss"], rel=rtol)
    grads = to_stock({k: p.grad for k, p in model.named_parameters()}, model.config)
    assert grads.keys() == case["grad_norms"].keys()
    for key, norm in case["grad_norms"].items():
        # the router's gradient is 1e-4 of the others' size: a difference of nearly equal numbers
        assert grads[key].norm().item() == pytest.approx(norm, rel=max(rtol, 2e-5), abs=1e-8), key


def test_parameter_counts():
    from minimind.modeling import Model

    counts = {}
    for preset in ("minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"):
        with torch.device("meta"):
            counts[preset] = Model(ModelConfig.preset(preset))
    millions = {name: model.num_parameters() / 1e6 for name, model in counts.items()}
    assert [round(millions[n], 1) for n in ("minimind2-small", "minimind2", "minimind2-moe")] == [25.8, 104.0, 145.0]
    assert 63 < millions["minimind3"] < 65
    assert 197 < millions["minimind3-moe"] < 200
    assert 63 < counts["minimind3-moe"].num_parameters(active=True) / 1e6 < 65
