"""Write report/index.html: the results of every stage on one page that needs no other file and no network."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from minimind.apps.zero.charts import STYLE, line_chart
from minimind.apps.zero.planning import StagePlan, State
from minimind.apps.zero.results import Curve, FinalResults, Results, SamplePair, commands, name_of, results_text, spell
from minimind.apps.zero.stages import STAGES, shown
from minimind.utils.display import duration
from minimind.utils.files import write_atomically

_SAMPLES = 6  # shown for each stage
# The entries of versions.json to show.
_VERSIONS = ("python", "torch", "triton", "numpy", "tokenizers", "safetensors", "platform", "commit", "attention")


def write_report(state: State, price: float | None) -> Path | None:
    """Write report/index.html and results.json from the stages' folders. Returns the path of the page. A failure must
    not end a run: it prints a line to standard error and returns None."""
    page = state.folder / "report" / "index.html"
    try:
        page.parent.mkdir(exist_ok=True)
        write_atomically(state.folder / "results.json", results_text(state).encode())
        write_atomically(page, html(state, price).encode("utf-8", errors="replace"))
    except Exception as problem:
        print(f"{page}: not written ({type(problem).__name__}: {problem})", file=sys.stderr)
        return None
    return page


def html(state: State, price: float | None = None) -> str:
    assert state.plan is not None and state.chain is not None
    stages = [(plan, Results.of(state.folder / plan.name)) for plan in state.plan.stages]
    begun = [(plan, results) for plan, results in stages if results is not None]
    first = state.plan.stages[0]
    title = f"{first.preset}, {first.parameters / 1e6:.1f}M parameters, from random weights"
    if state.chain.origin is not None:
        title = f"{first.preset}, {first.parameters / 1e6:.1f}M parameters, from {state.chain.origin}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(state, [r for _, r in begun]))}</p>',
        _tiles(state, begun, price),
        _times(state, price),
        _table(state, stages, price),
        *(_stage(state, plan, results) for plan, results in begun),
        _evaluation(FinalResults.of(state.folder)),
        _card(state, begun),
        _versions(begun),
        _go_on(state),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _subtitle(state: State, results: list[Results]) -> str:
    assert state.plan is not None
    done = sum(r.finished for r in results)
    progress = "finished" if done == len(state.plan.stages) else f"{done} of {len(state.plan.stages)} stages finished"
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.starts[-1])) if state.starts else ""
    return f"minimind zero --budget {state.plan.budget} on {state.plan.device}; {progress}; {day}"


def _tiles(state: State, begun: list[tuple[StagePlan, Results]], price: float | None) -> str:
    spent = sum(state.seconds.values())
    tiles = [(duration(spent), "total time"), (_count(sum(r.tokens for _, r in begun)), "tokens trained on")]
    for plan, results in begun:
        figures = results.figures()
        for key in ("heldout_exact", "heldout_reward"):
            if key in figures:
                text = f"{figures[key][1]:.1%}" if key == "heldout_exact" else f"{figures[key][1]:.2f}"
                what = "exact answers" if key == "heldout_exact" else "reward of sampled answers"
                tiles.append((text, f"held-out {what}, {plan.name}"))
        if plan.name == "pretrain" and "heldout_loss" in figures:
            tiles.append((f"{figures['heldout_loss'][1]:.3f}", "held-out loss of pretraining, nats per token"))
    if price is not None:
        tiles.append((f"{spent / 3600 * price:.2f}", f"cost, at {price:g} an hour"))
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in tiles)
    return f'<div class="tiles">{cells}</div>'


def _times(state: State, price: float | None) -> str:
    """A stacked bar of the time that each stage took."""
    assert state.plan is not None
    spent = [(s.name, state.seconds.get(s.name, 0.0)) for s in state.plan.stages]
    if not any(seconds for _, seconds in spent):
        return ""
    bar = "".join(f'<i class="c{i % 6}" style="flex:{max(seconds, 0.01):.2f}"></i>' for i, (_, seconds) in
                  enumerate(spent))  # fmt: skip
    legend = "".join(
        f'<li><i class="c{i % 6}"></i>{escape(name)} <b>{duration(seconds)}</b></li>'
        for i, (name, seconds) in enumerate(spent)
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul>'


def _table(state: State, stages: Iterable[tuple[StagePlan, Results | None]], price: float | None) -> str:
    head = ["stage", "tokens", "steps", "tokens/s", "time", "planned", *(["cost"] if price is not None else []),
            "held-out loss", "exact answers or reward"]  # fmt: skip
    rows = []
    for plan, results in stages:
        spent = state.seconds.get(plan.name, 0.0)
        money = [f"{spent / 3600 * price:.2f}"] if price is not None else []
        if results is None:
            rows.append([f"{plan.name} (not begun)", "", "", "", "", duration(plan.seconds), *money, "", ""])
            continue
        steps = results.train[-1]["step"] if results.train else 0
        figures = results.figures()
        right = "heldout_exact" if "heldout_exact" in figures else "heldout_reward"
        main = [spell(key, *figures[key]) if key in figures else "" for key in ("heldout_loss", right)]
        numbers = [f"{results.tokens:,}", f"{steps:,}", f"{results.rate:,.0f}", duration(spent), duration(plan.seconds)]
        rows.append([plan.name if results.finished else f"{plan.name} (not finished)", *numbers, *money, *main])
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table. The first column is aligned left, the others, which are numbers, right. Up to three columns do
    not fill the width of the page, so that the numbers stay near their names."""
    kinds = ["", *(' class="n"' for _ in head[1:])]
    cells = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    kind = "scroll short" if len(head) <= 3 else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _stage(state: State, plan: StagePlan, results: Results) -> str:
    unit = "per pair" if plan.name == "dpo" else "nats per token"
    speed = results.speed()
    charts = [
        line_chart("Loss", unit, "millions of tokens", results.losses()),
        line_chart("Held-out answers", "share", "millions of tokens", results.shares(), 1.0),
        line_chart("Reward", "of an answer", "steps", results.rewards()),
        line_chart("Speed", "tokens per second", "minutes of training", [Curve("training", speed)] if speed else []),
        _utilisation(plan, results, speed),
    ]
    figures = [[name_of(key), *spell(key, *values).split(" → ")] for key, values in results.figures().items()]
    return (
        f"<h2>{escape(plan.name)}: {escape(STAGES[plan.name].what)}</h2>"
        f"<pre>{escape(shown(state.command(plan.name)))}</pre>"
        f'<div class="charts">{"".join(charts)}</div>'
        + (table(["held out", "before", "after"], figures) if figures else "")
        + _samples(results.samples)
    )


