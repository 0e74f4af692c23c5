"""Sampling, reference and native: each option against a derivation of its own, samples against their distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minimind.inference.decode.reference import philox, uniform
from tests.inference.decode.cases import backends, needs_native, operator
from tests.kernels.contract import DEVICE, rand


def draw(logits: Tensor, backend: str = "native", **options) -> tuple[Tensor, Tensor]:
    """sample with neutral defaults; a number stands for every row."""
    batch = logits.shape[0]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    args: dict[str, Tensor] = {"logits": logits}
    for name, value in {
        **defaults,
        "presence_penalty": 0.0,
        "history": None,
        "seeds": 0,
        "offsets": 0,
        **options,
    }.items():
        if name == "history":
            args[name] = torch.zeros(logits.shape, dtype=torch.int32, device=DEVICE) if value is None else value
            continue
        dtype = {"top_k": torch.int32, "seeds": torch.int64, "offsets": torch.int64}.get(name, torch.float32)
        args[name] = torch.as_tensor(value, dtype=dtype, device=DEVICE).expand(batch).contiguous()
    return operator("sample", backend)(*args.values())


def many(row: Tensor, n: int, **options) -> Tensor:
    """How often each token occurs in n samples from one row of logits: int64 [V]."""
    logits = row.to(DEVICE).expand(n, -1).contiguous()
    tokens, _ = draw(logits, seeds=torch.arange(n, device=DEVICE), **options)
    return tokens.bincount(minlength=row.numel()).cpu()


def possible(row: Tensor, n: int = 4000, **options) -> set[int]:
    return set(many(row, n, **options).nonzero().flatten().tolist())


def test_philox_matches_the_published_vectors():
    """Random123's known answers for 4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in vectors:
        assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_the_uniform_number_is_the_first_word_of_seed_and_offset():
    seeds = torch.tensor([0, 0x299F31D0 << 32 | 0xA4093822, -1])
    offsets = torch.tensor([0, 5, -1])
    expected = [0x6627E8D5 >> 8, None, None]
    got = (uniform(seeds, offsets).double() * 2**24).long().tolist()
    assert got[0] == expected[0]
    words = philox(
        torch.tensor([[5, 0, 0, 0], [0xFFFFFFFF, 0xFFFFFFFF, 0, 0]]),
        torch.tensor([[0xA4093822, 0x299F31D0], [0xFFFFFFFF] * 2]),
    )
    assert got[1:] == (words[:, 0] >> 8).tolist()


@backends
def test_draws_follow_the_distribution(backend):
    """Chi-square of 40,000 draws over 12 tokens: 11 degrees of freedom exceed 31.3 once in a thousand."""
    row, n = rand(12, seed=3).cpu(), 40_000
    for temperature in (0.7, 1.0, 2.5):
        expected = (row / temperature).double().softmax(-1) * n
        counts = many(row, n, temperature=temperature, backend=backend)
        assert ((counts - expected) ** 2 / expected).sum() < 31.3


@backends
def test_the_same_seed_and_offset_draw_the_same_token_in_any_batch(backend):
    logits = rand(8, 500, seed=1)
    seeds, offsets = torch.arange(8, device=DEVICE) * 10**12, torch.arange(8, device=DEVICE) % 3
    tokens, log_probs = draw(logits, seeds=seeds, offsets=offsets, backend=backend)
    for b in range(8):
        one, log_prob = draw(logits[b : b + 1], seeds=seeds[b], offsets=offsets[b], backend=backend)
        assert one[0] == tokens[b] and log_prob[0] == log_probs[b]
    again, _ = draw(logits, seeds=seeds, offsets=offsets + 1, backend=backend)
    assert (again != tokens).any()


@backends
def test_greedy_takes_the_first_of_equals(backend):
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0], [-3.0, -2.0, -9.0, -2.0]], device=DEVICE)
    tokens, log_probs = draw(logits, temperature=0.0, top_k=2, top_p=0.5, backend=backend)
    assert tokens.tolist() == [1, 0, 1]
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (log_probs - expected).abs().max() < 1e-6


@backends
def test_top_k_leaves_the_largest_and_their_equals(backend):
    row = torch.tensor([0.0, 3.0, 1.0, 2.0, 2.0, -1.0])
    assert possible(row, top_k=1, backend=backend) == {1}
    assert possible(row, top_k=2, backend=backend) == {1, 3, 4}
    assert possible(row, top_k=4, backend=backend) == {1, 2, 3, 4}
    assert possible(row, top_k=100, backend=backend) == set(range(6)) == possible(row, top_k=0, backend=backend)


@backends
def test_top_p_leaves_the_smallest_set_that_reaches_it(backend):
    row = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log()
    assert possible(row, top_p=0.0, backend=backend) == {1} == possible(row, top_p=0.39, backend=backend)
    assert possible(row, top_p=0.41, backend=backend) == {1, 3}
    assert possible(row, top_p=0.66, backend=backend) == {1, 2, 3}
    assert possible(row, top_p=0.949, backend=backend) == {0, 1, 2, 3}
    # after top-k the rest counts as the whole: 0.4 / 0.65 = 0.615
    assert possible(row, top_k=2, top_p=0.61, backend=backend) == {1}
    assert possible(row, top_k=2, top_p=0.62, backend=backend) == {1, 3}


