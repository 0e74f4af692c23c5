"""Batches of one shape, one ahead of the step."""

import numpy as np
import pytest
import torch

from minimind.data import PackedLoader
from minimind.training.batches import DeviceBatches, to_device
from tests.data.fake import corpus_of

CPU = torch.device("cpu")


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 60, 200)]


@pytest.fixture
def loader(tmp_path):
    """(letters of each document, rows, options) -> a loader of rows of 32."""

    def make(lengths: list[int], rows: int = 3, **options) -> PackedLoader:
        folder = tmp_path / str(abs(hash(tuple(lengths))))
        return PackedLoader(corpus_of(folder, ["x" * n for n in lengths]), 32, rows, **options)

    return make


def test_every_batch_has_one_shape_and_the_loaders_numbers(loader):
    batches, plain = DeviceBatches(loader(LENGTHS), CPU), loader(LENGTHS)
    shapes = set()
    for _ in range(120):  # several epochs
        batch, host = batches.next_batch(), plain.next_batch()
        shapes.add((batch.input_ids.shape, batch.cu_seqlens.shape))
        assert np.array_equal(batch.input_ids.numpy(), host.input_ids)
        bounds = batch.cu_seqlens.numpy()
        assert np.array_equal(bounds[: len(host.cu_seqlens)], host.cu_seqlens)
        assert (bounds[len(host.cu_seqlens) :] == 3 * 32).all() and bounds.dtype == np.int32
        assert batch.num_targets == host.num_targets
        assert batches.host is not None and np.array_equal(batches.host.targets, host.targets)
    assert len(shapes) == 1


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2)])
def test_the_bound_holds_for_the_first_pass(loader, rank, world_size):
    for lengths in (LENGTHS, [1] * 500, [31] * 7, [1, 2]):
        for rows in (2, 3, 8):
            it = loader(lengths, rows, rank=rank, world_size=world_size)
            bound, most = it.max_segments, 0
            while it.epoch == 0:
                most = max(most, len(it.next_batch().cu_seqlens) - 1)
            assert most <= bound


def test_the_bound_is_what_batches_hold_and_not_the_sum_of_the_fullest_rows(loader):
    """One row in ten has 32 tiny documents, the others have one: eight shuffled rows seldom have more than three of the
    former."""
    lengths = [32] * 720 + [2] * 80 * 16
    for world_size in (1, 2):
        it = loader(lengths, 8 * world_size, world_size=world_size)
        held = []
        while it.epoch < 4:
            held.append(len(it.next_batch().cu_seqlens) - 1)
        assert max(held) < 6 * 16
        assert np.mean(np.array(held) > it.max_segments) < 0.01
        assert it.max_segments <= 1.25 * max(held) + 16 < 8 * 16


def test_a_batch_beyond_the_bound_makes_it_grow(loader, monkeypatch):
    monkeypatch.setattr(PackedLoader, "max_segments", 3)
    batches = DeviceBatches(loader([1] * 500, rows=8), CPU)
    assert batches.boundaries == 64
    batch = batches.next_batch()
    assert len(batch.cu_seqlens) == batches.boundaries > 64 and batches.boundaries % 64 == 0


def test_a_batch_fetched_ahead_is_not_lost(loader):
    batches, plain = DeviceBatches(loader(LENGTHS), CPU), loader(LENGTHS)
    first = batches.next_batch()
    batches.fetch()
    place = batches.state()
    second = batches.next_batch()
    again = DeviceBatches(loader(LENGTHS), CPU)
    again.load_state(place)
    assert torch.equal(again.next_batch().input_ids, second.input_ids)
    for batch in (first, second):
        assert np.array_equal(batch.input_ids.numpy(), plain.next_batch().input_ids)
    batches.fetch()
    batches.load_state(place)
    assert torch.equal(batches.next_batch().input_ids, second.input_ids)


def test_without_a_bound_nothing_is_padded(loader):
    host = loader(LENGTHS).next_batch()
    assert torch.equal(to_device(host, CPU).cu_seqlens, torch.from_numpy(host.cu_seqlens))
