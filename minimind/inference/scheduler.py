"""Which samples run in the next step, and in which pages.

    waiting --admit--> running: its prompt in chunks, then one token a step --> finished
       ^------preempt------'

Decoding samples come first; prompts share the step's prompt budget in the order of arrival. When a sample needs a page
and every page is held, the youngest running sample gives its pages back and waits at the front of the queue, to be
computed again from its tokens. The oldest is never taken from, so the work always goes forward.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.cache import PagePool, page_key


class SequenceState:
    """One sample of a request: its tokens, and the pages that hold the keys and values of the first `computed`.

    Until its prompt is computed it stands for `count` samples of the request, `index` being the first.
    track: whatever the engine keeps about it.
    """

    __slots__ = (
        "arrival", "cached", "computed", "count", "ended", "ending", "index", "keys", "pages", "prompt_length", "row",
        "tokens", "track",
    )  # fmt: skip

    def __init__(self, arrival: int, index: int, count: int, tokens: list[int], track: Any = None) -> None:
        self.arrival, self.index, self.count = arrival, index, count
        self.tokens, self.prompt_length = tokens, len(tokens)
        self.track = track
        self.computed = 0
        self.cached = 0  # prompt tokens that the first admission found in the cache
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # of full pages, as far as they were needed
        self.row = -1  # in the decode batch; -1 while the prompt is computed, and when it is ending
        self.ending = False  # its last token is drawn, but the host has not read it yet
        self.ended = False

    def __lt__(self, other: SequenceState) -> bool:
        return (self.arrival, self.index) < (other.arrival, other.index)


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a sample to compute in this step. last: then its next token can be drawn."""

    sample: SequenceState
    start: int
    end: int
    last: bool


