"""Kernels of Intel AMX (csrc/cpu/tiles.h) beside the pseudo-code of its instructions, which are emulated where the
processor has none."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimind.inference.decode.int8 import pack_int8, packed_int8_shape
from minimind.inference.decode.step import pack_matrix, packed_shape
from minimind.ops import native
from minimind.ops.native_build import cxx, library_name
from tests.csrc import amx, forms

pytestmark = pytest.mark.skipif(amx.why_not() is not None, reason=str(amx.why_not()))
PRODUCTS = Path(__file__).parent / "amx_products.cpp"
STEP, GROUP = 32, 64  # numbers along K of one tile, of bfloat16 and of 8 bits
COUNTS = ("loads", "stores", "bf16", "int8", "configured", "released")


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """amx_products.cpp as a library, and the emulator or None."""
    folder = tmp_path_factory.mktemp("amx")
    emulator = None if amx.HERE else ctypes.CDLL(str(amx.build_emulator(folder)))
    command = [str(cxx()), "-std=c++17", "-O1", "-shared", "-fPIC", *forms.COMMON, "-DMINIMIND_ISA=amx"]
    target = folder / "products.so"
    subprocess.run([*command, *forms.flags(forms.X86)["amx"], str(PRODUCTS), "-o", str(target)], check=True)
    yield ctypes.CDLL(str(target)), emulator
    if emulator is not None:
        emulator.amx_emulator_stop()


def counts(emulator: ctypes.CDLL) -> dict[str, int]:
    emulator.amx_emulator_counts.restype = ctypes.POINTER(ctypes.c_long * len(COUNTS))
    return dict(zip(COUNTS, emulator.amx_emulator_counts().contents, strict=True))


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def size(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def product(library: ctypes.CDLL, w: Tensor, x: Tensor, index: list[int] | None = None) -> Tensor:
    """x [B, K] . w [N, K] in bfloat16, of the rows `index` of x; what lies beyond K in the rows of x is NaN."""
    packed = pack_matrix(w, torch.zeros(packed_shape(w.shape, w.dtype), dtype=w.dtype))
    k_size = -(-w.shape[1] // 4) * 4
    rows = torch.full((len(x), k_size + 6), float("nan"), dtype=w.dtype)
    rows[:, :k_size] = torch.nn.functional.pad(x, (0, k_size - x.shape[1]))
    which = None if index is None else torch.tensor(index, dtype=torch.int32)
    out = torch.full((len(x) if index is None else len(index), len(w)), float("nan"))
    library.multiply_bf16(
        address(packed), size(k_size), size(len(w)), address(rows), size(rows.shape[1]), address(which),
        size(len(out)), address(out),
    )  # fmt: skip
    return out


def flushed(x: Tensor) -> Tensor:
    """Numbers without denormals, as AMX reads and writes them."""
    return x.where(x.abs() >= torch.finfo(torch.float32).tiny, 0.0)


def after_the_manual(w: Tensor, x: Tensor) -> Tensor:
    """x . w as a sequence of `tdpbf16ps`. A product of two bfloat16 and its sum with a float32 are exact in float64."""
    pad = (0, -w.shape[1] % STEP)
    w, x = (flushed(torch.nn.functional.pad(each, pad).float()).double() for each in (w, x))
    out = torch.zeros(len(x), len(w))
    for step in range(0, w.shape[1], STEP):
        parts = [torch.zeros_like(out), torch.zeros_like(out)]
        for k in range(step, step + STEP):
            parts[k % 2] = flushed((parts[k % 2].double() + x[:, k, None] * w[None, :, k]).float())
        out = flushed(out + flushed(parts[0] + parts[1]))
    return out


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


BF16 = [(1, 16, 32), (1, 40, 512), (16, 48, 64), (17, 33, 130), (32, 32, 160), (33, 17, 36), (70, 16, 4), (3, 5, 1)]


@pytest.mark.parametrize("batch, n, k", BF16)
def test_bfloat16_products_are_the_manuals(products, batch, n, k):
    (library, emulator), w, x = products, normals(n, k, seed=1), normals(batch, k)
    before = counts(emulator) if emulator else {}
    out = product(library, w, x)
    assert torch.equal(out, after_the_manual(w, x))
    for row in {0, batch // 2, batch - 1}:
        assert torch.equal(product(library, w, x[row : row + 1].contiguous())[0], out[row])
    index = [(7 * i) % batch for i in range(batch + 1)]
    assert torch.equal(product(library, w, x, index), out[index])
    if emulator:
        done = {name: number - before[name] for name, number in counts(emulator).items()}
        assert done["bf16"] >= -(-k // STEP) * -(-n // 16) and done["int8"] == 0
        assert done["configured"] >= done["released"] > 0  # tiles of other shapes, and none left behind
        assert emulator.amx_emulator_configured() == 0
    exact = x.double() @ w.double().T
    magnitude = x.double().abs() @ w.double().abs().T
    roundings = 16 + 1 + -(-k // STEP)  # of the longest way of one product into the sum
    assert ((out.double() - exact).abs() <= 1.001 * roundings * torch.finfo(torch.float32).eps / 2 * magnitude).all()


def test_denormal_numbers_are_zeros(products):
    (library, _), w, x = products, torch.ones(16, 32).bfloat16(), torch.zeros(3, 32).bfloat16()
    x[0, :2] = 2.0**-130  # a denormal bfloat16
    x[1, 0], x[1, 2], w[:, 2] = 2.0**-126, -(2.0**-126), 1.5  # whose sum is one
    x[2, 0], x[2, 4] = 1.0, 2.0**-130
    expected = torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 16)
    assert torch.equal(product(library, w, x), expected) and torch.equal(after_the_manual(w, x), expected)


def product_of_8_bits(library: ctypes.CDLL, w: Tensor, x: Tensor, index: list[int] | None = None) -> Tensor:
    """The same of w and x in float32, both rounded to 8 bits."""
    packed = pack_int8(w, torch.zeros(packed_int8_shape(w.shape), dtype=torch.int32))
    which = None if index is None else torch.tensor(index, dtype=torch.int32)
    out = torch.full((len(x) if index is None else len(index), len(w)), float("nan"))
    library.multiply_int8(
        address(packed), size(-(-w.shape[1] // GROUP) * GROUP), size(len(w)), address(x), size(x.shape[1]),
        size(len(x)), address(which), size(len(out)), address(out),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("batch", [7, 8, 16, 17, 40])
def test_products_of_8_bits_are_the_same_bits_with_tiles_and_without(products, batch):
    (library, emulator), w, x = products, normals(33, 200, seed=1).float(), normals(batch, 200).float()
    alone = torch.cat([product_of_8_bits(library, w, row.contiguous()) for row in x.split(1)])
    before = counts(emulator)["int8"] if emulator else 0
    assert alone.isfinite().all() and torch.equal(product_of_8_bits(library, w, x), alone)
    if emulator:
        assert (counts(emulator)["int8"] - before) == (0 if batch < 8 else 3 * 4 * -(-batch // 16))
        assert emulator.amx_emulator_configured() == 0
    index = [(5 * i) % batch for i in range(batch)]
    assert torch.equal(product_of_8_bits(library, w, x, index), alone[index])


def test_the_largest_sums_of_8_bits(products):
    w, x = torch.full((16, 128), 127.0), torch.full((9, 128), -127.0)
    assert (product_of_8_bits(products[0], w, x) == -128.0 * 127**2).all()


def child(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **amx.environment(folder), **variables}
    return subprocess.run([sys.executable, *arguments], cwd=forms.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.heavy
def test_the_operators_use_amx_where_the_system_permits_it_and_say_where_not(tmp_path):
    report = child(tmp_path, "-m", "minimind.ops", MINIMIND_CPU_KERNELS="").stdout
    assert "; amx of amx, avx512_bf16, " in report and "no amx" not in report
    if amx.HERE:
        return
    refused = child(tmp_path, "-m", "minimind.ops", MINIMIND_CPU_KERNELS="", AMX_EMULATOR_REFUSES="1").stdout
    assert "; avx512_bf16 of avx512_bf16, " in refused and "; no amx: the system does not let" in refused
    forced = child(tmp_path, "-m", "minimind.ops", AMX_EMULATOR_REFUSES="1")
    assert forced.returncode != 0 and re.search("MINIMIND_CPU_KERNELS=amx: .*no amx: the system", forced.stderr)


@pytest.mark.heavy
def test_the_library_has_no_instruction_of_amx_that_is_not_tested():
    """Other compilers might use more of them; the emulator stops at those that it does not know."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    library = native.PACKAGE / library_name("cpu")
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True).stdout
    used = set(re.findall(r"\t(tile\w+|\w+tilecfg|tdp\w+|tcm\w+)\b", text))
    assert used == {
        "ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps", "tdpbssd",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_and_prompts_with_amx(tmp_path, threads):
    """The tests of the operators themselves, in a process where they take AMX."""
    tests = ["tests/csrc/test_int8_forms.py"]
    tests += [f"tests/inference/{name}" for name in ("decode", "test_prefill.py", "test_engine.py")]
    options = ["-m", "pytest", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-x"]  # faulthandler takes the signal
    result = child(tmp_path, *options, *tests, OMP_NUM_THREADS=str(threads), PYTEST_ADDOPTS="")
    assert result.returncode == 0 and re.search(r"\d+ passed", result.stdout), result.stdout[-4000:] + result.stderr
