"""Reinforcement learning on conversations with tools: sampling them, their rewards, their figures and their curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from minimind.data.prompts import Prompt, PromptSet
from minimind.environments.episodes import Episode, EpisodeLimits, EpisodeRunner, EpisodeSampling
from minimind.environments.rewards import (
    WEIGHTS,
    EpisodeSample,
    agent_rewards,
    figures,
    is_checked,
    sample_of,
    start_of,
)
from minimind.environments.running import ToolRunner
from minimind.environments.turns import ToolTurns
from minimind.modeling import Model
from minimind.rewards import Rewards, parse_rewards
from minimind.tokenization import Tokenizer
from minimind.training.metrics import read_metrics, smooth
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.rollouts import Answer, DrawnPrompt, RolloutOptions, rollout_engine
from minimind.utils.display import caption, decoration, pyplot


@dataclass(eq=False)
class Conversation(Answer):
    """An answer of several turns with tool results between them. `ended`: whether it came to a final answer."""

    episode: Episode = field(kw_only=True)

    def as_sample(self, prompt: Prompt) -> EpisodeSample:
        return sample_of(prompt, self.episode)


class ConversationSampler:
    """Samples conversations from the current weights of `model`; arguments as for `rollout_engine`."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        longest: int,
        tokens: int,
        batch: int,
        samples: int,
        weights_dtype: torch.dtype | None,
        *,
        tools: ToolRunner,
        limits: EpisodeLimits,
    ) -> None:
        self.engine = rollout_engine(model, tokenizer, longest, tokens, batch, samples, weights_dtype)
        self.tokenizer, self.tools, self.limits = tokenizer, tools, limits
        self._turns: dict[bool | None, ToolTurns] = {}
        self._figures: dict[str, float] = {}

    def sample(self, prompts: PromptSet, drawn: Sequence[DrawnPrompt], options: RolloutOptions) -> list[Conversation]:
        """options.samples conversations from each prompt, in the order of `drawn`."""
        self.engine.refresh_weights()
        starts = [start_of(prompts[d.prompt], d.number, options.samples) for d in drawn]
        for start in starts:
            if start.thinking not in self._turns:
                self._turns[start.thinking] = ToolTurns(self.tokenizer, start.thinking)
        limits = dataclasses.replace(self.limits, tokens=options.max_new_tokens)
        runner = EpisodeRunner(self.engine, self._turns, self.tools, limits)
        episodes = runner.run(starts, EpisodeSampling(options.temperature, options.seed)) if starts else []
        counts = runner.counts
        self._figures = {
            "computed_tokens": counts.computed,
            "found_tokens": counts.found,
            "computed_per_written": (counts.computed + counts.sampled) / max(1, counts.sampled),
        }
        number_of = {d.number: d.prompt for d in drawn}
        return [self._answer(number_of[episode.start.number], episode) for episode in episodes]

    def figures(self) -> dict[str, float]:
        """Figures of the last `sample`: computed_tokens and found_tokens, prompt tokens that the engine computed and
        that it found in its cache; computed_per_written, tokens that went through the model per token that it wrote."""
        return dict(self._figures)

    def _answer(self, prompt: int, episode: Episode) -> Conversation:
        return Conversation(
            prompt,
            episode.start.number,
            episode.sample,
            np.array(episode.start.prompt, np.int64),
            np.array(episode.ids, np.int64),
            np.array(episode.log_probs, np.float32),
            episode.reason == "answer",
            self.tokenizer.decode(episode.ids),
            sampled=np.array(episode.sampled, bool),
            episode=episode,
        )


def conversation_rewards(args: RolloutArgs, prompts: PromptSet, device: torch.device) -> Rewards:
    """The rewards of --reward: answer, calls and frugal, and those that other stages have. Without --reward: the first
    three. Raises ValueError if a word is wrong, or if a prompt has nothing to check an answer against."""
    shared = args.shared_rewards
    weights = dict(map(_weight, (word for word in args.reward if word not in shared))) if args.reward else WEIGHTS
    if not all(map(is_checked, prompts.prompts)) and ({"answer", "frugal"} & set(weights)):
        raise ValueError(
            '--reward: not all prompts of --data have a reference answer or "gt"; name rewards that need none, such as '
            "calls or function=package.module:function"
        )
    named = parse_rewards(shared, args.on_reward_error, device, args.trust_remote_code).parts if shared else ()
    return Rewards([*agent_rewards(weights), *named], args.on_reward_error)


def _weight(word: str) -> tuple[str, float]:
    """(name, weight) of a word such as calls:0.2."""
    name, colon, weight = word.partition(":")
    try:
        found = float(weight) if colon else WEIGHTS[name]
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found == 0:
        raise ValueError(f"--reward {word}: the weight must be a finite number other than 0")
    return name, found


def conversation_figures(answers: Sequence[Answer], prompts: PromptSet) -> dict[str, float]:
    """Figures of conversations, for metrics.jsonl."""
    return figures([cast(Conversation, a).as_sample(prompts[a.prompt]) for a in answers])


@decoration
def draw_conversations(metrics: Path, folder: Path) -> None:
    """Draw agents.png: success by the number of calls that a task needs, in rollouts and held-out; calls, malformed
    calls and turns."""
    plt = pyplot()
    rows = read_metrics(metrics)
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    evals = [row for row in rows if row["kind"] == "eval" and "heldout_success" in row]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    names = sorted({name for row in rollouts for name in row if name.startswith("success_") and name[8:].isdigit()})
    for number, name in enumerate(names):
        needed, colour = name.removeprefix("success_"), f"C{number}"
        _line(axes.flat[0], rollouts, name, colour, f"{needed} call{'s' * (needed != '1')}")
        held = [row for row in evals if f"heldout_{name}" in row]
        x, y = [row["step"] for row in held], [row[f"heldout_{name}"] for row in held]
        axes.flat[0].plot(x, y, "o--", color=colour, markersize=4)
    if names:
        axes.flat[0].legend(title="tasks that need (dots: held-out)")
    _line(axes.flat[1], rollouts, "calls", "C0", "")
    _line(axes.flat[2], rollouts, "malformed_calls", "C0", "")
    _line(axes.flat[3], rollouts, "turns", "C0", "")
    titles = ("success", "calls per conversation", "share of calls that could not be run", "turns per conversation")
    for panel, title in zip(axes.flat, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("optimizer steps")
        panel.grid(alpha=0.3)
    figure.suptitle(caption(folder.name))
    figure.savefig(folder / "agents.png", dpi=120)
    plt.close(figure)


def _line(panel: Any, rows: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    told = [row for row in rows if key in row]
    x, y = [row["step"] for row in told], [row[key] for row in told]
    panel.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(x, smooth(y), color=colour, label=label or None)
