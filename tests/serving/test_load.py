"""Many clients at once: separate streams, slots that are freed at once, a full queue, an orderly shutdown."""

import asyncio
import itertools
import json
import time

import httpx
import openai
import pytest

from bench.common.models import random_model
from minimind import ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from tests.inference.small import random_prompts, small_model, small_tokenizer
from tests.serving.service import Running, serving

COMPLETIONS = "/v1/completions"
# greedy: random weights then repeat one token to the end, where samples may draw the end token
LONG = {"model": "tiny", "prompt": [5], "max_tokens": 1000, "stream": True, "temperature": 0}


def varied_model() -> Model:
    """Random weights, so large that every layer changes the next token and few answers are alike."""
    vocabulary = small_tokenizer().vocab_size
    return random_model(ModelConfig(32, 2, 4, 2, 16, 48, vocabulary, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def varied():
    with serving(varied_model(), kv_tokens=1 << 15, max_batch=16, backend="auto") as running:
        yield running


def alone(tokens: int) -> dict[str, list[int]]:
    """Prompts with different answers, each computed alone in the engine."""
    engine = Engine(varied_model(), small_tokenizer(), kv_tokens=2048, max_batch=1, prefix_cache=False)
    prompts = random_prompts(200, 12, small_tokenizer().vocab_size)
    outputs = engine.generate(Request(p, SamplingParams(tokens, temperature=0)) for p in prompts)
    return {output.text: output.prompt_token_ids for output in outputs}


async def text_of(client: openai.AsyncOpenAI, prompt: list[int], tokens: int) -> str:
    stream = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, logprobs=0
    )
    pieces, count, reason = [], 0, None
    async for chunk in stream:
        pieces.append(chunk.choices[0].text)
        count += len(chunk.choices[0].logprobs.tokens)
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "stop" or (reason == "length" and count == tokens)
    return "".join(pieces)


def mixed(running: Running, clients: int, seconds: float, tokens: int) -> int:
    """The number of answers that the clients got. Each must be the one that its prompt gets alone."""
    expected = list(alone(tokens).items())[:clients]
    assert len(expected) == clients

    async def all_of_them() -> int:
        end = time.perf_counter() + seconds
        numbers = itertools.count()
        async with openai.AsyncOpenAI(base_url=running.client.base_url, api_key="x", max_retries=0, timeout=60) as own:

            async def one(answer: str, prompt: list[int]) -> None:
                while True:
                    assert await text_of(own, prompt, tokens) == answer
                    next(numbers)
                    if time.perf_counter() > end:
                        return

            await asyncio.gather(*(one(*pair) for pair in expected))
        return next(numbers)

    return asyncio.run(all_of_them())


def test_64_streams_at_once_are_not_mixed(varied):
    assert mixed(varied, 64, 0.0, 10) == 64


@pytest.mark.slow
def test_64_streams_for_a_minute_are_not_mixed(varied):
    assert mixed(varied, 64, 60.0, 64) > 64
    assert varied.service.worker.in_flight == 0 and not varied.service.worker._generations


def until(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_disconnected_client_frees_its_slot(stream, queued):
    model = small_model(max_position_embeddings=4096)
    with serving(model, max_batch=1, kv_tokens=1 << 13) as running:
        blocker = httpx.stream("POST", running.root + COMPLETIONS, json={**LONG, "max_tokens": 4000})
        if queued:
            blocker.__enter__()
        with httpx.Client(base_url=running.root, timeout=None if stream else 0.3) as client:
            body = {**LONG, "max_tokens": 4000, "stream": stream}
            if stream:
                with client.stream("POST", COMPLETIONS, json=body):
                    until(lambda: running.metric("minimind_requests_waiting") == int(queued))
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(COMPLETIONS, json=body)
        until(lambda: running.service.worker.in_flight == int(queued))
        assert running.metric("minimind_requests_waiting") == 0
        assert running.metric("minimind_requests_running") == int(queued)
        if queued:
            blocker.__exit__(None, None, None)
            until(lambda: running.service.worker.in_flight == 0)
        assert running.metric('minimind_samples_finished_total{reason="cancelled"}') == 1 + queued
        assert running.metric("minimind_kv_cache_usage_ratio") == 0


def test_a_full_queue_refuses():
    with serving(small_model(max_position_embeddings=2048), max_batch=1, max_queue=2, kv_tokens=4096) as running:
        streams = [httpx.stream("POST", running.root + COMPLETIONS, json=LONG) for _ in range(3)]
        for stream in streams:
            assert stream.__enter__().status_code == 200
        assert running.metric("minimind_requests_waiting") == 2
        refused = running.http.post(COMPLETIONS, json=LONG)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            running.client.completions.create(model="tiny", prompt="x")
        streams[1].__exit__(None, None, None)
        until(lambda: running.service.worker.in_flight == 2)
        with running.http.stream("POST", COMPLETIONS, json=LONG) as response:
            assert response.status_code == 200
        for stream in (streams[0], streams[2]):
            stream.__exit__(None, None, None)


def events_of(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_a_shutdown_finishes_what_runs():
    with serving(small_model(max_position_embeddings=2048), drain=30) as running:
        idle = httpx.Client(base_url=running.root)
        assert idle.get("/health").status_code == 200
        body = {**LONG, "max_tokens": 300}
        with httpx.stream("POST", running.root + COMPLETIONS, json=body) as response:
            running.server.should_exit = True
            until(lambda: running.service.worker.draining)
            *chunks, done = events_of(response)
        assert done == "[DONE]"
        assert json.loads(chunks[-1])["choices"][0]["finish_reason"] in ("length", "stop")
        with pytest.raises(httpx.TransportError):
            httpx.get(running.root + "/health")


def test_a_shutdown_waits_no_longer_than_the_limit():
    with serving(small_model(max_position_embeddings=8192), kv_tokens=1 << 14, drain=0.5) as running:
        body = {**LONG, "max_tokens": 8000, "prompt": [5, 5]}
        with httpx.stream("POST", running.root + COMPLETIONS, json=body) as response:
            running.server.should_exit = True
            *_, last, done = events_of(response)
        assert json.loads(last)["error"]["code"] == "cancelled" and done == "[DONE]"


def test_characters_are_never_split(server):
    """Every event on the wire is valid UTF-8, whatever the tokens are."""
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = raw.split(b"\n\n")
    assert end == b"" and events[-1] == b"data: [DONE]"
    pieces = []
    for event in events[:-1]:
        assert event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event
        delta = json.loads(event[6:].decode("utf-8", "strict"))["choices"][0]["delta"]
        pieces.append(delta.get("content") or "")
    assert "😀" in pieces and "".join(pieces) == "Hello 你好 😀👍🏽 naïve café!" and "\ufffd" not in "".join(pieces)
