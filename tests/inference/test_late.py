"""A host that reads tokens a step late gives the same results as one in step, and never waits for a launched step."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minimind.inference import batch
from minimind.inference import engine as engine_module
from minimind.inference.batch import DecodeBatch
from minimind.inference.requests import Request, SamplingParams
from minimind.inference.scheduler import SequenceState
from tests.inference import test_engine
from tests.inference.small import is_greedy, small_model, small_tokenizer

VOCAB = small_tokenizer().vocab_size


def engine_with(late, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "host_is_late", lambda device: late)
        return test_engine.engine_of(*args, **options)


class Few:
    """A constraint: the next token is the last one plus 1 to 5, and after `most` tokens nothing may come."""

    def __init__(self, most):
        self.last, self.left = 0, most

    def allowed(self):
        if self.left == 0:
            raise ValueError("nothing may come")
        out = np.zeros(VOCAB, dtype=bool)
        out[(self.last + np.arange(1, 6)) % VOCAB] = True
        return out

    def advance(self, token_id):
        self.last, self.left = token_id, self.left - 1


@functools.cache
def model():
    return small_model()


PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    top_k=st.sampled_from([0, 8]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.one_of(st.none(), st.integers(0, 99)),
    stop=st.sampled_from([(), (), ("e",), ("lo", "好", "a")]),
    stop_token_ids=st.sampled_from([(), tuple(range(20, 50))]),
    logprobs=st.sampled_from([None, None, None, 2]),
    n=st.sampled_from([1, 1, 2, 3]),
    ignore_eos=st.booleans(),
)
REQUESTS = st.builds(
    Request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    params=PARAMS,
    constraint=st.sampled_from([None, None, None, functools.partial(Few, 3), functools.partial(Few, 12)]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), REQUESTS),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("refresh"), st.none()),
    ),
    min_size=2,
    max_size=14,
)


def check_mirror(engine):
    """Checks that the device's rows are what the host predicts."""
    batch = engine._batch
    if batch._mirror is None or not batch.sequences:
        return
    rows = len(batch.sequences)
    names = ("slot", "offset", "position", "length", "active")
    for name in names if not batch._changed else ():
        assert batch.tensor[name][:rows].tolist() == batch._array[name][:rows].tolist(), name
        assert (batch._array[name][rows:] == (-1 if name == "slot" else 0)).all() or name in ("offset", "position")


def play(engine, actions):
    """All deltas in order, with log-probabilities apart, and the finished requests' outputs."""
    deltas, names = [], []

    def step():
        deltas.extend(engine.step())
        check_mirror(engine)

    for action, value in actions:
        if action == "submit":
            names.append(engine.submit(value))
        elif action == "cancel" and value < len(names):
            engine.cancel(names[value])
        elif action == "refresh":
            engine.refresh_weights()
        elif action == "step":
            for _ in range(value):
                step()
    for _ in range(2000):
        if not engine.has_work:
            break
        step()
    stats = engine.stats()
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.generated_tokens == sum(len(d.token_ids) for d in deltas)
    assert len(engine._batch) == 0 and not engine.has_work
    return deltas, names


def said(delta):
    """A delta without the parts that rounding may change."""
    top = tuple(tuple(i for i, _ in row) for row in delta.top_logprobs)
    return (*delta[:4], top, *delta[6:8], None if delta.output is None else delta.output.error)


@pytest.mark.parametrize("backend", test_engine.BACKENDS)
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, chunk=st.sampled_from([7, 512]))
def test_a_late_host_gives_the_same_deltas_in_the_same_order(backend, actions, chunk):
    told = []
    for late in (False, True):
        engine = engine_with(
            late, model(), small_tokenizer(), backend=backend, kv_tokens=1 << 14, max_batch=32, prefill_chunk=chunk,
            prefix_cache=False,
        )  # fmt: skip
        told.append(play(engine, actions)[0])
    in_step, late = told
    assert list(map(said, late)) == list(map(said, in_step))
    scale = 1e-4  # of log-probabilities: float32 sums in the order of another batch
    for a, b in zip(late, in_step, strict=True):
        assert np.allclose(a.log_probs, b.log_probs, atol=scale)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, pages=st.integers(14, 40), max_batch=st.integers(3, 6), reuse=st.booleans())
