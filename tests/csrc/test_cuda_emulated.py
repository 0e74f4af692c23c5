"""The CUDA kernels, executed on the CPU thread by thread (tests/csrc/emulator), against float64 truth.

This checks index arithmetic, masks, barriers, fragment layouts as the PTX manual describes them, and numerics up to the
last bits of exp. Only a GPU can show that PTX does what the emulator's C++ does, and the speed.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bench.compilation import native_resources
from bench.compilation.occupancy import CARDS
from minimind.inference.decode.reference import decode_attention_ref, rope_append_kv_ref, sample_ref, uniform
from tests.csrc import emulated

FP8 = torch.float8_e4m3fn
PRESETS = [(4, 2, 64), (4, 2, 96), (4, 2, 80), (2, 4, 96)]  # query heads of a group, groups, head size
LENGTHS = [1, 2, 63, 64, 65, 0, 129, 200]

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_contract(value: Tensor, plain: Tensor, truth: Tensor, name: str = "") -> None:
    """As tests/kernels/contract.py: at most twice the error of plain PyTorch in the same dtype."""
    assert value.shape == plain.shape and value.dtype == plain.dtype and value.isfinite().all(), name
    error, plain_error = ((x.double() - truth).abs().max().item() for x in (value, plain))
    allowed = 2 * plain_error + 4 * torch.finfo(torch.float32).eps * (1 + truth.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


@dataclass
class Decoding:
    """A batch for attention. Cache rows that no sequence owns are NaN; pages are in random order."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    lengths: Tensor
    scale: float
    k_scale: Tensor | None
    v_scale: Tensor | None

    def run(self, op, *more) -> Tensor:
        return op(
            self.q, self.key_cache, self.value_cache, self.block_table, self.lengths, self.scale,
            self.k_scale, self.v_scale, *more,
        )  # fmt: skip

    def wide(self) -> Decoding:
        """Attention in float64 on the cache's values."""
        caches = [
            cache.double() if scale is None else cache.double() * scale.double()[:, None]
            for cache, scale in ((self.key_cache, self.k_scale), (self.value_cache, self.v_scale))
        ]
        return Decoding(self.q.double(), *caches, self.block_table, self.lengths, self.scale, None, None)


