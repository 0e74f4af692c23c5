"""The CUDA step of a whole model, executed thread by thread on the CPU, against plain PyTorch and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bench.compilation import native_resources
from minimind.config import ModelConfig
from minimind.inference.decode.step import DecodeWeights
from minimind.modeling import Model
from minimind.rope import rope_cos_sin
from tests.csrc import emulated
from tests.csrc.test_cuda_emulated import rand
from tests.inference.decode.reference_step import decode_step_ref
from tests.inference.decode.test_step import make_model
from tests.kernels.contract import assert_within, move_by_rounding

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
PAGE = 16
LENGTHS = [140, 1, 0, 129, 17]  # the fourth has its new token alone in a split of its own; the third is an empty slot


def config(heads: int, groups: int, dim: int, **more) -> ModelConfig:
    sizes = {"hidden_size": 72, "num_hidden_layers": 2, "intermediate_size": 264, "vocab_size": 45}
    return ModelConfig(**(sizes | more), num_attention_heads=heads, num_key_value_heads=groups, head_dim=dim)


CONFIGS = {
    "64": config(4, 2, 64),
    "80, QK norm": config(2, 2, 80, qk_norm=True),
    "96, untied": config(4, 1, 96, tie_word_embeddings=False),
    "128, QK norm": config(3, 1, 128, qk_norm=True),
    "no tensor core's": config(4, 2, 20),
}


@dataclass
class Case:
    """The input of a step. Cache rows that no sequence owns are NaN, those of older tokens noise; pages are in random
    order."""

    weights: DecodeWeights
    tokens: Tensor
    slots: Tensor
    table: Tensor
    lengths: Tensor
    key_cache: Tensor
    value_cache: Tensor
    scales: tuple[Tensor, Tensor] | tuple[None, None]
    angles: tuple[Tensor, Tensor]

    def run(self, step, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """The logits and the caches after the step."""
        caches = [cache.clone() for cache in (self.key_cache, self.value_cache)]
        positions = (self.lengths[rows] - 1).clamp(min=0).int()
        slots, table, lengths = (t[rows] for t in (self.slots, self.table, self.lengths))
        inputs = (self.tokens[rows], positions, slots, table, lengths, *self.angles)
        return step(inputs, caches, self), *caches

    def wide(self) -> Case:
        """The step in float64 on the same values."""
        caches = [
            cache.double() if scale is None else cache.double() * scale.double()[:, None, None, :, None]
            for cache, scale in zip((self.key_cache, self.value_cache), self.scales, strict=True)
        ]
        wide = replace(self.weights, tensors=tuple(t.double() for t in self.weights.tensors))
        return replace(self, weights=wide, key_cache=caches[0], value_cache=caches[1], scales=(None, None))

    @property
    def new_rows(self) -> tuple[Tensor, Tensor]:
        """Pages and positions of the new tokens' keys and values."""
        written = self.slots[(self.slots >= 0) & (self.lengths > 0)]
        return written // PAGE, written % PAGE


def plain(inputs, caches, case: Case) -> Tensor:
    return decode_step_ref(case.weights, *inputs, *caches, *case.scales)


def native(ops):
    def step(inputs, caches, case: Case) -> Tensor:
        w = case.weights
        return ops.decode_step(*inputs, w.operands_in_rows(), *caches, *w.settings, *case.scales)

    return step


