"""lm-evaluation-harness with this project's models: tasks with known answers, and the harness's own adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minimind import cli
from minimind.evaluation import perplexity
from minimind.export.hf import export_hf
from minimind.inference.engine import Engine
from minimind.inference.generate import generate
from minimind.weights import save_weights
from tests.evaluation.tasks import MULTIPLE_CHOICE, STOP, write_tasks
from tests.inference.small import VARIANTS, small_model, small_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
pytestmark = pytest.mark.filterwarnings("default")

CHOICES = ["世界", " there", "café", "Hello", "!"]
QUESTIONS = [f"Hello {'there ' * (i % 4)}naïve {i}:" for i in range(12)]


def log_prob(model, context: list[int], continuation: list[int]) -> float:
    """One forward of one sequence in float64."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0].log_softmax(-1)
    return float(sum(logits[len(context) - 1 + i, t] for i, t in enumerate(continuation)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Three tasks with known results: 9 of 12 choices and 2 of 4 texts are the model's own."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = small_model().double(), small_tokenizer()
    rows = []
    for i, question in enumerate(QUESTIONS):
        context = tokenizer.encode(question)
        scores = [log_prob(model, context, tokenizer.encode(question + c)[len(context) :]) for c in CHOICES]
        best = max(range(len(CHOICES)), key=scores.__getitem__)
        answer = best if i % 4 else (best + 1) % len(CHOICES)
        rows.append({"question": question, "choices": CHOICES, "answer": answer})
    texts = []
    for i, question in enumerate(QUESTIONS[:4]):
        (ids,) = generate(small_model(), [tokenizer.encode(question)], 6, temperature=0.0)
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        own = tokenizer.decode(ids, skip_special_tokens=True).split(STOP)[0]
        texts.append({"question": question, "answer": own if i % 2 else own + "?"})
    rolling = [{"text": "Hello there, 世界! " * (3 * i + 1)} for i in range(3)]
    return write_tasks(folder, {"choice": rows, "text": texts, "rolling": rolling})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_weights(small_model(), path)
    small_tokenizer().save(path)
    return path


def test_known_answers(tasks, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    status = cli.run(
        ["evaluate", "--model", str(folder), "--tasks", "known_choice,known_text", "known_perplexity",
         "--include", str(tasks), "--out", str(out), "--dtype", "fp32"]
    )  # fmt: skip
    assert status == 0 and str(out / "tasks.json") in capsys.readouterr().out
    found = json.loads((out / "tasks.json").read_text(encoding="utf-8"))["results"]
    assert found["known_choice"]["acc,none"] == 9 / 12
    assert found["known_text"]["exact_match,none"] == 2 / 4
    model, tokenizer = small_model().double(), small_tokenizer()
    nats = size = 0.0
    for line in (tasks / "rolling.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        nats -= log_prob(model, [tokenizer.bos_token_id], tokenizer.encode(text))
        size += len(text.encode())
    assert found["known_perplexity"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / size), rel=1e-5)


def instances(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_likelihoods_are_those_of_the_harness_own_adapter(variant, tmp_path):
    """Compares with the exported model in transformers, for contexts that are empty, end in spaces, or are too long."""
    pytest.importorskip("transformers", reason="install minimind[export]")
    from lm_eval.models.huggingface import HFLM

    from minimind.evaluation.harness import HarnessModel

    model, tokenizer = small_model(variant, max_position_embeddings=64), small_tokenizer()
    export_hf(model, tokenizer, tmp_path)
    engine = Engine(model, tokenizer, dtype=torch.float32)
    ours = HarnessModel(model, tokenizer, engine)
    theirs = HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=4, max_length=ours.max_length)
    assert ours.max_length == theirs.max_length
    pairs = instances(
        ("Hello", " there"), ("Hello", " world"), ("Hello ", "there"), ("", "café"), ("你好，", "世界！Hello world"),
        ("Hello there. " * 30, "naïve"), ("Hello there. " * 90, "naïve café 😀"),
    )  # fmt: skip
    own = ours.loglikelihood(pairs, disable_tqdm=True)
    other = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (found, greedy), (wanted, wanted_greedy) in zip(own, other, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4) and greedy == wanted_greedy
    texts = instances(("Hello there, 世界! ",), ("naïve café " * 40,), ("",))
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        [*theirs.loglikelihood_rolling(texts[:2], disable_tqdm=True), 0.0], rel=1e-4
    )


def test_generation(folder):
    from minimind.evaluation.harness import HarnessModel

    model, tokenizer = small_model(), small_tokenizer()
    lm = HarnessModel(model, tokenizer, Engine(model, tokenizer))
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7}
    texts = lm.generate_until(instances(("Hello", settings), ("Hello", settings), ("x" * 3000, {"max_gen_toks": 8})))
    assert texts[0] == texts[1] and len(texts) == 3, "seeded"
    assert lm.generate_until(instances(("", {"max_gen_toks": 4, "until": "zzz"})))[0] is not None
    with pytest.raises(ValueError, match="generation setting 'num_beams' is not supported"):
        lm.generate_until(instances(("Hello", {"num_beams": 4})))
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    asked = lm.apply_chat_template(history[:1])
    assert lm.apply_chat_template(history, add_generation_prompt=False) == asked + "The answer is"


def test_equal_inputs_are_computed_once(monkeypatch):
    from minimind.evaluation.harness import HarnessModel

    model, tokenizer = small_model(), small_tokenizer()
    lm = HarnessModel(model, tokenizer, Engine(model, tokenizer))
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    context = tokenizer.encode("Hello there")
    requests = [(None, context, [token]) for token in (50, 60, 70, 80)]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert sizes == [len(context)] and len({log_prob for log_prob, _ in found}) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        pytest.param(
            ["--tasks", "known_nothing"],
            "--tasks known_nothing: lm-evaluation-harness has no such task",
            marks=pytest.mark.slow,
        ),
        (["--tasks", ","], "--tasks: name at least one"),
        (["--tasks", "known_choice", "--ppl", "x.txt"], "--ppl and --tasks: give one of them"),
        (["--tasks", "known_choice", "--include", "nowhere"], "--include nowhere: no such folder"),
    ],
)
def test_bad_flags(flags, message, folder, capsys):
    assert cli.run(["evaluate", "--model", str(folder), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_without_lm_eval(folder, capsys, monkeypatch):
    monkeypatch.setattr(perplexity.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["evaluate", "--model", str(folder), "--tasks", "ceval"]) == 2
    assert "--tasks needs lm-evaluation-harness: pip install lm-eval" in capsys.readouterr().err


def test_data_that_cannot_be_read_is_one_line(tasks, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "tasks"
    broken.mkdir()
    text = MULTIPLE_CHOICE.replace("FOLDER", str(tmp_path / "gone")).replace("known_choice", "gone_choice")
    (broken / "gone.yaml").write_text(text, encoding="utf-8")
    flags = ["--tasks", "gone_choice", "--include", str(broken)]
    assert cli.run(["evaluate", "--model", str(folder), *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "--tasks gone_choice: the data cannot be read" in error[0]
