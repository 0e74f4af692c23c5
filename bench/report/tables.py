"""The tables of a device's rows in docs/PERFORMANCE.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from bench.report.rows import Device, Row, markdown, number, ratio, text
from bench.training.loss_curves import groups_of, mean_bpb, reach_text, targets_of, typed


def sections(device: Device, mark: str) -> list[str]:
    """A heading, a table and a note for every kind of measurement of this device. mark: of a heading."""
    parts = []
    for title, make in SECTIONS:
        body = make(device)
        if body:
            parts += [f"{mark} {title}", body]
    return parts


def tasks(device: Device) -> str:
    body = [
        (name, entry["state"], f"{entry.get('seconds', '')}", entry.get("commit", ""))
        for name, entry in device.state.items()
    ]
    return markdown(("task", "outcome", "seconds", "commit"), body) if body else ""


def training(device: Device) -> str:
    body = []
    for group in device.runs("throughput"):
        for r in group:
            base = device.base_of("throughput", r)
            body.append((
                r["stage"], r["preset"], f"{r['rows']} x {r['seq_len']}, {r['data']}", r["peer"], r["attention"],
                *_with_ratio(r, base, "tokens_per_second"), *_with_ratio(r, base, "positions_per_second"),
                _spread(r, "step_seconds", 1, ".3g"), *_with_ratio(r, base, "peak_mib"),
                text(number(r, "utilisation"), ".0%"), r["host_syncs"], r["steps"], r["commit"],
            ))  # fmt: skip
    head = ("stage", "model", "batch", "step", "attention", "real tokens/s", "x", "positions/s", "x",
            "s a step (p20-p80)", "peak MiB", "x", "MFU", "syncs", "n", "commit")  # fmt: skip
    note = (
        "x: against `upstream-style` in the same run; real: no padding; MFU: the model's operations over what one "
        "large product reaches here; n: steps. attention: `documents`, this project's on a CPU; `torch`, PyTorch's "
        "FlashAttention 2; `flash2` to `flash4`, a package's; `masked` and `sdpa`, PyTorch's others; empty: a row from "
        "before it was noted, on a CPU. bench/training/implementations.py says what each is."
    )
    return _noted(head, body, note)


def rl(device: Device) -> str:
    body = []
    for group in device.runs("rl"):
        for r in group:
            base = device.base_of("rl", r)
            body.append((
                r["model"], f"{r['prompts']} x {r['samples']} answers of {r['new']}", r["peer"],
                *(_with_ratio(r, base, "tokens_per_second") if r["status"] == "ok" else (r["status"], "")),
                _spread(r, "seconds", 1, ".3g"), *(text(number(r, part), ".3g") for part in ("rollout", "train")),
                *_with_ratio(r, base, "peak_mib"), r["turns"], r["commit"],
            ))  # fmt: skip
    head = ("model", "step", "contender", "tokens/s", "x", "s a step (p20-p80)", "rollout s", "update s", "peak MiB",
            "x", "n", "commit")  # fmt: skip
    return _noted(head, body, "x: against `naive` in the same run; bench/training/grpo.py says what each is.")


def decoding(device: Device) -> str:
    body = []
    for group in device.runs("decode"):
        for r in group:
            base = device.base_of("decode", r)
            body.append((
                r["model"], r["batch"], r["peer"],
                *(_with_ratio(r, base, "tokens_per_second") if r["status"] == "ok" else (r["status"], "")),
                text(number(r, "overall_per_second")), _spread(r, "tpot", 1e3, ".3g"),
                text(_scaled(r, "ttft", 1e3), ",.0f"),
                text(number(r, "share"), ".0%"), text(number(r, "peak_mib")), r["turns"], r["commit"],
            ))  # fmt: skip
    head = ("model", "batch", "decoder", "tokens/s", "x", "prompts included", "ms a token (p20-p80)",
            "first token ms", "of read bandwidth", "peak MiB", "n", "commit")  # fmt: skip
    note = "x: against `naive` in the same run; bench/decoding/implementations.py says what each is."
    return _noted(head, body, note)


def attention(device: Device) -> str:
    return _ops(device, "decode_attention", "context")


def kernels(device: Device) -> str:
    return _ops(device, "kernels", "tokens")


def _ops(device: Device, table: str, size: str) -> str:
    body = []
    for group in device.runs(table):
        for r in group:
            if r["phase"] == "both" or table == "decode_attention":
                body.append((
                    r["op"], r["shape"], f"{int(r['tokens']):,}", r["contender"],
                    _spread(r, "milliseconds", 1, ".3g") if r["status"] == "ok" else r["status"],
                    text(number(r, "ratio"), ".2f"), text(number(r, "rate"), ",.3g", f" {r['unit']}"),
                    text(number(r, "share"), ".0%"), text(number(r, "peak_mib")), r["runs"], r["commit"],
                ))  # fmt: skip
    head = ("op", "shape", size, "contender", "ms (p20-p80)", "time, ours = 1", "rate", "of limit", "peak MiB", "n",
            "commit")  # fmt: skip
    what = "forward" if table == "decode_attention" else "forward and backward"
    return _noted(head, body, f"Times of {what}; limit: of one large copy or product here.")


def serving(device: Device) -> str:
    body = [
        (
            r["model"], r["dtype"], r["clients"], r["requests"], r["lost"], r["mixed"],
            text(number(r, "tokens_per_second")), _pair(r, "ttft_p50", "ttft_p99"), _pair(r, "tpot_p50", "tpot_p99"),
            f"{text(number(r, 'rss_quarter'))}, {text(number(r, 'rss_end'))}", r["commit"],
        )
        for r in device.tables["serving"]
    ]  # fmt: skip
    head = ("model", "dtype", "clients", "answers", "lost", "mixed up", "tokens/s", "first token ms (median, p99)",
            "ms between pieces (median, p99)", "MiB after a quarter, at the end", "commit")  # fmt: skip
    return _noted(head, body, "")


def end_to_end(device: Device) -> str:
    body = [
        (
            r["stage"], r["preset"], r["data"], r["attention"], f"{int(r['tokens']):,}", text(number(r, "seconds")),
            text(number(r, "wall_seconds")), text(number(r, "tokens_per_second")),
            f"{text(number(r, 'heldout_before'), '.3f')} to {text(number(r, 'heldout_after'), '.3f')}",
            text(number(r, "heldout_bpb"), ".3f"), text(number(r, "correct"), ".1%"), r["commit"],
        )
        for r in device.tables["end_to_end"]
    ]  # fmt: skip
    head = ("stage", "model", "data", "attention", "tokens", "s of steps", "s in all", "tokens/s", "held-out loss",
            "bits per byte", "right answers", "commit")  # fmt: skip
    return _noted(head, body, "Whole commands, one after the other (bench/end_to_end.py).")


def time_to_loss(device: Device) -> str:
    rows = [typed(row) for row in device.tables["time_to_loss"]]
    parts = []
    for kind in dict.fromkeys((row.stage, row.data, row.preset) for row in rows):
        own = [row for row in rows if (row.stage, row.data, row.preset) == kind]
        targets = targets_of(own)
        body = [
            (
                one.implementation, text(one.lr, "g"), f"{one.minutes:g}", str(len(group)), str(one.steps),
                f"{fmean(row.seconds for row in group):.0f}", f"{mean_bpb(group):.3f}",
                text(one.exact and fmean(row.exact or 0.0 for row in group), ".1%"),
                *(reach_text(group, *target) for target in targets.values()), one.commit or "",
            )
            for group in groups_of(own)
            for one in group[:1]
        ]  # fmt: skip
        reached = (f"s to {name}'s {bpb:.3f}" for name, (bpb, _) in targets.items())
        head = ("implementation", "rate", "planned minutes", "seeds", "steps", "s in all", "bits per byte", "exact",
                *reached, "commit")  # fmt: skip
        parts.append(f"{', '.join(kind)}:\n\n{markdown(head, body)}")
    note = (
        "Whole commands with empty caches, evaluations left out (bench/time_to_loss.py). The last columns: seconds "
        "until the held-out loss is what that implementation ends with, and its own time over these seconds."
    )
    return "\n\n".join([*parts, note]) if parts else ""


def optimizers(device: Device) -> str:
    body = [
        (
            r["data"], r["preset"], r["optimizer"], r["lr"], r["seed"], f"{int(r['tokens']):,}",
            text(number(r, "heldout_loss"), ".3f"), text(number(r, "tokens_to_target")), r["commit"],
        )
        for r in device.tables["optimizers"]
    ]  # fmt: skip
    head = ("data", "model", "optimizer", "rate", "seed", "tokens", "held-out loss", "tokens to AdamW's best loss",
            "commit")  # fmt: skip
    return _noted(head, body, "")


def data(device: Device) -> str:
    body = [
        (f"{r['rows']} x {r['seq_len']}", text(number(r, "tokens_per_second")), text(number(r, "median_ms"), ".3g"),
         text(number(r, "slowest_ms"), ".3g"), r["batches"], r["commit"])
        for r in device.tables["loader"]
    ]  # fmt: skip
    loading = _noted(("batch", "tokens/s", "ms (median)", "ms (slowest)", "n", "commit"), body, "")
    grown = [
        (f"{int(r['text_mib']):,}", text(number(r, "tokenize_mb_per_second"), ".2f"),
         text(number(r, "tokenize_peak_mib")), text(number(r, "load_peak_mib")), r["commit"])
        for r in device.tables["memory"]
    ]  # fmt: skip
    head = ("text, MiB", "tokenized, MB/s", "own memory while tokenizing, MiB", "while loading, MiB", "commit")
    return "\n\n".join(part for part in (loading, _noted(head, grown, "")) if part)


def tuned(device: Device) -> str:
    body = [
        (r["op"], r["table"], f"`{r['entry']}`", text(number(r, "ratio"), ".3f"), r["commit"])
        for r in device.tables["tuning"]
    ]
    return _noted(("op", "table", "best entry found", "time, present entry = 1", "commit"), body, "")


SECTIONS: tuple[tuple[str, Callable[[Device], str]], ...] = (
    ("Tasks of bench/card.py", tasks), ("Training steps", training), ("GRPO steps", rl), ("Decoding", decoding),
    ("Attention of a decoding step", attention), ("Server", serving), ("Pretraining and SFT to their end", end_to_end),
    ("Time to a held-out loss", time_to_loss), ("Ops", kernels), ("Tuning", tuned), ("Optimizers", optimizers),
    ("Data", data),
)  # fmt: skip


def _noted(head: Sequence[str], body: Sequence[Sequence[str]], note: str) -> str:
    if not body:
        return ""
    return markdown(head, body) + (f"\n\n{note}" if note else "")


def _with_ratio(row: Row, base: Row | None, column: str) -> tuple[str, str]:
    value = number(row, column)
    return text(value), text(ratio(value, number(base, column)), ".2f")


def _spread(row: Row, column: str, scale: float, form: str) -> str:
    middle, low, high = (_scaled(row, name, scale) for name in (column, "p20", "p80"))
    if middle is None:
        return ""
    return f"{middle:{form}} ({text(low, form)}-{text(high, form)})"


def _scaled(row: Row, column: str, scale: float) -> float | None:
    value = number(row, column)
    return None if value is None else value * scale


def _pair(row: Row, first: str, second: str) -> str:
    return ", ".join(text(_scaled(row, column, 1e3), ",.3g") for column in (first, second))
