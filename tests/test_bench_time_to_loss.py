"""bench/time_to_loss.py: times and targets by hand, the recipes on a tiny model, and a campaign of replayed runs."""

import dataclasses
import json
import math
import sys
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import time_to_loss
from bench.common.models import transformers_model
from bench.report.rows import Device
from bench.report.tables import time_to_loss as time_to_loss_table
from bench.time_to_loss import Args, Campaign, check, main
from bench.training import commands, recipes
from bench.training.commands import PROBE, RunPlan, Speed, ours, recipe, split_file, step_tokens
from bench.training.loss_curves import (
    CurvePoint,
    TimeToLossRow,
    Watched,
    curve_text,
    groups_of,
    reach,
    reach_text,
    read,
    read_curve,
    run_and_poll,
    seconds_to,
    targets_of,
    typed,
    watch,
)
from bench.training.recipes import RecipeSetting, train, upstream_rate
from minimind import ModelConfig, load_tokenizer
from minimind.modeling import Model
from minimind.training.metrics import read_metrics
from minimind.weights import load_model, to_stock

TINY = ModelConfig(32, 1, 2, 1, 16, 48, 6400)


def row(name: str, seed: int, curve: str, lr: float | None = None, minutes: float = 10.0) -> TimeToLossRow:
    seconds, tokens, bpb = read_curve(curve)[-1]
    return TimeToLossRow("", None, "", "", None, "pretrain", name, "poems", "nano", seed, lr, minutes, 10, tokens,
                         seconds, 1.0, 2 * bpb, bpb, None, curve)  # fmt: skip


def test_seconds_to_a_loss_are_interpolated():
    one = row("ours", 1, "10/0/6 20/100/4 40/300/3")
    assert [seconds_to(one, bpb) for bpb in (7, 6, 5, 4, 3.5, 3, 2.9)] == [10, 10, 15, 20, 30, 40, None]
    points = [CurvePoint(12.34, 5, 4.56789, 9.0), CurvePoint(20.0, 9, 3.0, 6.0)]
    assert read_curve(curve_text(points)) == [(12.3, 5, 4.5679), (20.0, 9, 3.0)]


ROWS = [row("upstream-style", 1, "100/1/5 600/2/4", 5e-4), row("upstream-style", 2, "100/1/5 600/2/4.2", 5e-4),
        row("hf", 1, "50/1/5 600/9/3.9", 1e-3), row("hf", 2, "50/1/5 600/9/3.9", 1e-3),
        row("hf", 1, "50/1/5 600/9/3", 2e-3), row("hf", 2, "50/1/5 500/9/3.2", 2e-3),
        row("ours", 1, "10/1/5.1 20/2/3.1 600/9/2"), row("ours", 2, "10/1/5.1 30/2/4.1 600/9/3.5")]  # fmt: skip


def test_targets_are_what_others_reach_and_every_seed_must_reach_them():
    targets = targets_of(ROWS)
    assert targets == {"upstream-style": (pytest.approx(4.1), 600), "hf": (pytest.approx(3.1), 550)}
    own = groups_of(ROWS)[-1]
    assert reach(own, 4.1) == pytest.approx((15 + 30) / 2)
    assert reach_text(own, *targets["upstream-style"]) == "22.5, 26.7x"
    assert reach(own, 3.1) is None and reach_text(own, *targets["hf"]) == "1 of 2 seeds"


def test_the_performance_page_has_the_times():
    cells = [{k: "" if v is None else str(v) for k, v in dataclasses.asdict(one).items()} for one in ROWS]
    page = time_to_loss_table(Device(Path(), {"time_to_loss": cells}, {}))
    assert [typed(one) for one in cells] == ROWS
    assert "pretrain, poems, nano:" in page and "| s to upstream-style's 4.100 | s to hf's 3.100 |" in page
    assert "| ours |  | 10 | 2 | 10 | 600 | 2.750 |  | 22.5, 26.7x | 1 of 2 seeds |" in page
    assert time_to_loss_table(Device(Path(), {"time_to_loss": []}, {})) == ""


def test_a_command_is_timed_without_its_evaluations(tmp_path):
    rows = [{"kind": "eval", "tokens": n, "heldout_loss": 4.0, "heldout_bpb": 2.0, "time": {"seconds": 1e4}}
            for n in (0, 7)]  # fmt: skip
    first, second = (json.dumps(r) for r in rows)
    metrics = tmp_path / "metrics.jsonl"
    script = (
        f"printf '%s\\n%s' '{first}' '{second[:9]}' > {metrics}; sleep 0.3; printf '%s\\n' '{second[9:]}' >> {metrics}"
    )
    watched = watch(["sh", "-c", script], metrics, tmp_path / "log", {}, tmp_path)
    assert [p.tokens for p in watched.points] == [0, 7] and watched.evaluating == 2e4
    assert -1e4 < watched.points[0].seconds < -9e3 and -2e4 < watched.points[1].seconds < -19e3
    with pytest.raises(ValueError, match=r"sh -c exit 3 ended with status 3; see the end of .*log"):
        run_and_poll(["sh", "-c", "exit 3"], tmp_path / "log", {}, tmp_path, lambda seconds: None)


