"""Run conversations in which a model calls tools, many at a time in one engine.

    prompt -> turn -> its calls -> tools -> results appended -> turn -> ... -> a turn without a call: the answer

All conversations advance together: the engine decodes some while the tools of others run. Tokens are only appended to a
conversation (turns.py), and each turn is a request that begins with all of them: the engine reuses the full pages of
its cache (inference/scheduler.py) and computes only the new tokens and those of the last, partly filled page. Answers
do not depend on the other conversations: a turn's seed follows from the run's seed and the numbers of the conversation,
the turn and the sample.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from minimind.environments.running import ToolResult, ToolRunner
from minimind.environments.turns import ParsedCall, ToolTurns, read_calls, without_calls
from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Delta, EngineStats, Request, SamplingParams

EndReason = Literal["answer", "turns", "tokens", "tool time"]
_WAIT = 0.05  # seconds to wait for tools at a time while no conversation decodes


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of one conversation. turns: of the assistant; turn_tokens: sampled in one turn; tokens: after the prompt,
    tool results included; tool_seconds: all its calls together."""

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
    """The start of a conversation. number: unique, for the seed; prompt: token ids; samples: conversations to sample
    from it; offered: the JSON schema of each tool's arguments, by tool name; state: the tools' memory, which is copied;
    thinking: whether the prompt asks for reasoning, as in ToolTurns."""

    number: int
    prompt: Sequence[int]
    samples: int = 1
    offered: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: its text with markup, its calls, and the results of those that were run."""

    text: str
    calls: Sequence[ParsedCall] = ()
    results: Sequence[ToolResult] = ()


@dataclass(eq=False)
class Episode:
    """A conversation. ids: all tokens after the prompt; sampled: for each id, whether the model wrote it; log_probs:
    one for each sampled id; reason: why it ended; markup: number of results that spelt special tokens."""

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
        """The text of the last turn if the conversation ended with an answer, else ""."""
        return without_calls(self.turns[-1].text) if self.reason == "answer" else ""

    @property
    def calls(self) -> list[ParsedCall]:
        return [call for turn in self.turns for call in turn.calls]

    @property
    def problems(self) -> Counter[str]:
        """Counts of failed calls by kind of failure, and of results that were cut or spelt special tokens."""
        results = [result for turn in self.turns for result in turn.results]
        counts = Counter[str](call.problem for call in self.calls if call.problem is not None)
        counts.update(r.problem for r in results if r.problem in ("raised", "timeout", "died"))
        counts["cut"], counts["markup"] = sum(result.cut for result in results), self.markup
        return +counts  # without zeros


@dataclass(frozen=True)
class EpisodeSampling:
    """How turns are sampled. seed: of the run; the samples depend on it and on the conversation's number."""

    temperature: float = 1.0
    seed: int = 0


@dataclass
class Counts:
    """Tokens of all turns since the runner was made. computed: prompt tokens that the engine computed; found: prompt
    tokens whose keys and values were cached; sampled: tokens that the model wrote."""

    computed: int = 0
    found: int = 0
    sampled: int = 0


@dataclass
class _OpenTurn:
    """An unfinished turn. drawn: its tokens so far; calls: all that it makes; results: of the calls run so far."""

    episode: Episode
    drawn: list[int] = field(default_factory=list)
    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)


_Key = tuple[str, int]  # (name of the engine's request, index of the sample)


