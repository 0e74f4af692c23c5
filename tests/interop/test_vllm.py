"""vLLM with the exported folders: the same greedy tokens, adapters, and its server with the chat template."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench.decoding.judge import Judge
from minimind import cli
from minimind.export.hf import export_hf
from minimind.inference.generate import generate
from minimind.lora import adapter_names
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from tests import foreign
from tests.export.small import model_of
from tests.interop import programs
from tests.interop.neighbours import (
    NEW,
    PROMPTS,
    QUESTION,
    TOOLED,
    adapted,
    check_chat,
    openai_form,
    post,
    program,
    running,
    shapes,
    taught,
    write,
)
from tests.serving.service import WEATHER

pytestmark = pytest.mark.interop
PAGE = Path(__file__).parents[2] / "docs" / "export" / "vllm.md"

# On a CPU vLLM applies no adapter to a model with experts: its kernels for that are Triton's.
ADAPTED = ("llama", "qwen3")
MERGED = ("llama", "granitemoe")
NAMES = [*shapes(), *(f"{name}, adapter" for name in ADAPTED), *(f"{name}, merged" for name in MERGED)]


def model_named(name: str) -> Model:
    base, _, way = name.rpartition(", ")
    return adapted(base) if way in ("adapter", "merged") else model_of(shapes()[name])


def job_of(name: str, folder: Path) -> dict[str, str]:
    """The model as `minimind export` writes it: plain, as a base with an adapter beside it, or merged."""
    model = model_named(name)
    if name.endswith(", adapter") or name.endswith(", merged"):
        write(model_of(model.config), folder / "base")
        save_adapter(model, folder / "lora", base_model=str(folder / "base"))
        merge = ["--merge-lora"] if name.endswith(", merged") else []
        command = ["export", "--model", str(folder / "lora"), "--to", "hf", "--out", str(folder / "out"), *merge]
        assert cli.run(command) == 0
    else:
        write(model, folder / "out")
    adapter = {"adapter": str(folder / "out" / "adapter")} if name.endswith(", adapter") else {}
    return {"name": name, "folder": str(folder / "out"), **adapter}


@pytest.fixture(scope="module")
def greedy(request, tmp_path_factory):
    """The tokens of the models whose tests were selected, from one process: its imports take longest."""
    python, place = program("VLLM"), tmp_path_factory.mktemp("vllm")
    selected = {item.callspec.params["name"] for item in request.session.items if "greedy" in item.fixturenames}
    jobs = [job_of(name, place / str(number)) for number, name in enumerate(NAMES) if name in selected]
    return foreign.call("vLLM", programs.vllm_greedy, jobs, PROMPTS, NEW, python=python, timeout=7200)


@pytest.mark.parametrize("name", NAMES)
def test_vllm_writes_the_same_tokens(name, greedy):
    """Greedy in float32, one for one; an adapter that is not merged is applied at run time."""
    model = model_named(name)
    assert isinstance(greedy[name], list), greedy[name]
    assert greedy[name] == generate(model, PROMPTS, NEW, temperature=0.0)
    if adapter_names(model):
        base = model_of(shapes()[name.rpartition(", ")[0]])
        assert greedy[name] != generate(base, PROMPTS, NEW, temperature=0.0)
    else:
        assert Judge(model).judge(torch.tensor(PROMPTS), greedy[name], "fp32").passed


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """vLLM's server as its guide page starts it, with a model that knows a few answers."""
    place = tmp_path_factory.mktemp("serve")
    model, tokenizer = taught()
    export_hf(model, tokenizer, place / "my-model")
    (command,) = re.findall(r"^python (-m vllm\S+ (?:.*\\\n)*.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    words = command.replace("my-model", str(place / "my-model"), 1).replace("8000", "PORT").replace("\\\n", "").split()
    exact = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "2")
    with running([program("VLLM"), *words, *exact], place / "log", seconds=1500, VLLM_CPU_KVCACHE_SPACE="1") as address:
        yield address


def test_prompts_are_those_of_the_template(chatting):
    _, tokenizer = taught()
    for messages, tools in ((QUESTION, None), (openai_form(TOOLED), [WEATHER])):
        for thinking in (None, True, False):
            asked = {} if thinking is None else {"enable_thinking": thinking}
            wanted = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True, **asked)
            body = {"model": "minimind", "messages": messages, "tools": tools, "chat_template_kwargs": asked}
            assert post(f"{chatting}/tokenize", body)["tokens"] == tokenizer.encode(wanted)


def test_chat_thoughts_and_tool_calls(chatting):
    check_chat(chatting, reasoning="reasoning")