def decoding(
    lengths: list[int], of_group: int, groups: int, dim: int, page: int = 16,
    dtype: torch.dtype = torch.bfloat16, cache_dtype: torch.dtype | None = None, scale: float = 1.0, seed: int = 0,
) -> Decoding:  # fmt: skip
    """scale: of the queries; 30 makes the softmax one-hot."""
    cache_dtype = cache_dtype or dtype
    batch, max_pages = len(lengths), -(-max(*lengths, 1) // page)
    num_pages = batch * max_pages + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int()
    table = order[: batch * max_pages].reshape(batch, max_pages).clone()
    rows = torch.zeros(num_pages, page, dtype=torch.bool)
    for b, length in enumerate(lengths):
        used = -(-length // page)
        table[b, used:] = 2**30  # an index far outside, in case it is read
        for i in range(length):
            rows[table[b, i // page], i % page] = True
    scales = (rand(groups, seed=5).abs() + 0.5, rand(groups, seed=6).abs() + 0.5)
    caches = []
    for i in range(2):
        # the layer in the middle of a whole model's cache: pages of a layer are far apart
        whole = torch.full((num_pages, 3, page, groups, dim), float("nan"))
        whole[:, 1] = torch.where(rows[..., None, None], rand(num_pages, page, groups, dim, seed=seed + i), torch.nan)
        caches.append(whole.to(cache_dtype)[:, 1])
    q = rand(batch, of_group * groups, dim, seed=seed + 9, scale=scale).to(dtype)
    scaled = scales if cache_dtype == FP8 else (None, None)
    return Decoding(q, *caches, table, torch.tensor(lengths, dtype=torch.int32), dim**-0.5, *scaled)


def check_attention(ops, case: Decoding) -> Tensor:
    out = case.run(ops.decode_attention)
    truth = case.wide().run(decode_attention_ref)
    assert_contract(out, case.run(decode_attention_ref), truth)
    assert (out[case.lengths == 0] == 0).all()
    return out


@pytest.mark.parametrize("of_group, groups, dim", PRESETS)
def test_attention_of_every_preset(ops, of_group, groups, dim):
    check_attention(ops, decoding(LENGTHS, of_group, groups, dim))


@pytest.mark.parametrize("dtype, cache_dtype", [
    (torch.float16, torch.float16), (torch.float32, torch.float32), (torch.bfloat16, FP8), (torch.float16, FP8),
    (torch.float32, FP8), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
])  # fmt: skip
def test_attention_of_every_dtype(ops, dtype, cache_dtype):
    check_attention(ops, decoding([1, 65, 0, 200], 4, 2, 64, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_attention_of_every_tensor_core_head_size(ops, dim, cache_dtype):
    check_attention(ops, decoding([1, 37, 70], 3, 2, dim, page=5, cache_dtype=cache_dtype))


@pytest.mark.parametrize("dim", [2, 6, 34, 66, 130, 256])
def test_attention_of_other_head_sizes(ops, dim):
    check_attention(ops, decoding([1, 9, 40], 2, 2, dim, dtype=torch.float32))
    check_attention(ops, decoding([1, 9, 40], 2, 2, dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("of_group", [1, 2, 5, 7, 8, 9, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_every_group_size(ops, of_group, dtype):
    check_attention(ops, decoding([70, 3], of_group, 1, 32, dtype=dtype))


@pytest.mark.parametrize("dtype, cache_dtype", [(torch.bfloat16, None), (torch.bfloat16, FP8), (torch.float32, None)])
def test_attention_over_many_splits(ops, dtype, cache_dtype):
    check_attention(ops, decoding([1000, 1], 2, 1, 64, page=64, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_attention_over_long_splits(ops, cache_dtype):
    """Beyond 24k tokens a warp fills its buffers again, twice."""
    check_attention(ops, decoding([24_600], 1, 1, 32, page=128, cache_dtype=cache_dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, cache_dtype", [(torch.bfloat16, None), (torch.float16, FP8), (torch.float32, None)])
def test_attention_over_the_longest_context(ops, dtype, cache_dtype):
    check_attention(ops, decoding([32_768, 40_001], 4, 2, 96, page=64, dtype=dtype, cache_dtype=cache_dtype))


def test_probabilities_are_not_rounded_to_16_bits(ops):
    """Almost every output is the rounded true value; with bfloat16 probabilities one in ten is not."""
    case = decoding([100, 200], 8, 1, 64)
    truth = case.wide().run(decode_attention_ref)
    assert (case.run(ops.decode_attention) == truth.bfloat16()).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_to_one_key(ops, dtype):
    """Scores are hundreds apart, so each output is exactly one value, in the reference too."""
    check_attention(ops, decoding([200, 50], 4, 2, 64, scale=100.0, dtype=dtype))


def test_attention_of_a_slotted_cache(ops):
    """One page a sequence, as long as the longest."""
    check_attention(ops, decoding([300, 17, 0], 4, 2, 32, page=300))


def test_sequences_may_share_pages(ops):
    case = decoding([40, 40, 35], 4, 2, 32)
    case.block_table[1:, :2] = case.block_table[0, :2]
    case.block_table[2] = case.block_table[0]
    check_attention(ops, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sequence_does_not_see_the_batch(ops, dtype):
    """The same bits with more spare pages, as in a replay of a larger CUDA graph."""
    case = decoding([130, 300, 0, 5], 4, 2, 64, dtype=dtype)
    together = case.run(ops.decode_attention)
    for b in range(4):
        table = torch.cat((case.block_table[b : b + 1], torch.full((1, 900), 2**30, dtype=torch.int32)), dim=1)
        alone = Decoding(
            case.q[b : b + 1], case.key_cache, case.value_cache, table, case.lengths[b : b + 1], case.scale, None, None
        )
        assert torch.equal(alone.run(ops.decode_attention)[0], together[b])


def widened(case: Decoding, pages: int) -> Decoding:
    """The same bits with room for longer sequences in the block table."""
    more = torch.full((len(case.lengths), pages - case.block_table.shape[1]), 2**30, dtype=torch.int32)
    return replace(case, block_table=torch.cat((case.block_table, more), dim=1))


def test_cost_follows_the_lengths_and_not_the_longest_context(ops, library, monkeypatch):
    """An H100 holds 528 blocks at once. 64 sequences of 200 tokens in tables of 32,768 are 256 units of work; one block
    for each possible split would be 16,384 blocks and a second kernel."""
    monkeypatch.setenv("EMULATOR_RESIDENT", "528")
    case = widened(decoding([200] * 64, 4, 2, 64, page=64), 32_768 // 64)
    arrivals, before = torch.zeros(64 * 8, dtype=torch.int32), library.emulator_launches()
    out = case.run(ops.decode_attention, arrivals)
    assert library.emulator_launches() == before + 1
    assert library.emulator_last_blocks() == 528
    assert (out == case.run(decode_attention_ref)).float().mean() > 0.98
    widths = {length: 0 for length in (128, 256, 384, 512)}
    for length in widths:  # no more blocks than units if no sequence can be longer
        decoding([length] * 2, 4, 2, 64, page=64).run(ops.decode_attention)
        widths[length] = library.emulator_last_blocks()
    assert widths == {128: 4, 256: 8, 384: 12, 512: 16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_splits_are_put_together_in_one_order_whoever_comes_last(ops, library, monkeypatch, dtype):
    """Blocks in any order and number; consecutive calls share the counters, and each resets them to zero."""
    case = widened(decoding([300, 1, 0, *[2] * 30, 400, 129], 9, 1, 32, dtype=dtype), 99)
    arrivals, results = torch.zeros(len(case.lengths) * 9, dtype=torch.int32), []
    for resident, order in ((1, 0), (7, 3), (5, 1), (1000, 9)):
        monkeypatch.setenv("EMULATOR_RESIDENT", str(resident))
        monkeypatch.setenv("EMULATOR_ORDER", str(order))
        results.append(case.run(ops.decode_attention, arrivals))
        assert library.emulator_last_blocks() == min(resident, 35 * 2 * 13)
        assert (arrivals == 0).all()
    results.append(case.run(ops.decode_attention))  # counters of its own
    assert all(torch.equal(result, results[0]) for result in results)
    check_attention(ops, case)


def test_bad_counters_of_attention(ops):
    case = decoding([200, 3], 4, 2, 64)
    for arrivals in (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="arrivals: not 4 int32 on the device of q"):
            case.run(ops.decode_attention, arrivals)


def test_rows_that_are_not_aligned_take_the_other_kernel(ops):
    case = decoding([30, 3], 4, 2, 64)
    for name in ("q", "key_cache", "value_cache"):
        tensor = getattr(case, name)
        moved = torch.empty(tensor.numel() + 2, dtype=tensor.dtype)[2:].view(tensor.shape)  # by 4 bytes
        setattr(case, name, moved.copy_(tensor))
    check_attention(ops, case)


@pytest.mark.parametrize("where", ["key_cache", "value_cache"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_a_nan_in_a_sequence_is_not_hidden(ops, where, cache_dtype):
    case = decoding([20, 20], 4, 2, 64, cache_dtype=cache_dtype)
    cache = getattr(case, where)
    page = cache[case.block_table[0, 0].item(), 3, 1]
    page.copy_(torch.full_like(page, float("nan"), dtype=torch.float32).to(cache_dtype))
    out = case.run(ops.decode_attention)
    assert out[0, 4:].isnan().any() and out[0, :4].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths: int64; expected int32"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"block_table: not of size \[2, 2\]"),
        ({"q": torch.zeros(2, 7, 64, dtype=torch.bfloat16)}, r"q: not of size \[B, a multiple of 2, 64\]"),
        ({"value_cache": torch.zeros(3, 16, 2, 64)}, "value_cache: another size than key_cache"),
        ({"k_scale": torch.ones(2)}, "k_scale, v_scale: wanted for a cache of float8_e4m3fn, and only for one"),
    ],
)
def test_bad_arguments_of_attention(ops, change, message):
    case = decoding([20, 20], 4, 2, 64)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.decode_attention)


def angles(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    phase = torch.arange(positions)[:, None] / 1e6 ** (torch.arange(0, dim, 2) / dim)
    return phase.cos(), phase.sin()


@pytest.mark.parametrize("dim", [2, 6, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype, cache_dtype, norm", [
    (torch.bfloat16, torch.bfloat16, True), (torch.float32, torch.float32, True), (torch.float16, FP8, True),
    (torch.float32, torch.bfloat16, False), (torch.bfloat16, FP8, False),
])  # fmt: skip
def test_rope_append_kv(ops, dim, dtype, cache_dtype, norm):
    tokens, heads, groups, page = 7, 4, 2, 8
    qkv = rand(tokens, (heads + 2 * groups) * dim + 2, scale=3.0).to(dtype)[:, 2:]  # rows with a gap
    cos, sin = angles(50, dim)
    positions = torch.tensor([0, 49, 7, 2**30, -5, 1, 12], dtype=torch.int32)
    slots = torch.tensor([0, 39, -1, 17, 8, -1, 7])
    positions[2] = 2**31 - 1  # an empty slot may hold anything
    weights = [rand(dim, seed=i) + 1 for i in (1, 2)] if norm else [None, None]
    scales = [torch.tensor([0.01, 0.5]), torch.tensor([0.02, 2.0])] if cache_dtype == FP8 else [None, None]

    def run(op, dtype, cache_dtype):
        caches = [torch.full((5, 2, page, groups, dim), 7.0).to(cache_dtype)[:, 1] for _ in range(2)]
        q = op(qkv.to(dtype), cos, sin, positions, slots, *caches, heads, *weights, 1e-6, *scales)
        return q, *(cache.float() if cache.dtype == FP8 else cache for cache in caches)

    mine, plain = run(ops.rope_append_kv, dtype, cache_dtype), run(rope_append_kv_ref, dtype, cache_dtype)
    truth = run(rope_append_kv_ref, torch.float64, torch.float64)
    for name, value, expected, exact in zip(("q", "key_cache", "value_cache"), mine, plain, truth, strict=True):
        if cache_dtype == FP8 and name != "q":
            exact = exact.clamp(-448, 448)
        assert_contract(value, expected, exact, name)
    assert (mine[0][slots < 0] == 0).all()


@dataclass
class Sampling:
    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    history: Tensor
    seeds: Tensor
    offsets: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


OPTIONS = list(itertools.product((0.0, 0.7, 1.5), (0, 1, 5, 40), (1.0, 0.9, 0.3, 0.0), (0.0, 0.1)))


def sampling(vocabulary: int, options=OPTIONS, seed: int = 0, penalised: bool = True) -> Sampling:
    batch = len(options)
    columns = [torch.tensor(column) for column in zip(*options, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(-1, 3, (batch, vocabulary), generator=generator, dtype=torch.int32).clamp(min=0)
    return Sampling(
        rand(batch, vocabulary, seed=seed, scale=3.0), columns[0], columns[1].int(), columns[2], columns[3],
        torch.full((batch,), 1.2 if penalised else 1.0), torch.full((batch,), 0.3 if penalised else 0.0), history,
        torch.randint(-(2**62), 2**62, (batch,), generator=generator), torch.arange(batch) + 2**33,
    )  # fmt: skip


def check_sample(ops, case: Sampling) -> None:
    before = case.logits.clone()
    tokens, log_probs = ops.sample(*case.args())
    assert torch.equal(case.logits, before)
    wide = Sampling(case.logits.double(), *case.args()[1:])
    expected, truth = sample_ref(*wide.args())
    assert torch.equal(tokens, expected)
    assert_contract(log_probs, sample_ref(*case.args())[1], truth)


@pytest.mark.parametrize("vocabulary, step", [(1, 7), (2, 7), (33, 5), (511, 3), (1000, 7)])
def test_sample(ops, vocabulary, step):
    check_sample(ops, sampling(vocabulary, OPTIONS[::step]))


def test_truncation_to_the_token(ops):
    """Logits descend and the random numbers are close to 1, so the last token that is kept is sampled."""
    options = [(1.0, k, p, m) for k in (0, 3, 17, 90) for p in (1.0, 0.95, 0.6, 0.2) for m in (0.0, 0.02, 0.3)]
    case = sampling(200, options, penalised=False)
    case.logits = case.logits.sort(dim=-1, descending=True).values
    seeds, zeros = torch.arange(2**17), torch.zeros(2**17, dtype=torch.int64)
    case.seeds, case.offsets = uniform(seeds, zeros).topk(len(options)).indices, zeros[: len(options)]
    check_sample(ops, case)


def test_sample_from_the_vocabulary_of_the_presets(ops):
    check_sample(ops, sampling(6400, OPTIONS[-16::3], penalised=False))


def test_sample_from_a_row_too_long_for_shared_memory(ops):
    check_sample(ops, sampling(26_000, [(0.9, 50, 0.9, 0.0), (0.0, 0, 1.0, 0.0)]))


def test_equal_logits(ops):
    """Greedy sampling takes the first of equal logits; truncation keeps or drops them together."""
    case = sampling(300, OPTIONS[::5], penalised=False)
    case.logits = (case.logits / 2).round()
    case.logits[::2] = 0.0
    case.logits[1::4] = -0.0
    check_sample(ops, case)


def test_masked_and_confident_logits(ops):
    case = sampling(300, OPTIONS[::5], penalised=False)
    case.logits[:, ::3] = -torch.inf
    case.logits[1::2] *= 30
    check_sample(ops, case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_says_so_and_spoils_no_other(ops, bad):
    case = sampling(100, OPTIONS[-3:])
    expected = ops.sample(*case.args())
    case.logits[1, 42] = bad
    tokens, log_probs = ops.sample(*case.args())
    assert tokens[1] == 42 and log_probs[1].isnan()
    assert torch.equal(tokens[[0, 2]], expected[0][[0, 2]]) and torch.equal(log_probs[[0, 2]], expected[1][[0, 2]])


def test_draws_follow_the_distribution(ops):
    """Pearson's chi-squared over 400 draws of 5 tokens: every seed and offset gives a draw of its own."""
    draws, logits = 400, torch.tensor([0.0, 1.0, -1.0, 0.5, -9.0])
    ones = torch.ones(draws)
    tokens, log_probs = ops.sample(
        logits.expand(draws, 5), ones, torch.zeros(draws, dtype=torch.int32), ones, 0 * ones, ones, 0 * ones,
        torch.zeros(draws, 5, dtype=torch.int32), torch.arange(draws) // 20, torch.arange(draws) % 20,
    )  # fmt: skip
    expected = logits.softmax(0) * draws
    statistic = ((tokens.bincount(minlength=5) - expected) ** 2 / expected)[:4].sum()
    assert statistic < 16.3  # 99.9% of 3 degrees of freedom; seeds are fixed
    assert torch.allclose(log_probs, logits.log_softmax(0)[tokens])


@pytest.mark.parametrize(
    "kernel, arguments, dtype, cache_dtype",
    [
        ("tensor_core_kernel", ("bf16", "bf16", "96"), torch.bfloat16, torch.bfloat16),
        ("tensor_core_kernel", ("fp16", "fp8", "128"), torch.float16, FP8),
        ("cuda_core_kernel", ("float", "1"), torch.float32, torch.float32),
        ("cuda_core_kernel", ("bf16", "4"), torch.float32, torch.bfloat16),
        ("sample_kernel", (), None, None),
    ],
)
def test_launches_are_those_that_the_resources_are_reported_for(ops, library, kernel, arguments, dtype, cache_dtype):
    if dtype is None:
        ops.sample(*sampling(native_resources.VOCABULARY, [(0.0, 0, 1.0, 0.0)]).args())
    else:
        dim = int(arguments[-1]) * (64 if kernel == "cuda_core_kernel" else 1)
        decoding([5], 1, 1, dim, dtype=dtype, cache_dtype=cache_dtype).run(ops.decode_attention)
    launched = library.emulator_last_threads() // 32, library.emulator_last_shared()
    assert launched == native_resources.launch_of(kernel, arguments)


def test_shared_memory_is_what_a_launch_asks_for():
    """Static shared memory would not be counted when deciding whether to request more than 48 KB."""
    lines = [
        f"{file.name}: {line.strip()}"
        for file in sorted((emulated.ROOT / "csrc/cuda").iterdir())
        for line in file.read_text(encoding="utf-8").splitlines()
        if "__shared__" in line
    ]
    assert lines == ["platform.cuh: extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];"]


@pytest.mark.parametrize("vocabulary", [1, 6400, 11_698, 11_699, 11_915, 11_916, 24_000])
def test_sampling_asks_for_all_of_its_shared_memory(ops, library, vocabulary):
    """From 11,699 tokens on, a row and the warps' exchange buffers need more than the default 48 KB."""
    ops.sample(*sampling(vocabulary, [(0.0, 0, 1.0, 0.0)], penalised=False).args())
    _, shared = native_resources.launch_of("sample_kernel", (), vocabulary)
    assert library.emulator_last_shared() == shared
    assert (shared > 48 * 1024) == (11_699 <= vocabulary < 24_000)


@pytest.mark.parametrize("arch", [arch for arch in CARDS if arch >= 80])  # older ones decode in plain PyTorch
def test_every_launch_fits_every_card(arch):
    limit = CARDS[arch].shared_per_program
    for kernel, arguments in native_resources.VARIANTS:
        assert native_resources.launch_of(kernel, arguments)[1] <= limit, (kernel, arguments)
    assert max(native_resources.launch_of("sample_kernel", (), v)[1] for v in range(1, 30_000)) <= limit
    assert limit >= native_resources.MATVEC_SHARED


@pytest.mark.parametrize("order, eager", [("1", False), ("7", True)])
def test_the_order_of_threads_does_not_matter(ops, monkeypatch, order, eager):
    """Threads run in descending or random order, and copies arrive at once: the same bits."""

    def run() -> list[Tensor]:
        caches = [decoding([260, 3], 4, 2, 80, cache_dtype=dtype) for dtype in (torch.bfloat16, FP8)]
        caches.append(decoding([260, 3], 4, 2, 80, dtype=torch.float32))
        results = [case.run(ops.decode_attention) for case in caches]
        return [*results, *ops.sample(*sampling(700, OPTIONS[-20::5]).args())]

    expected = run()
    monkeypatch.setenv("EMULATOR_ORDER", order)
    if eager:
        monkeypatch.setenv("EMULATOR_EAGER", "1")
    for mine, theirs in zip(run(), expected, strict=True):
        assert torch.equal(mine, theirs)


SANITIZERS = {
    "thread": ("-fsanitize=thread",),  # a missing barrier is a race
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer, eager, tmp_path):
    program = emulated.build_program(emulated.EMULATOR / "sanitized.cpp", tmp_path, "-O1", "-g", *SANITIZERS[sanitizer])
    environment = os.environ | ({"EMULATOR_EAGER": "1"} if eager else {})
    result = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr[-4000:]
