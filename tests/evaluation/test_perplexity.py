"""Perplexity by context length, compared with full float64 logits for each window."""

import copy
import json
import math
import os

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig, cli, ops
from minimind.config import YarnScaling
from minimind.evaluation.perplexity import BATCH_TOKENS, Args, _folder, curves_of, measure, parse_contexts, read_stream
from minimind.inference.loading import LoadedModel, ModelArgs
from minimind.weights import save_weights
from tests.inference.small import TEXT, small_model, small_tokenizer

QUIET = Console(quiet=True)


def truth(model, ids, length: int) -> tuple[float, float]:
    """(nats of all targets, nats of the second halves), from full float64 logits, one window at a time."""
    ops.set_mode("reference")
    model = copy.deepcopy(model).double()
    nats = torch.zeros(length, dtype=torch.float64)
    for start in range(0, len(ids) - 1, length):
        with torch.no_grad():
            logits = model(ids[None, start : start + length]).logits[0]
        targets = ids[start + 1 : start + length + 1, None]
        nats -= logits.log_softmax(-1).gather(1, targets).squeeze(1)
    ops.set_mode("fused")
    return float(nats.sum()), float(nats[length // 2 :].sum())


def test_equals_full_logits_window_by_window():
    model, tokenizer = small_model(), small_tokenizer()
    ids = torch.tensor((tokenizer.encode(TEXT) * 20)[:193])
    plain = model.config
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=16)
    curves = {"plain": plain, "yarn": ModelConfig.from_dict({**plain.to_dict(), "rope_scaling": vars(yarn)})}
    scores = measure(model, tokenizer, ids, [32, 96], curves, QUIET)
    assert [(s.curve, s.context) for s in scores] == [(c, n) for c in curves for n in (32, 96)]
    assert model.config is plain
    num_bytes = len(tokenizer.decode(ids[1:].tolist()).encode())
    for score in scores:
        model.config = curves[score.curve]
        nats, half = truth(model, ids, score.context)
        assert score.tokens == 192
        assert math.log(score.perplexity) == pytest.approx(nats / 192, rel=1e-5)
        assert math.log(score.second_half) == pytest.approx(half / 96, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert len({s.perplexity for s in scores}) == 4


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """The largest tensor at the output head is far smaller than [tokens, vocabulary]."""
    model, tokenizer = small_model(vocab_size=6400), small_tokenizer()
    seen = []
    whole = ops.linear_log_probs

    def watched(x, weight, targets, **options):
        seen.append(x.shape[0])
        return whole(x, weight, targets, **options)

    monkeypatch.setattr(ops, "linear_log_probs", watched)
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: k["return_logits"] is False and forward(self, *a, **k)
    )
    ids = torch.randint(0, 300, (4 * 1024 + 1,))
    measure(model, tokenizer, ids, [256, 1024], {"plain": model.config}, QUIET)
    assert sum(seen) == 2 * 4096 and max(seen) <= BATCH_TOKENS


@pytest.mark.parametrize(
    "given, lengths",
    [
        (("512,1024",), [512, 1024]),
        (("64", "16"), [16, 64]),
        (("512,...,4096",), [512, 1024, 2048, 4096]),
        (("16,…,128", "256"), [16, 32, 64, 128, 256]),
    ],
)
def test_context_lengths(given, lengths):
    assert parse_contexts(given) == lengths


@pytest.mark.parametrize(
    "given, message",
    [
        (("512,x",), "--context x: must be a whole number"),
        (("1",), "--context 1: must be a whole"),
        ((), "give lengths"),
        (("...,512",), "begin with a length"),
        (("512,...",), "give lengths"),
        (("300,512",), "--context 300: must divide the longest"),
    ],
)
def test_invalid_context_lengths(given, message):
    with pytest.raises(ValueError, match=message):
        parse_contexts(given)


def test_the_stream_of_tokens(tmp_path):
    tokenizer = small_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    (tmp_path / "a.jsonl").write_text('{"text": "Hello <|im_end|>"}\n{"text": "world"}\n')
    long = "Hello world\n" * 2000  # more than the reader's pieces of 8 KiB
    (tmp_path / "b.txt").write_text(long)
    rows = [tokenizer.encode(t, allow_special=False) for t in ("Hello <|im_end|>", "world")]
    book = read_stream([str(tmp_path / "b.txt")], tokenizer, 10**6).tolist()
    assert book[0] == bos and book[-1] == eos and {bos, eos}.isdisjoint(book[1:-1])
    assert tokenizer.decode(book[1:-1]) == long
    found = read_stream([str(tmp_path)], tokenizer, 10**6).tolist()
    assert found == [bos, *rows[0], eos, bos, *rows[1], eos, *book]
    assert read_stream([str(tmp_path)], tokenizer, 5).tolist() == found[:5]


def test_curves():
    config = ModelConfig()
    assert curves_of(config, ModelArgs()) == {"as it is": config}
    both = curves_of(config, ModelArgs(yarn=8.0, yarn_original=512))
    assert list(both) == ["as it is", "YaRN, factor 8"]
    assert both["YaRN, factor 8"].rope_scaling == YarnScaling(8.0, 512)
    own = ModelConfig(rope_scaling=YarnScaling(4.0, 256))
    assert list(curves_of(own, ModelArgs())) == ["its own YaRN, factor 4"]


@pytest.fixture
def folder(tmp_path):
    save_weights(small_model(), tmp_path / "m")
    small_tokenizer().save(tmp_path / "m")
    (tmp_path / "book.txt").write_text(TEXT * 60)
    return tmp_path


def test_the_command(folder, capsys):
    flags = ["evaluate", "--model", str(folder / "m"), "--ppl", str(folder / "book.txt"), "--context", "64,...,256",
             "--tokens", "600", "--yarn", "4", "--yarn-original", "64", "--out", str(folder / "out")]  # fmt: skip
    assert cli.run(flags) == 0
    out = capsys.readouterr().out
    assert "perplexity of the same 512 tokens" in out and "ETA" in out
    scores = json.loads((folder / "out" / "perplexity.json").read_text())["scores"]
    assert [(s["curve"], s["context"]) for s in scores] == [
        (curve, n) for curve in ("as it is", "YaRN, factor 4") for n in (64, 128, 256)
    ]
    assert (folder / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--ppl: name the text"),
        (["--ppl", "BOOK", "--context", "65536"], "the longest --context needs 65,537"),
        (["--ppl", "BOOK", "--tokens", "100"], "--tokens 100: must be at least 2048"),
        (["--ppl", "nowhere.txt"], "nowhere.txt"),
        (["--ppl", "BOOK", "--context", "64", "--out", "BOOK"], "book.txt: cannot be created (File exists)"),
        (["--tasks", "arc_easy", "--limit", "-1"], "--limit -1: must be at least 1"),
        (["--tasks", "arc_easy", "--few-shot", "-1"], "--few-shot -1: must be at least 0"),
    ],
)
def test_bad_input(flags, message, folder, capsys):
    given = [str(folder / "book.txt") if flag == "BOOK" else flag for flag in flags]
    assert cli.run(["evaluate", "--model", str(folder / "m"), *given]) == 2
    said = capsys.readouterr()
    assert message in said.err and "perplexity of" not in said.out, "before anything is measured"


def test_an_unwritable_folder_fails_before_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be written to; name another folder with --out"):
        _folder(Args(out=str(tmp_path)), LoadedModel(None, None, torch.float32, None, None, []))


@pytest.mark.parametrize("factor", [float("nan"), 1e6])
def test_nan_weights_have_no_perplexity(factor, folder, capsys):
    model = small_model()
    with torch.no_grad():
        model.norm.weight *= factor
    save_weights(model, folder / "broken")
    small_tokenizer().save(folder / "broken")
    flags = ["--ppl", str(folder / "book.txt"), "--context", "64", "--tokens", "64", "--out", str(folder / "out")]
    assert cli.run(["evaluate", "--model", str(folder / "broken"), *flags]) == 2
    assert "nats per token gives no perplexity" in capsys.readouterr().err
    assert not any((folder / "out").iterdir())
