"""Views of reinforcement learning for people: answers with their advantages in colour, and the curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from minimind.tokenization import Tokenizer
from minimind.training.metrics import read_metrics, smooth
from minimind.training.rl.rollouts import Answer
from minimind.training.stages.answers import turns
from minimind.utils.display import caption, decoration, pyplot

# (title of a panel, {figure of rollouts: its label})
_PANELS = (
    ("reward", {"reward": "of the rollouts"}),
    ("KL to the reference, per token", {"kl": ""}),
    ("tokens of an answer", {"length": ""}),
    ("entropy of a token, nats", {"entropy": ""}),
)


def transcript(tokenizer: Tokenizer, answer: Answer) -> str:
    """One line: the prompt, the answer and its reward."""
    prompt = turns(tokenizer, answer.prompt_ids.tolist())
    cut = "" if answer.ended else " (cut off)"
    return f"{prompt} {answer.text}{cut}  [reward {answer.reward:.3f}]".replace("\n", "\\n")


def show_groups(console: Console, tokenizer: Tokenizer, answers: Sequence[Answer], count: int) -> None:
    """Print the first `count` prompts with their answers: tokens with a positive advantage in green, with a negative
    one in red, the brighter the larger the advantage is among those shown."""
    shown: list[list[Answer]] = []
    for _, group in islice(groupby(answers, key=lambda a: a.number), count):
        shown.append(list(group))
    largest = max(
        (float(np.abs(a.advantages).max(initial=0)) for g in shown for a in g if a.advantages is not None), default=0.0
    )
    for same in shown:
        console.print(Text(turns(tokenizer, same[0].prompt_ids.tolist()).replace("\n", "\\n"), style="bold"))
        for answer in same:
            console.print(_coloured(tokenizer, answer, largest), soft_wrap=True)


def _coloured(tokenizer: Tokenizer, answer: Answer, largest: float) -> Text:
    advantages = np.zeros(answer.written) if answer.advantages is None else answer.advantages
    parts = "".join(f" {name} {value:.3g}" for name, value in answer.parts.items())
    line = Text(f"  reward {answer.reward:7.3f} advantage {advantages.mean():+7.3f} ({parts.strip()}) ")
    for token, advantage in zip(answer.ids.tolist(), answer.spread(advantages).tolist(), strict=True):
        shade = round(55 + 200 * abs(advantage) / largest) if largest and advantage else 0
        colour = "default" if not shade else f"rgb(0,{shade},0)" if advantage > 0 else f"rgb({shade},0,0)"
        line.append(tokenizer.decode([token]).replace("\n", "\\n"), style=colour)
    return line


@decoration
def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw reward (held-out too), KL, length and entropy of the answers over the run."""
    plt = pyplot()
    rows = read_metrics(metrics)
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for panel, (name, figures) in zip(axes.flat, _PANELS, strict=True):
        panel.set_title(name)
        panel.set_xlabel("optimizer steps")
        panel.grid(alpha=0.3)
        for key, label in figures.items():
            _line(panel, [row for row in rollouts if key in row], key, label)
    _held_out(axes.flat[0], [row for row in rows if row["kind"] == "eval" and "heldout_reward" in row])
    if not any("kl" in row for row in rollouts):
        axes.flat[1].text(0.5, 0.5, "no reference model", ha="center", transform=axes.flat[1].transAxes)
    figure.suptitle(caption(title))
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _line(panel: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    panel.plot(x, y, color="tab:blue", alpha=0.3, linewidth=0.8)
    panel.plot(x, smooth(y), color="tab:blue", label=label or None)


def _held_out(panel: Any, rows: list[dict[str, Any]]) -> None:
    for key, label, colour in (
        ("heldout_reward", "held-out, sampled", "tab:red"),
        ("heldout_greedy_reward", "held-out, likeliest", "tab:orange"),
    ):
        x, y = [row["step"] for row in rows], [row[key] for row in rows]
        if rows:
            panel.plot(x, y, "o-", color=colour, markersize=4, label=f"{label}: {y[-1]:.3f}")
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
