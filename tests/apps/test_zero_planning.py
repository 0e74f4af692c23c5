"""From a budget of time to stages, preset and tokens; none of it needs a model."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig
from minimind.apps.zero import command, planning
from minimind.apps.zero.command import Args
from minimind.apps.zero.planning import LADDER, Plan, choose_preset, draft, make_plan, share_out
from minimind.apps.zero.stages import STAGES, Chain, FinalFlags, script, shown
from minimind.modeling import Model

QUIET = Console(quiet=True)


def chain(*names: str, **more) -> Chain:
    more = {"data": (), "origin": None, "extra": (), "common": ()} | more
    return Chain.of(names, more["data"], more["origin"], more["extra"], more["common"])


def found(tokens: int, seconds: float, preset: str = "nano", a_pass: int | None = None) -> dict:
    """The fields of a stage's --plan-json that the command reads."""
    return {
        "preset": preset,
        "parameters": 2_800_000,
        "data": {"tokens": a_pass or tokens},
        "tokens": tokens,
        "steps": math.ceil(tokens / 4096),
        "epochs": 1.0,
        "measured_hours": seconds / 3600,
        "micro_tokens": 4096,
        "flops_per_token": 17e6,
        "flops": 17e6 * tokens,
        "device": "a CPU",
        "cards": [{"name": "A", "hours": 0.5, "utilisation": 0.4, "micro_tokens": 4096, "bytes": 1 << 30}],
    }


def planned(monkeypatch, budget: str, of: dict[str, dict], asked: Chain, chosen: bool = False, preset="nano") -> Plan:
    monkeypatch.setattr(planning, "ask_script", lambda chain, name, shape: of[name])
    return make_plan(budget, asked, chosen, preset, 4, QUIET)[1]


def test_every_stage_has_its_script_and_goes_on_from_earlier_ones():
    for number, stage in enumerate(STAGES.values()):
        assert script(stage.script).is_file()
        assert set(stage.after) <= {*list(STAGES)[:number]}


def test_the_chain_of_stages(tmp_path):
    asked = chain("sft", "pretrain", "grpo", "dpo", data=["dpo=a.jsonl", "dpo=b.jsonl"])
    assert asked.names == ("pretrain", "sft", "dpo", "sums", "grpo")
    assert [asked.before(name) for name in asked.names] == [None, "pretrain", "sft", None, "sums"]
    assert asked.answers() == "dpo"  # GRPO on the built-in sums leaves no model to talk to
    assert asked.flags("dpo", "nano", tmp_path)[:5] == ["--from", str(tmp_path / "sft"), "--data", "a.jsonl", "b.jsonl"]
    assert asked.flags("pretrain", "nano", tmp_path) == ["--preset", "nano"]
    assert chain("pretrain", "sft", "grpo", data=["grpo=p.jsonl"]).before("grpo") == "sft"