@dataclass
class StepPlan:
    """chunks: of prompts. copies: pages (from, to) to copy before anything is written. grown: decoding samples whose
    last page is new. preempted: to be taken out of the decode batch."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    grown: list[SequenceState] = field(default_factory=list)
    preempted: list[SequenceState] = field(default_factory=list)


class Scheduler:
    """The queue and the page tables. Samples with row >= 0 are those of the decode batch."""

    def __init__(self, pool: PagePool, page_size: int, max_batch: int, chunk_tokens: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.max_batch, self.chunk_tokens = max_batch, chunk_tokens
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []  # both in the order of arrival
        self.preemptions = 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, sample: SequenceState) -> None:
        insort(self.waiting, sample)

    def plan(self) -> StepPlan:
        """Give every decoding sample its page for one more token, then prompts as far as the budget goes."""
        plan = StepPlan()
        for sample in self.running[:]:
            if sample.row >= 0 and sample.pages:  # pages: not preempted a moment ago
                self._grow(sample, plan)
        budget = self.chunk_tokens
        for sample in self.running:
            if sample.row < 0 and budget > 0 and not sample.ending:
                budget -= self._chunk(sample, budget, plan)
        while budget > 0 and self.waiting and not plan.preempted and self._admit(self.waiting[0]):
            budget -= self._chunk(self.running[-1], budget, plan)
        return plan

    def short_of_pages(self) -> bool:
        """Whether the decoding samples' next tokens may take more pages than there are, so that `plan` preempts."""
        if self.pool.available >= len(self.running):
            return False
        wanted = sum(
            sample.computed % self.page_size == 0 or self.pool.references(sample.pages[-1]) > 1
            for sample in self.running
            if sample.row >= 0
        )
        return self.pool.available < wanted

    def decoded(self, sample: SequenceState) -> None:
        """The keys and values of all `tokens` of a decoding sample are in the cache. `computed`, of which `plan` goes
        out, counts the last one since its step was launched, and may be further."""
        filled = len(sample.tokens)
        if filled % self.page_size == 0:
            self._publish(sample, filled - 1, filled)

    def fork(self, sample: SequenceState) -> list[SequenceState]:
        """The `count` samples of a prompt that is computed: the first one and copies that share its pages."""
        copies = []
        for i in range(1, sample.count):
            copy = SequenceState(sample.arrival, sample.index + i, 1, sample.tokens.copy())
            copy.prompt_length, copy.computed = sample.prompt_length, sample.computed
            copy.pages, copy.keys = sample.pages.copy(), sample.keys.copy()
            self.pool.share(copy.pages)
            insort(self.running, copy)
            copies.append(copy)
        sample.count = 1
        return [sample, *copies]

    def remove(self, sample: SequenceState) -> None:
        """Forget a finished or cancelled sample."""
        (self.running if sample.pages else self.waiting).remove(sample)
        self._give_back(sample)

    def preempt(self, sample: SequenceState) -> None:
        """Back to the queue, without pages."""
        self.running.remove(sample)
        self._give_back(sample)
        sample.ending = False
        insort(self.waiting, sample)

    def _give_back(self, sample: SequenceState) -> None:
        self.pool.release(sample.pages)
        sample.pages, sample.computed = [], 0

    def _grow(self, sample: SequenceState, plan: StepPlan) -> None:
        """A page of its own for the token at `computed`: a new one, or a copy of one that it shares."""
        fresh = sample.computed % self.page_size == 0
        if not fresh and self.pool.references(sample.pages[-1]) == 1:
            return
        page = self._take(sample, plan)
        if page is None:
            return
        if fresh:
            sample.pages.append(page)
        else:
            shared, sample.pages[-1] = sample.pages[-1], page
            self.pool.release([shared])
            plan.copies.append((shared, page))
        plan.grown.append(sample)

    def _take(self, sample: SequenceState, plan: StepPlan) -> int | None:
        """A page, at the cost of the youngest; None if that is the sample itself."""
        while (page := self.pool.take()) is None:
            youngest = self.running[-1]
            self.preempt(youngest)
            self.preemptions += 1
            plan.preempted.append(youngest)
            if youngest is sample:
                return None
        return page

    def _admit(self, sample: SequenceState) -> bool:
        """Pages for all of a waiting sample's tokens, those of a known beginning shared."""
        going_on = [s for s in self.running if not s.ending]
        if sum(s.count for s in going_on) + sample.count > self.max_batch:
            return False
        found = self._find(sample)
        missing = self.pages_for(len(sample.tokens)) - len(found)
        reserve = len(going_on) + sample.count if self.running else 0  # each may soon want one page more
        if self.pool.available < missing + reserve:
            self.pool.release(found)
            return False
        for _ in range(missing):
            page = self.pool.take()
            assert page is not None
            found.append(page)
        sample.pages = found
        sample.computed = (len(found) - missing) * self.page_size
        if len(sample.tokens) == sample.prompt_length:
            sample.cached = sample.computed
        self.waiting.pop(0)
        insort(self.running, sample)
        return True

    def _find(self, sample: SequenceState) -> list[int]:
        """Held pages with the sample's first tokens; its last token is never among them, it must be computed."""
        if not self.pool.reuse:
            return []
        full = (len(sample.tokens) - 1) // self.page_size
        self._name_pages(sample, full)
        return self.pool.find(sample.keys[:full])

    def _chunk(self, sample: SequenceState, budget: int, plan: StepPlan) -> int:
        """Plan the sample's next tokens and return their number. The pages they fill can be found from now on:
        a step writes the keys and values of all its chunks before any of them is read."""
        end = min(len(sample.tokens), sample.computed + budget)
        chunk = Chunk(sample, sample.computed, end, last=end == len(sample.tokens))
        plan.chunks.append(chunk)
        sample.computed = chunk.end
        self._publish(sample, chunk.start, chunk.end)
        return chunk.end - chunk.start

    def _publish(self, sample: SequenceState, start: int, end: int) -> None:
        """Publish the pages that tokens start..end filled."""
        if self.pool.reuse:
            full = end // self.page_size
            self._name_pages(sample, full)
            for i in range(start // self.page_size, full):
                self.pool.publish(sample.pages[i], sample.keys[i])

    def _name_pages(self, sample: SequenceState, full: int) -> None:
        keys, size = sample.keys, self.page_size
        for i in range(len(keys), full):
            keys.append(page_key(keys[-1] if keys else b"", sample.tokens[i * size : (i + 1) * size]))
