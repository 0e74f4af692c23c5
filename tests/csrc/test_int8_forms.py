"""Products of 8 bits (csrc/cpu/int8.h) compiled for every instruction set that this processor has, beside float64."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimind.inference.decode.int8 import GROUP, LARGEST, pack_int8, packed_int8_shape, quantize
from minimind.ops import native
from minimind.ops.native_build import cxx
from tests.csrc import forms

HERE = Path(__file__).parent
FLAGS = forms.flags(forms.X86) | forms.flags(forms.ARM)
NAMES = [name for name in FLAGS if name in native.build_info().cpu_kernels] or ["generic"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="session", name="forms")
def compiled(tmp_path_factory):
    """The library of each instruction set."""
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder, libraries = tmp_path_factory.mktemp("int8"), {}
    for name in NAMES:
        command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=fast", f"-DMINIMIND_ISA={name}"]
        command += [*FLAGS[name], str(HERE / "int8_forms.cpp"), "-o", str(folder / f"{name}.so")]
        subprocess.run(command, check=True)
        libraries[name] = ctypes.CDLL(str(folder / f"{name}.so"))
    return libraries


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def size(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def rows_of(library: ctypes.CDLL, x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [K] -> integers int32 [groups, 64] and scales float32 [groups] as C++ makes them."""
    groups = -(-len(x) // GROUP)
    integers, scales = torch.full((groups, GROUP), -1, dtype=torch.int32), torch.full((groups,), float("nan"))
    library.quantize_row(address(x), size(len(x)), address(integers), address(scales))
    return integers, scales


def product(library: ctypes.CDLL, w: Tensor, x: Tensor) -> Tensor:
    packed = pack_int8(w, torch.zeros(packed_int8_shape(w.shape), dtype=torch.int32))
    out = torch.full((len(x), len(w)), float("nan"))
    k_size = size(-(-w.shape[1] // GROUP) * GROUP)
    library.multiply(
        address(packed), k_size, size(len(w)), address(x), size(x.shape[1]), size(len(x)), address(out)
    )  # fmt: skip
    return out


def exact(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the quantised factors in float64, [B, N], and the sum of its terms' magnitudes."""
    integers, w_scales = quantize(w)
    pad = (0, -w.shape[1] % GROUP)
    w_groups = torch.nn.functional.pad(integers, pad).double().unflatten(1, (-1, GROUP))
    values, x_scales = quantize(torch.nn.functional.pad(x, pad).unflatten(1, (-1, GROUP)))
    terms = torch.einsum("ngk,bgk->bng", w_groups, values.double()) * x_scales.double().squeeze(-1)[:, None]
    scale = w_scales.double().squeeze(-1)
    return terms.sum(-1) * scale, terms.abs().sum(-1) * scale


CASES = [(1, 16, 64), (1, 40, 130), (3, 37, 70), (8, 64, 512), (11, 48, 1408), (19, 16, 45), (2, 1, 1)]  # B, N, K


@pytest.mark.parametrize("batch, n, k", CASES)
def test_every_form_is_within_the_rounding_of_the_sum_over_groups(forms, batch, n, k):
    generator = torch.Generator().manual_seed(n * k)
    w, x = (torch.randn(rows, k, generator=generator) for rows in (n, batch))
    truth, magnitude = exact(w, x)
    groups = -(-k // GROUP)
    bound = (groups + 2) * EPS / 2 * 1.001 * magnitude  # a product and a sum for each group, then the row's scale
    for name, library in forms.items():
        out = product(library, w, x)
        assert ((out.double() - truth).abs() <= bound).all(), name


def test_the_integers_and_one_groups_product_are_the_same_bits_in_every_form(forms):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(19, GROUP, generator=generator) * torch.logspace(-6, 6, 19)[:, None]
    x[3, :40] = 0
    x[4] = 0
    x[5] = torch.arange(GROUP) + 0.5  # halves, if the largest were 127
    x[5, 0] = 127
    w = torch.randn(33, GROUP, generator=generator)
    w[7] = 0
    expected = None
    for name, library in forms.items():
        made = [rows_of(library, row) for row in x]
        integers, scales = quantize(x)
        assert torch.equal(torch.stack([i.flatten() for i, _ in made]), integers.int()), name
        assert torch.equal(torch.cat([s for _, s in made]), scales.squeeze(-1)), name
        out = product(library, w, x)
        expected = out if expected is None else expected
        assert torch.equal(out, expected), name
        assert (out[4] == 0).all() and (out[:, 7] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_saturate_nothing(forms, sign):
    w, x = torch.full((16, 128), float(LARGEST)), torch.full((9, 128), sign * float(LARGEST))
    x[:, ::2] *= -1
    w[:, ::2] *= -1
    for name, library in forms.items():
        assert (product(library, w, x) == sign * 128.0 * LARGEST**2).all(), name


def test_what_is_no_number_stays_none(forms):
    w, x = torch.ones(16, 128), torch.ones(3, 128)
    x[0, 70], x[1, 3] = float("nan"), float("inf")
    for name, library in forms.items():
        out = product(library, w, x)
        assert not out[:2].isfinite().any() and (out[2] == 128).all(), name


def test_a_short_row_is_filled_with_zeros(forms):
    x = torch.arange(1, 71).float()
    for library in forms.values():
        integers, scales = rows_of(library, x)
        assert (integers[1, 6:] == 0).all() and integers[1, 5] == LARGEST and scales[1] == torch.tensor(70.0) / LARGEST
