"""Other programs, each in an environment of its own, and the models they get.

MINIMIND_TEST_VLLM=/path/to/python names the Python that has vLLM; without it the tests of vLLM are skipped. So for the
others: tests/README.md lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.export.hf import export_hf
from minimind.lora import LoRAConfig
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from tests.adapted import with_adapter
from tests.export.small import CONFIGS, model_of
from tests.serving.service import ANSWERS, CALL, WEATHER, teach

PROMPTS = torch.randint(16, 6400, (2, 100), generator=torch.Generator().manual_seed(1)).tolist()
NEW = 48
PRESETS = ("minimind2", "minimind2-moe", "minimind3", "minimind3-moe")


def program(name: str) -> str:
    """The program that MINIMIND_TEST_<NAME> names; skips the test where it names none."""
    variable = f"MINIMIND_TEST_{name}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no program")
    return os.environ[variable]


def shapes() -> dict[str, ModelConfig]:
    """The small shapes of tests/export, and two layers of each preset: their head sizes are 80 and 96 too. Programs
    other than transformers 5 and llama.cpp take Granite's head size from the hidden size."""
    small = {
        name: dataclasses.replace(config, hidden_size=128) if name.startswith("granite") else config
        for name, config in CONFIGS.items()
    }
    cut = {name: dataclasses.replace(ModelConfig.preset(name), num_hidden_layers=2) for name in PRESETS}
    return {**small, **cut}


def adapted(name: str, targets: tuple[str, ...] | None = None, **settings: Any) -> Model:
    """The model of shapes()[name] with an adapter, the same at every call. targets: None for all that take one."""
    torch.manual_seed(0)  # for A
    model = model_of(shapes()[name])
    return with_adapter(model, LoRAConfig(rank=4, alpha=8.0, targets=targets, **settings))


def write(model: Model, folder: Path) -> str:
    export_hf(model, load_tokenizer(), folder)
    return str(folder)


RESULT = "It is 20 degrees."
QUESTION = [{"role": "user", "content": "why"}]
TOOLED = [
    {"role": "user", "content": "go"},
    {"role": "assistant", **ANSWERS["go"]},
    {"role": "tool", "content": "20 degrees in Paris", "tool_call_id": "call-1"},
]


@functools.cache
def taught() -> tuple[Model, Tokenizer]:
    """A model that has memorised the answers to hi, why and go, and what it says after a call's result."""
    plain = [[{"role": "user", "content": q}, {"role": "assistant", **ANSWERS[q]}] for q in ("hi", "why")]
    tools = {"role": "system", "content": "", "tools": [WEATHER]}
    tooled = [tools, *TOOLED, {"role": "assistant", "content": RESULT}]
    texts = [str(CALL), RESULT, *(str(answer) for answer in ANSWERS.values())]
    return teach([*plain, tooled], texts, head_dim=32)  # vLLM's attention on CPUs begins at heads of 32


def check_chat(address: str, reasoning: str, **options: Any) -> None:
    """OpenAI's client gets the taught answers, whole and streamed: text, a thought, a tool call, and what follows its
    result. reasoning: the server's name of the thought's field; options: of every request."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        model = client.models.list().data[0].id

        def ask(messages: list[Any], **more: Any) -> dict[str, Any]:
            settings = {"model": model, "temperature": 0, "max_tokens": 64, **options, **more}
            whole = client.chat.completions.create(messages=messages, **settings).choices[0]
            stream = client.chat.completions.create(messages=messages, stream=True, **settings)
            streamed: dict[str, Any] = {"name": "", "arguments": ""}
            for delta in (choice.delta for chunk in stream for choice in chunk.choices):
                for field in ("content", reasoning):
                    streamed[field] = streamed.get(field, "") + (getattr(delta, field, None) or "")
                for call in delta.tool_calls or ():
                    streamed["name"] += call.function.name or ""
                    streamed["arguments"] += call.function.arguments or ""
            calls = [call.function for call in whole.message.tool_calls or ()]
            answer = {field: (getattr(whole.message, field, None) or "").strip() for field in ("content", reasoning)}
            assert {field: streamed[field].strip() for field in answer} == answer
            assert "".join(call.name for call in calls) == streamed["name"]
            assert [json.loads(call.arguments) for call in calls] == (
                [json.loads(streamed["arguments"])] if calls else []
            )
            return {**answer, "calls": [{"name": c.name, "arguments": json.loads(c.arguments)} for c in calls]}

        thought, text = ANSWERS["why"]["reasoning_content"], ANSWERS["why"]["content"]
        assert ask([{"role": "user", "content": "hi"}]) == {**ANSWERS["hi"], reasoning: "", "calls": []}
        assert ask(QUESTION) == {"content": text, reasoning: thought, "calls": []}
        assert ask(TOOLED[:1], tools=[WEATHER]) == {"content": "", reasoning: "", "calls": [CALL]}
        assert ask(openai_form(TOOLED), tools=[WEATHER]) == {"content": RESULT, reasoning: "", "calls": []}


def openai_form(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as OpenAI's clients send them: calls have an id, and their arguments are JSON in a string."""
    sent = []
    for message in messages:
        calls = message.get("tool_calls", ())
        functions = [
            {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)} for c in calls
        ]
        called = [{"id": "call-1", "type": "function", "function": function} for function in functions]
        sent.append({**message, **({"tool_calls": called} if called else {})})
    return sent


@contextmanager
def running(
    command: list[str], log: Path, health: str = "/health", seconds: float = 300, **environment: str
) -> Iterator[str]:
    """Start a server with `command`, in which PORT stands for a free port; gives its address when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [word.replace("PORT", port) for word in command],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + seconds
            while not answers(f"{address}/health"):
                said = log.read_text(encoding="utf-8", errors="replace")
                assert process.poll() is None and time.monotonic() < end, said[-3000:]
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read().decode()[:500]}") from None
