"""Conversations in which a model calls tools, many at a time over one engine.

    prompt -> turn -> its calls -> tools -> results appended -> turn -> ... -> a turn without a call: the answer

All conversations advance together: the engine decodes those whose turn it is while the tools of others run. The tokens
of a conversation are a list that only grows (turns.py), and its next turn is a request that begins with them: the
engine finds the pages of what it has computed before (inference/cache.py), so that of a turn only what is new is
computed, and the part of a page that was not full. Answers are the same whatever ran beside them, as the seed of a turn
follows from the conversation's number alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from minimind.environments.calls import ParsedCall, read_calls, without_calls
from minimind.environments.running import ToolResult, ToolRunner
from minimind.environments.turns import ToolTurns
from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Delta, EngineStats, Request, SamplingParams

EndReason = Literal["answer", "turns", "tokens", "tool time"]
_WAIT = 0.05  # seconds between looks at tools while no conversation decodes


@dataclass(frozen=True)
class EpisodeLimits:
    """turns: of the assistant; turn_tokens: of one turn; tokens: of the whole conversation behind its prompt, results
    included; tool_seconds: of all its calls together."""

    turns: int = 6
    turn_tokens: int = 256
    tokens: int = 1024
    tool_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("turns", "turn_tokens", "tokens", "tool_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class Start:
    """What a conversation begins with. number: which of all, for its seed; prompt: token ids; samples: conversations
    that begin so; offered: the JSON schema of the arguments of each tool on offer; state: of the tools, copied;
    thinking: whether the prompt asks for reasoning, as ToolTurns has it."""

    number: int
    prompt: Sequence[int]
    samples: int = 1
    offered: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: its text with markup, its calls, and what came of those that were run."""

    text: str
    calls: Sequence[ParsedCall] = ()
    results: Sequence[ToolResult] = ()


@dataclass(eq=False)
class Episode:
    """A conversation. ids: all tokens behind the prompt; sampled: which of them the model wrote; log_probs: of those
    that it wrote, one each. reason: why it ended. markup: results that spelt special tokens."""

    start: Start
    sample: int
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    reason: EndReason = "answer"
    state: dict[str, Any] = field(default_factory=dict)
    tool_seconds: float = 0.0
    markup: int = 0

    @property
    def answer(self) -> str:
        """What the last turn says, if it ends the conversation as an answer; else nothing."""
        return without_calls(self.turns[-1].text) if self.reason == "answer" else ""

    @property
    def calls(self) -> list[ParsedCall]:
        return [call for turn in self.turns for call in turn.calls]

    @property
    def problems(self) -> Counter[str]:
        """How many calls went wrong, by how, and how many results were cut or spelt special tokens."""
        results = [result for turn in self.turns for result in turn.results]
        found = Counter[str](call.problem for call in self.calls if call.problem is not None)
        found.update(r.problem for r in results if r.problem in ("raised", "timeout", "died"))
        found["cut"], found["markup"] = sum(result.cut for result in results), self.markup
        return +found


@dataclass(frozen=True)
class EpisodeSampling:
    """seed: of the run; with a conversation's number it decides what is drawn."""

    temperature: float = 1.0
    seed: int = 0


@dataclass
class Counts:
    """Prompt tokens of all turns since the runner was made: those that the engine computed, and those whose keys and
    values it still had. sampled: tokens that the model wrote."""

    computed: int = 0
    found: int = 0
    sampled: int = 0


@dataclass
class _Open:
    """A conversation's turn as it comes. drawn: its tokens; calls and results: as far as they are run."""

    episode: Episode
    drawn: list[int] = field(default_factory=list)
    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)


_Key = tuple[str, int]  # a request of the engine, and which of its samples