def test_a_model_of_the_users_is_gone_on_with(tmp_path):
    asked = chain("sft", "dpo", origin="mine")
    assert asked.flags("sft", None, tmp_path) == ["--from", "mine"]
    assert asked.flags("dpo", None, tmp_path) == ["--from", str(tmp_path / "sft")]
    assert asked.flags("dpo", None, None) == ["--from", "mine"]  # in a plan, for its shape
    assert chain("grpo", origin="mine").names == ("grpo",)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["sft"], {}, r"--stages sft: sft needs a model; name it with --from"),
        (["pretrain"], {"origin": "m"}, r"--from m: pretraining starts from random weights"),
        (["pretrain"], {"data": ["dpo=f"]}, r"--data dpo=\.\.\.: dpo is not among the stages; add it with --stages"),
        (["pretrain"], {"data": ["f.jsonl"]}, r"--data f.jsonl: name the stage, as in --data sft=FILE"),
        (["pretrain"], {"extra": ["sft=--lr 1"]}, r"--flags sft=\.\.\.: sft is not among the stages"),
        (["pretrain"], {"extra": ["pretrain=--lr '"]}, r"--flags pretrain=--lr ': a shell could not read this"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(names, more, message):
    with pytest.raises(ValueError, match=message):
        chain(*names, **more)


def test_a_shape_is_said_once():
    with pytest.raises(ValueError, match="--preset nano: mine has a shape of its own"):
        Args(from_="mine", preset="nano").chain()


def test_a_path_is_told_from_a_name_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Args(from_="mine").asked()["from"] == str(tmp_path / "mine")
    assert Args(from_="jingyaogong/MiniMind2@v1").asked()["from"] == "jingyaogong/MiniMind2@v1"


def test_stages_by_budget_and_data():
    assert Args().chain().names == ("pretrain", "sft")
    assert Args(budget="2h").chain().names == ("pretrain", "sft", "reason", "dpo", "sums", "grpo")
    assert Args(budget="2h", data=("dpo=f",)).chain().names == ("pretrain", "sft", "dpo")
    assert Args(from_="mine").chain().names == ("sft",)
    assert Args(device="cpu", cache_dir="c").chain().common == ("--evals", "4", "--device", "cpu", "--cache-dir", "c")


def test_a_whole_run_takes_upstreams_data(tmp_path, monkeypatch):
    asked: list[tuple] = []

    def fetch(stages, folder, hubs, console):
        asked.append((stages, hubs))
        if not hubs:
            raise ValueError("dataset/sft_mini_512.jsonl is not there")
        return {stage: folder / f"{stage}.jsonl" for stage in stages}

    monkeypatch.setattr(command, "fetch_for_stages", fetch)
    full = Args(budget="full")
    assert command.with_upstream_data(full, full.chain(), QUIET).data == {
        "pretrain": ("dataset/pretrain.jsonl",), "sft": ("dataset/sft.jsonl",)
    }  # fmt: skip
    mirror = Args(budget="full", from_="mine", hub="huggingface")
    assert command.with_upstream_data(mirror, mirror.chain(), QUIET).data == {"sft": ("dataset/sft.jsonl",)}
    assert asked == [(["pretrain", "sft"], ["modelscope", "huggingface"]), (["sft"], ["huggingface"])]
    for other in (Args(budget="2h"), Args(budget="full", hub="none"), Args(budget="full", data=("sft=f",))):
        assert command.with_upstream_data(other, other.chain(), QUIET) == other.chain()
    plan = Args(budget="full", plan=True)
    with pytest.raises(ValueError) as error:
        command.with_upstream_data(plan, plan.chain(), QUIET)
    assert str(error.value) == (
        "--budget full: takes upstream's data, but dataset/sft_mini_512.jsonl is not there; name your files with "
        "--data, or take the built-in data with --hub none"
    )


def test_what_follows_the_stages(tmp_path):
    """Perplexity is that of the pretrained model on its held-out text, at the lengths that fit. Everything that flags
    name is done with the last model."""
    asked = chain("pretrain", "sft", common=("--evals", "4", "--device", "cpu"))
    assert FinalFlags().steps(asked, tmp_path) == []
    (tmp_path / "pretrain").mkdir()
    text = tmp_path / "pretrain" / "heldout.jsonl"
    text.write_text("x" * 8 * 300)
    (perplexity,) = FinalFlags().steps(asked, tmp_path)
    assert shown(perplexity.command) == (
        f"minimind evaluate --model {tmp_path / 'pretrain'} --ppl {text} --context 128,256 --tokens 32768 --device cpu "
        f"--out {tmp_path / 'evaluation'}"
    )
    assert perplexity.optional and perplexity.product == tmp_path / "evaluation" / "perplexity.json"
    flags = FinalFlags(("book.txt",), ("ceval", "mmlu*"), 5, ("hf", "gguf"))
    steps = flags.steps(chain("sft", origin="m"), tmp_path)
    last, out = tmp_path / "sft", tmp_path / "evaluation" / "ceval-mmlu_"
    assert [shown(step.command) for step in steps] == [
        f"minimind evaluate --model {last} --ppl book.txt --context 128,256,512,1024,2048 --tokens 32768 --out "
        f"{tmp_path / 'evaluation'}",
        f"minimind evaluate --model {last} --tasks ceval 'mmlu*' --limit 5 --out {out}",
        f"minimind export --model {last} --to hf --out {tmp_path / 'export' / 'hf'}",
        f"minimind export --model {last} --to gguf --out {tmp_path / 'export' / 'model.gguf'}",
    ]
    assert not any(step.optional for step in steps)


def test_what_cannot_follow_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    for args, message in (
        (Args(tasks=("ceval",)), r"--tasks: needs the package lm_eval; run `pip install 'minimind\[eval\]'`"),
        (Args(export=("hf", "gguf")), r"--export: needs the package gguf; run `pip install 'minimind\[export\]'`"),
        (Args(limit=3), "--limit 3: at least 1, together with --tasks"),
        (Args(price=-1.0), "--price -1: must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            args.check()
    Args(export=("hf", "pth")).check()


def test_flags_of_one_stage_reach_it_alone(tmp_path):
    asked = chain("pretrain", "sft", extra=["sft=--lr 1e-4 --compile"], common=["--evals", "4"])
    assert asked.flags("sft", None, tmp_path)[-5:] == ["--evals", "4", "--lr", "1e-4", "--compile"]
    assert "--lr" not in asked.flags("pretrain", "nano", tmp_path)


def test_a_slow_device_trains_the_least_that_is_worth_it(monkeypatch):
    """Its demo has the minimum: 700,000 tokens of text, and all conversations."""
    of = {"pretrain": found(2_700_000, 2700), "sft": found(900_000, 900)}
    plan = planned(monkeypatch, "5min", of, chain("pretrain", "sft"))
    assert plan.stage("pretrain").flags == ("--tokens", "700000") and plan.stage("pretrain").tokens == 700_000
    assert plan.stage("sft").flags == () and plan.stage("sft").tokens == 900_000
    assert any("more than the budget" in note for note in plan.notes)


def test_a_budget_is_used_and_kept(monkeypatch):
    of = {"pretrain": found(2_700_000, 400), "sft": found(900_000, 100)}
    plan = planned(monkeypatch, "5min", of, chain("pretrain", "sft"))
    assert 0.9 * 300 < plan.seconds <= 300
    assert 700_000 < plan.stage("pretrain").tokens < 2_700_000
    assert plan.stage("pretrain").shortened and not plan.stage("sft").shortened


def test_text_is_read_four_times_at_most(monkeypatch):
    of = {"pretrain": found(2_700_000, 10), "sft": found(900_000, 1)}
    pretrain = planned(monkeypatch, "30min", of, chain("pretrain", "sft")).stage("pretrain")
    assert pretrain.tokens == 10_000_000 and pretrain.passes <= 4 and not pretrain.shortened


def test_a_whole_run_sets_no_length(monkeypatch):
    of = {"pretrain": found(2_700_000, 1e6), "sft": found(900_000, 1e6)}
    plan = planned(monkeypatch, "full", of, chain("pretrain", "sft"))
    assert all(stage.flags == () for stage in plan.stages) and plan.seconds > 2e6


def test_a_length_of_the_users_stands(monkeypatch):
    of = {"pretrain": found(100_000, 1e4), "sft": found(900_000, 10)}
    asked = chain("pretrain", "sft", extra=["pretrain=--tokens 100_000"])
    assert planned(monkeypatch, "5min", of, asked).stage("pretrain").flags == ()


def test_stages_without_time_are_left_out_unless_they_are_asked_for(monkeypatch):
    of = {name: found(900_000, 400) for name in ("pretrain", "sft", "dpo", "sums", "grpo")}
    asked = chain("pretrain", "sft", "dpo", "grpo")
    some = planned(monkeypatch, "30min", of, asked)
    assert [stage.name for stage in some.stages] == ["pretrain", "sft", "dpo"]
    assert any(note.startswith("grpo: left out") for note in some.notes)
    every = planned(monkeypatch, "30min", of, asked, chosen=True)
    assert [stage.name for stage in every.stages] == ["pretrain", "sft", "dpo", "sums", "grpo"]


def test_rollouts_are_what_shortens_reinforcement_learning(monkeypatch):
    asked = chain("pretrain", "sft", "grpo", data=["pretrain=t", "sft=c", "grpo=p"])
    of = {"pretrain": found(10**9, 1e5), "sft": found(10**8, 1e5), "grpo": found(10**6, 4000, a_pass=1000)}
    grpo = planned(monkeypatch, "30min", of, asked).stage("grpo")
    assert grpo.flags[0] == "--rollouts" and 1 <= int(grpo.flags[1]) < 12
    assert grpo.tokens == pytest.approx(10**6 * int(grpo.flags[1]) / 120, abs=1)


@pytest.mark.parametrize("seconds", [1.0, 100.0, 1000.0, 1e9])
def test_shares_add_up_and_stay_within_their_bounds(seconds):
    asked = chain("pretrain", "sft", "dpo", data=["pretrain=t", "sft=c"])
    of = {"pretrain": found(10**9, 5000), "sft": found(10**8, 300), "dpo": found(10**5, 30)}
    drafts = [draft(asked, name, of[name], "30min", 4) for name in asked.names]
    given = share_out(drafts, seconds)
    assert all(d.least - 1e-6 <= s <= d.whole + 1e-6 for d, s in zip(drafts, given, strict=True))
    spent, needed = sum(given) + sum(d.overhead for d in drafts), sum(d.least + d.overhead for d in drafts)
    whole = sum(d.whole + d.overhead for d in drafts)
    assert spent == pytest.approx(min(max(seconds, needed), whole))


def test_a_larger_preset_needs_time_and_text():
    text = chain("pretrain", data=["pretrain=t"])

    def ask(tokens: int, per_second: float):
        return lambda name, preset: found(tokens, tokens / per_second * dict(LADDER)[preset] / 2.8e6, preset)

    assert choose_preset(300, text, ask(10**9, 2e4))[0] == "nano"  # no time
    assert choose_preset(7200, text, ask(10**6, 1e8))[0] == "nano"  # no text
    assert choose_preset(7200, text, ask(10**9, 1e6))[0] == "minimind2-small"
    assert choose_preset(7200, text, ask(10**10, 1e8))[0] == "minimind2"
    assert choose_preset(math.inf, text, ask(10**6, 1.0))[0] == "minimind2-small"
    assert choose_preset(math.inf, chain("pretrain"), ask(10**6, 1.0))[0] == "nano"


def test_the_ladder_knows_the_sizes_of_the_presets():
    for name, parameters in LADDER:
        with torch.device("meta"):
            assert Model(ModelConfig.preset(name)).num_parameters() == pytest.approx(parameters, rel=0.02)


def test_a_plan_survives_json_and_is_told_in_lines(monkeypatch):
    import dataclasses
    import json

    plan = planned(monkeypatch, "5min", {"pretrain": found(2_700_000, 400)}, chain("pretrain"))
    assert Plan.of(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
    text = "\n".join(plan.lines(price=2.0))
    assert "projected, not measured" in text and "cost here" in text and "pretrain" in text
