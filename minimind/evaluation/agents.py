"""Measure how often a model with tools solves its tasks, by kind of task and number of calls needed.

    minimind evaluate --agent                                       held-out built-in tasks
    minimind evaluate --agent --agent-data agent_rl.jsonl --tools upstream
    minimind evaluate --agent --agent-data mine.jsonl --tools package.module:NAME
    minimind evaluate --agent --model http://127.0.0.1:8998/v1            a server with OpenAI's API, or URL#MODEL

Each task is one greedily decoded conversation; all conversations run concurrently, on one engine
(minimind/environments/episodes.py) or at a server (remote.py). The command prints a table and a few of the
conversations that failed; agent.json in the run folder or --out has all figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minimind.data.prompts import PromptSet, open_prompts
from minimind.environments.builtin import named_tools
from minimind.environments.builtin.tasks import agent_prompts
from minimind.environments.episodes import Episode, EpisodeLimits, EpisodeRunner, EpisodeSampling, Start
from minimind.environments.remote import RemoteRunner
from minimind.environments.rewards import (
    EpisodeSample,
    check_tools,
    figures,
    is_checked,
    is_done,
    needed_calls,
    sample_of,
    start_of,
)
from minimind.environments.running import ToolRunner
from minimind.environments.turns import ToolTurns
from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel
from minimind.tokenization import Tokenizer, load_tokenizer
from minimind.tokenization.reasoning import ThinkingPrompts
from minimind.utils.display import say

LIMITS = EpisodeLimits()
_LONGEST = 8192  # maximum tokens of a prompt
_BATCH = 64  # conversations decoded at a time
_FAILURES = 3  # failed conversations to print


@dataclass(frozen=True)
class RemoteModel:
    """A model at a server with OpenAI's API."""

    client: Any
    name: str

    @staticmethod
    def open(address: str) -> RemoteModel:
        """address: ends with /v1, or with /v1#NAME where the server has several models. The key is that of
        MINIMIND_API_KEY or OPENAI_API_KEY. Raises ValueError, in one line, if no server answers or none of its models
        is meant."""
        try:
            import openai

            from minimind.serving.web_client import connect
        except ImportError:
            raise ValueError(f"--model {address}: needs the openai package: pip install 'minimind[web]'") from None
        url, _, name = address.partition("#")
        client = connect(url, os.environ.get("MINIMIND_API_KEY") or os.environ.get("OPENAI_API_KEY"))
        try:
            names = [model.id for model in client.models.list()]
        except openai.OpenAIError as problem:
            raise ValueError(f"--model {url}: {' '.join(str(problem).split())}") from None
        if name not in names and (name or len(names) != 1):
            raise ValueError(f"--model {address}: write {url}#NAME with one of its models: {', '.join(names)}")
        return RemoteModel(client, name or names[0])


def is_address(model: str | None) -> bool:
    """Whether --model names a server."""
    return model is not None and model.startswith(("http://", "https://"))


def evaluate_agent(
    model: LoadedModel | RemoteModel, data: Sequence[str], tools: Sequence[str], limit: int | None, console: Console
) -> dict[str, Any]:
    """Evaluate the first `limit` tasks. Returns the figures of `minimind.environments.rewards.figures`, the number of
    "tasks", "kinds" ({kind: {"tasks": number, "success": share}}) and "failures", a transcript of each. Raises
    ValueError, one line, for unusable tasks or tools."""
    prompts = _open(load_tokenizer() if isinstance(model, RemoteModel) else model.tokenizer, data, limit, console)
    starts = [start_of(prompt, number) for number, prompt in enumerate(prompts.prompts)]
    with ToolRunner(named_tools(tools)) as runner:
        check_tools(prompts.prompts, runner)
        if isinstance(model, RemoteModel):
            messages = [prompt.messages for prompt in prompts.prompts]
            episodes = RemoteRunner(model.client, model.name, runner, LIMITS).run(starts, messages)
        else:
            episodes = _converse(model, starts, runner)
    samples = [sample_of(prompt, episode) for prompt, episode in zip(prompts.prompts, episodes, strict=True)]
    kinds: dict[str, list[float]] = {}
    for sample in samples:
        kinds.setdefault(str(sample.metadata.get("kind", "all")), []).append(float(is_done(sample)))
    return figures(samples) | {
        "tasks": len(samples),
        "kinds": {kind: {"tasks": len(s), "success": sum(s) / len(s)} for kind, s in sorted(kinds.items())},
        "failures": [_transcript(sample) for sample in samples if not is_done(sample)],
    }


def report_agent(evaluation: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the table and a few failures, and write agent.json."""
    table = Table("tasks", "number", "success")
    for kind, values in evaluation["kinds"].items():
        table.add_row(kind, f"{values['tasks']:,}", f"{values['success']:.3f}")
    names = sorted(name for name in evaluation if name.startswith("success_"))
    for name in names:
        group = name.removeprefix("success_").replace("_", " ")
        table.add_row(f"that need {group} calls" if group.isdigit() else group, "", f"{evaluation[name]:.3f}")
    table.add_row("all", f"{evaluation['tasks']:,}", f"{evaluation['success']:.3f}")
    console.print(table)
    say(
        console,
        f"{evaluation['calls']:.2f} calls and {evaluation['turns']:.2f} turns per conversation; "
        f"{evaluation['malformed_calls']:.3f} of the calls could not be run",
    )
    for failure in evaluation["failures"][:_FAILURES]:
        say(console, f"failed: {failure}")
    path = folder / "agent.json"
    path.write_text(json.dumps(evaluation, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    say(console, str(path))


def _open(tokenizer: Tokenizer, data: Sequence[str], limit: int | None, console: Console) -> PromptSet:
    paths = list(data) or [str(agent_prompts(None, console)[1])]
    prompts = open_prompts(paths, ThinkingPrompts(tokenizer, None), _LONGEST, console=console)
    chosen = [prompt for prompt in prompts.prompts if is_checked(prompt)][:limit]
    if not chosen:
        raise ValueError('--agent-data: no row has a "reference" or a list "gt" to check an answer against')
    return PromptSet(chosen, prompts.identity)


def _converse(loaded: LoadedModel, starts: Sequence[Start], tools: ToolRunner) -> list[Episode]:
    longest = max(len(start.prompt) for start in starts)
    context = min(longest + LIMITS.tokens, loaded.model.config.positions)
    engine = Engine(
        loaded.model, loaded.tokenizer, dtype=loaded.dtype, kv_dtype=loaded.kv_dtype, max_batch=_BATCH,
        max_context=context,
    )  # fmt: skip
    turns: dict[bool | None, ToolTurns] = {None: ToolTurns(loaded.tokenizer)}
    return EpisodeRunner(engine, turns, tools, LIMITS).run(starts, EpisodeSampling(0.0))


def _transcript(sample: EpisodeSample) -> str:
    """One line: the question, the turns with the results of their calls, how it ended, and the expected answer."""
    question = next((str(m.get("content")) for m in reversed(sample.prompt) if m["role"] == "user"), "")
    parts = [question]
    for turn in sample.conversation.turns:
        parts += [turn.text, *(f"[{result.text}]" for result in turn.results)]
    expected = sample.reference if sample.reference is not None else sample.metadata.get("gt")
    parts.append(f"ended by {sample.conversation.reason}, {needed_calls(sample)} calls needed, expected {expected}")
    return " | ".join(parts).replace("\n", "\\n")
