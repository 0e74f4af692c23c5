"""bench/plans.py: the lengths of the rows, every plan, and the committed page."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench import plans
from minimind.training import plan

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """A few rows of each format."""
    folder = tmp_path_factory.mktemp("samples")
    exchange = []
    for i in range(120):
        user = {"role": "user", "content": f"question {i} " + "why " * (i % 9)}
        exchange.append([user, {"role": "assistant", "content": f"answer {i} " + "so " * (i % 50)}])
    made = {
        "sft": [{"conversations": messages} for messages in exchange],
        "dpo": [{"chosen": a, "rejected": [a[0], b[1]]} for a, b in pairwise(exchange)],
        "rlaif": [{"conversations": [a[0], {"role": "assistant", "content": "无"}]} for a in exchange],
    }
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_rows_are_as_long_as_upstreams(samples):
    rows = [json.loads(line)["conversations"] for line in (samples / "sft.jsonl").read_text().splitlines()]
    contents = [m["content"] for messages in rows for m in messages]
    texts = [row["text"] for row in plans.texts(rows)]
    assert "\n".join(texts) == "\n".join(contents) and 300 < max(map(len, texts)) <= 512 + 20  # line ends between
    longer = [row["conversations"] for row in plans.longer(rows)]
    assert [m["content"] for messages in longer for m in messages] == contents
    assert 1500 < max(map(plans.size_of, longer)) <= 2048
    thoughts = [row["conversations"] for row in plans.thoughts(rows)]
    assert all(messages[1]["content"].startswith("<think>\nanswer") for messages in thoughts)


def test_every_file_is_planned_and_described(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SAMPLE_BYTES", 1 << 16)
    monkeypatch.setattr(plans, "PRESETS", ("nano",))
    args = plans.Args(
        str(samples), ("nano",), str(tmp_path / "cache"), str(tmp_path / "r.json"), str(tmp_path / "p.md")
    )
    plans.main(args, plans.Console(quiet=True))
    written = json.loads((tmp_path / "r.json").read_text())
    assert [(p["file"], p["stage"]) for p in written] == [(f.name, f.stage) for f in plans.FILES]
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert text == plans.page(written) and text.count("| rlaif-mini.jsonl |") == 6
    assert "| sft_2048.jsonl | 9 GB | conversations of up to 2048 characters | sft |" in text
    assert "- dpo.jsonl, dpo: " in text and "--epochs 1: upstream's" in text


def test_the_committed_page_follows_from_the_committed_figures():
    figures = json.loads((ROOT / "bench" / "results" / "plans.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "plans.md").read_text(encoding="utf-8") == plans.page(figures)
