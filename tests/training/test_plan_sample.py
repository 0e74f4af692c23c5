"""Samples of a file's rows: every row is equally likely, so that estimates are unbiased."""

import gzip
import json

import numpy as np
import pytest
import zstandard

from minimind.training.plan import sample_rows


def lines_of(sizes, path):
    """A file of numbered rows of these sizes in bytes, line ends included."""
    with path.open("wb") as file:
        for number, size in enumerate(sizes):
            file.write(f"{number:07}".encode().ljust(size - 1, b".") + b"\n")
    return path


def numbers_in(path) -> list[int]:
    return [int(line[:7]) for line in path.read_bytes().splitlines()]


def test_a_small_file_is_sampled_whole(tmp_path):
    path = lines_of([10, 20, 30], tmp_path / "a.jsonl")
    found = sample_rows(path, tmp_path / "b", 60)
    assert found.whole and found.total == 60 and found.sizes.tolist() == [10, 20, 30]
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_rows_are_whole_in_order_and_once(tmp_path):
    rng = np.random.default_rng(0)
    path = lines_of(rng.integers(10, 200, 40_000), tmp_path / "a.jsonl")
    found = sample_rows(path, tmp_path / "b", 1 << 19)
    rows = path.read_bytes().splitlines(keepends=True)
    numbers = numbers_in(tmp_path / "b")
    assert not found.whole and numbers == sorted(set(numbers))
    assert (tmp_path / "b").read_bytes() == b"".join(rows[i] for i in numbers)
    assert found.sizes.tolist() == [len(rows[i]) for i in numbers]
    assert abs(found.sizes.sum() - (1 << 19)) < 32 * 200
    thirds = np.bincount(np.array(numbers) * 3 // 40_000)
    assert thirds.min() > len(numbers) / 4  # from all over


def test_long_rows_are_no_likelier_than_short_ones(tmp_path):
    """Half of the rows have 40 bytes, half 4,000: taking the row that a random byte lies in, or the row that a stretch
    ends in, would give more long ones. Of each kind a draw takes some 120 rows; the mean over 40 draws has a
    standard error of 1.4%."""
    sizes = np.tile([40, 4000], 2000)
    rng = np.random.default_rng(1)
    rng.shuffle(sizes)
    path = lines_of(sizes, tmp_path / "a.jsonl")
    shares, totals = [], []
    for seed in range(40):
        found = sample_rows(path, tmp_path / "b", 1 << 19, seed)
        shares.append((found.sizes == 4000).mean())
        totals.append(found.total * len(found.sizes) / found.sizes.sum())
    assert abs(np.mean(shares) - 0.5) < 0.02
    assert abs(np.mean(totals) - 4000) < 4 * np.std(totals) / np.sqrt(40)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_is_read_from_its_beginning(tmp_path, kind):
    rng = np.random.default_rng(2)
    text = "".join(json.dumps({"text": str(rng.integers(1 << 60))}) + "\n" for _ in range(60_000)).encode()
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(gzip.compress(text) if kind == "gz" else zstandard.compress(text))
    found = sample_rows(path, tmp_path / "b", len(text) // 2)
    assert not found.whole and text.startswith((tmp_path / "b").read_bytes())
    assert found.total == pytest.approx(len(text), rel=0.15)  # both decompress a block ahead
    whole = sample_rows(path, tmp_path / "b", 2 * len(text))
    assert whole.whole and whole.total == len(text)


def test_rows_longer_than_the_parts_still_give_one(tmp_path):
    path = lines_of([1 << 20, 1 << 20], tmp_path / "a.jsonl")
    found = sample_rows(path, tmp_path / "b", 1 << 16, seed=3)
    assert len(found.sizes) and numbers_in(tmp_path / "b")[0] in (0, 1)
