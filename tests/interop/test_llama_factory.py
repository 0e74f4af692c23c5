"""LLaMA-Factory on an exported folder, by the files and the command of its guide page, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from minimind import load_model, load_tokenizer
from minimind.inference.generate import generate
from minimind.lora_files import load_adapter
from tests import foreign
from tests.export.small import CONFIGS, model_of
from tests.interop import programs
from tests.interop.neighbours import PROMPTS, program, write

pytestmark = pytest.mark.interop
PAGE = Path(__file__).parents[2] / "docs" / "export" / "llama-factory.md"
ASKED = [{"role": "user", "content": "你好, 2+2?"}, {"role": "assistant", "content": "It is four."}]


def test_its_template_writes_our_tokens(tmp_path):
    folder, tokenizer = write(model_of(CONFIGS["llama"]), tmp_path / "model"), load_tokenizer()
    conversations = [
        [{"role": "system", "content": text}, *ASKED, *more] for text in ("", "Be brief.") for more in ([], ASKED)
    ]
    python = program("LLAMA_FACTORY")
    encode = programs.llama_factory_encode
    found = foreign.call("LLaMA-Factory", encode, folder, conversations, python=python, timeout=1800)
    for conversation, ids in zip(conversations, found, strict=True):
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(conversation)
        assert ids == tokenizer.encode(tokenizer.apply_chat_template(conversation))


WAYS = [("qwen3", "lora"), ("granitemoe", "full")]


@pytest.mark.parametrize("name, way", WAYS)
def test_sft_and_back(name, way, tmp_path):
    """Training on the page's settings lowers the loss; what it leaves opens here and is what was trained."""
    command = Path(program("LLAMA_FACTORY")).with_name("llamafactory-cli")
    write(model_of(CONFIGS[name]), tmp_path / "my-model")
    rows = [{"conversations": ASKED}] * 16
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "sft_mini_512.jsonl").write_text(lines, encoding="utf-8")
    files = page_files()
    for old, new in (("type: lora", f"type: {way}"), ("rate: 2.0e-4", "rate: 1.0e-2"), ("steps: 10", "steps: 1")):
        assert old in files["my-sft.yaml"]
        files["my-sft.yaml"] = files["my-sft.yaml"].replace(old, new)
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [command, "train", "my-sft.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    log = [json.loads(line) for line in (tmp_path / "my-adapter" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    if way == "lora":
        model = load_model(tmp_path / "my-model")
        assert set(load_adapter(model, tmp_path / "my-adapter").targets or ()) == {"q_proj", "v_proj"}
    else:
        model = load_model(tmp_path / "my-adapter")
    base = load_model(tmp_path / "my-model")
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert generate(model.eval(), PROMPTS, 4, temperature=0.0)


def page_files() -> dict[str, str]:
    """The files of the page: the block after each line that names one."""
    return dict(re.findall(r"`([\w-]+\.\w+)`[^\n]*:\n\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
