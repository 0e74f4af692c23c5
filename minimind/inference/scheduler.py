"""The scheduler: which sequences run in the next step, and which pages of the cache they own.

    waiting --admit--> running: its prompt in chunks, then one token per step --> finished
       ^------preempt------'

Decoding sequences come first; prompts share the step's token budget in the order of arrival. If a sequence needs a page
and all pages are held, the youngest running sequence gives its pages back and waits at the front of the queue; its
tokens are computed again later. The oldest sequence is never preempted, so the work always makes progress.

PagePool counts who holds each page. A full page may be published under a key that stands for its tokens and all tokens
before them (`page_key`, a chain of hashes). A later sequence with the same beginning finds and shares the page, as in
vLLM's automatic prefix caching and SGLang's RadixAttention (arXiv 2312.07104). A published page that nobody holds can
be found until its memory is needed; the least recently used one is evicted first.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page, 16 bytes: a hash of its tokens and the key of the page before it (b"" for the first page).

    The hash is cryptographic because pages are shared between different users' requests.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference counts of `pages` pages, and the keys of the published ones. Holds no tensors."""

    def __init__(self, pages: int, reuse: bool = True) -> None:
        """reuse: whether pages can be published and found; if not, `publish` does nothing."""
        self.pages, self.reuse = pages, reuse
        self._references = [0] * pages
        self._free = deque(range(pages))
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # published and held by nobody, the longest idle first

    @property
    def available(self) -> int:
        """Number of pages that `take` can still return."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Number of published pages that nobody holds."""
        return len(self._idle)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self) -> int | None:
        """A page with undefined content for one holder; None if all pages are held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page = next(iter(self._idle))
            del self._idle[page]
            self._unpublish(page)
        else:
            return None
        self._references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to each of these pages, which must be held already."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Remove a holder from each page. `pages` must be in the sequence's order, so that later pages are evicted
        before earlier ones."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Make a full page available under `key`, unless another page already is."""
        if self.reuse and key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages published under `keys`, up to the first missing key. The caller now holds them."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        return pages

    def forget(self) -> None:
        """Withdraw all published pages."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _unpublish(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


class SequenceState:
    """One sampled sequence of a request: its tokens, and the pages with the keys and values of the first `computed`.

    Until its prompt is computed, it stands for the `count` sequences of the request from `index` on.
    output: the engine's SequenceOutput for it.
    """

    __slots__ = (
        "arrival", "cached", "computed", "count", "ended", "ending", "index", "keys", "output", "pages",
        "prompt_length", "row", "tokens",
    )  # fmt: skip

    def __init__(self, arrival: int, index: int, count: int, tokens: list[int], output: Any = None) -> None:
        self.arrival, self.index, self.count = arrival, index, count
        self.tokens, self.prompt_length = tokens, len(tokens)
        self.output = output
        self.computed = 0
        self.cached = 0  # prompt tokens that were in the cache at the first admission
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # keys of the first full pages, computed when needed
        self.row = -1  # in the decode batch; -1 while its prompt is computed and once it is ending
        self.ending = False  # its last token is sampled, but the host has not read it yet
        self.ended = False

    def __lt__(self, other: SequenceState) -> bool:
        return (self.arrival, self.index) < (other.arrival, other.index)


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a sequence to compute in this step. last: its next token can be sampled afterwards."""

    sequence: SequenceState
    start: int
    end: int
    last: bool


