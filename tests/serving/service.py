"""A server in this process, with a tiny random model or one that was trained on a few answers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import openai
import torch
import torch.nn.functional as F

from minimind import ModelConfig, load_tokenizer
from minimind.inference.engine import Engine
from minimind.modeling import Model
from minimind.serving.app import Server, listen
from minimind.serving.service import Metrics, Service
from minimind.serving.worker import EngineWorker
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.tokenization.training import train_bpe
from tests.inference.small import small_model, small_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = {"name": "weather", "arguments": {"city": "Paris 巴黎"}}
ANSWERS = {
    "hi": {"content": "Hello 你好 😀👍🏽 naïve café!"},
    "why": {"reasoning_content": "Because of 光.\n\nYes.", "content": "So it is."},
    "go": {"content": "", "tool_calls": [{"type": "function", "function": CALL}]},
}


class Running:
    """url ends with /v1; client: OpenAI's, without retries."""

    def __init__(self, server: Server, service: Service, port: int) -> None:
        self.server, self.service = server, service
        self.root = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(
            base_url=f"{self.root}/v1", api_key=service.api_key or "none", max_retries=0, timeout=60
        )
        self.http = httpx.Client(base_url=self.root, timeout=60)

    def chat(self, question: str = "hi", **options: Any) -> Any:
        options = {"model": self.service.model, "temperature": 0, "max_tokens": 48, **options}
        messages: Any = options.pop("messages", [{"role": "user", "content": question}])
        return self.client.chat.completions.create(messages=messages, **options)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def serving(
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    drain: float = 30.0,
    max_queue: int = 64,
    **options: Any,
) -> Iterator[Running]:
    """options: of the engine and the service."""
    own = {
        name: options.pop(name)
        for name in ("api_key", "max_body", "default_max_tokens", "allow_origins")
        if name in options
    }
    engine_options = {"kv_tokens": 4096, "max_batch": 8, "backend": "reference", **options}
    tokenizer = tokenizer or small_tokenizer()
    engine = Engine(model or small_model(vocab_size=tokenizer.vocab_size), tokenizer, **engine_options)
    metrics = Metrics()
    worker = EngineWorker(engine, max_queue, metrics.first_token.observe)
    service = Service(worker, tokenizer, "tiny", metrics, **own)
    place = listen("127.0.0.1", 0)
    server = Server(service, drain)
    thread = Thread(target=server.run, args=([place],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
        yield Running(server, service, place.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not worker.alive


@functools.cache
def taught() -> tuple[Model, Tokenizer]:
    """A model that has memorised ANSWERS, trained in a second or two."""
    conversations = []
    for question, answer in ANSWERS.items():
        head = [{"role": "system", "content": "", "tools": [WEATHER]}] if answer.get("tool_calls") else []
        conversations.append([*head, {"role": "user", "content": question}, {"role": "assistant", **answer}])
    return teach(conversations, [str(CALL), *(str(answer) for answer in ANSWERS.values())])


def teach(
    conversations: list[list[dict[str, Any]]],
    texts: list[str],
    vocabulary: int = 320,
    positions: int = 1024,
    head_dim: int = 16,
) -> tuple[Model, Tokenizer]:
    """A model that has memorised the answers of these conversations, and a tokenizer trained on `texts`."""
    tokenizer = load_tokenizer().with_model(train_bpe(texts, vocabulary))
    encoder = ChatEncoder(tokenizer)
    torch.manual_seed(0)
    model = Model(ModelConfig(64, 2, 4, 2, head_dim, 128, tokenizer.vocab_size, max_position_embeddings=positions))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    encoded = encoder.encode([encoder.pieces(conversation) for conversation in conversations])
    rows = [(torch.from_numpy(c.ids.astype("int64")), c.trained) for c in encoded]
    worst = 1.0
    while worst > 0.05:
        losses = torch.cat(
            [
                F.cross_entropy(model(ids[None, :-1]).logits[0].float(), ids[1:], reduction="none")[trained[1:]]
                for ids, trained in rows
            ]
        )
        worst = float(losses.detach().max())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return model.eval(), tokenizer
