"""The memory that a huge row takes, and rows that are too large."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind.data import build, reader
from minimind.data.cache import open_corpus
from minimind.data.reader import BadRows, read_documents
from tests.data.fake import QUIET, ByteTokenizer

ROOT = Path(__file__).parents[2]
MEASURE = """
import resource, sys
from rich.console import Console
from minimind import load_tokenizer
from minimind.data import open_conversations, open_corpus
from minimind.tokenization import ChatEncoder
tokenizer, quiet = load_tokenizer(), Console(quiet=True)
def tokens(path, cache):
    if "chat" in path:
        return open_conversations([path], ChatEncoder(tokenizer), cache, console=quiet).num_tokens
    return open_corpus([path], tokenizer, cache, console=quiet).num_tokens
for path, cache in zip(sys.argv[1::2], sys.argv[2::2]):
    print(tokens(path, cache), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
WORDS = "the quick brown fox jumps over a lazy dog, 12 times; then it rests. "
TEXTS = {"English": WORDS, "Chinese": "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。", "an emoji among": WORDS}


def row(kind: str, text: str) -> str:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
    return json.dumps({"text": text} if kind == "text" else {"conversations": said}, ensure_ascii=False) + "\n"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "name"), [("text", "English"), ("text", "Chinese"), ("chat", "Chinese"), ("chat", "an emoji among")]
)
def test_a_byte_of_a_row_takes_at_most_twenty_bytes_of_memory(tmp_path, kind, name):
    """For 16 MB, from the file to the token cache, compared with a row of a few words."""
    paths = [tmp_path / f"{size}-{kind}.jsonl" for size in ("small", "huge")]
    text = TEXTS[name] * (16_000_000 // len(TEXTS[name].encode())) + "😀" * (name == "an emoji among")
    for path, said in zip(paths, (WORDS, text), strict=True):
        path.write_text(row(kind, said), encoding="utf-8")
    places = [str(part) for path in paths for part in (path, tmp_path / path.stem)]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, *places],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    (few, before), (tokens, peak) = (map(int, line.split()) for line in answer.stdout.splitlines())
    assert tokens > 1_000_000 > few
    assert (peak - before) / paths[1].stat().st_size < 20


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_row_that_is_too_large_is_named_or_skipped(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reader, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "_SKIP_CHUNK", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(row("text", "good") + row("text", "a" * (1 << 20)) + row("text", "more").rstrip() + end)
    reason = "the row has more than 1 MiB; divide it into several rows"
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {reason}; fix the row or pass --on-bad-row skip")):
        list(read_documents(path))
    bad = BadRows()
    found = list(read_documents(path, "skip", bad=bad))
    assert [d.text for d in found] == ["good", "more"] and bad.first == [(2, reason)]
    assert found[-1].end.offset == path.stat().st_size
    assert [d.text for d in read_documents(path, "skip", start=found[0].end)] == ["more"]


def test_a_text_that_cannot_be_encoded_names_its_line(tmp_path):
    class Refusing(ByteTokenizer):
        def encode_batch(self, texts, allow_special=True):
            if max(map(len, texts)) > 100:
                raise ValueError("too long; divide it into several rows")
            return super().encode_batch(texts, allow_special)

    path = tmp_path / "a.jsonl"
    path.write_text(row("text", "good") + row("text", "a" * 200))
    assert path.stat().st_size < build.BATCH_BYTES
    with pytest.raises(ValueError, match=r"a.jsonl:2: too long; divide it into several rows"):
        open_corpus([path], Refusing(), tmp_path / "cache", console=QUIET)
