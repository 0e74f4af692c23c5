"""The models and tokenizers that a run refers to are identified by their contents."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig, load_tokenizer
from minimind.export.command import export_pth
from minimind.inference.loading import ModelArgs, open_model
from minimind.lora import LoRAConfig, add_adapter
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from minimind.serving.web_command import Args as WebArgs
from minimind.serving.web_command import server_command
from minimind.tokenization.tokenizer import DEFAULT_FOLDER
from minimind.training.arguments import StageArgs
from minimind.training.initial_model import InitialModel
from minimind.training.job import Job
from minimind.training.run_folder import Defaults, open_run
from minimind.value_head import ValueModel, save_value_model
from minimind.weights import save_weights
from tests.training.runs import SCRIPT, TINY, call, save_origin

NEW = "--new-tokenizer"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A tokenizer of the same size as the one shipped, in which two words have changed places."""
    folder = tmp_path_factory.mktemp("tokenizers") / "other"
    shutil.copytree(DEFAULT_FOLDER, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    by_id = sorted(words, key=words.__getitem__)
    words[by_id[5000]], words[by_id[6000]] = 6000, 5000
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = load_tokenizer(), load_tokenizer(folder)
    assert theirs.vocab_size == ours.vocab_size and theirs.fingerprint != ours.fingerprint
    return str(folder)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def bare(origin, tmp_path_factory) -> tuple[Path, Path]:
    """An upstream .pth with a tokenizer in its folder, and one without."""
    beside, alone = (tmp_path_factory.mktemp(name) / "nano.pth" for name in ("beside", "alone"))
    export_pth(Model(ModelConfig.preset("nano")), beside)
    shutil.copy(beside, alone)
    load_tokenizer().save(beside.parent)
    return beside, alone


@pytest.fixture(scope="module")
def adapter(origin, other, tmp_path_factory) -> Path:
    """An adapter with another tokenizer than its base."""
    folder = tmp_path_factory.mktemp("adapter")
    model = Model(TINY)
    add_adapter(model, LoRAConfig())
    save_adapter(model, folder, base_model=origin)
    load_tokenizer(other).save(folder)
    return folder


def begin(**flags) -> InitialModel:
    args = StageArgs(**flags)
    args.check()
    return InitialModel.from_args(args, Console(quiet=True))


def assert_one_line_names_both(act: Callable[[], object], *places: str) -> None:
    with pytest.raises(ValueError, match="the same ids mean other words") as problem:
        act()
    text = str(problem.value)
    assert "\n" not in text and NEW in text
    for each in (*places, load_tokenizer().fingerprint[:8]):
        assert each in text


def test_every_stage_refuses_another_tokenizer_of_the_same_size(origin, other, bare):
    begin(from_=str(origin), tokenizer=str(DEFAULT_FOLDER))  # the same one from another place
    assert_one_line_names_both(
        lambda: begin(from_=str(origin), tokenizer=other),
        f"--tokenizer {other}",
        f"--from {origin}",
        load_tokenizer(other).fingerprint[:8],
    )
    taken = begin(from_=str(origin), tokenizer=other, new_tokenizer=True)
    assert taken.tokenizer.fingerprint == load_tokenizer(other).fingerprint
    named = {"from_": str(bare[0]), "preset": "nano"}
    assert begin(**named).tokenizer.fingerprint == load_tokenizer().fingerprint
    assert_one_line_names_both(lambda: begin(**named, tokenizer=other), f"--from {bare[0]}")
    begin(from_=str(bare[1]), preset="nano", tokenizer=other)  # nothing there says otherwise
    with pytest.raises(ValueError, match="--new-tokenizer: goes with --tokenizer"):
        begin(from_=str(origin), new_tokenizer=True)


def test_weights_worse_than_chance_are_reported(capsys):
    """Weights without a tokenizer beside them."""

    def first(loss: float, weights: Path | None, unit: str = "nats per token", step: int = 0) -> str:
        job = SimpleNamespace(
            tokenizer=load_tokenizer(),
            state={"step": step},
            console=Console(),
            initial=SimpleNamespace(weights=weights),
        )
        stage = SimpleNamespace(evaluate=lambda final: {"heldout_loss": loss}, loss_unit=unit)
        evaluate = Job._checked_evaluate(job, stage)
        evaluate(False), evaluate(False)
        return capsys.readouterr().out

    chance = math.log(6400)
    assert first(chance + 1, Path("m.pth")).count("worse than a guess (8.76): is this the tokenizer") == 1
    assert not first(chance - 1, Path("m.pth")) and not first(chance + 1, None)
    assert not first(chance + 1, Path("m.pth"), "per pair") and not first(chance + 1, Path("m.pth"), step=5)


def test_every_command_refuses_another_tokenizer(origin, other, bare, adapter):
    """chat, serve, evaluate and export open models by this function."""

    def tokenizer_of(**flags) -> str:
        return open_model(ModelArgs(device="cpu", **flags)).tokenizer.fingerprint

    theirs, ours = load_tokenizer(other).fingerprint, load_tokenizer().fingerprint
    model = {"model": str(origin)}
    assert_one_line_names_both(
        lambda: tokenizer_of(**model, tokenizer=other), f"--tokenizer {other}", f"--model {origin}"
    )
    assert tokenizer_of(**model, tokenizer=other, new_tokenizer=True) == theirs
    assert tokenizer_of(**model, tokenizer=str(DEFAULT_FOLDER)) == tokenizer_of(**model) == ours
    assert_one_line_names_both(lambda: tokenizer_of(model=str(bare[0]), preset="nano", tokenizer=other), str(bare[0]))
    assert_one_line_names_both(
        lambda: tokenizer_of(**model, lora=str(adapter)), f"--lora {adapter}", f"--model {origin}"
    )
    assert tokenizer_of(**model, lora=str(adapter), new_tokenizer=True) == theirs
    assert tokenizer_of(model=str(adapter)) == theirs  # it was trained with that one
    with pytest.raises(ValueError, match="--new-tokenizer: goes with --tokenizer"):
        tokenizer_of(**model, new_tokenizer=True)


def test_the_web_server_gets_the_new_tokenizer():
    command = server_command(WebArgs(model="m", tokenizer="t", new_tokenizer=True))
    assert command[command.index(NEW) + 1].startswith("--")
    assert NEW not in server_command(WebArgs(model="m"))


def test_an_adapter_of_another_tokenizer_is_not_trained_further(origin, adapter, tmp_path):
    flags = {"from_": str(origin), "adapter": str(adapter), "out": str(tmp_path / "out"), "seq_len": 128}
    assert_one_line_names_both(lambda: call(SCRIPT.with_name("lora.py"), **flags), f"--adapter {adapter}")


def test_a_teacher_of_another_tokenizer_is_refused(origin, other, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(origin, teacher)
    load_tokenizer(other).save(teacher)
    flags = {"from_": str(origin), "teacher": str(teacher), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"--teacher .*: its tokenizer \(\w{8}\) is not the student's \(\w{8}\)"):
        call(SCRIPT.with_name("distill.py"), **flags)


def test_another_tokenizer_makes_another_run_except_for_old_runs(tmp_path):
    def start(name: str, **config):
        run = open_run(None, name, {"args": {}, **config}, "auto", tmp_path, Defaults())
        run.lock.release()
        return run

    one, two = "1" * 64, "2" * 64
    assert [start("x", tokenizer=t).path.name for t in (one, two, one)] == ["x", "x-2", "x"]
    assert "tokenizer 22222222 (now 33333333)" in start("x", tokenizer="3" * 64).notes[0]
    assert [start("y", **c).path.name for c in ({}, {"tokenizer": one, "references": {"a": "b"}})] == ["y", "y"]


def texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} and {i} make {2 * i}."}) + "\n" for i in range(200)))
    return path


def chats(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} it is."}] for i in range(200)]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return path


def teacher(folder: Path) -> None:
    """A model with new random weights at each call."""
    save_weights(Model(TINY), folder)
    load_tokenizer().save(folder)


def reward_model(folder: Path) -> None:
    save_value_model(ValueModel.from_model(Model(TINY)), folder)
    load_tokenizer().save(folder)


def own_adapter(folder: Path) -> None:
    model = Model(TINY)
    add_adapter(model, LoRAConfig())
    save_adapter(model, folder)


SHORT = {"tokens": 1024, "batch_tokens": 512, "seq_len": 128, "evals": 1, "eval_questions": 1, "save_every": 1}
RL = {"rollouts": 1, "prompts": 2, "minibatches": 1, "max_new_tokens": 2, "evals": 1, "eval_prompts": 1}


@pytest.mark.parametrize(
    ("stage", "make", "flags", "named"),
    [
        ("distill", teacher, lambda f: {"teacher": str(f), **SHORT}, "weights of teacher"),
        ("lora", own_adapter, lambda f: {"adapter": str(f), **SHORT}, "weights of adapter"),
        ("grpo", reward_model, lambda f: {"reward": (f"model={f}",), "samples": 2, **RL}, "weights of reward"),
        ("spo", reward_model, lambda f: {"reward": (f"answer_model={f}",), **RL}, "weights of reward"),
    ],
)
def test_references_of_a_run_are_identified_by_their_weights(stage, make, flags, named, origin, tmp_path):
    """A reference that was trained anew at the same path makes another run."""
    folder, out = tmp_path / "reference", tmp_path / "out"
    given = {"from_": str(origin), "data": (str(chats(tmp_path)),), "out": str(out), "cache_dir": str(tmp_path / "c")}
    for start in range(3):
        if start != 1:
            torch.manual_seed(start)
            make(folder)
        if start == 2:
            with pytest.raises(ValueError, match=f"out: started with {named}.* \\(now "):
                call(SCRIPT.with_name(f"{stage}.py"), **given, **flags(folder))
            return
        call(SCRIPT.with_name(f"{stage}.py"), **given, **flags(folder))
        (out / "finished").unlink()
        gc.collect()  # the run's lock goes with its objects


STAGES = ("pretrain", "sft", "lora", "distill", "reason", "dpo", "reward", "grpo", "ppo", "spo")


@pytest.mark.parametrize("stage", STAGES)
def test_built_in_data_are_not_made_when_data_are_named(stage, origin, tmp_path, monkeypatch):
    """A stage would write them below the cache's corpus/."""

    def opened(job: Job) -> None:
        raise ValueError("--data are open")

    monkeypatch.setattr(Job, "open_run", opened)
    cache = tmp_path / "cache"
    data = texts(tmp_path) if stage == "pretrain" else chats(tmp_path)
    flags = {"from_": str(origin), "data": (str(data),), "cache_dir": str(cache), "out": str(tmp_path / "out")}
    if stage == "distill":
        flags["teacher"] = str(origin)
    with pytest.raises(ValueError, match=r"--data|chats\.jsonl"):  # which are no pairs, and have no reasoning
        call(SCRIPT.with_name(f"{stage}.py"), **flags)
    assert not (cache / "corpus").exists()
