"""The answers that --show prints, and the curves of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from minimind import load_tokenizer
from minimind.training import metrics
from minimind.training.metrics import plot_rollouts
from minimind.training.rl.rollouts import Answer, show_groups, transcript

TOKENIZER = load_tokenizer()
ASKED = TOKENIZER.encode("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n")


def answer(number: int, text: str, advantages: list[float], reward: float) -> Answer:
    """An answer of as many tokens as it has letters, with an advantage each."""
    ids = np.array([token for letter in text for token in TOKENIZER.encode(letter)])
    assert len(ids) == len(text) == len(advantages)
    return Answer(number, number, 0, np.array(ASKED), ids, np.zeros(len(ids), np.float32), True, text, reward,
                  {"number": reward}, np.array(advantages, np.float32))  # fmt: skip


def shown(answers: list[Answer], count: int) -> str:
    console = Console(record=True, force_terminal=True, color_system="truecolor", width=200, quiet=False)
    with console.capture() as printed:
        show_groups(console, TOKENIZER, answers, count)
    return printed.get()


def test_tokens_have_the_colour_of_their_advantage():
    """Green above 0, red below, brightest the largest of those shown, plain at 0."""
    text = shown([answer(0, "abc", [2.0, -1.0, 0.0], 1.0), answer(0, "d", [-2.0], 0.25)], 1)
    green, half, red = "\x1b[38;2;0;255;0m", "\x1b[38;2;155;0;0m", "\x1b[38;2;255;0;0m"
    assert f"{green}a" in text and f"{half}b" in text and f"{red}d" in text
    assert "\x1b[38;2" not in text.partition(f"{half}b")[2].partition("c")[0]
    assert "user: 1 + 1?" in text and "reward   1.000 advantage  +0.333 (number 1)" in text
    assert "reward   0.250 advantage  -2.000 (number 0.25)" in text


def test_show_prints_the_requested_number_of_prompts():
    answers = [answer(number, "x", [1.0], float(number)) for number in range(3) for _ in range(2)]
    assert shown(answers, 2).count("user: 1 + 1?") == 2
    assert shown(answers, 2).count("reward") == 4 and "reward   2.000" not in shown(answers, 2)
    assert shown([answer(0, "x", [0.0], 0.0)], 1).count("\x1b[38;2") == 0  # nothing to compare with


def test_a_line_of_samples_says_what_was_cut_off():
    whole = answer(0, "ab", [0.0, 0.0], 0.5)
    assert transcript(TOKENIZER, whole).endswith("ab  [reward 0.500]")
    whole.ended = False
    whole.text = "a\nb"
    assert transcript(TOKENIZER, whole).endswith("a\\nb (cut off)  [reward 0.500]")


@pytest.mark.parametrize("reference", [True, False])
def test_every_curve_is_drawn(reference, tmp_path, monkeypatch, rendered):
    rollout = {"reward": 0.5, "length": 3.0, "entropy": 0.7} | ({"kl": 0.01} if reference else {})
    rows = [{"kind": "rollout", "step": step, **rollout} for step in (1, 2, 3)]
    rows += [{"kind": "eval", "step": 0, "heldout_reward": 0.25, "heldout_greedy_reward": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: dict[str, list[list[float]]] = {}
    lines = metrics._plot_smoothed

    def record(panel, rows, key, label):
        lines(panel, rows, key, label)
        drawn[key] = [list(line.get_ydata()) for line in panel.get_lines()]

    monkeypatch.setattr(metrics, "_plot_smoothed", record)
    plot_rollouts(tmp_path / "metrics.jsonl", tmp_path / "rewards.png", "a run")
    assert (tmp_path / "rewards.png").stat().st_size > 5000
    expected = {"reward": [0.5] * 3, "length": [3.0] * 3, "entropy": [0.7] * 3, "kl": [0.01] * 3 if reference else []}
    assert {key: found[0] for key, found in drawn.items()} == expected
