"""Measure the memory of a process that tokenizes generated text and then loads batches, for bench/loader.py --grow.

As a script, this file is that process, which imports no torch: it tokenizes FILE into CACHE, then loads batches. A line
of JSON on stdout marks the end of each part.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

import numpy as np
from rich.console import Console

from minimind.data import PackedLoader, expand_paths, open_corpus, read_documents
from minimind.tokenization import load_tokenizer
from minimind.utils.display import ByteProgress, say

SPARE = 3  # free space over the size of the text: for the text, its tokens, and as much again
SAMPLE_SECONDS = 0.05
_POOL_BYTES = 8 << 20
_DOCUMENTS = 20_000  # generated at a time


@dataclass
class MemoryUse:
    """Memory over time in MiB. anonymous: the process' own pages; mapped: pages of files, which the system can take
    back. seconds: since the start; loading_from: when tokenizing ended."""

    text_bytes: int
    seconds: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)
    mapped: list[float] = field(default_factory=list)
    loading_from: float = 0.0
    counts: dict[str, Any] = field(default_factory=dict)  # documents, tokens, batches, tokens_per_second

    def peak(self, loading: bool) -> float:
        """The peak of anonymous memory while tokenizing or while loading."""
        pairs = zip(self.seconds, self.anonymous, strict=True)
        return max((value for at, value in pairs if (at >= self.loading_from) == loading), default=0.0)

    @property
    def peak_rss(self) -> float:
        return max(a + m for a, m in zip(self.anonymous, self.mapped, strict=True))


def sentences_of(paths: Sequence[str | Path]) -> list[str]:
    """The sentences of the first 8 MiB of documents in `paths`, escaped for a JSON string."""
    texts, size = [], 0
    for path in expand_paths(paths):
        for document in read_documents(path):
            texts.append(document.text)
            size += document.num_bytes
            if size >= _POOL_BYTES:
                break
    sentences = (s for text in texts for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\n+", text))
    return [json.dumps(s, ensure_ascii=False)[1:-1] for s in sentences if s and not s.isspace()]


def write_text(path: Path, size: int, sentences: Sequence[str], console: Console, seed: int = 0) -> None:
    """Write a jsonl file of about `size` bytes: documents of 1 to about 40 random sentences."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file, ByteProgress(console, "writing text", size) as shown:
        while (done := file.tell()) < size:
            shown.update(done)
            for line in _lines(rng, sentences):
                done += file.write(line)
                if done >= size:
                    break


def _lines(rng: np.random.Generator, sentences: Sequence[str]) -> Iterator[str]:
    counts = rng.geometric(1 / 6, _DOCUMENTS)
    drawn = rng.integers(len(sentences), size=int(counts.sum())).tolist()
    place = 0
    for count in counts.tolist():
        yield '{"text": "' + " ".join(sentences[i] for i in drawn[place : place + count]) + '"}\n'
        place += count


def measure_memory(
    sizes: Sequence[int], sources: Sequence[str | Path], seconds: float, console: Console
) -> list[MemoryUse]:
    """Generate a corpus of each of `sizes` bytes, tokenize it, load batches for `seconds`, remove it.

    Raises ValueError without /proc, without space for the largest corpus, and if the process fails.
    """
    if not Path("/proc/self/status").exists():
        raise ValueError("--grow reads the memory of a process from /proc: run it on Linux")
    with tempfile.TemporaryDirectory(prefix="minimind-grow-") as name:
        free = shutil.disk_usage(name).free
        if free < SPARE * max(sizes):
            raise ValueError(
                f"--grow: {SPARE * max(sizes) / 1e9:,.1f} GB must be free in {Path(name).parent}, {free / 1e9:,.1f} "
                "are; give a smaller size, or name another folder with $TMPDIR"
            )
        sentences = sentences_of(sources)
        usages = []
        for i, size in enumerate(sizes):
            say(console, f"corpus {i + 1} of {len(sizes)}: {size / 2**20:,.0f} MiB of text")
            usages.append(_measure(Path(name) / f"{i}", size, sentences, seconds, console))
        return usages


def _measure(folder: Path, size: int, sentences: Sequence[str], seconds: float, console: Console) -> MemoryUse:
    folder.mkdir()
    text = folder / f"grown-{size >> 20}-MiB.jsonl"
    write_text(text, size, sentences, console)
    usage = MemoryUse(text.stat().st_size)
    command = [sys.executable, __file__, str(text), str(folder / "cache"), str(seconds)]
    # a session of its own, so that its children are measured and killed with it
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            start = time.monotonic()
            listener = Thread(target=_listen, args=(child, usage, start), daemon=True)
            listener.start()
            while child.poll() is None:
                _sample(child.pid, usage, time.monotonic() - start)
                time.sleep(SAMPLE_SECONDS)
            listener.join()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    shutil.rmtree(folder)
    if child.returncode or not usage.counts:
        raise ValueError(f"--grow: tokenizing {size:,} bytes ended with status {child.returncode}; see above")
    return usage


def _listen(child: subprocess.Popen[str], usage: MemoryUse, start: float) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        message = json.loads(line)
        if message.pop("phase") == "loading":
            usage.loading_from = time.monotonic() - start
        usage.counts |= message


def _sample(session: int, usage: MemoryUse, at: float) -> None:
    pages = {"RssAnon": 0.0, "RssFile": 0.0, "RssShmem": 0.0}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            lines = (folder / "status").read_text().splitlines()
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in pages:
                pages[name] += int(value.split()[0]) / 1024
    if any(pages.values()):
        usage.seconds.append(at)
        usage.anonymous.append(pages["RssAnon"])
        usage.mapped.append(pages["RssFile"] + pages["RssShmem"])


def tokenize_and_load(path: str, cache: str, seconds: float) -> None:
    """The measured work: tokenize the file, then load batches of 64 x 512 tokens for `seconds`."""
    corpus = open_corpus([path], load_tokenizer(), cache)
    counts = {"documents": corpus.num_documents, "tokens": corpus.num_tokens}
    print(json.dumps({"phase": "loading", **counts}), flush=True)
    loader = PackedLoader(corpus, 512, 64)
    start, batches, loaded = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        loaded += loader.next_batch().num_targets
        batches += 1
    rate = loaded / (time.perf_counter() - start)
    print(json.dumps({"phase": "done", "batches": batches, "tokens_per_second": rate}), flush=True)


if __name__ == "__main__":
    tokenize_and_load(sys.argv[1], sys.argv[2], float(sys.argv[3]))