@backends
def test_min_p_is_relative_to_the_largest(backend):
    row = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log()
    assert possible(row, min_p=0.49, backend=backend) == {1, 2, 3}
    assert possible(row, min_p=0.51, backend=backend) == {1, 3}
    assert possible(row, min_p=1.0, backend=backend) == {1}
    hot = possible(row, min_p=0.49, temperature=3.0, backend=backend)
    assert hot == {i for i, p in enumerate((row / 3).softmax(-1)) if p >= 0.49 * (row / 3).softmax(-1).max()}


@backends
def test_penalties(backend):
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]], device=DEVICE)
    history = torch.tensor([[3, 1, 0, 0]], dtype=torch.int32, device=DEVICE)
    options = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "history": history}
    penalised = torch.tensor([2 / 2 - 0.25, -2 * 2 - 0.25, 1.0, 0.5], dtype=torch.float64)
    tokens, log_probs = draw(logits, temperature=0.0, backend=backend, **options)
    assert tokens.item() == 2
    assert abs(log_probs.item() - penalised.log_softmax(-1)[2]) < 1e-6
    counts = many(
        logits[0],
        20_000,
        temperature=0.5,
        backend=backend,
        **{**options, "history": history.expand(20_000, -1).contiguous()},
    )
    expected = (penalised / 0.5).softmax(-1) * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, once in a thousand


@backends
def test_the_log_probability_is_of_the_whole_distribution(backend):
    logits = rand(64, 1000, seed=5, scale=3.0)
    tokens, log_probs = draw(logits, temperature=0.8, top_k=5, seeds=torch.arange(64, device=DEVICE), backend=backend)
    truth = (logits.double() / 0.8).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    plain = (logits / 0.8).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (log_probs - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


@backends
def test_hard_rows(backend):
    """One token; -inf everywhere but in one place; logits beyond e^88; sampling does not change the logits."""
    assert draw(torch.tensor([[3.0]], device=DEVICE), backend=backend)[0].item() == 0
    masked = torch.full((4, 50), float("-inf"), device=DEVICE)
    masked[:, 17] = -1000.0
    assert draw(masked, seeds=torch.arange(4), backend=backend)[0].tolist() == [17] * 4
    wide = rand(4, 50, scale=1000.0)
    before = wide.clone()
    tokens, log_probs = draw(wide, seeds=torch.arange(4, device=DEVICE), top_p=0.9, backend=backend)
    assert tokens.tolist() == wide.argmax(-1).tolist() and log_probs.isfinite().all()
    assert torch.equal(wide, before)


@needs_native
@pytest.mark.parametrize("seed", range(3))
def test_native_draws_what_the_reference_draws(seed):
    """With every option on; samples on a boundary of the cumulative sum may differ."""
    batch, vocab = 400, 6400
    logits = rand(batch, vocab, seed=seed, scale=2.5)
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return torch.tensor(values, device=DEVICE)[torch.randint(len(values), (batch,), generator=generator).to(DEVICE)]

    options = {
        "temperature": pick(0.0, 0.5, 1.0, 1.7),
        "top_k": pick(0, 1, 50, 7000),
        "top_p": pick(0.0, 0.5, 0.95, 1.0),
        "min_p": pick(0.0, 0.02, 0.3),
        "repetition_penalty": pick(1.0, 1.3),
        "presence_penalty": pick(0.0, 0.7),
        "history": torch.randint(0, 2, (batch, vocab), generator=generator).int().to(DEVICE),
        "seeds": torch.arange(batch, device=DEVICE),
        "offsets": pick(0, 1, 2**40),
    }
    results = []
    for name in ("reference", "native"):
        results.append(draw(logits, name, **options))
    (tokens, log_probs), (expected, expected_log_probs) = results[1], results[0]
    same = tokens == expected
    assert (~same).sum() <= 2
    assert (log_probs - expected_log_probs)[same].abs().max() < 1e-5


@needs_native
@pytest.mark.skipif(DEVICE.type != "cpu", reason="messages are the CPU's; tests/csrc has the GPU's")
def test_a_wrong_argument_is_named():
    logits = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="history: wrong shape"):
        draw(logits, history=torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="logits must be float32, got bfloat16"):
        draw(logits.bfloat16())


@needs_native
def test_opcheck():
    logits = rand(3, 40)
    numbers = [torch.full((3,), x, device=DEVICE) for x in (1.0, 0.9, 0.01, 1.1, 0.1)]
    ints = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    history = torch.zeros(3, 40, dtype=torch.int32, device=DEVICE)
    args = (logits, numbers[0], ints.int(), *numbers[1:], history, ints, ints)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minimind.sample.default, args, test_utils=tests)
