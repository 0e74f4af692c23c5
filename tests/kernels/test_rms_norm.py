import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.rms_norm import _rows, add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand

EPS = 1e-5
SHAPES = [(1, 64), (63, 96), (123, 80), (507, 128), (2, 5, 3, 32), (3, 640), (5, 4096), (7,), (2, 1)]


def weight_for(x, dtype):
    return (1 + rand(x.shape[-1], seed=1, scale=0.1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    x = rand(*shape, scale=3).to(dtype)
    assert_contract(
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: rms_norm_ref(x, w, EPS),
        [x, weight_for(x, dtype)],
        ["y", "dx", "dw"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (123, 80), (2, 31, 640)])
def test_add_rms_norm(shape, dtype):
    x, residual = rand(*shape).to(dtype), rand(*shape, seed=5, scale=4).to(dtype)
    assert_contract(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: add_rms_norm_ref(x, r, w, EPS),
        [x, residual, weight_for(x, dtype)],
        ["y", "total", "dx", "dresidual", "dw"],
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(used):
    x, residual = rand(9, 48), rand(9, 48, seed=5)
    names = [("y", "total")[used], "dx", "dresidual", "dw"]
    assert_contract(
        lambda x, r, w: add_rms_norm(x, r, w, EPS)[used],
        lambda x, r, w: add_rms_norm_ref(x, r, w, EPS)[used],
        [x, residual, weight_for(x, torch.float32)],
        names,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_packed_projection_are_read_where_they_lie(dtype):
    packed = rand(2, 17, 12, 80).to(dtype)
    for part in (packed[:, :, :8], packed[:, :, 8:10], packed.transpose(0, 1), packed[..., ::2]):
        assert not part.is_contiguous()
        assert_contract(
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: rms_norm_ref(x, w, EPS),
            [part, weight_for(part, dtype)],
            ["y", "dx", "dw"],
        )


def test_part_of_every_row_is_read_where_it_lies():
    x = rand(3, 18, 64)[:, 1:]
    assert _rows(x)[0] is x and _rows(x[:, -1:])[1] == 1
    assert_contract(
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: rms_norm_ref(x, w, EPS),
        [x, weight_for(x, torch.float32)],
        ["y", "dx", "dw"],
    )


@pytest.mark.parametrize("shape", [(5, 64), (1, 5, 64), (2, 5, 64), (2, 3, 5, 64), (64,), (2, 1, 64)])
def test_rows_side_by_side_are_found_with_one_stride(shape):
    assert _rows(rand(*shape))[1:] == (1, 64, 0)


def test_strides_of_the_two_addends_may_differ():
    x, residual = rand(2, 17, 12, 80)[:, :, :8], rand(17, 2, 8, 80, seed=5).transpose(0, 1)
    assert_contract(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: add_rms_norm_ref(x, r, w, EPS),
        [x, residual, weight_for(x, torch.float32)],
        ["y", "total", "dx", "dresidual", "dw"],
    )


def test_a_float32_weight_keeps_its_float32_gradient():
    x, weight = rand(70, 64).bfloat16(), weight_for(rand(64), torch.float32).requires_grad_()
    y = rms_norm(x, weight, EPS)
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_no_rows():
    x = rand(0, 64).requires_grad_()
    weight = weight_for(x, torch.float32).requires_grad_()
    y = rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == (0, 64) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_second_backward():
    x, residual = rand(70, 64), rand(70, 64, seed=5)
    weight = weight_for(x, torch.float32)
    assert_second_backward_agrees(lambda x, w: rms_norm(x, w, EPS), [x, weight])
    assert_second_backward_agrees(lambda x, r, w: add_rms_norm(x, r, w, EPS), [x, residual, weight])


def test_references_by_finite_differences():
    x, residual = rand(5, 6).double().requires_grad_(), rand(5, 6, seed=5).double().requires_grad_()
    weight = weight_for(x, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_ref(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm_ref(x, r, w, EPS), (x, residual, weight))


def test_opcheck():
    x, residual = rand(9, 48).requires_grad_(), rand(9, 48, seed=5).requires_grad_()
    weight = weight_for(x, torch.float32).detach().requires_grad_()
    rstd = torch.ones(9, device=DEVICE)
    torch.library.opcheck(torch.ops.minimind.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.minimind.add_rms_norm, (x, residual, weight, EPS))
    plain = [t.detach() for t in (x, residual, weight)]
    torch.library.opcheck(torch.ops.minimind.rms_norm_backward, (plain[0], plain[1], plain[2], rstd, None))


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x, w: rms_norm(x.double(), w, EPS), "x is torch.float64"),
        (lambda x, w: rms_norm(x, w[:-1], EPS), r"weight is \[63\], and x needs \[64\]"),
        (lambda x, w: rms_norm(x, w.to("meta"), EPS), "weight is on meta"),
        (lambda x, w: rms_norm(x[:, :0], w[:0], EPS), "rows of 0"),
        (lambda x, w: add_rms_norm(x, x[:3], w, EPS), "residual is"),
        (lambda x, w: add_rms_norm(x, x.bfloat16(), w, EPS), "residual is"),
    ],
)
def test_bad_input_is_refused(bad, message):
    x = rand(5, 64)
    with pytest.raises(ValueError, match=message):
        bad(x, weight_for(x, torch.float32))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), max_size=3),
    size=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    added=st.booleans(),
)
def test_any_shape(shape, size, dtype, scale, added):
    x, residual = rand(*shape, size, scale=scale).to(dtype), rand(*shape, size, seed=5).to(dtype)
    weight = weight_for(x, dtype)
    if added:
        assert_contract(
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
            lambda x, r, w: add_rms_norm_ref(x, r, w, EPS),
            [x, residual, weight],
            ["y", "total", "dx", "dresidual", "dw"],
        )
    else:
        assert_contract(
            lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), [x, weight], ["y", "dx", "dw"]
        )
