import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.swiglu import swiglu, swiglu_ref
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand

SHAPES = [(1, 2), (63, 74), (123, 246), (507, 16), (2, 5, 3, 32), (3, 2 * 1408), (74,), (1, 2 * 1728)]
NAMES = ["y", "dgate_up"]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype):
    assert_contract(swiglu, swiglu_ref, [rand(*shape, scale=3).to(dtype)], NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steep_gates(dtype):
    gate = torch.tensor([-1e4, -200, -89, -60, -20, -1.28, -0.0, 0, 1e-3, 20, 60, 200, 1e4], device=DEVICE)
    gate_up = torch.cat((gate.expand(5, -1), rand(5, 13)), dim=1).to(dtype)
    assert_contract(swiglu, swiglu_ref, [gate_up], NAMES)


def test_the_reference_takes_the_gate_from_the_first_half():
    gate_up = torch.tensor([[0.0, 1.0, 3.0, 5.0]])
    torch.testing.assert_close(swiglu_ref(gate_up), torch.tensor([[0.0, 5 / (1 + torch.e**-1)]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    wide = rand(2, 9, 3, 80).to(dtype)
    for part in (wide[..., 6:80], wide[:, :, 1], wide.transpose(0, 1), wide[..., ::2]):
        assert not part.is_contiguous()
        assert_contract(swiglu, swiglu_ref, [part], NAMES)
    row = rand(1, 34).to(dtype)
    assert_contract(lambda x: swiglu(x.expand(5, -1)), lambda x: swiglu_ref(x.expand(5, -1)), [row], NAMES)
    assert swiglu(wide.transpose(0, 1)).is_contiguous()


def test_a_strided_gradient():
    gate_up = rand(7, 5, 12)
    assert_contract(lambda x: swiglu(x).transpose(0, 2), lambda x: swiglu_ref(x).transpose(0, 2), [gate_up], NAMES)


def test_no_rows():
    gate_up = rand(0, 3, 64).requires_grad_()
    y = swiglu(gate_up)
    y.sum().backward()
    assert y.shape == (0, 3, 32) and gate_up.grad.shape == gate_up.shape


def test_second_backward():
    assert_second_backward_agrees(swiglu, [rand(63, 74)])


def test_only_the_input_is_saved():
    gate_up, saved = rand(5, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate_up)
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]


def test_reference_by_finite_differences():
    assert torch.autograd.gradcheck(swiglu_ref, rand(5, 6).double().requires_grad_())


def test_opcheck():
    gate_up = rand(9, 74).requires_grad_()
    torch.library.opcheck(torch.ops.minimind.swiglu, (gate_up,))
    torch.library.opcheck(torch.ops.minimind.swiglu_backward, (rand(9, 37), gate_up.detach()))


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: x.double(), "gate_up is torch.float64"),
        (lambda x: x[:, :-1], r"gate_up is \[5, 7\]"),
        (lambda x: x[:, :0], r"gate_up is \[5, 0\]"),
        (lambda x: x[0, 0], r"gate_up is \[\]"),
        (lambda x: x.to("meta"), "gate_up is on meta"),
    ],
)
def test_bad_input_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        swiglu(bad(rand(5, 8)))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), max_size=3),
    size=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape(shape, size, dtype, scale):
    assert_contract(swiglu, swiglu_ref, [rand(*shape, 2 * size, scale=scale).to(dtype)], NAMES)
