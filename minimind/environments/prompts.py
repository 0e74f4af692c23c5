"""From a prompt of a data set to a conversation, and from that to what rewards and figures are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from minimind.environments.episodes import Episode, Start
from minimind.environments.rewards import EpisodeSample, needed_calls, rightness
from minimind.environments.running import ToolRunner
from minimind.rewards.rules import offered_tools

_RIGHT = 1.0 - 1e-9  # how right an answer must be for its task to count as done


class TaskPrompt(Protocol):
    """What is needed of minimind.data.prompts.Prompt."""

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
    """`samples` conversations that begin with a prompt; its "state" is the tools' at their beginning."""
    state = prompt.metadata.get("state")
    known = state if isinstance(state, dict) else {}
    return Start(number, prompt.ids, samples, offered_tools(prompt.messages), known, prompt.thinking)


def sample_of(prompt: TaskPrompt, episode: Episode) -> EpisodeSample:
    """What rewards see of a conversation."""
    reason: Any = "stop" if episode.reason == "answer" else "length"
    return EpisodeSample(
        prompt.messages, episode.answer, episode.ids, reason, prompt.reference, prompt.metadata, prompt.thinking,
        episode,
    )  # fmt: skip


def is_checked(prompt: TaskPrompt | EpisodeSample) -> bool:
    """Whether there is something to check an answer against."""
    return prompt.reference is not None or bool(prompt.metadata.get("gt"))


def is_done(sample: EpisodeSample) -> bool:
    """Whether the final answer is right."""
    return rightness(sample) > _RIGHT


def check_tools(prompts: Iterable[TaskPrompt], tools: ToolRunner) -> None:
    """ValueError, one line, where a prompt offers a tool that there is none for, or with arguments that it has not."""
    for prompt in prompts:
        for name, schema in offered_tools(prompt.messages).items():
            if name not in tools.tools:
                raise ValueError(
                    f"--tools: a prompt of --data offers {name}, which there is no function for; name one, as "
                    "package.module:name"
                )
            mine = tools.tools[name].parameters.get("properties", {})
            other = set(schema.get("properties", {})) - set(mine)
            if other:
                raise ValueError(
                    f"--tools: a prompt of --data offers {name} with {', '.join(sorted(other))}; the function takes "
                    f"{', '.join(mine) or 'nothing'}"
                )


def figures(samples: Sequence[EpisodeSample]) -> dict[str, float]:
    """success, the share of tasks that were done, and of those of one, two, ... calls and of new wordings; calls and
    turns of a conversation; malformed_calls, the share that could not be run; and how many calls failed by the way that
    they did, how many conversations ended by the reason."""
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
