"""8-bit weights: the packed form and the step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from minimind.inference.decode.int8 import (
    GROUP,
    LARGEST,
    check_weights_dtype,
    pack_int8,
    packed_int8_shape,
    quantize,
    rounded_activations,
    rounded_rows,
    rounded_weights,
)
from minimind.inference.decode.step import DecodeWeights
from minimind.modeling import Model
from tests.inference.decode.cases import FP8, needs_native
from tests.inference.decode.reference_step import linear_int8_ref
from tests.inference.decode.test_step import (
    CONFIGS,
    Decoder,
    assert_empty_slots_are_left_alone,
    assert_rows_are_the_same,
    feed,
    make_model,
    token_ids,
)


def int8_decoder(model: Model, rows: int, dtype=None, cache_dtype=torch.float32) -> Decoder:
    weights = DecodeWeights.from_model(model, dtype, torch.int8)
    return replace(Decoder.of(model, rows, dtype, cache_dtype), weights=weights)


@pytest.mark.parametrize("shape", [(32, 64), (37, 70), (3, 16, 7), (1, 1)])
def test_every_integer_has_its_place_and_padding_is_zero(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = pack_int8(weight, torch.full(packed_int8_shape(weight.shape), -1, dtype=torch.int32))
    integers, scales = quantize(weight)
    assert integers.abs().amax() == LARGEST and (integers * scales - weight).abs().le(scales / 1.999).all()
    values = out[..., :-1, :].contiguous().view(torch.int8).unflatten(-1, (16, 4))  # [..., N / 16, K / 4, 16, 4]
    found = values.transpose(-3, -2).flatten(-2)  # [..., N / 16, 16, K]
    found = found.flatten(-3, -2)
    n, k = shape[-2:]
    assert found.shape[-1] % GROUP == 0 and torch.equal(found[..., :n, :k], integers.to(torch.int8))
    assert found.count_nonzero() == integers.count_nonzero()
    rows = out[..., -1, :].contiguous().view(torch.float32).flatten(-2)
    assert torch.equal(rows[..., :n], scales.squeeze(-1)) and (rows[..., n:] == 0).all()


@pytest.mark.parametrize("shape", [(64, 64), (42, 6), (2, 34, 65)])
def test_gate_and_up_alternate_block_by_block(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = pack_int8(weight, torch.empty(packed_int8_shape(weight.shape, True), dtype=torch.int32), True)
    gate, up = weight.chunk(2, dim=-2)
    for half, packed in zip((gate, up), out.unbind(len(shape) - 1), strict=True):
        assert torch.equal(packed, pack_int8(half, torch.empty(packed_int8_shape(half.shape), dtype=torch.int32)))


def test_rows_of_nothing_and_of_no_numbers():
    x = torch.zeros(3, GROUP)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    rounded = rounded_activations(x)
    assert torch.equal(rounded[0], x[0]) and rounded[1].isnan().all() and not rounded[2].isfinite().any()
    assert torch.equal(rounded_rows(x[:1]), x[:1])


def test_the_reference_product_is_that_of_the_rounded_factors():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 150, generator=generator, dtype=torch.float64) for n in (5, 33))
    product = linear_int8_ref(x, w.float())
    assert torch.allclose(product, rounded_activations(x) @ rounded_rows(w.float()).double().t(), rtol=1e-5, atol=1e-5)
    error = (product - x @ w.float().double().t()).pow(2).mean().sqrt() / product.std()
    assert 1e-3 < error < 2e-2


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_native_step_is_the_reference_but_for_rare_roundings_to_the_other_side(name):
    model = make_model(CONFIGS[name])
    ids = token_ids(model.config, 3, 21)
    exact = feed(Decoder.of(model, 3), ids).double()
    native = feed(int8_decoder(model, 3), ids).double()
    reference = feed(replace(int8_decoder(model, 3), backend="reference"), ids).double()
    rounding = (reference - exact).pow(2).mean().sqrt()
    assert 1e-3 < rounding / exact.std() < 0.1
    assert (native - reference).pow(2).mean().sqrt() < rounding / 2


@needs_native
@pytest.mark.parametrize("name", ["dense", "moe"])
@torch.no_grad()
def test_the_step_over_a_cache_is_the_whole_forward_with_rounded_weights(name):
    model = make_model(CONFIGS[name])
    ids = token_ids(model.config, 3, 21)
    exact = model(ids).logits.double()
    before = copy.deepcopy(model.state_dict())
    with rounded_weights(model):
        whole = model(ids).logits.double()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits.double(), exact), "all is as it was"
    step = feed(int8_decoder(model, 3), ids).double()
    rounding = (whole - exact).pow(2).mean().sqrt()
    assert rounding > 0 and (step - whole).pow(2).mean().sqrt() < rounding / 2


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bit_for_bit_in_any_batch_and_on_any_number_of_threads(name, dtype):
    model = make_model(CONFIGS[name])
    assert_rows_are_the_same(lambda rows: int8_decoder(model, rows, dtype), token_ids(model.config, 19, 5))


@needs_native
def test_empty_slots_yield_zeros_and_touch_nothing():
    model = make_model(CONFIGS["moe"])
    assert_empty_slots_are_left_alone(lambda rows: int8_decoder(model, rows), token_ids(model.config, 4, 3))


@needs_native
@torch.no_grad()
def test_weights_are_packed_again_in_place_and_over_a_float8_cache():
    model, changed = make_model(CONFIGS["moe"]), make_model(CONFIGS["moe"], seed=1)
    decoder = int8_decoder(model, 1, cache_dtype=FP8)
    before = decoder.step(torch.tensor([3]))
    weights = DecodeWeights.from_model(changed, None, torch.int8)
    matrices = [i for i, role in enumerate(weights.roles) if role in ("matrix", "gate_up")]
    again = weights.operands(into=decoder.operands)
    assert [again[i].data_ptr() for i in matrices] == [decoder.operands[i].data_ptr() for i in matrices]
    decoder.weights, decoder.operands = weights, again
    decoder.lengths.zero_()
    after = decoder.step(torch.tensor([3]))
    assert not torch.equal(after, before)
    assert torch.equal(after, int8_decoder(changed, 1, cache_dtype=FP8).step(torch.tensor([3])))


@needs_native
@torch.no_grad()
def test_a_weight_that_is_no_number_is_seen_in_the_logits():
    model = make_model(CONFIGS["dense"])
    model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    assert int8_decoder(model, 1).step(torch.tensor([3])).isnan().any()


@needs_native
def test_native_refuses_wrong_sizes():
    decoder = int8_decoder(make_model(CONFIGS["dense"]), 2)
    w = decoder.weights
    narrow = [t[:150] if role == "gate_up" else t for t, role in zip(w.tensors, w.roles, strict=True)]
    with pytest.raises(RuntimeError, match="gate_up and down: sizes disagree"):
        replace(decoder, weights=replace(w, tensors=tuple(narrow))).step(torch.tensor([1, 2]))


def test_what_cannot_be_met_is_one_line():
    with pytest.raises(ValueError, match=r"weights_dtype=torch\.int8 needs a CPU or a CUDA GPU, not mps: use .*=None"):
        check_weights_dtype(torch.int8, torch.device("mps"))
    with pytest.raises(ValueError, match=r"weights_dtype=torch\.float16 must be None or torch\.int8"):
        DecodeWeights.from_model(make_model(CONFIGS["dense"]), None, torch.float16)
    check_weights_dtype(None, torch.device("mps"))
    check_weights_dtype(torch.int8, torch.device("cuda"))