def _evaluation(results: FinalResults) -> str:
    """Perplexity by context length, benchmarks and exports; "" without any."""
    parts = []
    if results.perplexity:
        rows = results.perplexity
        curves = [
            Curve(label, [(row["context"], row[key]) for row in rows], dots=True)
            for label, key in (("all tokens", "perplexity"), ("second halves of the windows", "second_half"))
        ]
        head = ["context", "perplexity", "second half of window", "bits per byte", "tokens"]
        cells = [[f"{row['context']:,}", f"{row['perplexity']:.4g}", f"{row['second_half']:.4g}",
                  f"{row['bits_per_byte']:.3f}", f"{row['tokens']:,}"] for row in rows]  # fmt: skip
        chart = line_chart(
            "Perplexity by context length", "of text that was not trained on", "tokens of context", curves
        )
        parts.append(f'<div class="charts">{chart}</div>{table(head, cells)}')
    if results.tasks:
        cells = [[task, metric, f"{value:.4f}"] for (task, metric), value in results.tasks.items()]
        parts.append(table(["benchmark", "metric", "value"], cells))
    if results.exports:
        parts.append(table(["exported", "MB"], [[str(path), f"{size / 1e6:,.1f}"] for path, size in results.exports]))
    return f"<h2>Evaluation and export</h2>{''.join(parts)}" if parts else ""


def _utilisation(plan: StagePlan, results: Results, speed: list[tuple[float, float]]) -> str:
    """Chart of the model's FLOP/s, on a known card as a share of its peak. Empty for stages that sample."""
    if not speed or results.rollouts:
        return ""
    device = results.starts[-1].get("device", "") if results.starts else ""
    card = next((name for name in plan.peaks if re.sub(r" (SXM|80 GB)", "", name) in device), None)
    if card is not None:
        share = [(x, rate * plan.flops_per_token / plan.peaks[card]) for x, rate in speed]
        unit = f"share of the {plan.peaks[card] / 1e12:.0f} bf16 TFLOP/s of {card}"
        return line_chart("Utilisation", unit, "minutes of training", [Curve("model's operations", share)], 1.0)
    work = [(x, rate * plan.flops_per_token / 1e9) for x, rate in speed]
    unit = "GFLOP per second (this device's peak is not known)"
    return line_chart("Utilisation", unit, "minutes of training", [Curve("model's operations", work)])