def test_a_stopped_benchmark_ends_its_command(tmp_path):
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_and_poll(["sleep", "60"], tmp_path / "log", {}, tmp_path, stop)
    assert time.perf_counter() - started < 30


def test_upstreams_rate_is_a_cosine_from_the_peak_to_a_tenth():
    rates = [upstream_rate(2.0, step, 100) for step in (0, 50, 100)]
    assert rates == [pytest.approx(2.0), pytest.approx(1.1), pytest.approx(0.2)]


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path]:
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ModelConfig, "preset", lambda name, **changes: replace(TINY, **changes))
    text = tmp_path / "lines.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i % 50} of many " * 9}) + "\n" for i in range(90)))
    return split_file(str(text), "pretrain", tmp_path / "work", 2000)


def test_copies_of_a_text_are_held_out_together(files):
    train_texts, held = ({line for line in path.read_text().splitlines()} for path in files)
    assert held and not train_texts & held
    assert sum(len(path.read_text().splitlines()) for path in files) == 90
    before = files[0].stat().st_mtime_ns
    again = split_file(str(files[0].parents[3] / "lines.jsonl"), "pretrain", files[0].parents[2], 2000)
    assert again == files and files[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["upstream-style", "hf"])
def test_recipes_learn_and_save_the_weights_that_were_evaluated(name, files, tmp_path):
    if name == "hf":
        pytest.importorskip("transformers", reason="install minimind[export] to run transformers' recipe")
    setting = RecipeSetting(name, "pretrain", "nano", *map(str, files), str(tmp_path), 1e-2, 6, 1, 2, 64, 2, 3,
                            device="cpu", compile=False)  # fmt: skip
    train(setting)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    evals = [r for r in rows if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [2, 4, 6] and evals[-1]["tokens"] == 6 * 2 * 64 * 2
    assert [r["kind"] for r in rows].count("train") == 6
    assert evals[0]["heldout_loss"] < math.log(6400) - 0.1 and evals[-1]["heldout_loss"] < evals[0]["heldout_loss"]
    tokenizer = load_tokenizer(tmp_path / "weights")
    heldout = recipes.open_data("pretrain", str(files[1]), tokenizer)
    figures = recipes.heldout_figures(load_model(tmp_path / "weights"), heldout, tokenizer, 0)
    assert figures["heldout_loss"] == pytest.approx(evals[-1]["heldout_loss"], rel=0.01)  # bf16 where the CPU has it


def test_upstreams_recipe_takes_the_steps_of_its_script(files, tmp_path):
    """Two steps as its script computes them: mean loss over what is not padding, AdamW's defaults, no warm-up."""
    setting = RecipeSetting("upstream-style", "pretrain", "nano", *map(str, files), str(tmp_path), 1e-2, 2, 1, 3, 40)
    train(setting)
    torch.manual_seed(1)
    model = Model(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2)
    corpus = recipes.open_data("pretrain", str(files[0]), load_tokenizer())
    batches = recipes.padded_batches(recipes.STAGES["pretrain"], corpus, 3, 40, torch.device("cpu"), 1)
    for share in (0.1 + 0.45 * (1 + math.cos(math.pi / 2)), 0.1):
        optimizer.param_groups[0]["lr"] = 1e-2 * share
        batch = next(batches)
        labels = batch.targets.masked_fill(batch.weights == 0, -100)
        logits = model(batch.inputs).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_model(tmp_path / "weights")
    for (name, expected), parameter in zip(model.named_parameters(), trained.parameters(), strict=True):
        moved = (expected - parameter).norm() / expected.norm()
        assert moved < 1e-4, name


def test_sft_of_transformers_begins_with_our_weights():
    pytest.importorskip("transformers", reason="install minimind[export] to run transformers' recipe")
    model = Model(TINY).eval()
    other = transformers_model(TINY)
    missing, unexpected = other.load_state_dict(to_stock(model.state_dict(), TINY), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    ids = torch.arange(20)[None]
    torch.testing.assert_close(other.eval()(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)


def plan(**changes) -> RunPlan:
    one = RunPlan("pretrain", "ours", "poems", (Path("t.jsonl"), Path("h.jsonl")), "nano", 3, 2.0, Path("work"))
    return replace(one, **changes)


def test_commands_name_the_flags_of_the_scripts(tmp_path):
    from train.pretrain import Args as PretrainArgs
    from train.sft import Args as SftArgs

    first, second = ours(plan(), 20), ours(plan(stage="sft", init=Path("run"), questions=9, name="ours-eager"), PROBE)
    assert "--compile" in first and "--compile" not in second
    flags = [dict(zip(c[2::2], c[3::2], strict=False)) for c in (first, second)]
    assert flags[0]["--tokens"] == str(20 * step_tokens(plan())) and flags[0]["--seed"] == "3"
    assert flags[1]["--from"] == "run" and flags[1]["--eval-questions"] == "9" and flags[1]["--log-every"] == "1"
    for args, words in zip((PretrainArgs, SftArgs), (first, second), strict=True):
        named = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert named <= {name.rstrip("_") for name in args.__dataclass_fields__}
    for name, size, compiled in (("upstream-style", (8, 339), False), ("hf", (8, 512), True)):
        one = plan(name=name, lr=1e-3, work=tmp_path)
        one.folder.mkdir()
        setting = RecipeSetting(**json.loads(Path(recipe(one, 5)[-1]).read_text()))
        assert (setting.rows, setting.seq_len) == size and setting.compile == compiled and setting.steps == 5


def test_a_run_fills_the_planned_time():
    assert Speed(10.0, 0.5).steps_in(60) == 100 and Speed(10.0, 0.5).steps_in(5) == 2


@pytest.mark.parametrize(
    ("paces", "step"),
    [([0.25] * 12, 0.5), ([0.125] * 6 + [9.0] + [0.375] * 5, 0.5), ([0.25] * 9 + [1.625] * 3, 1.25)],
    ids=["even", "shallow first, then compiled again", "shallow for longer"],
)
def test_speed_is_measured_without_the_first_steps(paces, step, tmp_path, monkeypatch):
    """paces: seconds of steps that have half the tokens."""

    def execute(one: RunPlan, steps: int) -> Watched:
        one.metrics.parent.mkdir(parents=True)
        seconds = list(accumulate(paces, initial=20.0))
        half = step_tokens(one) // 2
        rows = [{"kind": "train", "tokens": i * half, "time": {"seconds": s}} for i, s in enumerate(seconds, 1)]
        one.metrics.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return Watched([CurvePoint(30.0, 1, 2.0, 4.0)], 1.0)

    monkeypatch.setattr(commands, "execute", execute)
    assert Speed.measure(plan(work=tmp_path)) == Speed(30.0 - PROBE * step, step)
    assert not list(tmp_path.iterdir())


class Replay:
    """Stands for the commands: a run's loss falls with its steps, and its weights are a folder."""

    def __init__(self) -> None:
        self.plans: list[RunPlan] = []

    def __call__(self, one: RunPlan, steps: int) -> Watched:
        self.plans.append(one)
        one.weights.mkdir(parents=True, exist_ok=True)
        speed = {"upstream-style": 0.0, "hf": 1.0}.get(one.name, 2.0) + 100 * (one.lr or 0.0)
        points = [CurvePoint(60 * one.minutes * s, 100 * i, 6 - speed * s, 9.0) for i, s in enumerate((0.1, 0.5, 1.0))]
        exact = 0.5 if one.stage == "sft" else None
        return Watched([*points[:-1], replace(points[-1], exact=exact)], 1.0)


@pytest.fixture
def replay(monkeypatch) -> Replay:
    runs = Replay()
    monkeypatch.setattr(time_to_loss, "execute", runs)
    monkeypatch.setattr(Speed, "measure", staticmethod(lambda one: Speed(1.0, 1.0)))
    return runs


def test_a_short_run_that_would_be_all_start_up_is_left_out(tmp_path, monkeypatch, replay):
    monkeypatch.setattr(Speed, "measure", staticmethod(lambda one: Speed(50.0, 1.0)))
    args = Args(preset="nano", minutes=1.0, device="cpu")
    campaign = Campaign(args, tmp_path / "rows.csv", tmp_path, Console(quiet=True))
    for minutes in (1.0, 0.9, 0.1):
        campaign._run(plan(name="ours-eager", minutes=minutes, work=tmp_path))
    assert [one.minutes for one in replay.plans] == [1.0]  # 10 steps, 4 and none


def test_a_campaign_takes_turns_and_continues_where_it_was_cut(tmp_path, monkeypatch, replay, capsys):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINIMIND_COMMIT", "abc")
    text, chats = tmp_path / "poems.jsonl", tmp_path / "chats.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text("".join(json.dumps({"conversations": turns, "n": i}) + "\n" for i in range(20)))
    args = Args(data=(str(text),), chats=str(chats), preset="nano", minutes=1.0, shares=(1.0, 0.1), seeds=(1, 2),
                only=("upstream-style", "hf", "ours"), hf_lr=(1e-3, 2e-3), hf_sft_lr=(1e-3,), device="cpu",
                work=str(tmp_path / "work"), out=str(tmp_path / "out"))  # fmt: skip
    rows = main(args)["rows"]
    assert len(rows) == 2 * (5 + 3) and [r["seed"] for r in rows] == [1] * 8 + [2] * 8
    assert (rows[0]["lr"], rows[8]["lr"]) == (1e-3, 2e-3)  # another run begins
    assert {r["minutes"] for r in rows if r["implementation"] == "ours" and r["stage"] == "pretrain"} == {1.0, 0.1}
    assert {r["exact"] for r in rows if r["stage"] == "sft"} == {0.5}
    begun = {p.name: p.init for p in replay.plans if p.stage == "sft" and p.seed == 1}
    assert "0.002" in str(begun["hf"]) and "-1min-" in str(begun["ours"])  # the best rate, the longest run
    assert (tmp_path / "out" / "time-to-loss-nano.png").read_bytes().startswith(b"\x89PNG")
    assert "poems.jsonl, nano" in capsys.readouterr().out
    table = tmp_path / "out" / "time_to_loss.csv"
    table.write_text("".join(f"{line}\n" for line in table.read_text().splitlines()[:-1]))  # a row is lost
    done = len(replay.plans)
    work = tmp_path / "work"
    assert len(Campaign(args, table, work, Console(quiet=True)).run()) == 16 and len(replay.plans) == done + 1
    assert len(read(table)) == 16 and {r.lr for r in read(table) if r.implementation == "ours"} == {None}


UPSTREAM = """
import os, shutil, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(flags["--data_path"]).read().count("\\n") == int(flags["--batch_size"]) * 6 // int(flags["--epochs"])
os.makedirs("../checkpoints")
for step in range(int(flags["--save_interval"]), 7, int(flags["--save_interval"])):
    time.sleep(0.12)
    print(f"Epoch:[{1 + step // 4}/2]({step % 4 + step // 4}/3), loss: 1", flush=True)
    shutil.copy(os.environ["WEIGHTS"], "../checkpoints/pretrain_32.pth")
    open("../checkpoints/resume", "w").write(str(step))
    os.replace("../checkpoints/resume", "../checkpoints/pretrain_32_resume.pth")
"""


def test_upstreams_trainer_is_evaluated_by_what_it_saves(files, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for part in ("model", "trainer", "dataset"):
        (checkout / part).mkdir(parents=True)
    load_tokenizer().save(checkout / "model")
    (checkout / "trainer" / "train_pretrain.py").write_text(UPSTREAM)
    theirs = replace(
        TINY, num_attention_heads=8, head_dim=4, num_key_value_heads=2, intermediate_size=80, qk_norm=True
    )  # of another version
    state = to_stock(Model(theirs).state_dict(), theirs)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "weights.pth")
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights.pth"))
    one = plan(name="upstream", lr=5e-4, rows=2, parts=files, work=tmp_path / "work", device="cpu",
               upstream=str(checkout), python=sys.executable)  # fmt: skip
    watched = commands.execute(one, PROBE)
    steps = [p.tokens / (2 * 339) for p in watched.points]  # a busy machine may see the newer of two saves alone
    assert steps == sorted(set(steps)) and set(steps) <= {1, 2, 3, 4, 5, 6} and steps[-1] == 6
    assert all(abs(p.nats - math.log(6400)) < 0.2 for p in watched.points)
    seconds = [p.seconds for p in watched.points]
    assert seconds == sorted(seconds) and seconds[0] > 0.1 and not list(one.folder.glob("*.pth"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shares": (0.0,)}, "--shares above 0"),
        ({"minutes": 0.0}, "--minutes must be above 0"),
        ({"only": ("upstream",)}, "name its checkout with --upstream"),
        ({"upstream": "/nowhere"}, "no trainer/train_pretrain.py in it"),
        ({"data": ("/nowhere.jsonl",)}, "/nowhere.jsonl: no such file"),
        ({"seeds": ()}, "--seeds: needs a value"),
    ],
)
def test_unusable_flags_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check(Args(**changes))


def test_a_group_is_of_one_commit():
    first, second = row("ours", 1, "1.0/10/3.0"), row("ours", 2, "1.0/10/3.0")
    assert groups_of([first, second]) == [[first, second]]
    later = replace(second, commit="another")
    assert groups_of([first, later]) == [[first], [later]]


def test_a_picture_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="has no rows of nano"):
        main(Args(plot=True, preset="nano", device="cpu", out=str(tmp_path)))
    assert Campaign(Args(device="cpu"), tmp_path / "t.csv", tmp_path, None).rows == []
