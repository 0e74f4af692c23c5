"""Mixtures, named held-out sets, repeated documents, and the choices that a run makes from its data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from minimind import load_tokenizer
from minimind.data import open_conversations, open_corpus
from minimind.data.split import split, split_tail
from minimind.tokenization import ChatEncoder
from minimind.training import data_split
from minimind.training.arguments import StageArgs
from minimind.training.data_split import NamedFiles, form_of, open_split, read_texts, save_heldout
from tests.training.runs import (
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    call,
    finish,
    reproducible,
    rows_of,
    save_origin,
)

SFT = SCRIPT.with_name("sft.py")


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


def rows(folder: Path, name: str, count: int, times: int = 1) -> Path:
    """`count` different short conversations, each `times` times."""
    lines = []
    for i in range(count * times):
        said = [("user", f"{name} {i % count}?"), ("assistant", f"it is {i % count * 7}" + " so" * (i % 5))]
        messages = [{"role": role, "content": text.replace(" so", "")} for role, text in said]
        lines.append(json.dumps({"conversations": messages}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


def command(origin: Path, out: Path, folder: Path, data: list[str], *extra: str) -> list[str]:
    flags = ["--from", str(origin), "--data", *data, "--out", str(out), "--cache-dir", str(folder / "cache"),
             "--seq-len", "64", "--batch-tokens", "512", "--tokens", str(512 * 12), "--save-every", "4",
             "--log-every", "1", "--evals", "2", *extra]  # fmt: skip
    return [sys.executable, str(SFT), *flags]


def test_held_out_text_is_kept_in_the_run_folder(tmp_path, monkeypatch):
    """The text is unchanged, is cut to about that many tokens, and is written once."""
    texts = [f"Line {i}\nof 文字 <|im_end|> {i * 7}" for i in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer()
    corpus = open_corpus([tmp_path / "text.jsonl"], tokenizer, tmp_path / "cache", console=Console(quiet=True))
    held = split(corpus, 0.5)[1]
    monkeypatch.setattr(data_split, "HELDOUT_TOKENS", held.num_tokens // 2)
    job: Any = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path),
        parallel=SimpleNamespace(main=True),
        flags=SimpleNamespace(plan=False),
        tokenizer=tokenizer,
    )
    save_heldout(job, held)
    save_heldout(job, corpus)
    kept = [json.loads(line)["text"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    places = [held.locate(i)[1] for i in range(held.num_documents)]
    assert kept == [texts[i] for i in places[: len(kept)]] and 0.4 < len(kept) / len(places) < 0.6


def test_a_mixture_with_named_sets_resumes_to_the_bit(origin, tmp_path):
    """It resumes while the mixture's weights change; every set has its line, its figures and its curve."""
    data = [f"{rows(tmp_path, 'old', 90)}:3..1", f"{rows(tmp_path, 'new', 40)}:0..2"]
    sets = ["--heldout-data", f"first={rows(tmp_path, 'first', 9)}", f"other={rows(tmp_path, 'other', 12)}"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    text = finish(command(origin, whole, tmp_path, data, *sets))
    assert "mixture: old.jsonl 6" in text and "% of the rows (" in text
    assert "held-out set first: 9 documents" in text
    losses = rows_of(whole, "eval")
    for name in ("first", "other"):
        assert text.count(f"held-out loss of {name} ") == len(losses) == 3
        assert {f"heldout_{name}_loss", f"heldout_{name}_bpb", f"heldout_{name}_tokens"} <= losses[0].keys()
    last = losses[-1]
    assert last["heldout_first_loss"] != last["heldout_other_loss"] != last["heldout_loss"]
    assert last["heldout_all"] and "heldout_first_all" not in last
    arguments = command(origin, out, tmp_path, data, *sets)
    assert "as this run began: fields checked, split hash" in assert_continues_to_the_bit(arguments, out, whole, 2, 6)


def test_named_sets_alone_are_measured(origin, tmp_path):
    path = rows(tmp_path, "data", 40)
    named = f"mine={rows(tmp_path, 'mine', 9)}"
    text = finish(command(origin, tmp_path / "run", tmp_path, [str(path)], "--heldout", "0", "--heldout-data", named))
    assert text.count("held-out loss of mine ") == 3 and "held-out loss 8" not in text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"heldout_mine_loss", "heldout_all"} <= rows_of(tmp_path / "run", "eval")[-1].keys()


def test_entries_with_names_and_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").write_text("a file of that name")
    found = NamedFiles.from_flags(("x:2",), ("y", "one=z", "one=w", "two=v", "a=b"))
    assert found.paths == ["x"] and found.heldout == ["y", "a=b"]
    assert found.sets == {"one": ["z", "w"], "two": ["v"]}
    assert NamedFiles.from_flags((), ("one=z",), ("train", "held")).heldout == ["held"]
    assert NamedFiles.from_flags((), ("y",), ("train", "held")).heldout == ["y"]


def opened(folder: Path, data: list[Path], heldout: list[Path], **flags):
    """(parts, notes) as a fresh run has them."""
    args = StageArgs(**{"heldout": 0.2, "dedupe": False} | flags)
    job = SimpleNamespace(
        args=args,
        flags=args,
        stage="sft",
        initial=SimpleNamespace(weights=None),
        notes=[],
        settle=lambda name, rule: rule()[0],
    )
    encoder = ChatEncoder(load_tokenizer())

    def read(paths):
        return open_conversations(paths, encoder, folder / "cache", console=Console(quiet=True))

    named = NamedFiles.from_flags([str(path) for path in data], [str(path) for path in heldout])
    return open_split(job, named, read), job.notes