@dataclass
class StepPlan:
    """The work of one step. chunks: of prompts. copies: pages (from, to) to copy before anything is written. grown:
    decoding sequences whose last page is new. preempted: sequences to remove from the decode batch."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    grown: list[SequenceState] = field(default_factory=list)
    preempted: list[SequenceState] = field(default_factory=list)


class Scheduler:
    """The queue and the pages of all sequences. Sequences with row >= 0 are in the decode batch."""

    def __init__(self, pool: PagePool, page_size: int, max_batch: int, chunk_tokens: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.max_batch, self.chunk_tokens = max_batch, chunk_tokens
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []  # both lists are in the order of arrival
        self.preemptions = 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, sequence: SequenceState) -> None:
        insort(self.waiting, sequence)

    def plan(self) -> StepPlan:
        """Plan the next step: a page for the next token of every decoding sequence, then prompts within the budget."""
        plan = StepPlan()
        for sequence in self.running[:]:
            if sequence.row >= 0 and sequence.pages:  # without pages it was just preempted
                self._grow(sequence, plan)
        budget = self.chunk_tokens
        for sequence in self.running:
            if sequence.row < 0 and budget > 0 and not sequence.ending:
                budget -= self._chunk(sequence, budget, plan)
        while budget > 0 and self.waiting and not plan.preempted and self._admit(self.waiting[0]):
            budget -= self._chunk(self.running[-1], budget, plan)
        return plan

    def short_of_pages(self) -> bool:
        """Whether the decoding sequences' next tokens need more pages than are available, so that `plan` preempts."""
        if self.pool.available >= len(self.running):
            return False
        needed = sum(
            sequence.computed % self.page_size == 0 or self.pool.references(sequence.pages[-1]) > 1
            for sequence in self.running
            if sequence.row >= 0
        )
        return self.pool.available < needed

    def decoded(self, sequence: SequenceState) -> None:
        """Publish the page that a decoding sequence has just filled: the keys and values of all its `tokens` are in the
        cache. `computed` may be ahead of them, as it counts a token from the launch of its step."""
        filled = len(sequence.tokens)
        if filled % self.page_size == 0:
            self._publish(sequence, filled - 1, filled)

    def fork(self, sequence: SequenceState) -> list[SequenceState]:
        """The `count` sequences of a computed prompt: the first one, and copies that share its pages."""
        copies = []
        for i in range(1, sequence.count):
            copy = SequenceState(sequence.arrival, sequence.index + i, 1, sequence.tokens.copy())
            copy.prompt_length, copy.computed = sequence.prompt_length, sequence.computed
            copy.pages, copy.keys = sequence.pages.copy(), sequence.keys.copy()
            self.pool.share(copy.pages)
            insort(self.running, copy)
            copies.append(copy)
        sequence.count = 1
        return [sequence, *copies]

    def remove(self, sequence: SequenceState) -> None:
        """Remove a finished or cancelled sequence and release its pages."""
        (self.running if sequence.pages else self.waiting).remove(sequence)
        self._give_back(sequence)

    def preempt(self, sequence: SequenceState) -> None:
        """Move a running sequence back to the queue and release its pages."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.ending = False
        insort(self.waiting, sequence)

    def _give_back(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _grow(self, sequence: SequenceState, plan: StepPlan) -> None:
        """Give the sequence a page of its own for the token at `computed`: a new page, or a copy of a shared one."""
        at_boundary = sequence.computed % self.page_size == 0
        if not at_boundary and self.pool.references(sequence.pages[-1]) == 1:
            return
        page = self._take(sequence, plan)
        if page is None:
            return
        if at_boundary:
            sequence.pages.append(page)
        else:
            shared, sequence.pages[-1] = sequence.pages[-1], page
            self.pool.release([shared])
            plan.copies.append((shared, page))
        plan.grown.append(sequence)

    def _take(self, sequence: SequenceState, plan: StepPlan) -> int | None:
        """A page, preempting the youngest sequences if necessary; None if `sequence` itself was preempted."""
        while (page := self.pool.take()) is None:
            youngest = self.running[-1]
            self.preempt(youngest)
            self.preemptions += 1
            plan.preempted.append(youngest)
            if youngest is sequence:
                return None
        return page

    def _admit(self, sequence: SequenceState) -> bool:
        """Start a waiting sequence, with shared pages for a cached prefix and new ones for the rest. False if there is
        no room."""
        continuing = [s for s in self.running if not s.ending]
        if sum(s.count for s in continuing) + sequence.count > self.max_batch:
            return False
        pages = self._find(sequence)
        missing = self.pages_for(len(sequence.tokens)) - len(pages)
        reserve = len(continuing) + sequence.count if self.running else 0  # each may soon need one more page
        if self.pool.available < missing + reserve:
            self.pool.release(pages)
            return False
        for _ in range(missing):
            page = self.pool.take()
            assert page is not None
            pages.append(page)
        sequence.pages = pages
        sequence.computed = (len(pages) - missing) * self.page_size
        if len(sequence.tokens) == sequence.prompt_length:
            sequence.cached = sequence.computed
        self.waiting.pop(0)
        insort(self.running, sequence)
        return True

    def _find(self, sequence: SequenceState) -> list[int]:
        """Cached pages with the sequence's first tokens, now held by it. The last token is never among them, since it
        must be computed."""
        if not self.pool.reuse:
            return []
        full = (len(sequence.tokens) - 1) // self.page_size
        self._compute_keys(sequence, full)
        return self.pool.find(sequence.keys[:full])

    def _chunk(self, sequence: SequenceState, budget: int, plan: StepPlan) -> int:
        """Plan the sequence's next tokens and return their number. The pages they fill are published at once, since a
        step writes the keys and values of all its chunks before it reads any."""
        end = min(len(sequence.tokens), sequence.computed + budget)
        chunk = Chunk(sequence, sequence.computed, end, last=end == len(sequence.tokens))
        plan.chunks.append(chunk)
        sequence.computed = chunk.end
        self._publish(sequence, chunk.start, chunk.end)
        return chunk.end - chunk.start

    def _publish(self, sequence: SequenceState, start: int, end: int) -> None:
        """Publish the pages that tokens start..end fill."""
        if self.pool.reuse:
            full = end // self.page_size
            self._compute_keys(sequence, full)
            for i in range(start // self.page_size, full):
                self.pool.publish(sequence.pages[i], sequence.keys[i])

    def _compute_keys(self, sequence: SequenceState, full: int) -> None:
        keys, size = sequence.keys, self.page_size
        for i in range(len(keys), full):
            keys.append(page_key(keys[-1] if keys else b"", sequence.tokens[i * size : (i + 1) * size]))
