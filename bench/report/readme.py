"""The tables of measured results in README.md and README_zh.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.report.rows import Device, Row, find, number, ratio
from bench.training.loss_curves import groups_of, mean_bpb, targets_of, typed

SHOWN = "cpu-epyc-zen5-2core"  # the machine whose figures the README shows
TIMED = "cpu-epyc-zen4-2core"  # that of the times to a loss
POEMS = {"stage": "pretrain", "data": "pretrain_zh_tang.jsonl", "rows": "8", "seq_len": "512"}
Words = tuple[str, str]  # English, Chinese


@dataclass(frozen=True)
class Result:
    """A line of the table: `column` of `ours` and of a peer, in the newest run of `table` with the cells `wanted`."""

    words: Words
    table: str
    wanted: dict[str, str]
    column: str
    peer: str
    against: Words
    ours: str = "ours"


UPSTREAM = ("upstream's way", "上游的做法")
NAIVE = ("upstream's `generate`", "上游的 `generate`")
LLAMA_CPP = ("llama.cpp", "llama.cpp")
RESULTS = (
    Result(("pretraining, tokens/s", "预训练，token/s"),
           "throughput", POEMS, "tokens_per_second", "upstream-style", UPSTREAM),
    Result(("the same, peak memory in MiB", "同上，峰值内存（MiB）"),
           "throughput", POEMS, "peak_mib", "upstream-style", UPSTREAM),
    Result(("GRPO with its rollouts, tokens/s", "GRPO（含采样），token/s"),
           "rl", {}, "tokens_per_second", "naive", UPSTREAM),
    Result(("decoding one sequence with 8-bit weights, tokens/s", "8 位权重解码，单序列，token/s"),
           "decode", {"batch": "1"}, "tokens_per_second", "llama.cpp-q8_0", LLAMA_CPP, "ours-int8"),
    Result(("decoding sixteen in bf16, tokens/s", "bf16 解码，十六条序列，token/s"),
           "decode", {"batch": "16"}, "tokens_per_second", "llama.cpp-bf16", LLAMA_CPP),
)  # fmt: skip
ENGLISH = "pretrain_en.jsonl"
ENDS: dict[tuple[str, str], tuple[Words, Words]] = {
    (POEMS["data"], "upstream-style"): (("seconds of a run to {bpb:.2f} bits per byte, held out (Zen 4)",
                                         "训练到留出文本 {bpb:.2f} bit/字节，秒（Zen 4）"), UPSTREAM),
    (ENGLISH, "upstream-style"): (("the same, English text, to {bpb:.2f}", "同上，英文，到 {bpb:.2f}"), UPSTREAM),
}  # fmt: skip
MODEL_COLUMN = {"throughput": "preset", "rl": "model", "decode": "model"}


def blocks(devices: Sequence[Device]) -> dict[str, Words]:
    """Name of a block -> its text in both languages. ValueError if rows that the README shows are missing."""
    by_name = {device.folder.name: device for device in devices}
    for name in (SHOWN, TIMED):
        if name not in by_name:
            raise ValueError(f"bench/results/{name} has no rows, but the README shows them")
    makers: dict[str, Callable[[int], str]] = {
        "results": lambda language: results(by_name[SHOWN], by_name[TIMED], language),
        "cards": lambda language: cards([d for d in devices if not d.is_cpu], language),
    }
    return {name: (make(0), make(1)) for name, make in makers.items()}


def results(device: Device, timed: Device, language: int) -> str:
    head = (
        "| `minimind2-small` on two cores of an AMD EPYC (Zen 5) | ours | | other |",
        "| `minimind2-small`，AMD EPYC（Zen 5）的两个核心 | 本项目 | | 对照 |",
    )
    lines = [head[language], "|---|---|---|---|"]
    for result in RESULTS:
        run = _run(device, result)
        ours, other = _one(run, result.ours), _one(run, result.peer)
        value, base = float(ours[result.column]), float(other[result.column])
        times = f"{value / base:{'.2f' if value < 10 * base else '.1f'}}x"
        lines.append(f"| {result.words[language]} | {value:,.0f} | {times} | {base:,.0f}, {result.against[language]} |")
    return "\n".join([*lines, *times_to_loss(timed, language)])


def times_to_loss(device: Device, language: int) -> list[str]:
    """A line for each of ENDS: seconds of our shortest runs that end at its held-out loss or below, in bits per byte.
    Ours may be there earlier, but then still trains a part of its layers."""
    every = [typed(row) for row in device.tables["time_to_loss"]]
    lines = []
    for (data, name), (words, against) in ENDS.items():
        rows = [row for row in every if (row.stage, row.preset, row.data) == ("pretrain", "minimind2-small", data)]
        ours = [group for group in groups_of(rows) if group[0].implementation in ("ours", "ours-eager")]
        if name not in targets_of(rows):
            continue
        bpb, seconds = targets_of(rows)[name]
        ended = [statistics.fmean(row.seconds for row in group) for group in ours if mean_bpb(group) <= bpb]
        best = min(ended, default=None)
        if best is None:
            continue
        label = words[language].format(bpb=bpb)
        lines.append(f"| {label} | {best:,.0f} | {seconds / best:.1f}x | {seconds:,.0f}, {against[language]} |")
    return lines


def cards(gpus: Sequence[Device], language: int) -> str:
    """A table with a line for each GPU, or a sentence if there is none."""
    page = "[docs/PERFORMANCE.md](docs/PERFORMANCE.md)"
    if not gpus:
        return (
            f"No GPU has been measured yet. {page} has every row, missed targets with reasons, and projections.",
            f"尚未在任何 GPU 上测量。{page} 列出每一行测量结果、未达到的目标与原因，以及推算。",
        )[language]
    head = (
        "| card | pretraining, tokens/s | | decoding, tokens/s | |",
        "| 显卡 | 预训练，token/s | | 解码，token/s | |",
    )
    lines = [head[language], "|---|---|---|---|---|"]
    for device in gpus:
        cells = [device.name]
        for table, wanted in (
            ("throughput", {"stage": "pretrain", "preset": "minimind2-small"}),
            ("decode", {"model": "minimind2-small", "batch": "1"}),
        ):
            ours = find(device.tables[table], peer="ours", **wanted)
            other = None if ours is None else device.base_of(table, ours)
            rate = number(ours, "tokens_per_second")
            times = ratio(rate, number(other, "tokens_per_second"))
            cells += ["" if rate is None else f"{rate:,.0f}", "" if times is None else f"{times:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"`minimind2-small` against upstream's way and the naive loop; {page} has the rest.",
        f"`minimind2-small`，与上游做法及朴素循环相比；其余见 {page}。",
    )
    return "\n".join([*lines, "", note[language]])


def _run(device: Device, result: Result) -> list[Row]:
    """The rows of the newest run with this result."""
    wanted = {MODEL_COLUMN[result.table]: "minimind2-small", **result.wanted}
    newest = find(device.tables[result.table], **wanted)
    if newest is None:
        cells = ", ".join(wanted.values())
        raise ValueError(f"{device.folder / result.table}.csv: no row with {cells}, which the README shows")
    same = {**wanted, "date": newest["date"]}
    return [r for r in device.tables[result.table] if all(r[key] == value for key, value in same.items())]


def _one(run: Sequence[Row], peer: str) -> Row:
    row = find(run, peer=peer)
    if row is None:
        raise ValueError(f"the run of {run[0]['date']} has no {peer}, which the README shows; measure it with --peer")
    return row