def _samples(samples: list[SamplePair]) -> str:
    if not samples:
        return ""
    return f'<h3>Before and after</h3><div class="samples">{"".join(map(_sample, samples[:_SAMPLES]))}</div>'


def _sample(sample: SamplePair) -> str:
    rows = [("before", sample.before, ""), ("after", sample.after, ""), ("wanted", sample.wanted, "")]
    if sample.wanted and sample.after.strip() == sample.wanted.strip():
        rows[1:] = [("after, right", sample.after, " right")]
    rows = [(name, text.strip(), kind) for name, text, kind in rows if text.strip() or name != "wanted"]
    body = "".join(
        f'<dt>{name}</dt><dd class="text{kind}">{escape(text) or "&nbsp;"}</dd>' for name, text, kind in rows
    )
    earlier, _, last = sample.prompt.rpartition(" | ")
    prompts = [("earlier", earlier), ("prompt", last)]
    head = "".join(f'<p class="{kind} text">{escape(text)}</p>' for kind, text in prompts if text)
    return f'<div class="sample">{head}<dl>{body}</dl></div>'


def _card(state: State, begun: list[tuple[StagePlan, Results]]) -> str:
    """The model card: shape, data, training, limits."""
    assert state.chain is not None and state.plan is not None
    if not begun:
        return ""
    plan, results = begun[0]
    shape = results.config.get("model", {})
    names = [("hidden_size", "width"), ("num_hidden_layers", "layers"), ("num_attention_heads", "query heads"),
             ("num_key_value_heads", "key/value heads"), ("head_dim", "head size"), ("intermediate_size", "FFN"),
             ("vocab_size", "vocabulary"), ("num_experts", "experts"),
             ("max_position_embeddings", "positions")]  # fmt: skip
    rows: list[tuple[str, str]] = [
        ("model", f"{plan.preset}, {plan.parameters:,} parameters"),
        ("shape", ", ".join(f"{label} {shape[key]}" for key, label in names if shape.get(key))),
        ("tokenizer", str(results.config.get("tokenizer", ""))[:16]),
    ]
    for stage, trained in begun:
        data = " ".join(state.chain.data.get(stage.name, ())) or "built-in data"
        passes = f"{stage.passes:.2g} passes" if stage.passes else ""
        cut = ", shortened to fit the budget" if stage.shortened else ""
        rows.append((stage.name, f"{data}; {trained.tokens:,} tokens, {passes}{cut}; seed {_seed(trained)}"))
    rows += [("planning", note) for note in state.plan.notes]
    rows.append(
        ("limits", "a model of this size repeats its training data, knows little else and checks nothing; held-out "
         "figures are of data like the training data")
    )  # fmt: skip
    return f"<h2>Model card</h2>{_facts(rows)}"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th>{escape(k)}</th><td class="text">{escape(v)}</td></tr>' for k, v in rows if v)
    return f'<table class="facts">{body}</table>'


def _seed(results: Results) -> Any:
    return results.config.get("args", {}).get("seed", "?")


def _versions(begun: list[tuple[StagePlan, Results]]) -> str:
    """Device and versions of each stage's newest start, once for stages where they are the same, and the number of
    starts."""
    stages: dict[str, list[str]] = {}
    starts = []
    for plan, results in begun:
        if results.starts:
            newest = results.starts[-1]
            versions = [f"{name} {newest[name]}" for name in _VERSIONS if newest.get(name)]
            stages.setdefault("; ".join([newest.get("device", ""), ", ".join(versions)]), []).append(plan.name)
            starts.append(f"{plan.name} {len(results.starts)}")
    rows = [(", ".join(names), versions) for versions, names in stages.items()]
    return f"<h2>Versions</h2>{_facts([*rows, ('starts', ', '.join(starts))])}" if rows else ""


def _go_on(state: State) -> str:
    lines = "".join(f'<p class="soft">{escape(what)}</p><pre>{escape(line)}</pre>' for line, what in commands(state))
    return f"<h2>Next steps</h2>{lines}"


def _count(number: float) -> str:
    return f"{number / 1e6:,.2f}M" if number >= 1e6 else f"{number:,.0f}"
