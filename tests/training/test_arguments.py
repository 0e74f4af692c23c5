"""Default passes over the data, the default optimizer, and the run's name from its data."""

import json
import runpy

import pytest

from minimind.config import PRESETS, ModelConfig
from minimind.training.arguments import MOST, PASSES, StageArgs, default_epochs, default_optimizer, pretraining_lr
from tests.training.runs import SCRIPT

# The flags' defaults before the data decided them; unfinished runs continue with these.
BEFORE = {"pretrain": 1.0, "distill": 1.0, "sft": 3.0, "reason": 4.0, "lora": 6.0, "dpo": 6.0, "reward": 6.0}


@pytest.mark.parametrize("stage", PASSES)
def test_builtin_data_and_unfinished_runs_stay_as_they_were(stage):
    args = runpy.run_path(str(SCRIPT.with_name(f"{stage}.py")))["Args"]()
    assert args.epochs is None and args.legacy["epochs"] == BEFORE[stage]
    assert args.legacy["optimizer"] == "muon"
    for tokens in (100, 10**9):
        assert default_epochs(stage, True, tokens) == (BEFORE[stage], "")


@pytest.mark.parametrize(
    ("stage", "tokens", "expected"),
    [
        ("pretrain", 100, 1),
        ("sft", 500_000_000, 2),  # upstream's sft_mini_512
        ("sft", 336_000, 2),
        ("sft", 100_000, 5),  # 409,600 tokens are the least
        ("sft", 1000, 10),
        ("reason", 100_000_000, 1),
        ("dpo", 830_000, 1),
        ("reward", 200_000, 3),
        ("lora", 8_500_000, 10),  # upstream's lora_medical
        ("lora", 5_500, 19),  # its lora_identity, 91 rows
        ("lora", 0, 50),
    ],
)
def test_files_get_upstreams_passes_and_small_ones_more(stage, tokens, expected):
    epochs, reason = default_epochs(stage, False, tokens)
    assert epochs == expected and epochs <= MOST * PASSES[stage].files
    assert stage == "pretrain" or f"--epochs {expected}: " in reason


def test_the_rate_of_pretraining_follows_the_size_of_model_and_run():
    small, reason = pretraining_lr("muon", PRESETS["minimind2-small"], 50, 1.0)
    assert (
        small == 2.9e-3 and reason == "--lr 0.0029: the rule for this width, depth and number of steps (docs/rates.md)"
    )
    rates = [pretraining_lr("muon", PRESETS["nano"], steps, 1.0)[0] for steps in (1, 50, 150, 400, 10**6)]
    assert rates == [1.1e-2, 1.1e-2, 6.9e-3, 4.7e-3, 4.7e-3]
    shallow = [pretraining_lr("muon", PRESETS[name], 50, 1.0, layers=1)[0] for name in ("minimind2-small", "nano")]
    assert shallow == [3.8e-3, 1.1e-2]
    tiny = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    least = ModelConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    assert pretraining_lr("muon", tiny, 50, 1.0) == pretraining_lr("muon", least, 50, 1.0)
    assert pretraining_lr("adamw", PRESETS["nano"], 50, 4e-3) == (4e-3, "")


def test_the_optimizer_follows_the_weights(tmp_path):
    assert default_optimizer(None)[0] == "muon"
    weights = tmp_path / "run" / "checkpoints" / "step-00000010"
    weights.mkdir(parents=True)
    assert default_optimizer(weights) == (
        "adamw",
        "--optimizer adamw: no run of ours made the weights, and released models come from AdamW, which Muon does not "
        "improve on (docs/training.md)",
    )
    for config, expected in (
        ({"args": {"optimizer": "muon"}}, "muon"),
        ({"args": {"optimizer": None}, "chosen": {"optimizer": "muon"}}, "muon"),
        ({"args": {"optimizer": "adamw"}, "chosen": {}}, "adamw"),
        ({"args": ["a", "list"], "chosen": None}, "adamw"),  # not ours
    ):
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        (weights / "config.json").write_text(json.dumps({"hidden_size": 64}))
        assert default_optimizer(weights)[0] == expected
    bare = tmp_path / "run" / "model.pth"
    assert default_optimizer(bare)[0] == "adamw"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ((), "builtin"),
        (("a/sft.jsonl", "b.jsonl"), "sft+1"),
        ((f"{'x' * 249}.jsonl",), "x" * 40),
        ((f"{'唐' * 83}.jsonl", "b"), "唐" * 40 + "+1"),
    ],
)
def test_a_run_is_named_after_its_data_as_far_as_a_folder_can_be(data, name, tmp_path):
    assert StageArgs(data=data).data_name == name
    (tmp_path / f"pretrain-minimind2-small-{name}-12").mkdir()
