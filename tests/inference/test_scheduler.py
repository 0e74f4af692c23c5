"""The scheduler without a model: sequences get invented tokens until they reach their length."""

from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.inference.scheduler import PagePool, Scheduler, SequenceState

SIZE = 4


class Run:
    """Drives a scheduler as the engine does, and checks every plan."""

    def __init__(self, pages, max_batch, chunk, reuse=True):
        self.pool = PagePool(pages, reuse)
        self.scheduler = Scheduler(self.pool, SIZE, max_batch, chunk)
        self.max_batch, self.chunk, self.pages = max_batch, chunk, pages
        self.wanted: dict[tuple[int, int], int] = {}
        self.done: dict[tuple[int, int], list[int]] = {}
        self.written: dict[int, list[tuple[int, ...]]] = {}  # page -> what its slots hold, as token prefixes

    def add(self, arrival, tokens, wanted, count=1):
        self.scheduler.add(SequenceState(arrival, 0, count, list(tokens)))
        for index in range(count):
            self.wanted[arrival, index] = wanted

    def write(self, sequence, position):
        """Stands for the key and value of a token, which depend on all tokens up to it."""
        page = sequence.pages[position // SIZE]
        holders = [s for s in self.scheduler.running if page in s.pages and s is not sequence]
        for other in holders:  # shared pages are only written by a chunk that fills what others only find
            assert other.tokens[: position + 1] == sequence.tokens[: position + 1]
        slots = self.written.setdefault(page, [()] * SIZE)
        slots[position % SIZE] = tuple(sequence.tokens[: position + 1])

    def check_cache(self, sequence, length):
        for position in range(length):
            slot = self.written[sequence.pages[position // SIZE]][position % SIZE]
            assert slot == tuple(sequence.tokens[: position + 1])

    def step(self):
        oldest = min(self.scheduler.running, default=None)
        plan = self.scheduler.plan()
        assert oldest not in plan.preempted
        for sequence in plan.preempted:
            assert not sequence.pages
            sequence.row = -1
        for source, target in plan.copies:
            self.written[target] = self.written[source].copy()
        decoding = [s for s in self.scheduler.running if s.row >= 0]
        assert sum(chunk.end - chunk.start for chunk in plan.chunks) <= self.chunk
        assert sum(s.count for s in self.scheduler.running) <= self.max_batch
        for sequence in decoding:
            assert sequence.computed == len(sequence.tokens) - 1
            assert self.pool.references(sequence.pages[-1]) == 1
            self.write(sequence, sequence.computed)
        for chunk in plan.chunks:  # all are written before any is read, as in a layer
            assert chunk.start < chunk.end
            for position in range(chunk.start, chunk.end):
                self.write(chunk.sequence, position)
        for chunk in plan.chunks:
            self.check_cache(chunk.sequence, chunk.end)
        for sequence in decoding:
            self.check_cache(sequence, len(sequence.tokens))
            sequence.computed += 1
            self.scheduler.decoded(sequence)
        joined = [s for c in plan.chunks if c.last for s in self.scheduler.fork(c.sequence)]
        for sequence in decoding + joined:
            sequence.row = 0
            new = len(sequence.tokens) - sequence.prompt_length
            sequence.tokens.append(hash((sequence.arrival, sequence.index, new)) % 2)
            if new + 1 == self.wanted[sequence.arrival, sequence.index]:
                self.done[sequence.arrival, sequence.index] = sequence.tokens
                self.scheduler.remove(sequence)
        self.check_pages()
        return plan

    def check_pages(self):
        held = [page for s in self.scheduler.running for page in s.pages]
        assert all(not s.pages for s in self.scheduler.waiting)
        for page in range(self.pages):
            assert self.pool.references(page) == held.count(page)
        assert self.pool.available == self.pages - len(set(held))

    def finish(self):
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps += 1
            assert steps < 5000, "no progress"
        assert self.done.keys() == self.wanted.keys()
        assert self.pool.available == self.pages
        return steps


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 10), st.integers(1, 3)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(REQUESTS, st.integers(6, 14), st.integers(3, 5), st.integers(1, 20), st.booleans())
def test_every_sequence_finishes_with_any_budget(requests, pages, max_batch, chunk, reuse):
    run = Run(pages, max_batch, chunk, reuse)
    for arrival, (tokens, wanted, count) in enumerate(requests):
        run.add(arrival, tokens, wanted, count)
        if arrival % 3 == 2:  # the others come while these run
            run.step()
    run.finish()
    for (arrival, index), tokens in run.done.items():
        prompt, wanted, _ = requests[arrival]
        new = [hash((arrival, index, i)) % 2 for i in range(wanted)]
        assert tokens == prompt + new


def test_a_long_prompt_comes_in_chunks_while_others_decode():
    run = Run(pages=20, max_batch=4, chunk=5)
    run.add(0, [1, 2], wanted=9)
    run.step()
    run.add(1, [0] * 12, wanted=1)
    chunks = [[(c.start, c.end, c.last) for c in run.step().chunks] for _ in range(3)]
    assert chunks == [[(0, 5, False)], [(5, 10, False)], [(10, 12, True)]]
    first = next(s for s in run.scheduler.running if s.arrival == 0)
    assert len(first.tokens) == 2 + 4  # a token in every step


def test_prompts_of_one_step_share_a_prefix():
    run = Run(pages=20, max_batch=4, chunk=100)
    system = [3, 1, 4, 1, 5, 9, 2, 6, 5]  # two full pages and one token
    run.add(0, [*system, 1], wanted=3)
    run.add(1, [*system, 2], wanted=3)
    plan = run.step()
    assert [(c.start, c.end) for c in plan.chunks] == [(0, 10), (8, 10)]
    a, b = sorted(run.scheduler.running)
    assert a.pages[:2] == b.pages[:2]
    assert a.pages[2] != b.pages[2]
    assert (a.cached, b.cached) == (0, 8)
    run.finish()


def test_the_last_token_is_computed_even_if_its_page_is_cached():
    run = Run(pages=20, max_batch=4, chunk=100)
    for arrival in range(2):
        run.add(arrival, [1, 2, 3, 4, 5, 6, 7, 8], wanted=1)
        chunks = run.step().chunks
        assert [(c.start, c.end) for c in chunks] == [(4 * arrival, 8)]
    assert run.done.keys() == {(0, 0), (1, 0)}


def test_sequences_share_their_prompt_and_copy_the_page_they_write():
    run = Run(pages=20, max_batch=4, chunk=100)
    run.add(0, [1, 2, 3, 4, 5, 6], wanted=4, count=3)
    run.step()
    assert len({tuple(s.pages) for s in run.scheduler.running}) == 1
    plan = run.step()
    assert len(plan.copies) == 2  # the last one writes where it is
    pages = [s.pages for s in sorted(run.scheduler.running)]
    assert len({p[0] for p in pages}) == 1
    assert len({p[1] for p in pages}) == 3
    run.finish()


def test_the_youngest_is_preempted_and_the_oldest_never():
    run = Run(pages=4, max_batch=4, chunk=100, reuse=False)
    run.add(0, [1] * 3, wanted=9)
    run.step()
    run.add(1, [2] * 3, wanted=9)
    preempted = []
    while run.scheduler.running or run.scheduler.waiting:
        preempted += [s.arrival for s in run.step().preempted]
    assert preempted == [1]
    assert run.scheduler.preemptions == 1
    assert run.done.keys() == {(0, 0), (1, 0)}


def test_nobody_overtakes_the_first_in_the_queue():
    run = Run(pages=6, max_batch=4, chunk=100)
    run.add(0, [1] * 12, wanted=8)
    run.step()
    run.add(1, [2] * 12, wanted=1)  # does not fit beside the first
    run.add(2, [3], wanted=1)  # would
    run.step()
    assert [s.arrival for s in run.scheduler.waiting] == [1, 2]
    run.finish()
