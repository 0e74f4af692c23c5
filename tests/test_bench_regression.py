"""bench/regression: what counts as slower, and the committed ratios."""

import ast
from pathlib import Path

import pytest

from bench.regression import ratios
from bench.regression.ratios import Entry, Measurement

FOLDER = Path(ratios.__file__).parent


def measured(ratio: float) -> Measurement:
    return Measurement("beside", ratio, 1.0, ratio)


def entry(ratio: float, allowed: float = 1.5) -> Entry:
    return Entry(ratio, allowed, "beside", "some processor")


def verdicts(found: dict[str, float], committed: dict[str, float], allowed: float = 1.5) -> dict[str, str]:
    now = {name: measured(ratio) for name, ratio in found.items()}
    rows = ratios.compare(now, {name: entry(ratio, allowed) for name, ratio in committed.items()})
    failed = {row.name for row in ratios.failures(rows)}
    assert failed == {row.name for row in rows if row.verdict in ratios.FAILURES}
    return {row.name: row.verdict for row in rows}


@pytest.mark.parametrize("ratio, verdict", [(2.9, "ok"), (3.1, "WORSE"), (1.4, "ok"), (1.3, "better")])
def test_a_ratio_beyond_what_is_allowed_fails(ratio, verdict):
    assert verdicts({"a": ratio}, {"a": 2.0}) == {"a": verdict}


def test_every_entry_allows_its_own_factor():
    assert verdicts({"a": 3.1}, {"a": 2.0}, allowed=1.6) == {"a": "ok"}


def test_missing_entries_are_named():
    assert verdicts({"new": 1.0}, {"old": 1.0}) == {"new": "NOT IN THE BASELINE", "old": "not run"}
    rows = ratios.compare({"new": measured(1.0)}, {"old": entry(1.0)})
    assert [row.name for row in ratios.failures(rows)] == ["new"], "one that is not run does not fail"


def test_the_ratio_is_that_of_rounds_side_by_side():
    """The machine is three times as slow in half of the rounds; each ratio is 2."""
    found = ratios.measurement("beside", [2.0, 6.0, 2.0, 6.0, 60.0], [1.0, 3.0, 1.0, 3.0, 1.0])
    assert found.ratio == 2.0


def test_the_table_says_it_all():
    rows = ratios.compare({"slow": measured(3.0), "new": measured(1.0)}, {"slow": entry(1.0), "gone": entry(2.0)})
    head, *lines, last = ratios.table(rows)
    assert head.split() == ["benchmark", "ms", "reference", "ms", "ratio", "baseline", "change", "allowed", "verdict"]
    assert [line.split() for line in lines] == [
        ["new", "1000.00", "1000.00", "1", "NOT", "IN", "THE", "BASELINE"],
        ["slow", "3000.00", "1000.00", "3", "1", "3.00x", "1.5x", "WORSE"],
    ]
    assert last == "not run: gone"


def test_rewriting_keeps_what_was_not_measured_and_what_is_allowed(tmp_path):
    path = tmp_path / "baseline.json"
    ratios.rewrite(path, {"a": measured(1.23456), "b": measured(2.0)}, "one")
    text = path.read_text().replace('"allowed": 1.5', '"allowed": 2.0', 1)
    path.write_text(text)
    ratios.rewrite(path, {"a": measured(3.0)}, "two")
    assert ratios.read(path) == {"a": Entry(3.0, 2.0, "beside", "two"), "b": Entry(2.0, 1.5, "beside", "one")}


def test_a_broken_baseline_says_what_to_do(tmp_path):
    assert ratios.read(tmp_path / "none.json") == {}
    for text in ("{", "[]", '{"a": {"ratio": 1}}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"not a baseline .*--rewrite-baseline"):
            ratios.read(tmp_path / "broken.json")


def test_every_benchmark_is_in_the_committed_baseline():
    names = set()
    for file in FOLDER.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name.removeprefix("test_"))
    committed = ratios.read()
    assert names == {name.partition(" ")[0] for name in committed}  # behind the space: a variant
    assert all(found.ratio > 0 and found.allowed > 1 and found.processor for found in committed.values())
