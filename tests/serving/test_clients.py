"""Requests of OpenAI's clients, recorded by tests/interop/: plain, streamed and typed answers, tools, results."""

import json
from pathlib import Path

import pytest

from minimind import load_tokenizer
from tests.inference.small import small_model
from tests.serving.service import serving

CLIENTS = json.loads(Path(__file__).with_name("clients.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def roomy():
    """A server of random weights with room for prompts of 4,096 tokens, as an agent's are."""
    tokenizer = load_tokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    with serving(model, tokenizer, default_max_tokens=16, kv_tokens=1 << 14) as running:
        yield running


@pytest.mark.parametrize("name", CLIENTS)
def test_what_clients_send_is_answered(roomy, name):
    for recorded in CLIENTS[name]["bodies"]:
        typed = "response_format" in recorded or recorded.get("tool_choice") == "required"
        limits = {name: 4 for name in ("max_tokens", "max_completion_tokens") if name in recorded and not typed}
        body = {**recorded, **limits}
        response = roomy.http.post("/v1/chat/completions", json={"temperature": 0, **body})
        assert response.status_code == 200, (CLIENTS[name]["client"], response.text)
        if body.get("stream"):
            events = response.text.strip().split("\n\n")
            assert events[-1] == "data: [DONE]" and "error" not in response.text
            usage = json.loads(events[-2].removeprefix("data: ")).get("usage")
            asked = (body.get("stream_options") or {}).get("include_usage", False)
            assert bool(usage and usage["total_tokens"] > 0) == asked
            continue
        choice = response.json()["choices"][0]
        message = choice["message"]
        assert message["role"] == "assistant"
        assert message.get("tool_calls") or body.get("tool_choice") != "required"
        if body.get("response_format") and not message.get("tool_calls") and choice["finish_reason"] == "stop":
            assert isinstance(json.loads(message["content"]), dict)
