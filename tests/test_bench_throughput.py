"""bench/throughput.py and bench/campaign.py on a CPU and a few steps: what is counted, written and refused."""

import csv
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import campaign, contenders, projection
from bench.campaign import Campaign, Slice
from bench.contenders import MAKERS, why_not
from bench.throughput import Args, main
from bench.throughput_report import COLUMNS, Row, plot
from minimind.data.files import write_json

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "one two three four " * (i % 9 + 1)}) + "\n" for i in range(300))
    )
    return path


def row(**changes) -> Row:
    values = dict.fromkeys(COLUMNS) | {
        "device": "card", "stage": "pretrain", "preset": "minimind2-small", "data": "d", "rows": 8, "seq_len": 512,
        "peer": "ours", "steps": 3, "tokens_per_second": 1000.0, "positions_per_second": 2000.0, "step_seconds": 1.0,
        "p20": 0.9, "p80": 1.1, "peak_mib": 100.0, "loader_share": 0.01, "optimizer": "adamw", "date": "today",
    }  # fmt: skip
    return Row(**(values | changes))


def test_a_run_of_two_contenders(data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIMIND_CACHE": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    out = tmp_path / "out"
    command = [sys.executable, "bench/throughput.py", "--data", str(data), "--preset", "nano", "--peer", "ours-eager",
               "upstream-style", "--steps", "3", "--turn", "2", "--warmup", "1", "--rows", "2", "--seq-len", "64",
               "--out", str(out)]  # fmt: skip
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    ours, peer = json.loads(answer.stdout.splitlines()[-1])["rows"]
    assert ours["steps"] == peer["steps"] == 3 and ours["graph_breaks"] is None
    assert ours["tokens_per_second"] > 0.9 * ours["positions_per_second"], "packed rows are full"
    assert peer["tokens_per_second"] < 0.9 * peer["positions_per_second"], "padded ones are not"
    with (out / "throughput.csv").open(encoding="utf-8", newline="") as file:
        assert [r["peer"] for r in csv.DictReader(file)] == ["ours-eager", "upstream-style"]
    (picture,) = out.glob("throughput-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"peer": ("theirs",)}, "--peer theirs: unknown; choose from ours, "),
        ({"preset": ("gpt5",)}, "--preset gpt5: unknown"),
        ({"stage": ("sft",)}, "--stage sft: unknown; choose from pretrain"),
        ({"steps": 0}, "--steps 0: counts from 1"),
        ({"seq_len": 0}, "--seq-len 0: counts from 1"),
        ({"project": True, "device": "cpu"}, "--project: a CPU's figures"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        main(Args(**given))


def test_who_cannot_run_says_why():
    cpu = torch.device("cpu")
    assert why_not("liger", "minimind2-small", cpu) == "Liger-Kernel needs a GPU"
    assert "no model of minimind3's shape" in (why_not("hf", "minimind3", cpu) or "")
    assert why_not("ours", "minimind3-moe", cpu) is None


def test_every_contender_is_described():
    text = inspect.cleandoc(contenders.__doc__ or "")
    for name in MAKERS:
        assert f"\n{name} " in text


def test_projections_by_hand(capsys):
    from rich.console import Console

    (first, second) = projection.cards([row(utilisation=0.5), row(utilisation=None)], Console())
    flops = (
        154.9e6 + 8 * 8 * 64 * 2 * 512 * 3
    )  # 6 for each weight of a matrix, and half of the scores' square
    assert first["positions_per_second"] == pytest.approx(0.5 * 71e12 / flops, rel=0.01)
    assert second["card"] == "RTX 4090"
    assert "projected, not measured" in capsys.readouterr().out
    corpus = type("Fake", (), {"num_bytes": 3000, "num_tokens": 1000})()
    found = projection.headline([row(tokens_per_second=1e5)], corpus, Console())
    assert found["total_hours"] == pytest.approx(2.8e9 / 3 / 1e5 / 3600)
    with pytest.raises(ValueError, match="--peer ours"):
        projection.headline([row(peer="hf")], corpus, Console())


def test_a_picture_of_several_presets(tmp_path):
    plot([row(), row(peer="hf"), row(preset="minimind2", peer="hf")], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.fixture
def here(tmp_path) -> Campaign:
    from rich.console import Console

    return Campaign(tmp_path, "abc", Console(quiet=True), {})


def test_slices_are_run_once_and_their_failures_again(here, tmp_path):
    works = Slice("good one", (sys.executable, "-c", "print('fine')"))
    fails = Slice("bad one", (sys.executable, "-c", "raise SystemExit(3)"))
    lacks = Slice("other", ("x",), needs="no-such-program")
    for piece in (works, fails, lacks):
        here.run(piece)
    assert (here.done("good one"), here.done("bad one"), here.done("other")) == (True, False, False)
    state = json.loads((tmp_path / "campaign.json").read_text())
    assert state["bad one"]["status"] == "failed: exit status 3"
    assert state["other"]["status"] == "not run: no-such-program is not on PATH"
    assert (tmp_path / state["good one"]["log"]).read_text() == "fine\n"
    here.commit = "def"
    assert not here.done("good one"), "another commit has to pass by itself"


def test_a_slice_that_takes_too_long_is_cut_off(here, monkeypatch):
    monkeypatch.setattr(campaign, "LIMIT", 0.2)
    here.run(Slice("slow", (sys.executable, "-c", "import time; time.sleep(30)")))
    assert here.state["slow"]["status"].startswith("failed: longer than")


def test_the_campaign_covers_every_kernel_and_names_files_that_exist():
    found = campaign.slices(campaign.Args(), cuda=True)
    named = {part for piece in found for part in piece.command if part.endswith(".py")}
    assert all((ROOT / name).exists() for name in named)
    tests = {f"tests/kernels/{f.name}" for f in (ROOT / "tests/kernels").glob("test_*.py")}
    assert tests - named <= {
        f"tests/kernels/test_{n}.py" for n in ("bench_kernels", "interpreter", "resources")
    }
    kinds = {"parity", "sanitizer", "resources", "kernels", "throughput", "decode"}
    assert {p.name.split()[0] for p in found} == kinds
    assert not any(p.needs for p in campaign.slices(campaign.Args(), cuda=False))


def test_summary(here, tmp_path):
    from bench.campaign_summary import summary
    from bench.kernel_report import append

    append(tmp_path / "throughput.csv", [row(tokens_per_second=1.0), row(tokens_per_second=2345.0)])
    write_json(tmp_path / "campaign.json", {})
    here.run(Slice("good one", (sys.executable, "-c", "")))
    stamp = {"device": "card", "torch": "2", "triton": "3", "python": "3.12"}
    text = summary(tmp_path, stamp, here.state)
    assert "| good one | passed |" in text and "| 2,345 |" in text and "| 1 |" not in text