def test_a_late_host_gives_the_same_samples_with_too_little_memory(actions, pages, max_batch, reuse):
    """The times of admission and preemption may differ, and so may the tokens of a cancelled request."""
    told = []
    for late in (False, True):
        engine = engine_with(
            late, model(), small_tokenizer(), kv_tokens=8 * pages, page_size=8, max_batch=max_batch,
            prefill_chunk=24, prefix_cache=reuse,
        )  # fmt: skip
        deltas, _ = play(engine, actions)
        found = {}
        for d in deltas:
            ids, text, ends = found.setdefault((d.id, d.index), ([], [], []))
            ids.extend(d.token_ids)
            text.append(d.text)
            ends += [(d.finish_reason, d.stop)] * (d.finish_reason is not None)
        told.append(found)
    in_step, late = told
    assert late.keys() == in_step.keys()
    for name, (ids, text, ends) in in_step.items():
        other_ids, other_text, other_ends = late[name]
        assert len(ends) == len(other_ends) == 1
        if "cancelled" in (ends[0][0], other_ends[0][0]):
            shorter = min(len(ids), len(other_ids))
            assert ids[:shorter] == other_ids[:shorter]
        else:
            assert (ids, "".join(text), ends) == (other_ids, "".join(other_text), other_ends)


class Calls(TorchDispatchMode):
    """The tensor operations outside of graphs, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Event:
    """Replaces one of CUDA's."""

    def __init__(self, log, step):
        self.log, self.step = log, step

    def synchronize(self):
        self.log.append(("wait", self.step))


def watch(engine, log):
    """Record the engine's graphs, copies to the host and waits in `log`, each with the number of its step."""
    run, fetch = engine._runner._run, engine._batch._sampled.fetch
    step = 0

    def launch(name, function):
        nonlocal step
        step += 1
        log.append(("launch", step))
        with _disable_current_modes():  # a graph is one launch, whatever is in it
            return run(name, function)

    def fetched():
        log.append(("copy to the host", step))
        return *fetch()[:2], Event(log, step)

    engine._runner._run, engine._batch._sampled.fetch = launch, fetched


@pytest.mark.parametrize("backend", test_engine.BACKENDS)
def test_a_steady_step_launches_before_it_waits_and_copies_nothing_to_the_device(backend):
    engine = engine_with(True, model(), backend=backend, page_size=64)
    params = SamplingParams(60, temperature=1.0, repetition_penalty=1.1)
    for prompt in ([1, 2, 3], [4], [5, 6]):
        engine.submit(Request(prompt, params))
    for _ in range(4):
        engine.step()
    log = []
    watch(engine, log)
    engine.step()
    log.clear()
    for step in range(2, 42):
        with Calls() as calls:
            assert len(engine.step()) == 3
        assert calls.names == ["copy_"]  # the copy to the host, and nothing else besides the graph
        assert log == [("launch", step), ("copy to the host", step), ("wait", step - 1)]
        log.clear()


def test_a_page_costs_one_copy_to_the_device(monkeypatch):
    engine = engine_with(True, model(), page_size=8)
    copies = []
    copy_over = batch.copy_over
    monkeypatch.setattr(batch, "copy_over", lambda *tensors: copies.append(copy_over(*tensors)))
    for first in (3, 6):  # their second pages come in different steps
        engine.submit(Request(list(range(first)), SamplingParams(17, temperature=0)))
    counts = []
    for _ in range(16):
        copies.clear()
        engine.step()
        counts.append(len(copies))
    # first the blank twin and the two that joined; then 8 is reached after 3 and 6 tokens in steps 4 and 7, and so on
    assert [step for step, n in enumerate(counts, 1) if n] == [1, 2, 4, 7, 12, 15]
    assert max(counts[2:]) == 1


def test_a_launched_step_keeps_its_pages_until_it_is_read():
    """The first token ends the sequence; the row launched after it still has a page of its own."""
    engine = engine_with(True, model(), page_size=4, prefix_cache=False)
    prompt = [1, 2, 3, 4]
    (first,) = test_engine.new_ids(engine.generate([Request(prompt, SamplingParams(1, temperature=0))]))[0]
    engine.submit(Request(prompt, SamplingParams(9, temperature=0, stop_token_ids=(first,))))
    assert engine.step() == [] and engine.stats().pages_used == 1
    (delta,) = engine.step()
    assert (delta.token_ids, delta.finish_reason) == ((first,), "stop")
    assert engine.stats().pages_used == 0 and not engine.has_work
    engine.submit(Request([5, 6], SamplingParams(3, temperature=0)))
    given = [token for _ in range(4) for delta in engine.step() for token in delta.token_ids]
    assert is_greedy(model(), [5, 6], given) and len(given) == 3  # the token that this row drew belongs to no sequence