def make_case(model: Model, dtype: torch.dtype, cache_dtype: torch.dtype, lengths=LENGTHS) -> Case:
    cfg = model.config
    batch, pages = len(lengths), -(-max(lengths) // PAGE)
    count = torch.tensor(lengths, dtype=torch.int32)
    order = torch.randperm(batch * pages + 1, generator=torch.Generator().manual_seed(1)).int()
    table = order[1:].reshape(batch, pages).clone()
    older = torch.zeros(len(order), PAGE, dtype=torch.bool)
    slots = torch.full((batch,), -1)
    for b, length in enumerate(lengths):
        places = torch.arange(length)
        rows = table[b, places // PAGE].long() * PAGE + places % PAGE
        older.view(-1)[rows[:-1]] = True
        slots[b] = rows[-1] if length else -1
        table[b, -(-length // PAGE) :] = 2**30  # an index far outside, in case it is read
    shape = (cfg.num_hidden_layers, len(order), PAGE, cfg.num_key_value_heads, cfg.head_dim)
    noise = [torch.where(older[None, :, :, None, None], rand(*shape, seed=i), torch.nan) for i in (3, 4)]
    scale = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(5)) / 10 + 0.02
    scales = (scale, scale.flip(0).contiguous()) if cache_dtype == FP8 else (None, None)
    tensors = DecodeWeights.from_model(model, FP32).tensors
    roles = DecodeWeights.from_model(model, FP32).roles
    weights = replace(
        DecodeWeights.from_model(model, FP32),
        tensors=tuple(t if r == "small" else t.to(dtype) for t, r in zip(tensors, roles, strict=True)),
    )
    tokens = torch.randint(0, cfg.vocab_size, (batch,), generator=torch.Generator().manual_seed(2))
    angles = rope_cos_sin(cfg, torch.arange(200))
    return Case(weights, tokens, slots, table, count, *(n.to(cache_dtype) for n in noise), scales, angles)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; a NaN is a NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


def check(ops, case: Case, reference: Case | None = None, exact: Case | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """reference: what plain PyTorch computes in, if not as the case says. exact: the step in float64, if its weights
    have other values than the case's."""
    results = case.run(native(ops))
    theirs = (reference or case).run(plain)
    wide = exact or case.wide()
    truths = wide.run(plain)
    moved = replace(wide, weights=replace(wide.weights, tensors=_moved(wide.weights.tensors))).run(plain)
    pages, places = case.new_rows
    assert (results[0][case.lengths <= 0] == 0).all()
    assert_within(results[0], theirs[0], truths[0], "logits", moved[0])
    before = (case.key_cache, case.value_cache)
    for i, name in enumerate(("keys", "values")):
        mine, scale = results[i + 1], case.scales[i]
        stored = [_stored(each[:, pages, places], scale) for each in (mine, theirs[i + 1])]
        exact = [each[i + 1][:, pages, places] for each in (truths, moved)]
        assert_within(*stored, exact[0], name, exact[1])
        untouched = mine.clone()
        untouched[:, pages, places] = before[i][:, pages, places]
        assert same(untouched, before[i]), name
    return results


def _stored(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows.float() * scale[:, None, :, None]


def _moved(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    holder = torch.nn.ParameterList([t.clone() for t in tensors])
    move_by_rounding(holder, 264)
    return tuple(t.detach() for t in holder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_in_float32_is_the_models(ops, name):
    check(ops, make_case(make_model(CONFIGS[name]), FP32, FP32))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sixteen_bit_weights_lose_nothing_more(ops, dtype):
    """With a float32 cache all arithmetic is float32, as exact as plain PyTorch's on the same weights in float32."""
    case = make_case(make_model(CONFIGS["64"]), dtype, FP32)
    wide = replace(case.weights, tensors=tuple(t.float() for t in case.weights.tensors))
    check(ops, case, replace(case, weights=wide))


@pytest.mark.parametrize(
    "dtype, cache_dtype", [(BF16, BF16), (FP16, FP16), (BF16, FP8), (FP16, FP8), (FP32, FP8), (FP32, BF16)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_over_every_cache(ops, name, dtype, cache_dtype):
    check(ops, make_case(make_model(CONFIGS[name]), dtype, cache_dtype, LENGTHS[1:]))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_longer_than_what_is_under_way_at_once(ops, dtype):
    """With 1,672 columns each lane makes seven loads per row, more than the six or three that are in flight at once."""
    model = make_model(config(1, 1, 64, num_hidden_layers=1, intermediate_size=1672, hidden_size=40))
    wide = DecodeWeights.from_model(model, FP32)
    for lengths in ([3], [3, 1, 5]):
        case = make_case(model, dtype, FP32, lengths)
        check(ops, case, replace(case, weights=wide) if dtype == FP32 else _in_float32(case))


def _in_float32(case: Case) -> Case:
    weights = replace(case.weights, tensors=tuple(t.float() for t in case.weights.tensors))
    return replace(case, weights=weights)


EIGHT = [140, 0, 3, 129, 1, 17, 2, 130]


def check_rows(ops, case: Case) -> None:
    """Logits, keys and values of a row are the same bits in any batch; the case has eight rows."""
    whole = case.run(native(ops))
    for rows in (slice(0, 1), slice(2, 3), slice(3, 5), slice(0, 4), slice(2, 8)):
        logits, *caches = case.run(native(ops), rows)
        assert torch.equal(logits, whole[0][rows])
        places = case.slots[rows][case.lengths[rows] > 0]
        for mine, theirs in zip(caches, whole[1:], strict=True):
            index = (slice(None), places // PAGE, places % PAGE)
            assert same(mine[index], theirs[index])


@pytest.mark.parametrize("dtype, cache_dtype", [(BF16, BF16), (FP32, FP32), (BF16, FP8)])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(ops, dtype, cache_dtype):
    check_rows(ops, make_case(make_model(CONFIGS["64"]), dtype, cache_dtype, EIGHT))


@pytest.mark.parametrize("order, resident, eager", [("1", "1", False), ("7", "3", True), ("3", "99", False)])
def test_the_order_of_threads_and_blocks_does_not_matter(ops, monkeypatch, order, resident, eager):
    case = make_case(make_model(CONFIGS["80, QK norm"]), BF16, BF16)
    expected = case.run(native(ops))
    monkeypatch.setenv("EMULATOR_ORDER", order)
    monkeypatch.setenv("EMULATOR_RESIDENT", resident)
    if eager:
        monkeypatch.setenv("EMULATOR_EAGER", "1")
    for mine, theirs in zip(case.run(native(ops)), expected, strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_without_a_slot_writes_nothing(ops, dtype):
    """A zero input attends with a query of zeros, as in the reference."""
    case = make_case(make_model(CONFIGS["64"]), dtype, dtype)
    case.key_cache, case.value_cache = (cache.nan_to_num(0.5) for cache in (case.key_cache, case.value_cache))
    case.slots[0] = case.slots[4] = -1
    check(ops, case)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch, context", [(1, 5), (1, 200), (8, 140)])
def test_five_launches_a_layer_and_one_for_the_logits(ops, library, layers, batch, context):
    """41 for the 8 layers of minimind2-small, and one that samples. Layer by layer there were ten per layer and 4 more:
    norm, qkv, rotation, attention, merge, o, norm, gate and up, SwiGLU, down; embedding, norm, head and its float32."""
    case = make_case(make_model(config(2, 1, 32, num_hidden_layers=layers)), BF16, BF16, [context] * batch)
    before = library.emulator_launches()
    case.run(native(ops))
    assert library.emulator_launches() - before == 5 * layers + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.ones(9, dtype=torch.int32)}, "tokens: 9 of them; at most 8 on a GPU"),
        ({"weights": {"experts": 4}}, "experts: 4; on a GPU this step is for dense models only"),
        ({"weights": {"heads": 3}}, "heads: 3; expected a multiple of 2"),
        ({"weights": {"layers": 1}}, "key_cache, value_cache: 4 and 4 dimensions; expected 5"),
        ({"drop": -1}, "weights: 14 tensors, but down is still to come"),
        ({"drop": 3}, "input norm: bfloat16; expected float32"),
        ({"config": {"intermediate_size": 268}}, r"weights: rows of 268 \(inner width\) do not begin at mult"),
    ],
)
def test_bad_arguments_of_a_step(ops, change, message):
    model = make_model(config(4, 2, 64, **change.get("config", {})))
    case = make_case(model, BF16, BF16, [1] * len(change.get("lengths", [0])))
    weights = replace(case.weights, **{k: v for k, v in change.get("weights", {}).items() if k != "layers"})
    if "drop" in change:
        tensors = list(weights.tensors)
        del tensors[change["drop"]]
        weights = replace(weights, tensors=tuple(tensors))
    case = replace(case, weights=weights)
    if "layers" in change.get("weights", {}):
        case = replace(case, key_cache=case.key_cache[0], value_cache=case.value_cache[0])
    with pytest.raises(RuntimeError, match=message):
        case.run(native(ops))


@pytest.mark.parametrize(
    "width, inner, dtype, expected",
    [(72, 264, BF16, 8), (72, 2600, BF16, 4), (72, 2600, FP32, 8), (68, 264, BF16, 0), (68, 264, FP32, 8)],
)
def test_python_knows_how_many_rows_a_step_takes(ops, library, width, inner, dtype, expected):
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1}
    model = make_model(config(1, 1, 64, **sizes))
    assert make_case(model, dtype, dtype, [1]).weights.cuda_rows == expected
    if expected:
        make_case(model, dtype, dtype, [1] * expected).run(native(ops))
        kind = ("float" if dtype == FP32 else "bf16", str(expected))  # the head is the last launch, of `width` columns
        launched = library.emulator_last_threads() // 32, library.emulator_last_shared()
        assert launched == native_resources.launch_of("matvec_kernel", kind, columns=width)
        assert native_resources.launch_of("matvec_kernel", kind, columns=inner)[1] <= native_resources.MATVEC_SHARED
    with pytest.raises(RuntimeError, match=r"do not fit|do not begin|at most 8"):
        make_case(model, dtype, dtype, [1] * (expected + 1)).run(native(ops))


def test_a_mixture_of_experts_takes_no_step():
    model = make_model(config(1, 1, 64, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64))
    assert DecodeWeights.from_model(model).cuda_rows == 0
