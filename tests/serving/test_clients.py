"""Requests of OpenAI's clients, most of them recorded: a question, a question with a tool, the tool's result."""

import json
from pathlib import Path

import pytest

CLIENTS = json.loads(Path(__file__).with_name("clients.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CLIENTS)
def test_what_clients_send_is_answered(server, name):
    for body in CLIENTS[name]["bodies"]:
        response = server.http.post("/v1/chat/completions", json={"temperature": 0, **body})
        assert response.status_code == 200, (CLIENTS[name]["client"], response.text)
        if body.get("stream"):
            assert response.text.rstrip().endswith("data: [DONE]")
        else:
            assert response.json()["choices"][0]["message"]["role"] == "assistant"
