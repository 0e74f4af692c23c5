"""bench/serving.py on a tiny load: its counts, its checks and its row."""

import asyncio
import csv
import dataclasses
import json

import pytest

from bench.common.record import columns_of
from minimind import ModelConfig, load_tokenizer
from minimind.weights import save_weights

serving = pytest.importorskip("bench.serving", reason="pip install 'minimind[dev]'")


def stream_of(*lines: str) -> bytes:
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def piece(text: str, reason: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 7}})


@pytest.mark.parametrize(
    ("content", "status", "lost", "mixed"),
    [
        (stream_of(piece("a"), piece("b", "stop"), USAGE, "[DONE]"), 200, 0, 0),
        (stream_of(piece("a"), piece("c", "stop"), USAGE, "[DONE]"), 200, 0, 1),
        (stream_of(piece("a"), piece("b", "stop"), USAGE), 200, 1, 0),
        (stream_of(piece("a"), '{"error": {}}', "[DONE]"), 200, 1, 1),
        (b"{}", 500, 1, 0),
    ],
)
def test_lost_and_mixed_answers_are_counted(content, status, lost, mixed):
    async def run() -> serving.LoadLog:
        log = serving.LoadLog()
        transport = serving.httpx.MockTransport(lambda request: serving.httpx.Response(status, content=content))
        async with serving.httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await serving.ask(client, "x", serving.CheckedPrompt([1], 7, "ab"), log)
        return log

    log = asyncio.run(run())
    assert (log.requests, log.lost, log.mixed) == (1, lost, mixed)
    if not lost:
        assert log.tokens == 7 and len(log.ttft) == 1 and len(log.gaps) == 1


def test_a_load_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="no answer came"):
        serving.summary(serving.LoadLog())


@pytest.mark.heavy
def test_a_short_run(tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'minimind[serve]'")
    tokenizer = load_tokenizer()
    model = serving.random_model(ModelConfig(32, 2, 4, 2, 16, 48, tokenizer.vocab_size, max_position_embeddings=256))
    save_weights(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    args = serving.Args(
        model=str(tmp_path / "model"), clients=6, seconds=1.0, max_batch=4, prompt=16, new=16, prompts=2, threads=1,
        device="cpu", out=str(tmp_path / "out"),
    )  # fmt: skip
    result = serving.main(args)
    assert result["lost"] == result["mixed"] == 0 and result["requests"] >= 6
    assert 0 < result["ttft_p50"] <= result["ttft_p99"] and result["tokens_per_second"] > 0
    with (tmp_path / "out" / "serving.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == columns_of(serving.ServingRow) and int(row["requests"]) == result["requests"]
    assert len(list((tmp_path / "out").glob("serving-*.png"))) == 1
    for wrong in ({"preset": "tiny"}, {"clients": 0}, {"new": 3}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            serving.main(dataclasses.replace(args, **wrong))