def test_a_sequence_at_its_limit_runs_no_extra_step():
    engine = engine_with(True, model())
    rows = []
    step = engine._runner.step
    engine._runner.step = lambda: (rows.append(len(engine._batch)), step())
    prompts = [[1, 2], [7], [5, 9]]
    params = [SamplingParams(n, temperature=0) for n in (1, 3, 4)]
    outputs = engine.generate([Request(prompt, p) for prompt, p in zip(prompts, params, strict=True)])
    assert rows == [2, 2, 1]  # two and three tokens are decoded, the first ones come with the prompts
    for prompt, output in zip(prompts, outputs, strict=True):  # rows that moved up took their tokens with them
        assert is_greedy(model(), prompt, output.token_ids)


@pytest.mark.parametrize("late", [False, True])
def test_an_ended_sequence_causes_no_preemption(late):
    """Both sequences need a third page for their sixth token, and none is left; but the first ended with its fifth."""
    prompt = [1, 2, 3, 4]
    for seed in range(20):
        params = SamplingParams(6, temperature=1.5, seed=seed)
        (ids,) = test_engine.new_ids(engine_with(False, model()).generate([Request(prompt, params)]))
        if ids[4] not in ids[:4]:
            break
    engine = engine_with(late, model(), kv_tokens=16, page_size=4, prefix_cache=False)
    stopping = SamplingParams(9, temperature=1.5, seed=seed, stop_token_ids=(ids[4],))
    requests = [Request([4, 3, 2, 1], SamplingParams(7, temperature=0)), Request(prompt, stopping)]
    other, ended = engine.generate(requests)
    assert ended.token_ids == ids[:5] and is_greedy(model(), [4, 3, 2, 1], other.token_ids)
    assert engine.stats().preemptions == 0


def test_steps_wait_for_a_host_that_takes_part_in_sampling():
    engine = engine_with(True, model())
    plain = engine.submit(Request([1, 2], SamplingParams(20, temperature=0)))
    assert engine.step() == []
    assert len(engine.step()) == 1
    bound = engine.submit(Request([3], SamplingParams(4, temperature=0), constraint=functools.partial(Few, 9)))
    assert [delta.id for delta in engine.step()] == [plain, plain, bound]
    for _ in range(2):
        assert [delta.id for delta in engine.step()] == [plain, bound]
    assert [delta.id for delta in engine.step()] == [plain, bound]  # its last
    assert engine.step() == []
    assert [delta.id for delta in engine.step()] == [plain]


def test_cancelling_reads_unread_tokens():
    tokens = []
    for late in (False, True):
        engine = engine_with(late, model())
        name = engine.submit(Request([1, 2], SamplingParams(20, temperature=1.0, seed=1)))
        deltas = [delta for _ in range(5) for delta in engine.step()]
        assert engine.cancel(name) and engine.stats().pages_used == 0
        deltas += engine.step()
        assert deltas[-1].finish_reason == "cancelled"
        tokens.append([token for delta in deltas for token in delta.token_ids])
        assert tokens[-1] == deltas[-1].output.token_ids
    assert tokens[0] == tokens[1] and len(tokens[0]) == 5


def test_cancelling_an_unread_ended_request_is_too_late():
    engine = engine_with(True, model())
    name = engine.submit(Request([1, 2], SamplingParams(1, temperature=0)))
    engine.step()
    assert not engine.cancel(name)
    assert [delta.finish_reason for delta in engine.step()] == ["length"] and not engine.has_work


def test_warm_up_steps_do_not_change_the_rows():
    """Before the capture of a graph, its step runs once, on a mirror without rows."""
    late = DecodeBatch(4, 3, 4, 50, torch.device("cpu"), late=True)
    sample = SequenceState(0, 0, 1, [1, 2, 3])
    sample.pages, sample.computed = [2], 3
    late.join(sample, SamplingParams(repetition_penalty=1.5), seed=5)
    late.upload()
    late.append(0, torch.tensor([9]), torch.tensor([-1.0]))
    late.advance()
    before = {name: tensor.clone() for name, tensor in late.tensor.items()}
    with late.blank():
        assert late.tensor["slot"].tolist() == [-1] * 4
        late.append(0, torch.full((4,), 7), torch.zeros(4))
        assert late.tensor["slot"].tolist() == [-1] * 4 and not late.tensor["length"].any()
    for name, tensor in late.tensor.items():
        assert torch.equal(tensor, before[name]), name
