"""A run folder and a token cache that the version of 2026-11-30 (commit 855e643) left behind still open and go on.

earlier_run.zip holds a run of six steps that was stopped after the third, its data, weights and cache. That version
itself continued it to the losses below (AMD EPYC, AVX512; float32).
"""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from minimind.inference.loading import ModelArgs, open_model
from tests.training.runs import SCRIPT, call, rows_of

LOSSES = {4: 5.711396217346191, 5: 5.70333194732666, 6: 5.6986918449401855}
HELDOUT = 5.7003917078818045
# float32 rounding moves a loss of 5.7 by about 1e-6; forgetting the saved momentum moves the last by 4.5e-3.
BOUND = 1e-4


@pytest.fixture
def place(tmp_path, monkeypatch):
    with zipfile.ZipFile(Path(__file__).with_name("earlier_run.zip")) as archive:
        archive.extractall(tmp_path)
    for file in [tmp_path / "notes.jsonl", *tmp_path.glob("start/*")]:
        os.utime(file, (1_700_000_000, 1_700_000_000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_run_goes_on_where_it_stopped(place):
    cached = {file: file.stat().st_mtime_ns for file in (place / "cache" / "tokens").rglob("*.bin")}
    call(
        SCRIPT, from_="start", data=("notes.jsonl",), out="run", cache_dir="cache", seq_len=64, batch_tokens=256,
        tokens=1536, evals=2, device="cpu", fused=False, precision="fp32", optimizer="muon", keep_checkpoints=1,
    )  # fmt: skip
    losses = {row["step"]: row["loss"] for row in rows_of(place / "run", "train")}
    assert losses.keys() == {1, 2, 3, 4, 5, 6}
    for step, loss in LOSSES.items():
        assert abs(losses[step] - loss) < BOUND, step
    assert abs(rows_of(place / "run", "eval")[-1]["heldout_loss"] - HELDOUT) < BOUND
    assert {file: file.stat().st_mtime_ns for file in cached} == cached
    folders = {file.parent.name for file in (place / "cache" / "tokens").rglob("*.bin")}
    assert folders == {file.parent.name for file in cached}  # nothing was tokenized again


def test_its_weights_answer(place):
    loaded = open_model(ModelArgs(model="run", device="cpu", dtype="fp32"))
    tokens = loaded.tokenizer.encode("The quick brown fox")
    logits = loaded.model(torch.tensor([tokens])).logits
    assert logits.shape == (1, len(tokens), 320) and logits.isfinite().all()
