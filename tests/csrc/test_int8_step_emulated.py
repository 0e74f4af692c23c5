"""The CUDA step with 8-bit weights, executed thread by thread on the CPU, against plain PyTorch on the same rounded
weights and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.compilation import native_resources
from minimind.inference.decode.int8 import ROW_UNIT, int8_rows, quantize
from minimind.inference.decode.step import DecodeWeights
from tests.csrc import emulated
from tests.csrc.test_decode_step_emulated import (
    BF16,
    CONFIGS,
    EIGHT,
    FP8,
    FP16,
    FP32,
    LENGTHS,
    Case,
    check,
    check_rows,
    config,
    make_case,
    native,
    same,
)
from tests.inference.decode.test_step import make_model

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")

ODD = config(3, 1, 20, hidden_size=68, intermediate_size=268)  # rows of 68, 60 and 268 numbers


def make_int8_case(model, dtype: torch.dtype, cache_dtype: torch.dtype, lengths=LENGTHS) -> Case:
    case = make_case(model, dtype, cache_dtype, lengths)
    return replace(case, weights=replace(case.weights, int8=True))


def rounded(case: Case, dtype: torch.dtype | None) -> Case:
    """The case with integers times scales in place of the 8-bit matrices, computed in float64 and stored in `dtype`;
    None: the other weights as they are, these in float32."""

    def of_role(tensor, role):
        if role not in ("matrix", "gate_up"):
            return tensor if dtype is None or role == "small" else tensor.to(dtype)
        integers, scales = quantize(tensor.float())
        return (integers.double() * scales.double()).to(dtype or FP32)

    w = case.weights
    tensors = tuple(of_role(t, r) for t, r in zip(w.tensors, w.roles, strict=True))
    return replace(case, weights=replace(w, tensors=tensors, int8=False))


def exact(case: Case) -> Case:
    """The step in float64 on the same integers, scales and cache."""
    tensors = rounded(case, torch.float64).weights.tensors
    wide = case.wide()
    return replace(wide, weights=replace(wide.weights, tensors=tuple(t.double() for t in tensors), int8=False))


def check_int8(ops, case: Case, dtype: torch.dtype = FP32) -> None:
    """dtype: of plain PyTorch's matrices; float32 is the strictest."""
    check(ops, case, rounded(case, dtype), exact(case))


