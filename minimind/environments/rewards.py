"""A prompt's conversation with tools, what it is worth, and its figures.

Each reward is from 0 to 1:

answer     1 if the final answer matches the reference, else 0; for rows with a list "gt", as in upstream's
           agent_rl.jsonl, the share of these values that the final answer contains
calls      the share of calls that are well-formed, name a tool on offer and have arguments that fit the schema;
           without any call, 1 if none is needed, else 0
frugal     the answer reward; if more calls were made than needed, multiplied by needed calls / calls made
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from minimind.environments.episodes import Episode, Start
from minimind.environments.running import ToolRunner
from minimind.rewards import Reward, RewardTerm, Sample
from minimind.rewards.rules import last_number, offered_tools

WEIGHTS = {"answer": 1.0, "calls": 0.2, "frugal": 0.3}
_RIGHT = 1.0 - 1e-9  # the answer reward from which a task counts as done
_MAX_EXTRA = 80  # characters besides a reference that is not a number; an answer must not list all candidates


@dataclass(frozen=True)
class EpisodeSample(Sample):
    """A prompt and the conversation that continues it; text: the final answer."""

    episode: Episode | None = None

    @property
    def conversation(self) -> Episode:
        assert self.episode is not None
        return self.episode


def agent_rewards(weights: dict[str, float]) -> list[RewardTerm]:
    return [RewardTerm(name, weight, _REWARDS[name], (0.0, 1.0), name) for name, weight in weights.items()]


def needed_calls(sample: Sample) -> int:
    """Number of calls that the task needs: the row's "calls", else the number of its values in "gt"."""
    count = sample.metadata.get("calls", len(_expected(sample)))
    return count if isinstance(count, int) else 0


def rightness(sample: Sample) -> float:
    """The answer reward. Raises ValueError if the row has neither a reference nor "gt"."""
    expected = _expected(sample)
    if expected:
        return sum(_holds(sample.text, value) for value in expected) / len(expected)
    if sample.reference is None:
        raise ValueError('the prompt has neither a reference answer nor a list "gt" to check against')
    return float(_is_answer(sample.text, sample.reference))


def _answers(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        try:
            return rightness(sample)
        except ValueError:
            return math.nan

    return np.array([judge(sample) for sample in samples])


def _calls(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        calls = _episode(sample).calls
        if not calls:
            return float(needed_calls(sample) == 0)
        return sum(call.problem is None for call in calls) / len(calls)

    return np.array([judge(sample) for sample in samples])


def _frugal(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        needed, made = needed_calls(sample), len(_episode(sample).calls)
        return needed / made if made > needed else 1.0

    return _answers(samples) * np.array([judge(sample) for sample in samples])


_REWARDS: dict[str, Reward] = {"answer": _answers, "calls": _calls, "frugal": _frugal}


def _episode(sample: Sample) -> Episode:
    assert isinstance(sample, EpisodeSample)
    return sample.conversation


def _expected(sample: Sample) -> list[Any]:
    values = sample.metadata.get("gt") or []
    return values if isinstance(values, list) else [values]


def _is_answer(text: str, reference: str) -> bool:
    """Whether the last number of `text` equals a numeric reference, or `text` contains another one and little else."""
    number = _number(reference)
    if number is not None:
        return last_number(text) == number
    return len(text) <= len(reference) + _MAX_EXTRA and reference.strip().casefold() in text.casefold()


def _holds(text: str, value: Any) -> bool:
    """Whether `text` contains the value, or a number equal to it."""
    expected = str(value).strip()
    if not expected:
        return False
    number = _number(expected)
    words = text.replace(",", "").split() if number is not None else []
    return expected.casefold() in text.casefold() or any(last_number(word) == number for word in words)


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else, else None."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


class TaskPrompt(Protocol):
    """The attributes of minimind.data.prompts.Prompt that are used here."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def reference(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def thinking(self) -> bool | None: ...


def start_of(prompt: TaskPrompt, number: int, samples: int = 1) -> Start:
    """The start of `samples` conversations from one prompt. The row's "state" is the tools' memory at the start."""
    state = prompt.metadata.get("state")
    known = state if isinstance(state, dict) else {}
    return Start(number, prompt.ids, samples, offered_tools(prompt.messages), known, prompt.thinking)


def sample_of(prompt: TaskPrompt, episode: Episode) -> EpisodeSample:
    """The conversation as rewards see it."""
    reason: Any = "stop" if episode.reason == "answer" else "length"
    return EpisodeSample(
        prompt.messages, episode.answer, episode.ids, reason, prompt.reference, prompt.metadata, prompt.thinking,
        episode,
    )  # fmt: skip


def is_checked(prompt: TaskPrompt | EpisodeSample) -> bool:
    """Whether the row has a reference or a list "gt", so that an answer can be checked."""
    return prompt.reference is not None or bool(prompt.metadata.get("gt"))


def is_done(sample: EpisodeSample) -> bool:
    """Whether the final answer is right."""
    return rightness(sample) > _RIGHT


def check_tools(prompts: Iterable[TaskPrompt], tools: ToolRunner) -> None:
    """Raise ValueError, one line, if a prompt offers a tool that no function implements, or one with arguments that its
    function does not take."""
    for prompt in prompts:
        for name, schema in offered_tools(prompt.messages).items():
            if name not in tools.tools:
                raise ValueError(
                    f"--tools: a prompt of --data offers {name}, which no function implements; name one with --tools "
                    "package.module:NAME"
                )
            mine = tools.tools[name].parameters.get("properties", {})
            other = set(schema.get("properties", {})) - set(mine)
            if other:
                raise ValueError(
                    f"--tools: a prompt of --data offers {name} with {', '.join(sorted(other))}; the function takes "
                    f"{', '.join(mine) or 'nothing'}"
                )


def figures(samples: Sequence[EpisodeSample]) -> dict[str, float]:
    """Figures of finished conversations, by name:

    success             share of the tasks that were solved; success_N: of those that need N calls;
                        success_new_wording: of those whose wording is in no training task
    calls, turns        mean number per conversation
    malformed_calls     share of the calls that could not be run
    call_PROBLEM        number of calls that failed in this way
    ended_by_REASON     number of conversations that ended for this reason
    """
    done: dict[str, list[float]] = {}
    problems, reasons, calls, turns = Counter[str](), Counter[str](), 0, 0
    for sample in samples:
        episode = sample.conversation
        problems += episode.problems
        reasons[episode.reason.replace(" ", "_")] += 1
        calls, turns = calls + len(episode.calls), turns + len(episode.turns)
        if is_checked(sample):
            names = ["success", f"success_{needed_calls(sample)}"]
            for name in names + ["success_new_wording"] * bool(sample.metadata.get("new_wording")):
                done.setdefault(name, []).append(float(is_done(sample)))
    bad = sum(problems[name] for name in ("malformed", "unknown", "arguments"))
    found = {name: float(np.mean(values)) for name, values in sorted(done.items())}
    found |= {"calls": calls / max(1, len(samples)), "turns": turns / max(1, len(samples))}
    found |= {"malformed_calls": bad / max(1, calls)}
    found |= {f"call_{name}": float(count) for name, count in sorted(problems.items())}
    return found | {f"ended_by_{name}": float(count) for name, count in sorted(reasons.items())}