class EpisodeRunner:
    """Runs conversations. engine: only this runner uses it during `run`; its max_batch limits how many conversations
    run at a time. turns: the encoder of turns for each value of `Start.thinking`. tools: runs the calls."""

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
        self._open: dict[_Key, _OpenTurn] = {}
        self._ended: list[Episode] = []

    def run(self, starts: Sequence[Start], sampling: EpisodeSampling | None = None) -> list[Episode]:
        """Run all conversations to their end. Returns them in the order of `starts`, the samples of a start together.
        Raises ValueError if the engine refuses a prompt or its logits are not finite."""
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
        """Run one step of the engine, and handle the tool results that have arrived."""
        if self.engine.has_work:
            for delta in self.engine.step():
                self._on_delta(delta)
        if self.tools.busy:
            for key, result in self.tools.poll(0.0 if self.engine.has_work else _WAIT):
                self._on_result(cast(_Key, key), result)

    def _begin(self, start: Start) -> None:
        name = f"{start.number}/1"
        for sample in range(start.samples):
            self._open[name, sample] = _OpenTurn(Episode(start, sample, state=copy.deepcopy(dict(start.state))))
        self._submit(name, start.prompt, start.samples, derive_seed(self._sampling.seed, start.number), 0)

    def _submit(self, name: str, ids: Sequence[int], samples: int, seed: int, used: int) -> None:
        """Ask the engine to continue `ids`, of which the last `used` come after the prompt."""
        room = min(self.limits.turn_tokens, self.limits.tokens - used, self.engine.max_context - len(ids))
        params = SamplingParams(max(1, room), self._sampling.temperature, seed=seed, n=samples)
        self.engine.submit(Request(ids, params, name))

    def _on_delta(self, delta: Delta) -> None:
        key = delta.id, delta.index
        turn = self._open[key]
        turn.drawn += delta.token_ids
        turn.episode.log_probs += delta.log_probs
        if delta.finish_reason == "error":
            raise ValueError((delta.output and delta.output.error) or "the engine cannot continue a conversation")
        if delta.finish_reason is None:
            return
        turn.episode.ids += turn.drawn
        turn.episode.sampled += [True] * len(turn.drawn)
        if delta.finish_reason != "stop":
            turn.text = self._text(turn.drawn)
            return self._end(key, "tokens")
        turn.text = self._text(turn.drawn[:-1])
        turn.calls = read_calls(turn.text, turn.episode.start.offered)
        if not turn.calls:
            self._end(key, "answer")
        elif len(turn.episode.turns) + 1 >= self.limits.turns:
            self._end(key, "turns")
        else:
            self.tools.submit(key, turn.calls[0], turn.episode.state)

    def _on_result(self, key: _Key, result: ToolResult) -> None:
        """Record a call's result, and start the turn's next call or the next turn."""
        turn = self._open[key]
        turn.results.append(result)
        turn.episode.tool_seconds += result.seconds
        if turn.episode.tool_seconds > self.limits.tool_seconds:
            self._end(key, "tool time")
        elif len(turn.results) < len(turn.calls):
            self.tools.submit(key, turn.calls[len(turn.results)], turn.episode.state)
        else:
            self._next_turn(key)

    def _next_turn(self, key: _Key) -> None:
        """Append the tool results, and request the next turn."""
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
        number, conversation = len(episode.turns) + 1, episode.start.number
        name = f"{conversation}/{number}/{episode.sample}"
        self._open[name, 0] = _OpenTurn(episode)
        seed = derive_seed(derive_seed(self._sampling.seed, conversation), (number << 32) + episode.sample)
        self._submit(name, [*prompt, *episode.ids], 1, seed, used)

    def _end(self, key: _Key, reason: EndReason) -> None:
        episode = self._close(key)
        episode.reason = reason
        self._ended.append(episode)

    def _close(self, key: _Key) -> Episode:
        """Add the finished turn to its episode."""
        turn = self._open.pop(key)
        turn.episode.turns.append(Turn(turn.text, turn.calls, turn.results))
        return turn.episode

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _give_up(self) -> None:
        """Cancel the requests and calls of unfinished conversations."""
        if self._open:
            for name in {name for name, _ in self._open}:
                self.engine.cancel(name)
            self.engine.step()  # delivers the cancellations
            self.tools.stop()
            self._open.clear()

    def _count(self, before: EngineStats) -> None:
        after = self.engine.stats()
        cached = after.cached_tokens - before.cached_tokens
        self.counts.computed += after.prompt_tokens - before.prompt_tokens - cached
        self.counts.found += cached
        self.counts.sampled += after.generated_tokens - before.generated_tokens
