"""lm-evaluation-harness on one folder, by `minimind evaluate` and by its own adapter of transformers.

MINIMIND_TEST_LM_EVAL names a Python that has lm_eval, transformers and what this project needs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from minimind import load_tokenizer
from minimind.inference.generate import generate
from tests.evaluation.tasks import STOP, write_tasks
from tests.export.small import CONFIGS, model_of
from tests.interop.neighbours import program, write

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
TASKS = ("known_choice", "known_text", "known_perplexity")


@pytest.mark.parametrize("name", ["llama", "qwen3", "granitemoe"])
def test_the_same_numbers(name, tmp_path):
    """Accuracies, matches and perplexity of generated tasks, in float32."""
    python = program("LM_EVAL")
    model = write(model_of(CONFIGS[name]), tmp_path / "my-model")
    (tmp_path / "tasks").mkdir()
    words = ["世界", " there", " café", " Hello", "!"]
    questions = [f"Hello {'there ' * (i % 4)}naïve {i}:" for i in range(40)]
    choices = [{"question": q, "choices": words, "answer": i % len(words)} for i, q in enumerate(questions)]
    texts = [{"question": q, "answer": written(name, q) + "?" * (i % 2)} for i, q in enumerate(questions[:8])]
    rolling = [{"text": "Hello there, 世界! " * (3 * i + 1)} for i in range(4)]
    write_tasks(tmp_path / "tasks", {"choice": choices, "text": texts, "rolling": rolling})
    files = ["--tasks", ",".join(TASKS)]
    ours = ["-m", "minimind", "evaluate", "--model", model, *files, "--include", str(tmp_path / "tasks")]
    theirs = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", *files]
    theirs += ["--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--output_path", str(tmp_path / "theirs")]
    for arguments in ([*ours, "--dtype", "fp32", "--out", str(tmp_path / "ours")], theirs):
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    own = json.loads((tmp_path / "ours" / "tasks.json").read_text(encoding="utf-8"))["results"]
    (file,) = (tmp_path / "theirs").rglob("results*.json")
    other = json.loads(file.read_text(encoding="utf-8"))["results"]
    compared = 0
    for task in TASKS:
        for metric, value in own[task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert value == pytest.approx(other[task][metric], rel=1e-5), (task, metric)
                compared += 1
    assert compared >= 3 and 0 < own["known_text"]["exact_match,none"] < 1


def written(name: str, question: str) -> str:
    """What the model writes after the question, up to the task's stop string: an answer that matches."""
    tokenizer = load_tokenizer()
    (ids,) = generate(model_of(CONFIGS[name]), [tokenizer.encode(question)], 6, temperature=0.0)
    return tokenizer.decode(ids, skip_special_tokens=True).split(STOP)[0]
