"""LLaMA-Factory with the settings of its guide page: its token ids, LoRA on a Llama and a Qwen3, and the way back."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from minimind import load_model, load_tokenizer
from minimind.inference.generate import generate
from minimind.lora_files import load_adapter
from tests import foreign
from tests.export.small import model_of
from tests.interop import programs
from tests.interop.neighbours import PROMPTS, program, shapes, write

pytestmark = pytest.mark.interop
PAGE = Path(__file__).parents[2] / "docs" / "export" / "llama-factory.md"
NEW = 24
ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is four. 四"}]
CONVERSATIONS = [ASKED, [{"role": "system", "content": "Answer briefly."}, *ASKED, *ASKED]]


def written(kind: str) -> str:
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return block


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_reads_and_trains_an_export(name, tmp_path, monkeypatch):
    python, tokenizer = program("LLAMA_FACTORY"), load_tokenizer()
    write(model_of(shapes()[name]), tmp_path / "my-model")
    (tmp_path / "my-sft.yaml").write_text(written("yaml"))
    (tmp_path / "dataset_info.json").write_text(written("json"))
    rows = [json.dumps({"conversations": turns}) + "\n" for turns in [ASKED] * 16]
    (tmp_path / "sft_mini_512.jsonl").write_text("".join(rows))
    (tmp_path / "torchaudio.py").touch()  # as the page says for a CPU build of torch
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = [python, "-m", "llamafactory.cli", "train", "my-sft.yaml", "max_steps=6", "logging_steps=1"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "my-adapter" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    folders = [str(tmp_path / folder) for folder in ("my-model", "my-adapter")]
    arguments = (*folders, CONVERSATIONS, PROMPTS, NEW)
    found = foreign.call("LLaMA-Factory", programs.llama_factory, *arguments, python=python, timeout=600)
    assert found["ids"] == [tokenizer.encode(tokenizer.apply_chat_template(turns)) for turns in CONVERSATIONS]
    model = load_model(Path(folders[0]))
    assert load_adapter(model, folders[1]).rank == 8
    assert generate(model.eval(), PROMPTS, NEW, temperature=0.0) == found["tokens"]
