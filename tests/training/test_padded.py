"""A Hugging Face folder whose vocabulary is padded beyond its tokenizer's: from training to every use of the result."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind import cli, load_model, load_tokenizer
from minimind.export.hf import export_hf
from minimind.inference.loading import WeightArgs, open_weights
from minimind.modeling import Model
from tests.inference.padded import padded
from tests.training.runs import SCRIPT, TINY, call, rows_of

SFT, DISTILL, GRPO = (SCRIPT.with_name(f"{name}.py") for name in ("sft", "distill", "grpo"))
SMALL = {"seq_len": 128, "batch_tokens": 512, "evals": 1, "precision": "fp32", "log_every": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model twice, as transformers keeps it: with rows for the tokenizer's ids, and with 64 more."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = Model(TINY)
    for name, each in (("narrow", model), ("wide", padded(model))):
        export_hf(each, load_tokenizer(), place / name)
    return {name: place / name for name in ("narrow", "wide")}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(folders, chats, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    for name, folder in folders.items():
        call(SFT, from_=str(folder), data=(str(chats),), out=str(place / name), cache_dir=str(place / "cache"),
             tokens=512 * 4, heldout=0.1, **SMALL)  # fmt: skip
    return {name: place / name for name in folders}


def test_training_sees_the_tokenizers_ids_alone(folders, runs):
    """To the bit: no row beyond them is in a loss, and none learns."""
    assert rows_of(runs["wide"], "train")[0]["loss"] == pytest.approx(math.log(6400), rel=0.05)
    for kind in ("train", "eval"):
        wide, narrow = (rows_of(runs[name], kind) for name in ("wide", "narrow"))
        same = [{k: v for k, v in row.items() if "per_second" not in k} for row in narrow]
        assert [{k: row[k] for k in known} for row, known in zip(wide, same, strict=True)] == same
    models = {name: load_model(run) for name, run in runs.items()}
    assert models["wide"].config.vocab_size == 6464 and models["wide"].config.num_tokens == 6400
    rows = [model.embed_tokens.weight for model in models.values()]
    assert torch.equal(rows[0], rows[1][:6400])


def test_the_result_chats_and_is_evaluated(runs, capsys, tmp_path):
    text, said = tmp_path / "text.txt", {}
    text.write_text("what is it? it is one.\n" * 40)
    for name, run in runs.items():
        assert cli.run(["chat", "--model", str(run), "--prompt", "What is 5?", "--dtype", "fp32", "--seed", "1",
                         "--max-new-tokens", "12"]) == 0  # fmt: skip
        said[name] = capsys.readouterr().out
        assert cli.run(["evaluate", "--model", str(run), "--ppl", str(text), "--context", "16", "--tokens", "160",
                         "--dtype", "fp32", "--out", str(tmp_path / name)]) == 0  # fmt: skip
        capsys.readouterr()
    assert said["wide"] == said["narrow"] != ""
    scores = [json.loads((tmp_path / n / "perplexity.json").read_text())["scores"][0]["perplexity"] for n in runs]
    assert scores[0] == scores[1]


def test_export_keeps_the_rows_and_opens_again(runs, tmp_path, capsys):
    out = tmp_path / "hf"
    assert cli.run(["export", "--model", str(runs["wide"]), "--to", "hf", "--out", str(out)]) == 0
    assert "padded vocabulary: 64 of the model's 6,464 rows" in capsys.readouterr().out
    trained, weights = load_model(runs["wide"]), load_file(out / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], trained.embed_tokens.weight)
    config, generation = (json.loads((out / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config["vocab_size"] == 6464 and generation["suppress_tokens"] == list(range(6400, 6464))
    opened = open_weights(WeightArgs(str(out)), torch.device("cpu"))
    assert opened.model.config == trained.config
    transformers = pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ids.max() < 6400


def test_a_padded_teacher_and_a_narrow_student(folders, chats, tmp_path):
    for name in ("narrow", "wide"):
        places = {"out": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "data": (str(chats),)}
        models = {"from_": str(folders["narrow"]), "teacher": str(folders[name])}
        call(DISTILL, **models, **places, tokens=512 * 2, heldout=0.1, **SMALL)
    wide, narrow = (rows_of(tmp_path / name, "train") for name in ("wide", "narrow"))
    assert [row["loss"] for row in wide] == [row["loss"] for row in narrow]


def test_rollouts_and_trainer_agree(folders, chats, tmp_path):
    """GRPO's ratio of the first update is 1 to rounding: sampler and trainer leave out the same ids."""
    call(GRPO, from_=str(folders["wide"]), data=(str(chats),), out=str(tmp_path / "run"), rollouts=2, prompts=2,
         samples=2, max_new_tokens=6, evals=1, eval_prompts=4, log_every=1, lr=1e-3, precision="fp32",
         reward=("length=1..4",))  # fmt: skip
    rows = rows_of(tmp_path / "run", "train")
    assert rows and all(row["ratio_drift"] < 1e-4 for row in rows)
