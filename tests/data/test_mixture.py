"""Parts of the training data with weights: which rows come, at which time, and that the same come again."""

import json
from collections import Counter

import numpy as np
import pytest

from minimind.data.loader import PackedLoader
from minimind.data.mixture import Mixture, MixtureEntry, PartSampler, Weight, describe_mixture, parse_part
from tests.data.fake import corpus_of, some_texts
from tests.data.test_loader import same

TEXTS = some_texts(400)


def test_entries_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").write_text("a file of that name")
    for entry, part in {
        "a.jsonl": MixtureEntry("a.jsonl"),
        "builtin:arithmetic": MixtureEntry("builtin:arithmetic"),
        "odd:2": MixtureEntry("odd:2"),
        "a.jsonl:2": MixtureEntry("a.jsonl", Weight((0.0,), (2.0,))),
        "x/*.jsonl:0.5": MixtureEntry("x/*.jsonl", Weight((0.0,), (0.5,))),
        "a:0..3": MixtureEntry("a", Weight((0.0, 1.0), (0.0, 3.0))),
        "a:0@0.8..2": MixtureEntry("a", Weight((0.8, 1.0), (0.0, 2.0))),
        "a:1..4@0.25..1@0.5": MixtureEntry("a", Weight((0.0, 0.25, 0.5), (1.0, 4.0, 1.0))),
    }.items():
        assert parse_part(entry) == part
    assert parse_part("a:0@0.8..2").weight.at(0.9) == pytest.approx(1.0)
    for entry, message in (
        ("a:1..2..3", "needs its share of the run, such as 1@0.5"),
        ("a:1@0.5..2@0.5", "must ascend"),
        ("a:1..2@1.5", "must ascend"),
    ):
        with pytest.raises(ValueError, match=f"--data {entry}: .*{message}"):
            parse_part(entry)


def mixture(corpus, *weights: Weight, seam: int = 300) -> Mixture:
    return Mixture(("a", "b"), weights, ((0, seam), (seam, corpus.num_documents)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("mixture"), TEXTS[:300], TEXTS[300:])


def parts_of(batch) -> Counter:
    """How many rows are of each part; no row is of both."""
    counted: Counter = Counter()
    for documents in batch.documents:
        (part,) = set((documents >= 300).tolist())
        counted[part] += 1
    return counted


def test_rows_have_the_shares_of_the_weights(corpus):
    loader = PackedLoader(
        corpus, 64, rows=6, seed=1, mixture=mixture(corpus, Weight((0.0,), (1.0,)), Weight((0.0,), (2.0,)))
    )
    for _ in range(50):
        assert parts_of(loader.next_batch()) == {False: 2, True: 4}
    first, second = loader.streams
    assert second.epoch > first.epoch == loader.epoch
    seen = {int(d) for stream in loader.streams for d in stream.pieces(0, 0).document}
    assert seen == set(range(400))


def test_weights_change_over_the_run(corpus):
    schedule = mixture(corpus, Weight(), Weight((0.5, 1.0), (0.0, 3.0)))
    loader = PackedLoader(corpus, 64, rows=5, seed=1, mixture=schedule)
    loader.horizon = 5 * 100
    shares = np.array([parts_of(loader.next_batch())[True] / 5 for _ in range(100)])
    assert not shares[:50].any() and shares[50:60].mean() < 0.25
    assert abs(shares[-10:].mean() - 0.75 * 0.95) < 0.06
    owed = [schedule.shares((row + 0.5) / 500)[1] for row in range(500)]
    assert abs(5 * shares.sum() - sum(owed)) <= 1.5
    assert schedule.mean_shares()[1] == pytest.approx(np.mean(owed), abs=1e-3)
    assert describe_mixture(schedule, [1000, 500], 3000).startswith("mixture: a 7")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_mixture_resumes_bit_for_bit(corpus, world_size):
    """The same rows for any number of ranks, from any step on, through the change of weights."""
    schedule = mixture(corpus, Weight((0.0, 1.0), (3.0, 0.0)), Weight((0.0, 1.0), (0.1, 0.7)))
    one = PackedLoader(corpus, 48, 6, seed=5, mixture=schedule)
    one.horizon = 6 * 40
    ranks = [PackedLoader(corpus, 48, 6, 5, rank=r, world_size=world_size, mixture=schedule) for r in range(world_size)]
    for rank in ranks:
        rank.horizon = one.horizon
    for step in range(40):
        state = json.loads(json.dumps(one.state()))
        late = PackedLoader(corpus, 48, 6, seed=5, mixture=schedule)
        late.horizon = one.horizon
        late.load_state(state)
        whole = one.next_batch()
        assert same(whole, late.next_batch()) and late.state() == one.state()
        parts = [rank.next_batch() for rank in ranks]
        assert all(rank.state() == one.state() for rank in ranks), step
        for row in range(6):
            assert (parts[row % world_size].input_ids[row // world_size] == whole.input_ids[row]).all()
    other = PackedLoader(corpus, 48, 6, seed=5, mixture=mixture(corpus, Weight(), Weight()))
    with pytest.raises(ValueError, match="does not fit this data: mixture was"):
        other.load_state(one.state())
    for loader in (PackedLoader(corpus, 48, 6, seed=5), other):
        with pytest.raises(ValueError, match="checkpoint"):
            loader.load_state(PackedLoader(corpus, 48, 6, 5, mixture=schedule).state())


def test_mixtures_that_no_run_could_draw_from(corpus):
    with pytest.raises(ValueError, match="--data b: none of its documents is left to train on"):
        mixture(corpus, Weight(), Weight(), seam=400)
    with pytest.raises(ValueError, match=r"at 0\.5 of the run every weight is 0"):
        mixture(corpus, Weight((0.0, 0.5), (1.0, 0.0)), Weight((0.5, 1.0), (0.0, 1.0)))
    drawn = PartSampler(mixture(corpus, Weight((0.0,), (0.0,)), Weight())).rows(7)
    assert drawn == [0, 7]
