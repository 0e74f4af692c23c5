"""bench/performance.py: the committed pages follow from the committed rows, and name what is missing."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from bench import performance, projection
from bench.performance import with_blocks
from bench.report.projections import default_tiles, minimind_zero
from bench.report.readme import SHOWN, TIMED, blocks
from bench.report.rows import RESULTS, Device, device_of, devices, find
from bench.report.tables import sections
from bench.report.targets import CPU, GPU, NEEDS_CARD, UNEXPLAINED, Target, failed, judged, step, table


def write(folder, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def step_row(**changes) -> dict:
    row = {
        "date": "1", "commit": "abc", "device": "NVIDIA H100, 80 GiB", "stage": "pretrain",
        "preset": "minimind2-small", "data": "built-in", "rows": "64", "seq_len": "512", "peer": "ours", "steps": "30",
        "tokens_per_second": "300", "positions_per_second": "320", "step_seconds": "0.5", "p20": "0.4", "p80": "0.6",
        "peak_mib": "100", "utilisation": "0.41", "host_syncs": "0", "once_seconds": "", "attention": "torch",
    }  # fmt: skip
    return row | changes


@pytest.fixture
def card(tmp_path) -> Device:
    rows = [
        step_row(date="0", peer="ours", positions_per_second="999"),
        step_row(),
        step_row(peer="upstream-style", tokens_per_second="60", positions_per_second="100", peak_mib="200"),
        step_row(date="2", peer="compile", positions_per_second="200"),
    ]
    write(tmp_path / "card", "throughput", rows)
    return device_of(tmp_path / "card")


def test_the_committed_pages_follow_from_the_rows():
    for path, text in performance.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run python bench/performance.py"
        assert UNEXPLAINED not in text


def test_every_cpu_target_has_a_figure_on_some_machine():
    every = [[value is not None for _, value in judged(CPU, d)] for d in devices() if d.is_cpu]
    assert all(any(column) for column in zip(*every, strict=True))
    assert device_of(RESULTS / SHOWN).is_cpu and not any(d.is_cpu for d in devices() if "nvidia" in d.folder.name)


def test_ratios_compare_rows_of_one_run(card):
    assert step("positions_per_second", "ours", "upstream-style")(card) == pytest.approx(3.2)
    assert step("positions_per_second", "ours", "compile")(card) is None, "they did not take turns"
    (group,) = card.runs("throughput")
    assert [row["date"] for row in group] == ["1", "1", "2"], "the newest of each, oldest first"
    assert card.base_of("throughput", group[0])["peer"] == "upstream-style"
    assert card.base_of("throughput", group[2]) is None


def test_a_table_by_hand(card):
    text = "\n".join(sections(card, "##"))
    assert "## Training steps" in text and "## Decoding" not in text
    line = next(line for line in text.splitlines() if "| ours |" in line)
    cells = [cell.strip() for cell in line.split("|")[5:]]
    assert cells == ["torch", "300", "5.00", "320", "3.20", "0.5 (0.4-0.6)", "100", "0.50", "41%", "0", "30", "abc", ""]


def test_met_missed_and_not_measured(card):
    def always(value):
        return lambda device: value

    targets = [
        Target("speed", 3.0, always(3.2)),
        Target("memory", 0.5, always(0.6), at_most=True, reason="It leaks."),
        Target("worse", 3.0, always(2.999)),
        Target("unknown", 1.0, always(None)),
    ]
    lines = table(judged(targets, card), NEEDS_CARD).splitlines()[2:]
    assert lines[0].endswith("| 3.20x | met |")
    assert lines[1].endswith("at most 0.50x | 0.60x | **missed**: It leaks. |")
    assert lines[2].endswith(f"**missed**: {UNEXPLAINED} |")
    assert lines[3].endswith(f"|  | {NEEDS_CARD} |")
    values = {target.what: value for target, value in judged(GPU, card)}
    assert values["minimind2-small, model FLOP utilisation"] == pytest.approx(0.41)
    assert values["decoding, 64 sequences against one"] is None


def test_rows_of_a_gpu_change_the_pages(card):
    every = [card, *(device_of(RESULTS / name) for name in (SHOWN, TIMED))]
    page = performance.page(every)
    assert "On NVIDIA H100, 80 GiB (" in page and "Targets that are not measured here: " in page
    assert UNEXPLAINED not in page
    assert NEEDS_CARD not in page
    english, chinese = blocks(every)["cards"]
    assert "| NVIDIA H100, 80 GiB | 300 | 5.0x |  |  |" in english and "| 300 | 5.0x |" in chinese
    assert "No GPU" in blocks(every[1:])["cards"][0]


def test_markers(tmp_path):
    text = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n"
    new = with_blocks(text, {"x": "new"}, "README.md")
    assert new == "a\n<!-- generated: x -->\n\nnew\n\n<!-- end: x -->\nb\n"
    assert with_blocks(new, {"x": "new"}, "README.md") == new
    with pytest.raises(ValueError, match=r"README\.md: needs <!-- generated: y -->"):
        with_blocks(text, {"x": "1", "y": "2"}, "README.md")
    with pytest.raises(ValueError, match="no code makes the block x"):
        with_blocks(text, {}, "README.md")


def test_hours_by_hand(card, tmp_path):
    assert projection.hours(71e12 * 0.5 * 3600 / 1e6, 1_000_000, 71.0, 0.5) == pytest.approx(1.0)
    counts = tmp_path / "counts.csv"
    rows = [
        {"stage": "pretrain", "data": "a", "bytes": "200", "tokens": "100"},
        {"stage": "sft", "data": "b", "bytes": "400", "tokens": "100"},
    ]
    write(tmp_path, "counts", rows)
    text = minimind_zero([], counts)
    assert "= 700M tokens" in text and "needs a card" in text
    likely = projection.hours(7e8, projection.zero_flops(), 71.0, 0.4)
    assert "| RTX 3090 | 71 | 40% |" in text and f"| {likely:.2f} |" in text
    both = [step_row(tokens_per_second="1e6"), step_row(stage="sft", tokens_per_second="5e5")]
    write(card.folder, "throughput", both)
    measured = minimind_zero([device_of(card.folder)], counts)
    assert f"{4e8 / 1e6 / 3600 + 3e8 / 5e5 / 3600:.2f} h in all" in measured


def test_every_table_of_tiles_is_shown():
    text = default_tiles([], performance.RESOURCES)
    for name in ("grouped_gemm.py HALF_CONFIGS", "rope.py CONFIGS", "moe_routing.py CONFIGS"):
        assert name in text
    for line in text.splitlines():
        if line.startswith("| `kernels/"):
            assert "report and arithmetic" in line
    rows = [line for line in text.splitlines() if line.startswith("| `") and "sm_90 |" in line]
    assert rows, "resources.json is empty; python bench/resources.py --json"


def test_the_tasks_of_a_gpu(card):
    state = {
        "parity of kernels": {"state": "done", "seconds": 3.0, "commit": "abc"},
        "parity of native operators": {"state": "failed 1", "seconds": 2.0, "commit": "abc"},
        "grpo": {"state": "not reached"},
    }
    (card.folder / "card.json").write_text(json.dumps(state))
    device = device_of(card.folder)
    text = "\n".join(sections(device, "##"))
    assert "| parity of kernels | done | 3.0 | abc |" in text and "| grpo | not reached |  |  |" in text
    assert failed("parity")(device) == 1 and failed("grpo")(device) == 1 and failed("memcheck")(card) is None


def test_missing_rows_are_named(tmp_path):
    for name in (SHOWN, TIMED):
        shutil.copytree(RESULTS / name, tmp_path / name)
    rows = [row for row in device_of(tmp_path / SHOWN).tables["rl"] if row["model"] != "minimind2-small"]
    write(tmp_path / SHOWN, "rl", rows)
    with pytest.raises(ValueError, match=r"rl\.csv: no row with minimind2-small, which the README shows"):
        blocks(devices(tmp_path))
    assert find(rows, model="minimind2-small") is None
