"""MNN with an exported folder, converted by the command of its guide page: prompts, token ids and answers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minimind.export.hf import export_hf
from tests import foreign
from tests.interop import programs
from tests.interop.neighbours import program, taught
from tests.serving.service import ANSWERS

pytestmark = pytest.mark.interop
PAGE = Path(__file__).parents[2] / "docs" / "export" / "mnn.md"


def quiet(folder: Path) -> dict[str, str]:
    """An environment in which MNN's converter neither installs its vendor's logging package, as it otherwise does with
    the first `pip` it finds, nor reports its use."""
    (folder / "aliyun" / "log").mkdir(parents=True)
    (folder / "aliyun" / "log" / "__init__.py").write_text("LogClient = PutLogsRequest = None\n")
    (folder / "aliyun" / "log" / "logitem.py").write_text("LogItem = None\n")
    nowhere = "http://127.0.0.1:9"
    return {**os.environ, "PYTHONPATH": str(folder), "http_proxy": nowhere, "https_proxy": nowhere}


def test_a_converted_model_chats(tmp_path):
    """In 8 bits, which leave the memorised answers as they are."""
    python = program("MNN")
    (command,) = re.findall(r"^python (\S+llmexport\.py .*)$", PAGE.read_text(encoding="utf-8"), re.M)
    model, tokenizer = taught()
    export_hf(model, tokenizer, tmp_path / "my-model")
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    script, *flags = shlex.split(command.replace("$PACKAGES", packages.stdout.strip()))
    done = subprocess.run(
        [python, script, *flags], cwd=tmp_path, env=quiet(tmp_path / "quiet"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    questions = ["hi", "why"]
    found = foreign.call("MNN", programs.mnn_chat, str(tmp_path / "my-mnn"), questions, python=python, timeout=1800)
    for question, answer in zip(questions, found, strict=True):
        asked = [{"role": "user", "content": question}]
        assert answer["prompt"] == tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        assert answer["ids"] == tokenizer.encode(answer["prompt"])
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", **ANSWERS[question]}])
        assert answer["text"].strip() == whole.removeprefix(answer["prompt"]).removesuffix("<|im_end|>\n").strip()
