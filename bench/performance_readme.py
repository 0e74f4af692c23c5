"""The tables of README.md and README_zh.md that hold measured figures, made from the committed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.performance_rows import Device, Row, find, number, ratio

SHOWN = "amd-epyc-2-threads-avx512"  # the machine whose figures the README tells
POEMS = {"data": "pretrain_zh_tang.jsonl", "rows": "8", "seq_len": "512"}
Words = tuple[str, str]  # English, Chinese

STEPS: tuple[tuple[str, Words], ...] = (
    ("ours", ("ours: `--compile --fused`", "本项目：`--compile --fused`")),
    ("hf-bf16", ("transformers' Llama, compiled, weights and AdamW in bf16",
                 "transformers 的 Llama，编译，权重与 AdamW 均为 bf16")),
    ("upstream-style", ("as upstream trains", "按上游的训练方式")),
)  # fmt: skip
DECODERS: tuple[tuple[Sequence[str], Words], ...] = (
    (("ours",), ("ours, bf16", "本项目，bf16")),
    (("ours-fp32",), ("ours, float32", "本项目，float32")),
    (
        ("hf-dynamic", "hf-static"),
        ("transformers, best of its caches, bf16", "transformers，其各种缓存中最快的，bf16"),
    ),
    (("llama.cpp-bf16",), ("llama.cpp, bf16", "llama.cpp，bf16")),
    (("llama.cpp-f16",), ("llama.cpp, f16", "llama.cpp，f16")),
    (("llama.cpp-f32",), ("llama.cpp, float32", "llama.cpp，float32")),
    (("naive",), ("naive", "朴素")),
)


def blocks(devices: Sequence[Device]) -> dict[str, Words]:
    """Name of a block -> its text in both languages. ValueError where rows that the README shows are missing."""
    device = next((d for d in devices if d.folder.name == SHOWN), None)
    if device is None:
        raise ValueError(f"bench/results/{SHOWN} has no rows, and the README shows them")
    makers: dict[str, Callable[[Device, int], str]] = {
        "training": training, "decoding": decoding, "stages": stages, "server": server,
    }  # fmt: skip
    found = {name: (make(device, 0), make(device, 1)) for name, make in makers.items()}
    gpus = [d for d in devices if not d.is_cpu]
    return found | {"cards": (cards(gpus, 0), cards(gpus, 1))}


def cards(gpus: Sequence[Device], language: int) -> str:
    """A line for each GPU, or that there is none."""
    page = "[docs/PERFORMANCE.md](docs/PERFORMANCE.md)"
    if not gpus:
        return (
            f"No GPU has been measured yet. {page} has every row above with its spread, what was missed and\nwhy, "
            "projections (marked so), and the commands that remain to be run on a card.",
            f"尚未在任何 GPU 上测量。{page} 列出以上每一行及其离散程度、未达到的目标与原因、"
            "推算（均已注明），以及仍需在显卡上运行的命令。",
        )[language]
    head = (
        "| card | pretraining, real tokens/s | | decoding, tokens/s | |",
        "| 显卡 | 预训练，有效 token/s | | 解码，token/s | |",
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
    said = (
        f"`minimind2-small` against upstream's way and the naive loop; {page} has the rest.",
        f"`minimind2-small`，与上游做法及朴素循环相比；其余见 {page}。",
    )
    return "\n".join([*lines, "", said[language]])


def training(device: Device, language: int) -> str:
    run = _run(device, "throughput", stage="pretrain", preset="minimind2-small", **POEMS)
    base = _one(run, "upstream-style")
    head = (
        "| step | real tokens/s | | positions/s | | peak memory | |",
        "| 训练步 | 有效 token/s | | 位置/s | | 峰值内存 | |",
    )
    lines = [head[language], "|---|---|---|---|---|---|---|"]
    for peer, words in STEPS:
        r = _one(run, peer)
        cells = [words[language]]
        for column, form in (
            ("tokens_per_second", ".1f"),
            ("positions_per_second", ".2f"),
            ("peak_mib", ".2f"),
        ):
            unit = " MiB" if column == "peak_mib" else ""
            cells += [f"{float(r[column]):,.0f}{unit}", _times(r, base, column, form)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _commits(run, language)])


def decoding(device: Device, language: int) -> str:
    runs = [_run(device, "decode", model="minimind2-small", batch=batch) for batch in ("1", "16")]
    head = (
        "| decoder | tokens/s, one sequence | | sixteen | |",
        "| 解码器 | token/s，单序列 | | 十六条序列 | |",
    )
    lines = [head[language], "|---|---|---|---|---|"]
    for peers, words in DECODERS:
        cells = [words[language]]
        for run in runs:
            best = max((_one(run, peer) for peer in peers), key=lambda r: float(r["tokens_per_second"]))
            rate, naive = float(best["tokens_per_second"]), _one(run, "naive")
            cells += [f"{rate:,.0f}", _times(best, naive, "tokens_per_second", ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    one = runs[0]
    rates = {r["peer"]: float(r["tokens_per_second"]) for r in one}
    half, full = rates["ours"] / rates["llama.cpp-bf16"], rates["ours-fp32"] / rates["llama.cpp-f32"]
    share, int8 = f"{float(_one(one, 'ours')['share']):.0%}", f"{rates['llama.cpp-q8_0']:,.0f}"
    said = (
        f"For one sequence that is {half:.2f} of llama.cpp in bf16 and {full:.2f} in float32, and takes memory at "
        f"{share} of the rate\nat which these two cores can read the weights; llama.cpp's 8-bit weights ({int8} "
        f"tokens/s) have no counterpart here.\n{_commits(one, language)}",
        f"单序列时，速度在 bf16 下是 llama.cpp 的 {half:.2f}，在 float32 下是其 {full:.2f}，"
        f"并达到这两个核心读取权重的带宽上限的 {share}；"
        f"llama.cpp 的 8 位权重（{int8} token/s）在本项目中没有对应的实现。{_commits(one, language)}",
    )
    return "\n".join([*lines, "", said[language]])


def stages(device: Device, language: int) -> str:
    head = ("| step | real tokens/s | | peak memory |", "| 训练步 | 有效 token/s | | 峰值内存 |")
    lines = [head[language], "|---|---|---|---|"]
    used: list[Row] = []
    for stage, preset, files, words in (
        ("sft", "minimind2-small", {"data": "sft.jsonl"},
         ("SFT, `minimind2-small`, rows of 340", "SFT，`minimind2-small`，每行 340")),
        ("dpo", "minimind2-small", {"data": "dpo.jsonl"},
         ("DPO, `minimind2-small`, rows of 1024; the reference's single pass counted",
          "DPO，`minimind2-small`，每行 1024；计入参考模型的一次前向")),
        ("pretrain", "minimind2-moe", POEMS,
         ("pretraining, `minimind2-moe`, poems in rows of 512", "预训练，`minimind2-moe`，唐诗，每行 512")),
    ):  # fmt: skip
        run = _run(device, "throughput", stage=stage, preset=preset, **files)
        ours, base = _one(run, "ours"), _one(run, "upstream-style")
        once = (number(ours, "once_seconds") or 0.0) / float(ours["step_seconds"])
        rate = float(ours["tokens_per_second"]) / (1 + once)
        lines.append(_stage_line(words[language], rate, rate / float(base["tokens_per_second"]), ours, base))
        used.append(ours)
    for model, words in (
        ("nano", ("GRPO, `nano`, 64 answers of 128: rollout, reward and update",
                  "GRPO，`nano`，64 个回答，每个 128：采样、打分与更新")),
        ("minimind2-small", ("GRPO, `minimind2-small`, 32 answers of 128",
                             "GRPO，`minimind2-small`，32 个回答，每个 128")),
    ):  # fmt: skip
        run = _run(device, "rl", model=model)
        ours, base = _one(run, "ours"), _one(run, "naive")
        rate = float(ours["tokens_per_second"])
        lines.append(_stage_line(words[language], rate, rate / float(base["tokens_per_second"]), ours, base))
        used.append(ours)
    return "\n".join([*lines, "", _commits(used, language)])


def server(device: Device, language: int) -> str:
    r = device.tables["serving"][-1]
    lost, mixed = (int(r[name]) for name in ("lost", "mixed"))
    figures = {
        "clients": r["clients"], "answers": f"{int(r['requests']):,}", "rate": f"{float(r['tokens_per_second']):,.0f}",
        "median": f"{1e3 * float(r['ttft_p50']):,.0f} ms", "p99": f"{1e3 * float(r['ttft_p99']):,.0f} ms",
        "batch": r["max_batch"], "before": f"{float(r['rss_quarter']):,.0f}",
        "after": f"{float(r['rss_end']):,.0f} MiB",
    }  # fmt: skip
    said = (
        "The server with {clients} streaming clients for a minute (`python bench/serving.py`, `nano` in float32): "
        f"{{answers}} answers,\n{lost} lost, {mixed} mixed up, "
        "{rate} tokens/s, the first token after {median} (median; p99: {p99}) with {batch} answers\ndecoding together, "
        "memory {before} after a quarter of the time and {after} at the end. ",
        "服务器在 {clients} 个流式客户端下运行一分钟（`python bench/serving.py`，`nano`，float32）：{answers} 个回答，"
        f"丢失 {lost} 个，混淆 {mixed} 个，"
        "{rate} token/s；{batch} 个回答同时解码，首个 token 的延迟中位数为 {median}（p99：{p99}），"
        "内存在四分之一时间时为 {before}，结束时为 {after}。",
    )
    return said[language].format(**figures) + _commits([r], language)


def _stage_line(words: str, rate: float, times: float, ours: Row, base: Row) -> str:
    memory = ratio(number(ours, "peak_mib"), number(base, "peak_mib"))
    assert memory is not None
    return f"| {words} | {rate:,.0f} | {times:.1f}x | {memory:.2f}x |"


def _times(row: Row, base: Row, column: str, form: str) -> str:
    return "1" if row is base else f"{float(row[column]) / float(base[column]):{form}}x"


def _commits(rows: Sequence[Row], language: int) -> str:
    names = list(dict.fromkeys(r["commit"] for r in rows))
    return (f"(Commit {', '.join(names)}.)", f"（提交 {'、'.join(names)}。）")[language]


def _run(device: Device, table: str, /, **wanted: str) -> list[Row]:
    """The rows of the newest run with these cells."""
    newest = find(device.tables[table], **wanted)
    if newest is None:
        cells = ", ".join(wanted.values())
        raise ValueError(f"{device.folder / table}.csv: no row with {cells}, which the README shows")
    same = {**wanted, "date": newest["date"]}
    return [r for r in device.tables[table] if all(r[key] == value for key, value in same.items())]


def _one(run: Sequence[Row], peer: str) -> Row:
    row = find(run, peer=peer)
    if row is None:
        raise ValueError(
            f"the run of {run[0]['date']} has no {peer}, which the README shows; measure it with --peer"
        )
    return row
