"""The whole step in one call, compared with the model's own forward and with itself in other batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from minimind.config import ModelConfig, YarnScaling
from minimind.inference.decode.step import DecodeWeights, decode_step
from minimind.modeling import Model
from minimind.rope import rope_cos_sin
from tests.inference.decode.cases import FP8, MISSING, needs_native
from tests.inference.decode.reference_step import decode_step_ref
from tests.kernels.contract import DEVICE, assert_within

SMALL = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 150, "vocab_size": 301}
CONFIGS = {
    "dense": ModelConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "odd sizes": ModelConfig(
        hidden_size=70, num_hidden_layers=2, intermediate_size=45, vocab_size=37,
        num_attention_heads=3, num_key_value_heads=1, head_dim=18,
    ),
    "qk norm, untied": ModelConfig(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=80, qk_norm=True, tie_word_embeddings=False
    ),
    "yarn": ModelConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=16, attention_factor=None),
    ),
    "moe": ModelConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        num_experts=5, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=72,
    ),
    "moe, top 1, two shared": ModelConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=96, qk_norm=True,
        num_experts=4, num_experts_per_tok=1, num_shared_experts=2, moe_intermediate_size=100,
    ),
}  # fmt: skip
PAGE = 8
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="decode_step is the CPU's; a GPU has CUDA graphs")


def make_model(config: ModelConfig, seed: int = 0) -> Model:
    """Weights so large that attention and routing matter."""
    torch.manual_seed(seed)
    model = Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + (p.ndim == 1))
    return model


@dataclass
class Decoder:
    """Sequences in a paged cache, fed token by token."""

    model: Model
    weights: DecodeWeights
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    lengths: Tensor
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    backend: str = "native"
    operands: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = self.weights.operands()

    @staticmethod
    def of(model: Model, rows: int, dtype=None, cache_dtype=torch.float32, tokens: int = 64) -> Decoder:
        cfg, pages = model.config, -(-tokens // PAGE)
        order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(1))
        shape = (cfg.num_hidden_layers, rows * pages, PAGE, cfg.num_key_value_heads, cfg.head_dim)
        caches = [torch.full(shape, float("nan")).to(cache_dtype) for _ in range(2)]
        scale = torch.full((shape[0], shape[3]), 0.02) if cache_dtype == FP8 else None
        table = order.view(rows, pages).int()
        lengths = torch.zeros(rows, dtype=torch.int32)
        return Decoder(model, DecodeWeights.from_model(model, dtype), *caches, table, lengths, (scale, scale))

    def step(self, tokens: Tensor, rows: list[int] | None = None) -> Tensor:
        """tokens: int64 [rows]; -1 marks an empty row."""
        index = torch.arange(len(tokens)) if rows is None else torch.tensor(rows)
        live = tokens >= 0
        self.lengths[index] += live.int()
        lengths, table = torch.where(live, self.lengths[index], 0).int(), self.table[index].contiguous()
        positions = (lengths - 1).clamp(min=0)
        pages = table[torch.arange(len(index)), positions // PAGE].long()
        slots = torch.where(live, pages * PAGE + positions % PAGE, -1)
        cos, sin = rope_cos_sin(self.model.config, torch.arange(64))
        inputs = (tokens.clamp(min=0), positions, slots, table, lengths, cos, sin)
        caches = (self.key_cache, self.value_cache, *self.scales)
        if self.backend == "reference":
            return decode_step_ref(self.weights, *inputs, *caches)
        return decode_step(self.weights, self.operands, *inputs, *caches)


def feed(decoder: Decoder, ids: Tensor) -> Tensor:
    """All of ids [B, T], token by token -> logits [B, T, V]."""
    return torch.stack([decoder.step(column) for column in ids.unbind(1)], dim=1)


def token_ids(config: ModelConfig, rows: int, length: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_step_by_step_equals_the_models_forward(backend, name):
    model = make_model(CONFIGS[name])
    ids = token_ids(model.config, 3, 21)
    logits = feed(replace(Decoder.of(model, 3), backend=backend), ids)
    truth = copy.deepcopy(model).double()(ids).logits
    assert_within(logits, model(ids).logits, truth)
    assert torch.equal(logits.argmax(-1), truth.argmax(-1))


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_bfloat16_weights_are_no_worse_than_the_models_own_bfloat16(name):
    model = make_model(CONFIGS[name])
    ids = token_ids(model.config, 3, 21)
    rounded = copy.deepcopy(model).bfloat16()
    for mine, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
        if mine.ndim > 1 and not (theirs.shape[0] == model.config.num_experts and theirs.ndim == 2):
            theirs.copy_(mine)  # the truth has the same rounded matrices
    logits = feed(Decoder.of(model, 3, torch.bfloat16), ids)
    truth = copy.deepcopy(model).double()(ids).logits
    own = model.to(torch.bfloat16)(ids).logits
    spread = truth.std()
    mine_error, own_error = ((x.double() - truth).pow(2).mean().sqrt() / spread for x in (logits, own))
    assert mine_error <= own_error


@needs_native
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, FP8])
@torch.no_grad()
def test_narrow_caches_agree_with_the_reference(cache_dtype):
    model = make_model(CONFIGS["qk norm, untied"])
    ids = token_ids(model.config, 3, 21)
    results = []
    for backend in ("reference", "native"):
        results.append(feed(replace(Decoder.of(model, 3, cache_dtype=cache_dtype), backend=backend), ids))
    exact = feed(Decoder.of(model, 3), ids)
    error, of_cache = (results[1] - results[0]).abs().max(), (results[0] - exact).abs().max()
    assert error < of_cache / 2  # both store the same numbers but for rare roundings to the other side


def assert_rows_are_the_same(make: Callable[[int], Decoder], ids: Tensor) -> None:
    """Logits over `ids` [19, 5] are the same bits in any batch and on any number of threads. make(rows): a decoder."""
    threads, whole = torch.get_num_threads(), feed(make(19), ids)
    assert whole.isfinite().all()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(feed(make(19), ids), whole)
            for rows in ([4], [7, 0], [18, 1, 5], [3, 2, 9, 8, 11]):
                decoder = make(19)
                steps = [decoder.step(ids[rows, t], rows) for t in range(5)]
                assert torch.equal(torch.stack(steps, dim=1), whole[rows])
    finally:
        torch.set_num_threads(threads)


def assert_empty_slots_are_left_alone(make: Callable[[int], Decoder], ids: Tensor) -> None:
    """With the second of four rows empty its logits are zeros, its cache is untouched, and the others are as before."""
    expected, holes = feed(make(4), ids), make(4)
    ids[1] = -1
    logits = feed(holes, ids)
    assert logits[1].abs().max() == 0 and torch.equal(logits[[0, 2, 3]], expected[[0, 2, 3]])
    assert holes.key_cache[:, holes.table[1].long()].isnan().all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bit_for_bit_in_any_batch_and_on_any_number_of_threads(name, dtype):
    model = make_model(CONFIGS[name])
    assert_rows_are_the_same(lambda rows: Decoder.of(model, rows, dtype), token_ids(model.config, 19, 5))


@needs_native
def test_empty_slots_yield_zeros_and_touch_nothing():
    model = make_model(CONFIGS["moe"])
    assert_empty_slots_are_left_alone(lambda rows: Decoder.of(model, rows), token_ids(model.config, 4, 3))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_follow_when_they_are_packed_again_in_place(dtype):
    model, changed = make_model(CONFIGS["moe"]), make_model(CONFIGS["moe"], seed=1)
    decoder = Decoder.of(model, 1, dtype)
    before = decoder.step(torch.tensor([3]))
    for mine, theirs in zip(model.parameters(), changed.parameters(), strict=True):
        mine.copy_(theirs)
    decoder.lengths.zero_()
    weights = DecodeWeights.from_model(model, dtype)
    packed = [i for i, role in enumerate(weights.roles) if role in ("matrix", "gate_up")]
    addresses = [decoder.operands[i].data_ptr() for i in packed]
    decoder.weights, decoder.operands = weights, weights.operands(into=decoder.operands)
    assert [decoder.operands[i].data_ptr() for i in packed] == addresses
    after = decoder.step(torch.tensor([3]))
    assert not torch.equal(after, before)
    assert torch.equal(after, Decoder.of(changed, 1, dtype).step(torch.tensor([3])))


@needs_native
def test_wrong_arguments_are_named():
    model = make_model(CONFIGS["dense"])
    decoder, caches = Decoder.of(model, 2), ("key_cache", "value_cache")
    with pytest.raises(ValueError, match=r"float32 or bfloat16 weights, not torch\.float16"):
        DecodeWeights.from_model(model, torch.float16)
    with pytest.raises(RuntimeError, match="key_cache and value_cache must have the same shape"):
        replace(decoder, key_cache=decoder.key_cache[:2]).step(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="weights: 21 tensors, but the model has 15"):
        replace(decoder, **{name: getattr(decoder, name)[:2] for name in caches}).step(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="k_scale and v_scale go with a float8 cache"):
        replace(decoder, scales=(torch.ones(3, 2), None)).step(torch.tensor([1, 2]))


@needs_native
def test_native_refuses_indices_outside_its_memory():
    decoder = Decoder.of(make_model(CONFIGS["dense"]), 2)
    with pytest.raises(RuntimeError, match=r"tokens\[1\] = 301 is not in the vocabulary of 301"):
        decoder.step(torch.tensor([1, 301]))
    w = decoder.weights
    fewer = replace(w, tensors=w.tensors[:-1], roles=w.roles[:-1])
    with pytest.raises(RuntimeError, match=r"weights: 20 tensors, but down is still to come"):
        replace(decoder, weights=fewer).step(torch.tensor([1, 2]))
    narrow = [t[:150] if role == "gate_up" else t for t, role in zip(w.tensors, w.roles, strict=True)]
    with pytest.raises(RuntimeError, match="gate_up and down: sizes disagree"):
        replace(decoder, weights=replace(w, tensors=tuple(narrow))).step(torch.tensor([1, 2]))


@needs_native
def test_opcheck():
    assert MISSING is None
    d = Decoder.of(make_model(CONFIGS["dense"]), 2)
    d.step(torch.tensor([1, 2]))
    w, one = d.weights, torch.ones(2, dtype=torch.int32)
    cos, sin = rope_cos_sin(d.model.config, torch.arange(8))
    inputs = (torch.tensor([1, 2]), one * 0, d.table[:, 0].long() * PAGE, d.table, one, cos, sin)
    args = (*inputs, d.operands, d.key_cache.zero_(), d.value_cache.zero_(), *w.settings, None, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minimind.decode_step.default, args, test_utils=tests)
    last = torch.tensor([1], dtype=torch.int32)
    prefill = torch.ops.minimind.prefill_step.default
    torch.library.opcheck(prefill, (args[0], last, *args[1:]), test_utils=tests)
    with pytest.raises(RuntimeError, match=r"last\[0\] = 2 is none of 2 rows"):
        prefill(args[0], last + 1, *args[1:])
