"""Client libraries of others against the server, each in its own Python. Their requests are recorded in
tests/serving/clients.json, which the normal suite sends again; MINIMIND_TEST_RECORD=1 writes that file anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minimind.serving import app
from tests.serving.service import ANSWERS, CALL, WEATHER, Running, serving

pytestmark = pytest.mark.interop
HERE = Path(__file__).parent
RECORDED = HERE.parent / "serving" / "clients.json"
RESULT = "It is 20 degrees."
PACKAGES = {
    "langchain": "langchain-openai",
    "llama_index": "llama-index-llms-openai-like",
    "litellm": "litellm",
    "pydantic_ai": "pydantic-ai-slim",
    "openai_agents": "openai-agents",
    "smolagents": "smolagents",
}


def conversations() -> list[list[dict[str, Any]]]:
    """ANSWERS with and without a system prompt, and the answer after the tool's result, for the tool as the libraries
    describe it."""
    brief = {"role": "system", "content": "Be brief."}
    plain = [
        [*head, {"role": "user", "content": question}, {"role": "assistant", **ANSWERS[question]}]
        for question in ("hi", "why")
        for head in ([], [brief])
    ]
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    titled = {**city, "properties": {"city": {"title": "City", "type": "string"}}, "additionalProperties": False}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", **ANSWERS["go"]},
        {"role": "tool", "content": f"20 degrees in {CALL['arguments']['city']}"},
        {"role": "assistant", "content": RESULT},
    ]
    formed = [{"role": "user", "content": "place"}, {"role": "assistant", "content": json.dumps({"city": "Paris"})}]
    tooled = []
    told = {
        "properties": {"city": {"description": "a city's name", "type": "string"}},
        "required": ["city"],
        "type": "object",
    }
    forms = [
        (text, form)
        for form in (WEATHER["function"]["parameters"], city, titled)
        for text in ("Weather in a city", "weather(city: str) -> str\nWeather in a city")
    ]
    for text, form in [*forms, ("\n        Weather in a city\n        ", told)]:
        tool = {"type": "function", "function": {"name": "weather", "description": text, "parameters": form}}
        head = {"role": "system", "content": "", "tools": [tool]}
        tooled += [[head, *turns], [head, *formed]]
    return [*plain, *tooled]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[tuple[Running, list[tuple[str, Any, int]]]]:
    """A server, and what it was asked: (path, body, status) of each request."""
    asked: list[tuple[str, Any, int]] = []
    gate = app.Gate.__call__

    async def note(self: app.Gate, scope: Any, receive: Any, send: Any) -> None:
        received, status = b"", [0]

        async def hear() -> Any:
            nonlocal received
            message = await receive()
            received += message.get("body", b"")
            return message

        async def say(message: Any) -> None:
            status[0] = message.get("status", status[0])
            await send(message)

        await gate(self, scope, hear, say)
        if scope["type"] == "http":
            asked.append((scope["path"], json.loads(received) if received else None, status[0]))

    monkeypatch.setattr(app.Gate, "__call__", note)
    with serving(**options) as running:
        yield running, asked


def interpreter(library: str) -> str:
    name = f"MINIMIND_TEST_{library.upper()}"
    found = os.environ.get(name)
    if not found:
        pytest.skip(f"{name} is not set: the Python that has {PACKAGES[library]}")
    return found


def run(*command: str) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any]) -> None:
    """What every library must have got, where it was asked."""
    hello, call = ANSWERS["hi"]["content"], [CALL["name"], CALL["arguments"]]
    assert all(found[name] == hello for name in ("whole", "streamed", "async") if name in found), found
    assert found["usage"] and found["usage"][-1] > 10, found
    assert found.get("call", call) == call and found.get("after", RESULT) == RESULT, found
    for name in ("form", "forced", "tools_and_form"):
        assert name not in found or list(found[name]) == ["city"], (name, found)
    assert "no embeddings" in found.get("embeddings", "no embeddings"), found


def save(name: str, client: str, asked: list[tuple[str, Any, int]]) -> None:
    """Record the requests for chats, one of each kind."""
    if os.environ.get("MINIMIND_TEST_RECORD"):
        clients = json.loads(RECORDED.read_text(encoding="utf-8"))
        bodies = [body for path, body, _ in asked if path.endswith("/chat/completions")]
        clients[name] = {"client": client, "bodies": list({kind_of(body): body for body in bodies}.values())}
        RECORDED.write_text(json.dumps(clients, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def kind_of(body: dict[str, Any]) -> str:
    """The parameters of a request, and the beginnings of its messages."""
    said = [str(message.get("content"))[:40] for message in body["messages"]]
    return json.dumps([{**body, "messages": said}], sort_keys=True)


@pytest.mark.parametrize("library", PACKAGES)
def test_a_library_gets_its_answers(library, model, monkeypatch):
    python = interpreter(library)
    with recorded(monkeypatch, model=model[0], tokenizer=model[1]) as (running, asked):
        found = run(python, str(HERE / "clients.py"), library, f"{running.root}/v1")
    check(found)
    assert not found.get("failures") and all(status == 200 for path, _, status in asked if "embeddings" not in path)
    show = "import sys; from importlib.metadata import version; print(sys.argv[1], version(sys.argv[1]))"
    client = subprocess.run([python, "-c", show, PACKAGES[library]], capture_output=True, text=True, check=True)
    save(library, client.stdout.strip(), asked)


def test_vercel_ai_sdk(model, monkeypatch, tmp_path):
    folder = os.environ.get("MINIMIND_TEST_VERCEL")
    if not folder:
        pytest.skip(
            "MINIMIND_TEST_VERCEL is not set: the folder in which npm installed ai and @ai-sdk/openai-compatible"
        )
    (tmp_path / "node_modules").symlink_to(Path(folder) / "node_modules")
    script = shutil.copy(HERE / "clients.mjs", tmp_path)
    with recorded(monkeypatch, model=model[0], tokenizer=model[1]) as (running, asked):
        found = run("node", "--preserve-symlinks", "--preserve-symlinks-main", str(script), f"{running.root}/v1")
    check(found)
    assert found["thinking"] == ANSWERS["why"]["reasoning_content"]
    versions = [
        f"{name} {json.loads((Path(folder) / 'node_modules' / name / 'package.json').read_text())['version']}"
        for name in ("ai", "@ai-sdk/openai-compatible")
    ]
    save("vercel_ai_sdk", ", ".join(versions), asked)