class EpisodeRunner:
    """engine: nobody else's while `run` is on; its max_batch is how many conversations go on at a time. turns: by what
    a prompt says of reasoning. tools: run what is called."""

    def __init__(
        self,
        engine: Engine,
        turns: Mapping[bool | None, ToolTurns],
        tools: ToolRunner,
        limits: EpisodeLimits | None = None,
    ) -> None:
        self.engine, self.turns, self.tools, self.limits = engine, turns, tools, limits or EpisodeLimits()
        self.counts = Counts()
        self._tokenizer = next(iter(turns.values())).tokenizer
        self._sampling = EpisodeSampling()
        self._open: dict[_Key, _Open] = {}
        self._ended: list[Episode] = []

    def run(self, starts: Sequence[Start], sampling: EpisodeSampling | None = None) -> list[Episode]:
        """All to their end, in the order of `starts`, samples of one beside each other. Raises ValueError where the
        engine refuses a prompt or its logits are not finite."""
        self._sampling, self._ended = sampling or EpisodeSampling(), []
        before = self.engine.stats()
        queue = list(reversed(starts))
        try:
            while queue or self._open:
                while queue and (not self._open or len(self._open) + queue[-1].samples <= before.max_batch):
                    self._begin(queue.pop())
                self._advance()
        finally:
            self._give_up()
        self._count(before)
        place = {start.number: i for i, start in enumerate(starts)}
        return sorted(self._ended, key=lambda episode: (place[episode.start.number], episode.sample))

    def _advance(self) -> None:
        """A step of the engine, and what tools have done meanwhile."""
        if self.engine.has_work:
            for delta in self.engine.step():
                self._hear(delta)
        if self.tools.busy:
            for key, result in self.tools.poll(0.0 if self.engine.has_work else _WAIT):
                self._answered(cast(_Key, key), result)

    def _begin(self, start: Start) -> None:
        name = f"{start.number}/1"
        for sample in range(start.samples):
            self._open[name, sample] = _Open(Episode(start, sample, state=copy.deepcopy(dict(start.state))))
        self._ask(name, start.prompt, start.samples, derive_seed(self._sampling.seed, start.number), 0)

    def _ask(self, name: str, ids: Sequence[int], samples: int, seed: int, used: int) -> None:
        """Let the engine go on behind `ids`, of which `used` are behind the prompt."""
        room = min(self.limits.turn_tokens, self.limits.tokens - used, self.engine.max_context - len(ids))
        params = SamplingParams(max(1, room), self._sampling.temperature, seed=seed, n=samples)
        self.engine.submit(Request(ids, params, name))

    def _hear(self, delta: Delta) -> None:
        key = delta.id, delta.index
        here = self._open[key]
        here.drawn += delta.token_ids
        here.episode.log_probs += delta.log_probs
        if delta.finish_reason == "error":
            raise ValueError((delta.output and delta.output.error) or "the engine cannot go on with a conversation")
        if delta.finish_reason is None:
            return
        here.episode.ids += here.drawn
        here.episode.sampled += [True] * len(here.drawn)
        if delta.finish_reason != "stop":
            here.text = self._text(here.drawn)
            return self._end(key, "tokens")
        here.text = self._text(here.drawn[:-1])
        here.calls = read_calls(here.text, here.episode.start.offered)
        if not here.calls:
            self._end(key, "answer")
        elif len(here.episode.turns) + 1 >= self.limits.turns:
            self._end(key, "turns")
        else:
            self.tools.submit(key, here.calls[0], here.episode.state)

    def _answered(self, key: _Key, result: ToolResult) -> None:
        """A call's result: on to the next call of the turn, or to the next turn."""
        here = self._open[key]
        here.results.append(result)
        here.episode.tool_seconds += result.seconds
        if here.episode.tool_seconds > self.limits.tool_seconds:
            self._end(key, "tool time")
        elif len(here.results) < len(here.calls):
            self.tools.submit(key, here.calls[len(here.results)], here.episode.state)
        else:
            self._go_on(key)

    def _go_on(self, key: _Key) -> None:
        """Append what the tools said, and ask for the next turn."""
        episode, results = self._open[key].episode, [result.text for result in self._open[key].results]
        turns = self.turns[episode.start.thinking]
        episode.markup += sum(map(turns.holds_special, results))
        ids, prompt = turns.ids(results), episode.start.prompt
        used = len(episode.ids) + len(ids)
        if used >= self.limits.tokens or len(prompt) + used >= self.engine.max_context:
            return self._end(key, "tokens")
        self._close(key)
        episode.ids += ids
        episode.sampled += [False] * len(ids)
        number, of = len(episode.turns) + 1, episode.start.number
        name = f"{of}/{number}/{episode.sample}"
        self._open[name, 0] = _Open(episode)
        seed = derive_seed(derive_seed(self._sampling.seed, of), (number << 32) + episode.sample)
        self._ask(name, [*prompt, *episode.ids], 1, seed, used)

    def _end(self, key: _Key, reason: EndReason) -> None:
        episode = self._close(key)
        episode.reason = reason
        self._ended.append(episode)

    def _close(self, key: _Key) -> Episode:
        """The turn is over."""
        here = self._open.pop(key)
        here.episode.turns.append(Turn(here.text, here.calls, here.results))
        return here.episode

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _give_up(self) -> None:
        """Leave nothing behind of conversations that did not end."""
        if self._open:
            for name in {name for name, _ in self._open}:
                self.engine.cancel(name)
            self.engine.step()  # which delivers that they are cancelled
            self.tools.stop()
            self._open.clear()

    def _count(self, before: EngineStats) -> None:
        after = self.engine.stats()
        found = after.cached_tokens - before.cached_tokens
        self.counts.computed += after.prompt_tokens - before.prompt_tokens - found
        self.counts.found += found
        self.counts.sampled += after.generated_tokens - before.generated_tokens
