"""rope_append_kv and decode_attention, reference and native, against float64 truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minimind.inference.decode.kv_cache import FLOAT8_MAX
from minimind.inference.decode.reference import rope_append_kv_ref
from minimind.kernels.rope import rope_ref
from tests.inference.decode.cases import FP8, HEADS, backends, needs_native, operator, paged
from tests.kernels.contract import DEVICE, assert_within, rand

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_attention_is_within_the_contract(backend, dtype, shape):
    case = paged([1, 2, 63, 64, 65, 0, 257], shape, dtype)
    assert_within(case.run(backend), case.plain(), case.truth())


@backends
@pytest.mark.parametrize("length", [1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences(backend, length, dtype):
    case = paged([length, 3], (8, 2, 64), dtype, page=64)
    assert_within(case.run(backend), case.plain(), case.truth())


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
def test_a_cache_of_another_dtype(backend, dtype, cache_dtype):
    case = paged([5, 300, 0, 64], (8, 2, 96), dtype, cache_dtype)
    assert_within(case.run(backend), case.plain(), case.truth())


@backends
def test_confident_attention_and_scores_far_from_zero(backend):
    for scale in (50.0, 300.0):
        case = paged([1, 65, 700], (4, 2, 64), scale=scale)
        assert_within(case.run(backend), case.plain(), case.truth())


@backends
def test_the_slotted_cache_is_one_page_per_sequence(backend):
    pages = paged([40, 7, 64], (8, 2, 64), page=64)
    assert pages.page_table[:, 1:].max() == -1  # one page each
    slotted = replace(pages, page_table=pages.page_table[:, :1].contiguous())
    assert torch.equal(slotted.run(backend), pages.run(backend))


@backends
def test_sequences_may_share_pages(backend):
    case = paged([64, 50, 33], (8, 2, 64))
    table = case.page_table.clone()
    table[1:, :2] = table[0, :2]
    shared = replace(case, page_table=table)
    assert_within(shared.run(backend), shared.plain(), shared.truth())


@backends
def test_a_layer_of_a_wider_cache_is_a_view(backend):
    case = paged([20, 70], (8, 2, 64))
    wide = [torch.stack((torch.full_like(c, float("nan")), c), dim=1)[:, 1] for c in (case.key_cache, case.value_cache)]
    assert not wide[0].is_contiguous()
    assert torch.equal(replace(case, key_cache=wide[0], value_cache=wide[1]).run(backend), case.run(backend))


@needs_native
def test_a_row_is_the_same_in_any_batch_and_every_time():
    case = paged([1, 513, 64, 0, 257, 2048], (8, 2, 64), torch.bfloat16)
    whole = case.run()
    assert torch.equal(whole, case.run())
    for keep in ([1], [4, 1], [5, 4, 3, 2, 1, 0]):
        assert torch.equal(case.rows(keep).run(), whole[keep])


@needs_native
@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the CPU's")
def test_attention_does_not_depend_on_the_number_of_threads():
    case = paged([513, 64, 2048], (8, 2, 64))
    whole, threads = case.run(), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(case.run(), whole)
    finally:
        torch.set_num_threads(threads)


def rope_inputs(dtype, cache_dtype, shape, norm, tokens=6, seed=0):
    heads, kv_heads, dim = shape
    qkv = rand(tokens, (heads + 2 * kv_heads) * dim, seed=seed, scale=3.0).to(dtype)
    angles = rand(50, dim // 2, seed=seed + 1, scale=3.0)
    positions = torch.tensor([0, 49, 7, 3, 12, 7], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([5, 0, -1, 63, 17, 16], device=DEVICE)
    caches = [torch.full((4, 16, kv_heads, dim), 3.0, device=DEVICE).to(cache_dtype) for _ in range(2)]
    weights = [1 + rand(dim, seed=seed + i, scale=0.3) for i in (2, 3)] if norm else [None, None]
    scales = [rand(kv_heads, seed=seed + i).abs() / 40 + 0.01 if cache_dtype == FP8 else None for i in (4, 5)]
    return qkv, angles.cos(), angles.sin(), positions, slots, *caches, heads, *weights, 1e-5, *scales


@backends
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_rope_append_is_within_the_contract(backend, dtype, shape, norm):
    qkv, cos, sin, positions, slots, keys, values, heads, q_w, k_w, eps, *_ = args = rope_inputs(
        dtype, dtype, shape, norm
    )
    q = operator("rope_append_kv", backend)(*args)
    kv_heads = keys.shape[2]
    plains = rope_ref(qkv, cos, sin, positions.long(), heads, kv_heads, q_w, k_w, eps)
    truths = rope_ref(qkv.double(), cos.double(), sin.double(), positions.long(), heads, kv_heads, q_w, k_w, eps)
    wanted = slots >= 0
    assert q[~wanted].abs().max() == 0
    assert_within(q[wanted], plains[0][wanted], truths[0][wanted], "q")
    for name, cache, plain, truth in zip("kv", (keys, values), plains[1:], truths[1:], strict=True):
        assert_within(cache.flatten(0, 1)[slots[wanted]], plain[wanted], truth[wanted], name)
        untouched = torch.ones(64, dtype=torch.bool, device=DEVICE)
        untouched[slots[wanted]] = False
        assert (cache.flatten(0, 1)[untouched] == 3.0).all(), name


@backends
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
def test_rope_append_into_a_cache_of_another_dtype(backend, cache_dtype):
    args = rope_inputs(torch.bfloat16, cache_dtype, (8, 2, 64), True)
    operator("rope_append_kv", backend)(*args)
    wide = rope_inputs(torch.bfloat16, torch.float64, (8, 2, 64), True)
    rope_append_kv_ref(wide[0].double(), *wide[1:-2])
    slots = args[4][args[4] >= 0]
    for cache, exact, scale in zip(args[5:7], wide[5:7], args[-2:], strict=True):
        stored, truth = (c.flatten(0, 1)[slots].double() for c in (cache, exact))
        scale = 1.0 if scale is None else scale.double()[:, None]
        rounded = (truth / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX) if cache_dtype == FP8 else truth
        assert_within(stored.float(), rounded.to(cache_dtype).float(), rounded)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, FP8, torch.bfloat16])
def test_every_number_is_stored_as_torch_rounds_it(dtype):
    """From the smallest subnormal over the largest number, ties and both zeros included; float8 saturates."""
    every = torch.arange(0, 2 ** (16 if dtype != FP8 else 8) - 1, dtype=torch.int32)
    unsigned = every.to(torch.uint8).view(FP8) if dtype == FP8 else every.to(torch.int16).view(dtype)
    numbers = unsigned.float()[unsigned.float().isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat(
        (numbers, between, between.nextafter(torch.tensor(9e9)), torch.tensor([-0.0, 1e-30, 480.0, -1e5]))
    )
    values = torch.nn.functional.pad(values, (0, -values.numel() % 64)).to(DEVICE).view(-1, 1, 64)
    tokens = values.shape[0]
    keys, cache = (torch.zeros(1, tokens, 1, 64, device=DEVICE).to(dtype) for _ in range(2))
    one = torch.ones(1, device=DEVICE) if dtype == FP8 else None
    qkv = torch.cat((torch.zeros(tokens, 128, device=DEVICE), values[:, 0]), dim=1)
    angles = torch.zeros(1, 32, device=DEVICE)
    positions = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    operator("rope_append_kv")(
        qkv, angles, angles, positions, torch.arange(tokens, device=DEVICE), keys, cache, 1, None, None, 1e-6, one, one
    )
    wanted = values.clamp(-FLOAT8_MAX, FLOAT8_MAX) if dtype == FP8 else values
    assert torch.equal(cache[0].float(), wanted.to(dtype).float())


@needs_native
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_native_equals_the_reference_on_what_it_writes(cache_dtype):
    """q agrees, and so does later attention over the cache: each can read what the other wrote."""
    results = []
    for backend in ("reference", "native"):
        args = rope_inputs(torch.float32, cache_dtype, (8, 2, 64), False)
        q = operator("rope_append_kv", backend)(*args)
        table = torch.arange(4, dtype=torch.int32, device=DEVICE).expand(6, 4).contiguous()
        lengths = torch.full((6,), 64, dtype=torch.int32, device=DEVICE)
        attend = operator("decode_attention", backend)
        results.append((q, attend(q, args[5], args[6], table, lengths, 0.125, *args[-2:])))
    for native, reference in zip(results[1], results[0], strict=True):
        assert (native - reference).abs().max() < 1e-2  # a rounding of the cache may fall to the other side


WRONG = {
    "q has head_dim 32, the cache 64": {"q": torch.zeros(2, 8, 32)},
    "q: wrong shape or dtype": {"q": torch.zeros(2, 8, 64, dtype=torch.float64)},
    "heads=7 is no multiple": {"q": torch.zeros(2, 7, 64)},
    "block_table: wrong shape": {"page_table": torch.zeros(3, 4, dtype=torch.int32)},
    "block_table must be int32": {"page_table": torch.zeros(2, 4, dtype=torch.int64)},
    "lengths must be int32": {"lengths": torch.zeros(2, dtype=torch.int64)},
    "k_scale and v_scale go with a float8": {"k_scale": torch.ones(2)},
    "value_cache must have the same shape": {"value_cache": torch.zeros(1, 16, 2, 64)},
    "key_cache must be dense": {"key_cache": torch.zeros(2, 2, 16, 64).transpose(1, 2)},
}


@needs_native
@pytest.mark.skipif(DEVICE.type != "cpu", reason="messages are the CPU's; tests/csrc has the GPU's")
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    case = paged([3, 4], (8, 2, 64))
    if "key_cache" in WRONG[message]:
        case = replace(case, value_cache=torch.zeros(2, 16, 2, 64))
    with pytest.raises(RuntimeError, match=message) as caught:
        replace(case, **WRONG[message]).run()
    assert "\n" not in str(caught.value)


@needs_native
@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU does not look at indices")
def test_native_cpu_operators_refuse_indices_that_lie_outside():
    case = paged([3, 40], (8, 2, 64))
    with pytest.raises(RuntimeError, match=r"block_table\[1, 2\] = 99 is none of"):
        table = case.page_table.clone()
        table[1, 2] = 99
        replace(case, page_table=table).run()
    with pytest.raises(RuntimeError, match=r"lengths\[0\] = 999 needs 63 pages"):
        replace(case, lengths=torch.tensor([999, 1], dtype=torch.int32)).run()
    args = list(rope_inputs(torch.float32, torch.float32, (8, 2, 64), False))
    args[4] = torch.tensor([0, 1, 2, 3, 4, 64])
    with pytest.raises(RuntimeError, match=r"slots\[5\] = 64 lies beyond"):
        operator("rope_append_kv")(*args)


@needs_native
def test_opcheck():
    case = paged([3, 40], (8, 2, 64))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minimind.decode_attention.default, tuple(vars(case).values()), test_utils=tests)
    args = rope_inputs(torch.bfloat16, torch.bfloat16, (8, 2, 64), True)
    torch.library.opcheck(torch.ops.minimind.rope_append_kv.default, args, test_utils=tests)


@needs_native
def test_operators_compile_whole():
    case = paged([3, 40], (8, 2, 64))

    @torch.compile(backend="eager", fullgraph=True)
    def attend(*args):
        return torch.ops.minimind.decode_attention(*args) * 2

    assert torch.equal(attend(*vars(case).values()), case.run() * 2)