def test_repeated_documents_are_counted_and_left_out_on_request(tmp_path):
    data, heldout = rows(tmp_path, "sums", 30, times=2), tmp_path / "held.jsonl"
    heldout.write_text("\n".join(data.read_text().splitlines()[:4]))
    parts, notes = opened(tmp_path, [data], [])
    assert notes == [
        "copies: 30 of 60 documents repeat an earlier one, on one side of the split with it; --dedupe leaves them out"
    ]
    assert parts.train.num_documents + parts.heldout.num_documents == 60
    parts, notes = opened(tmp_path, [data], [], dedupe=True)
    assert notes == ["copies: 30 of 60 documents repeat an earlier one, left out"]
    assert parts.train.num_documents + parts.heldout.num_documents == 30
    parts, notes = opened(tmp_path, [data], [heldout])
    assert parts.train.num_documents == 60 and parts.heldout.num_documents == 4
    assert "copies: 8 documents of --data are also in --heldout-data; --dedupe leaves them out" in notes
    parts, notes = opened(tmp_path, [data], [heldout], dedupe=True)
    assert parts.train.num_documents == 26 and parts.heldout.num_documents == 4
    with pytest.raises(ValueError, match="every document of --data is also in --heldout-data"):
        opened(tmp_path, [heldout], [heldout], dedupe=True)
    assert opened(tmp_path, [rows(tmp_path, "more", 9)], [])[1] == []
    again = [tmp_path / "more.jsonl:2", tmp_path]
    with pytest.raises(ValueError, match=r"more\.jsonl is in two entries; give it one weight"):
        opened(tmp_path, again, [])


def test_a_run_of_an_earlier_version_keeps_its_split_and_its_rows(origin, tmp_path):
    """Its folder does not say what the data decided: the last documents are held out, rows have 512 tokens."""
    data, cache, out = rows(tmp_path, "data", 60), tmp_path / "cache", tmp_path / "old"
    flags = {"from_": str(origin), "data": (str(data),), "cache_dir": str(cache), "tokens": 4096, "evals": 1}
    call(SFT, out=str(tmp_path / "new"), **flags)
    assert len(rows_of(tmp_path / "new", "train")) == 3  # of what the data has, not of 4096 tokens
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config.pop("chosen") == {
        "split": "hash",
        "fields": "checked",
        "optimizer": "adamw",
        "seq_len": 512,
        "batch_tokens": 4096,
        "step": 1536,
    }
    assert config["args"]["seq_len"] is None
    del config["args"]["dedupe"]
    config["args"] |= {"seq_len": 512, "epochs": 3.0, "optimizer": "muon"}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    call(SFT, out=str(out), **flags)
    assert len(rows_of(out, "train")) == 1
    corpus = open_conversations([data], ChatEncoder(load_tokenizer()), cache)
    for folder, how in ((out, split_tail(corpus, 0.05)), (tmp_path / "new", split(corpus, 0.05))):
        held = how[1]
        targets = sum(int(np.count_nonzero(held.codes(i) & 3)) for i in range(held.num_documents))
        assert rows_of(folder, "eval")[-1]["heldout_tokens"] == targets
    assert reproducible(out)[0] != reproducible(tmp_path / "new")[0]


def test_a_run_of_an_earlier_version_still_drops_unknown_fields(origin, tmp_path):
    data, cache, out = rows(tmp_path, "data", 60), tmp_path / "cache", tmp_path / "old"
    flags = {"from_": str(origin), "data": (str(data),), "cache_dir": str(cache), "tokens": 512, "evals": 1}
    call(SFT, out=str(tmp_path / "new"), seq_len=128, batch_tokens=512, **flags)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["chosen"]["fields"], config["args"]["format"], config["args"]["ignore_fields"]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    data.write_text(data.read_text().replace('{"conv', '{"images": 1, "conv'))
    with pytest.raises(ValueError, match=r'data\.jsonl:1: field "images" is unknown'):
        call(SFT, out=str(tmp_path / "newer"), seq_len=128, batch_tokens=512, **flags)
    call(SFT, out=str(out), seq_len=128, batch_tokens=512, **flags)


def test_choices_stay_when_the_data_change(origin, tmp_path):
    """The row length is not chosen again, since the run's folder records it."""
    data = rows(tmp_path, "data", 60)
    flags = {
        "from_": str(origin),
        "data": (str(data),),
        "cache_dir": str(tmp_path / "cache"),
        "tokens": 8192,
        "evals": 1,
    }
    call(SFT, out=str(tmp_path / "first"), **flags)
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config["chosen"]["seq_len"] = 256
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "again").iterdir():
        if path.name in ("finished", "metrics.jsonl", "samples.txt", "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    call(SFT, out=str(tmp_path / "again"), **flags)
    trainer = sorted((tmp_path / "again" / "checkpoints").iterdir())[-1] / "trainer.pt"
    assert torch.load(trainer, weights_only=True)["loader"]["seq_len"] == 256


def test_a_form_is_about_conversations_of_ones_own(tmp_path):
    for stage, flags, told in (
        ("sft", {"from_": str(tmp_path)}, "--format alpaca: says how the rows of --data are read"),
        ("distill", {"data": (str(rows(tmp_path, "data", 9)),)}, "--format alpaca: is about conversations"),
    ):
        args = SimpleNamespace(**{"data": (), "ignore_fields": (), "cache_dir": None} | flags, format="alpaca")
        job = SimpleNamespace(args=args, settle=lambda name, rule: rule()[0])
        with pytest.raises(ValueError, match=told):
            read_texts(job, list(args.data)) if stage == "distill" else form_of(job)
