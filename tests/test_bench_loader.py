"""bench/loader.py on a small file: its figures, its rows, and the flags that it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench import loader
from bench.training import memory
from minimind.data import read_documents
from tests.data.fake import QUIET, write_jsonl

ROOT = Path(__file__).parents[1]
TEXTS = [f'Return the "sum" of {i} and {i + 1}.\nRaises an error when {i} is 名. It is\tnot.' for i in range(300)]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", TEXTS)


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_written_text_reads_back(data, tmp_path):
    sentences = memory.sentences_of([data])
    assert 'Return the \\"sum\\" of 0 and 1.' in sentences and len(sentences) == 900
    grown = tmp_path / "grown.jsonl"
    memory.write_text(grown, 200_000, sentences, QUIET)
    assert 200_000 <= grown.stat().st_size < 210_000
    documents = [document.text for document in read_documents(grown)]
    plain = {json.loads(f'"{s}"') for s in sentences}
    assert all(any(s in text for s in plain) for text in documents[:20])
    assert 4 < np.mean([text.count(".") for text in documents]) < 8
    again = tmp_path / "again.jsonl"
    memory.write_text(again, 200_000, sentences, QUIET)
    assert again.read_bytes() == grown.read_bytes()


def test_speed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    args = loader.Args(data=(str(data),), seconds=0.05, out=str(tmp_path / "out"))
    outcome = loader.main(args)
    json.dumps(outcome)
    rows = rows_of(outcome["csv"])
    assert [(int(r["rows"]), int(r["seq_len"])) for r in rows] == list(loader.SHAPES)
    assert all(float(r["tokens_per_second"]) > 0 and 0 < float(r["fill"]) <= 1 for r in rows)
    assert "tokens/s" in capsys.readouterr().out
    loader.main(args)
    assert len(rows_of(outcome["csv"])) == 2 * len(rows)


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_grow_by_a_few_megabytes(data, tmp_path):
    """As a user runs it: a subprocess, whose temporary folder is empty afterwards."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    flags = ("--data", str(data), "--grow", "0.004", "--seconds", "0.3", "--out", str(tmp_path / "out"))
    answer = subprocess.run(
        [sys.executable, "bench/loader.py", *flags], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert answer.returncode == 0, answer.stderr
    outcome = json.loads(answer.stdout.splitlines()[-1])
    small, full = rows_of(outcome["csv"])
    assert float(full["text_mib"]) == pytest.approx(4.1, abs=0.1)
    assert float(full["text_mib"]) == pytest.approx(8 * float(small["text_mib"]), rel=0.05)
    for row in (small, full):
        # a Python process with numpy at the least, and nothing like torch
        assert 15 < float(row["tokenize_peak_mib"]) < 250 and 15 < float(row["load_peak_mib"]) < 250
        assert float(row["rss_peak_mib"]) > float(row["tokenize_peak_mib"])
        assert float(row["load_tokens_per_second"]) > 0
    assert Path(outcome["png"]).read_bytes().startswith(b"\x89PNG")
    assert "tokenized grown-4-MiB.jsonl" in answer.stderr
    assert not any(path.name.startswith("minimind-grow") for path in scratch.iterdir())


def test_too_little_disk_space(data, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(ValueError, match=r"--grow: 0\.0 GB must be free in .* are; give a smaller size") as caught:
        memory.measure_memory((1 << 20, 1 << 21), [data], 1.0, QUIET)
    assert "\n" not in str(caught.value)


def test_a_process_that_dies(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(ValueError, match=r"--grow: tokenizing .* bytes ended with status 2"):
        memory.measure_memory((10_000,), [data], 0.1, Console(quiet=True))


@pytest.mark.parametrize("flags", [{"seconds": 0.0}, {"grow": 0.0}, {"grow": -1.0}])
def test_bad_arguments(flags):
    with pytest.raises(ValueError, match="must be above 0"):
        loader.main(loader.Args(**flags))


def test_peaks():
    usage = memory.MemoryUse(1, [0.0, 1.0, 2.0, 3.0], [10, 50, 40, 30], [1, 1, 30, 5], loading_from=2.0)
    assert usage.peak(loading=False) == 50 and usage.peak(loading=True) == 40 and usage.peak_rss == 70
