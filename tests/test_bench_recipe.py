"""bench/recipe.py: gains by hand, the order of runs, what is not repeated, and one run of a tiny model."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import recipe
from bench.recipe import Args, RecipeRun, main, planned
from bench.report.recipe import figures, page, table
from bench.training.tries import TRIES, RecipeRow
from minimind import ModelConfig
from train import pretrain

DEVICE, KEY = "A CPU, 1 threads", ("poems", "nano", 1000)


def row(attempt: str, seed: int, loss: float, busy: float | None, tokens: int = 1000, device: str = DEVICE) -> dict:
    one = RecipeRow("", "abc", device, "2", attempt, "", "poems", "nano", tokens, seed, 1e-2, 10, 99.0, busy, 500, loss,
                    loss / 2)  # fmt: skip
    return {name: "" if value is None else str(value) for name, value in dataclasses.asdict(one).items()}


ROWS = [row("", 1, 4.0, 10.0), row("", 2, 4.2, 10.0), row("linear", 1, 3.9, 20.0), row("linear", 2, 4.2, 20.0),
        row("to-zero", 1, 3.5, None), row("", 1, 3.7, 20.0, 2000), row("", 2, 4.0, 20.0, 2000)]  # fmt: skip


def test_gains_at_equal_tokens_and_at_equal_time():
    base, more = ROWS[:2], {r["seed"]: r for r in ROWS[5:]}
    found = figures(ROWS[2:4], base, more)
    assert found["tokens"] == pytest.approx((0.05, 0.0, 0.1)) and found["ratio"] == 2
    assert found["time"] == pytest.approx((0.05 - 0.25, -0.2, -0.2))  # twice the tokens would have gained 0.3 and 0.2
    assert figures(ROWS[2:4], base, {})["time"][0] != figures(ROWS[2:4], base, more)["time"][0]
    assert figures(ROWS[4:5], base, more)["ratio"] is None
    on_gpu = [row(a, 1, 4.0, busy, device="A GPU, 24 GiB") for a, busy in (("", 1.0), ("linear", 9.0))]
    assert figures(on_gpu[1:], on_gpu[:1], {})["ratio"] == 1  # by the clock


def test_losses_are_compared_between_processors_and_times_are_not(page_of):
    other = row("linear", 1, 3.9, 5.0, device="Another CPU, 1 threads")
    found = figures([other], ROWS[:2], {})
    assert found["tokens"][0] == pytest.approx(0.1) and found["ratio"] is None
    own = row("", 1, 4.4, 10.0, device=other["device"])
    assert figures([other], [*ROWS[:2], own], {})["ratio"] == 0.5  # a reference of its own comes first
    assert figures([other], [own], {})["tokens"][0] == pytest.approx(0.5)
    assert "\n\nA CPU, 1 threads; Another CPU, 1 threads\n\n" in page_of([*ROWS, other])


def test_the_page_has_the_best_try_first():
    lines = table(ROWS, KEY).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| to-zero", "| linear"]
    assert "| 2 | +0.0500 (+0.0000 to +0.1000) | 2.00x | -0.2000 (-0.2000 to -0.2000) |" in lines[3]
    assert lines[-1].startswith("The reference recipe: 4.0000, 4.2000 nats per token; with twice the tokens 3.7000")


@pytest.fixture
def page_of(tmp_path) -> Callable[[list[dict]], str]:
    def make(rows: list[dict]) -> str:
        (tmp_path / "device").mkdir()
        with (tmp_path / "device" / "recipe.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return page(tmp_path)

    return make


def test_the_page_is_made_from_rows(page_of, tmp_path):
    text = page_of(ROWS)
    assert "## nano, poems, 1,000 tokens" in text and all(f"- **{name}**: " in text for name in TRIES)
    assert page(tmp_path / "device").count("## nano") == 0


@pytest.mark.parametrize("name", TRIES)
def test_a_try_is_made_of_flags(name):
    args = pretrain.Args(**TRIES[name].flags)
    dataclasses.replace(args, optimizer="muon").check()
    assert args != pretrain.Args()


def test_runs_are_interleaved_and_a_doubled_one_ends_each_group():
    runs = list(planned(Args(shapes=("nano",), tokens=(100,), only=("linear", "to-zero")), ["a", "b"]))
    assert [(r.attempt, r.corpus, r.tokens, r.seed) for r in runs[:5]] == [
        ("", "a", 100, 1),
        ("to-zero", "a", 100, 1),
        ("linear", "a", 100, 1),
        ("", "a", 200, 1),
        ("", "b", 100, 1),
    ]
    assert len(runs) == 2 * 2 * 4


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i} of many " * 9}) + "\n" for i in range(60)))
    return file


def test_a_run_with_a_row_is_not_repeated(text, tmp_path, monkeypatch):
    trained: list[RecipeRun] = []

    def train(one: RecipeRun, data: str, heldout: float, folder: Path) -> RecipeRow:
        trained.append(one)
        return RecipeRow("", None, "", "", one.attempt, "", one.corpus, one.shape, one.tokens, one.seed, 1e-2, 2, 1.0,
                         1.0, 9, 4.0, 2.0)  # fmt: skip

    monkeypatch.setattr(recipe, "train", train)
    args = Args((str(text),), ("nano",), (100,), (1,), ("linear",), work=str(tmp_path / "w"), out=str(tmp_path))
    assert main(args)["runs"] == 3 and main(args)["runs"] == 0
    assert main(dataclasses.replace(args, seeds=(1, 2), minutes=-1.0))["runs"] == 0
    assert main(dataclasses.replace(args, seeds=(1, 2)))["runs"] == 3
    assert [one.seed for one in trained] == [1] * 3 + [2] * 3


def test_a_run_trains_with_its_flags(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelConfig, "preset", lambda name: ModelConfig(32, 1, 2, 1, 16, 48, 6400))
    one = RecipeRun("wsd-0.5", "lines", "nano", 8192, 3)
    found = recipe.train(one, str(text), 0.2, tmp_path / "run")
    assert found.steps > 1 and found.seed == 3 and json.loads(found.flags)["schedule"] == "wsd"
    assert 0 < found.busy_seconds < 60 and 1.0 < found.heldout_loss < 9.0 and found.lr > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"only": ("nothing",)}, {"shapes": ("huge",)}, {"data": ("/no",)}, {"tokens": ()}])
def test_unusable_flags_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"--only nothing|--shapes huge|--data /no: no such file|--tokens: needs"):
        main(Args(out=str(tmp_path), **changes))