@pytest.mark.parametrize("shape", [(5, 48), (3, 20), (1, 1)])
def test_rows_are_integers_padded_with_zeros_and_scales(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    integers, scales = int8_rows(weight)
    n, k = shape
    expected, factors = quantize(weight)
    assert integers.dtype == torch.int8 and integers.shape == (n, -(-k // ROW_UNIT) * ROW_UNIT)
    assert torch.equal(integers[:, :k].float(), expected) and not integers[:, k:].any()
    assert torch.equal(scales, factors[:, 0])
    again = int8_rows(-weight, (integers, scales))
    assert again[0] is integers and again[1] is scales and torch.equal(integers[:, :k].float(), -expected)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", ["64", "80, QK norm", "96, untied", "odd"])
def test_a_step_is_that_of_the_rounded_weights(ops, name, dtype):
    """Over a float32 cache all arithmetic is float32, as exact as plain PyTorch's in float32 on the same weights."""
    check_int8(ops, make_int8_case(make_model(CONFIGS.get(name, ODD)), dtype, FP32))


@pytest.mark.parametrize("batch", range(1, 9))
def test_every_batch(ops, batch):
    check_int8(ops, make_int8_case(make_model(ODD), BF16, FP32, EIGHT[-batch:]))


@pytest.mark.parametrize("dtype, cache_dtype", [(BF16, BF16), (FP16, FP16), (BF16, FP8), (FP32, FP8)])
def test_a_step_over_every_cache(ops, dtype, cache_dtype):
    """As exact as what the layers compute: the rounded weights in the model's dtype."""
    check_int8(ops, make_int8_case(make_model(CONFIGS["64"]), dtype, cache_dtype), dtype)


@pytest.mark.parametrize("lengths", [[3], [3, 1, 5]])
def test_rows_longer_than_what_is_under_way_at_once(ops, lengths):
    """With 3,164 columns each lane makes seven loads per row, more than the six or three that are in flight at once."""
    model = make_model(config(1, 1, 64, num_hidden_layers=1, intermediate_size=3164, hidden_size=40))
    check_int8(ops, make_int8_case(model, BF16, FP32, lengths))


@pytest.mark.parametrize("dtype, cache_dtype", [(BF16, BF16), (FP32, FP32), (BF16, FP8)])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(ops, dtype, cache_dtype):
    check_rows(ops, make_int8_case(make_model(CONFIGS["64"]), dtype, cache_dtype, EIGHT))


def test_the_order_of_threads_and_blocks_does_not_matter(ops, monkeypatch):
    case = make_int8_case(make_model(CONFIGS["80, QK norm"]), BF16, BF16)
    expected = case.run(native(ops))
    monkeypatch.setenv("EMULATOR_ORDER", "7")
    for mine, theirs in zip(case.run(native(ops)), expected, strict=True):
        assert same(mine, theirs)


def test_as_many_launches_as_with_wide_weights(ops, library):
    case = make_int8_case(make_model(config(2, 1, 32, num_hidden_layers=3)), BF16, BF16, [5] * 8)
    before = library.emulator_launches()
    case.run(native(ops))
    assert library.emulator_launches() - before == 5 * 3 + 1


def test_a_weight_that_is_no_number_is_seen_in_the_logits(ops):
    model = make_model(CONFIGS["64"])
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    assert make_int8_case(model, BF16, FP32, [3]).run(native(ops))[0].isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[:-1], "weights: 23 tensors, but down is still to come"),
        (lambda w: w[:3] + w[4:], r"head scales: not of size \[45\]"),
        (lambda w: [*w[:-1], w[-1].double()], "down scales: another dtype; expected float32"),
        (lambda w: [*w[:-1], w[-1][:-1]], r"down scales: not of size \[72\]"),
        (lambda w: [*w[:-2], w[-2][:, :264].contiguous(), w[-1]], r"down: not of size \[72, 272\]"),
        (lambda w: [*w[:-2], w[-2].float(), w[-1]], "down: float32; expected int8"),
    ],
)
def test_bad_weights(ops, change, message):
    case = make_int8_case(make_model(CONFIGS["64"]), BF16, BF16, [1])
    w = case.weights
    operands = change(w.operands_in_rows())
    with pytest.raises(RuntimeError, match=message):
        case.run(lambda inputs, caches, case: ops.decode_step(*inputs, operands, *caches, *w.settings, None, None))


@pytest.mark.parametrize(
    "width, inner, dtype, expected", [(72, 264, BF16, 8), (68, 268, BF16, 8), (72, 2600, BF16, 4), (66, 264, FP32, 0)]
)
def test_python_knows_how_many_rows_a_step_takes(ops, library, width, inner, dtype, expected):
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1}
    model = make_model(config(1, 1, 64, **sizes))
    assert make_int8_case(model, dtype, dtype, [1]).weights.cuda_rows == expected
    if expected:
        make_int8_case(model, dtype, dtype, [1] * expected).run(native(ops))
        launched = library.emulator_last_threads() // 32, library.emulator_last_shared()
        assert launched == native_resources.launch_of("matvec_kernel", ("q8", str(expected)), columns=width)
        assert native_resources.launch_of("matvec_kernel", ("q8", "8"))[1] <= native_resources.MATVEC_SHARED
    with pytest.raises(RuntimeError, match=r"do not fit|do not begin at multiples of 4 numbers|at most 8"):
        make_int8_case(model, dtype, dtype, [1] * (expected + 1)).run(native(ops))


def test_the_embedding_of_a_tied_head_keeps_its_dtype():
    weights = replace(DecodeWeights.from_model(make_model(CONFIGS["64"]), FP32), int8=True)
    embedding, norm, head, scales = weights.operands_in_rows()[:4]
    assert embedding is weights.tensors[0] and norm is weights.tensors[1]
    assert head.dtype == torch.int8 and scales.shape == (45,)
