"""Every kernel compiles for every card in its default configuration, without spills (bench/resources.py)."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from bench.compilation.occupancy import CARDS, Occupancy, occupancy

ROOT = Path(__file__).parents[2]
OLD, NEW = ([arch for arch in CARDS if (arch >= 80) == new] for new in (False, True))
NATIVE = ROOT / "csrc/cuda"
SUBSET = ("minimind2-moe", "8/4 heads of 96", "vocabulary of 6400")  # launches every kernel

SPILLING = """
import sys

import torch

from bench import resources
from bench.compilation.capture import capture
from minimind.kernels.triton_support import jit, launch, tl


@jit
def _spilling_kernel(p_x, p_y, SIZE: tl.constexpr):
    o_tile = tl.arange(0, SIZE)
    b_x = tl.load(p_x + o_tile)  # [SIZE], 256 numbers a thread
    tl.store(p_y + o_tile, b_x - tl.sum(b_x, axis=0))


def run():
    launch(_spilling_kernel, (1,), torch.ones(1), torch.ones(1), SIZE=8192, num_warps=1)


resources.capture_all = lambda args: capture({"control": run}, 86, "fp32")
sys.exit(resources.main(resources.Args(json=sys.argv[1], jobs=1, native="none")))
"""


FOR_MANY_SIZES = """
import sys

import torch

from bench.compilation import capture, op_cases


def compilations(tokens):
    op_cases.TOKENS = tokens
    found = capture.capture(op_cases.cases(torch.bfloat16, sys.argv[1:]), 86, "bf16")
    return {c.key: f"{c.kernel} ({c.case})" for c in found}


known = compilations(96)
for tokens in (1, 2, 97, 2064):
    for key, name in compilations(tokens).items():
        if key not in known:
            print(f"{name} is compiled anew for {tokens} tokens")
"""


FOR_MANY_LENGTHS = """
import torch

from bench.compilation import run_cases
from bench.compilation.capture import capture

few, many = (
    capture(run_cases.cases(torch.bfloat16, lengths), 90, "bf16") for lengths in (run_cases.FEW, run_cases.MANY)
)
for key, name in ({c.key: f"{c.kernel} ({c.case})" for c in many}).items():
    if key not in {c.key for c in few}:
        print(f"{name} is compiled anew for some length")
for kernel, count in run_cases.variants(many).items():
    if count > 3:
        print(f"{kernel} has {count} variants")
"""


FLOAT64_ARGUMENTS = """
import dataclasses
import re
import sys

import torch

from bench.compilation import capture, compiling, op_cases

found = {c.kernel: c for c in capture.capture(op_cases.cases(torch.bfloat16, sys.argv[1:]), 86, "bf16")}
for kernel, job in sorted(found.items()):
    if "fp32" in job.signature.values():
        wide = {name: "fp64" if kind == "fp32" else kind for name, kind in job.signature.items()}
        code = compiling._compile(dataclasses.replace(job, signature=wide)).asm["ttir"]
        lines = [line.strip() for line in code.splitlines() if re.search(r"\\bf64\\b|xf64", line)]
        assert lines, kernel
        bad = [line for line in lines if not line.startswith("tt.func") and "arith.truncf" not in line]
        print(kernel, "computes in float64:" if bad else "rounds first", *bad[:1])
"""


def run(*command: str) -> subprocess.CompletedProcess:
    """Run in a separate process, since this one may interpret its kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path()}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


def path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)


def compile_kernels(tmp_path: Path, *flags: str) -> list[dict]:
    report = tmp_path / "resources.json"
    result = run("bench/resources.py", "--json", str(report), *flags)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(report.read_text(encoding="utf-8"))


def launched_kernels() -> set[tuple[str, str]]:
    """(module, name) of each @jit function that no other one calls."""
    defined, used = set(), set()
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.dump(decorator) for decorator in node.decorator_list
            ):
                defined.add((f"minimind.kernels.{file.stem}", node.name))
                used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return {(module, name) for module, name in defined if name not in used}


def check_rows(rows: list[dict], grouped: bool = True) -> None:
    """grouped: whether the products of experts are among them."""
    for row in rows:
        name = f"{row['module']}.{row['kernel']}, {row['case']}, {row['dtype']}, sm_{row['arch']}"
        assert row["spilled"] == 0, name
        assert row["shared"] <= CARDS[row["arch"]].shared_per_program, name
        assert row["programs"] >= 1 and 0 < row["occupancy"] <= 1, name
        assert 16 <= row["registers"] <= 255, name
        if row["module"].endswith("grouped_gemm") and row["multiplies_matrices"]:
            tensor_core = row["hmma"] + row["hgmma"]
            assert tensor_core > 0 if row["dtype"] == "bf16" else row["ffma"] > 0 and tensor_core == 0, name
    expected = {k for k in launched_kernels() if grouped or not k[0].endswith(("moe_experts", "grouped_gemm"))}
    assert {(row["module"], row["kernel"]) for row in rows} == expected
    assert any(row["multiplies_matrices"] for row in rows) == grouped


@pytest.mark.heavy
def test_every_kernel_compiles_without_spills(tmp_path):
    flags = ("--arch", "86", "--dtype", "bf16", "--native", "none", "--only", *SUBSET)
    check_rows(compile_kernels(tmp_path, *flags))


def check_native_rows(rows: list[dict]) -> None:
    for row in rows:
        name = f"{row['kernel']} ({row['case']}), sm_{row['arch']}"
        assert row["spilled"] == row["stack"] == 0, name
        assert row["programs"] >= 1 and row["shared"] <= CARDS[row["arch"]].shared_per_program, name
        assert (row["hmma"] > 0) == (row["kernel"] == "tensor_core_kernel"), name
    found = re.findall(r"__global__[^;{]*?(\w+_kernel)\(", "".join(f.read_text() for f in NATIVE.glob("*.cuh")))
    assert {row["kernel"] for row in rows} == set(found) and len(found) == 5


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
@pytest.mark.heavy
def test_every_native_kernel_compiles_without_spills(tmp_path):
    check_native_rows(compile_kernels(tmp_path, "--native", "only", "--arch", "86"))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", NEW)
def test_every_native_kernel_on_every_card(arch, tmp_path):
    check_native_rows(compile_kernels(tmp_path, "--native", "only", "--arch", str(arch)))


def test_native_kernels_need_nvcc(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    result = run("bench/resources.py", "--native", "only")
    assert result.returncode == 1
    assert "error: --native only: the kernels of csrc/cuda are not compiled: nvcc" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [*product(OLD, ("fp16", "fp32")), *product(NEW, ("bf16", "fp32"))])
def test_every_case_on_every_card(arch, dtype, tmp_path):
    rows = compile_kernels(tmp_path, "--arch", str(arch), "--dtype", dtype, "--native", "none")
    check_rows(rows, grouped=arch in NEW)


@pytest.mark.heavy
def test_the_number_of_tokens_compiles_nothing_anew(tmp_path):
    script = tmp_path / "sizes.py"
    script.write_text(FOR_MANY_SIZES, encoding="utf-8")
    result = run(str(script), *SUBSET)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr[-4000:]


@pytest.mark.heavy
def test_a_run_compiles_few_variants_whatever_its_lengths(tmp_path):
    """Prompts of 1 to 600 tokens, rows of 128 to 1024, batches of 1 to 64 samples, training on 1 to 17 documents."""
    script = tmp_path / "lengths.py"
    script.write_text(FOR_MANY_LENGTHS, encoding="utf-8")
    result = run(str(script))
    assert (result.returncode, result.stdout) == (0, ""), result.stderr[-4000:]


@pytest.mark.slow
def test_no_kernel_computes_in_float64(tmp_path):
    """A Python number that Inductor passes to a kernel is float64, and would promote everything it touches."""
    script = tmp_path / "wide.py"
    script.write_text(FLOAT64_ARGUMENTS, encoding="utf-8")
    result = run(str(script), *SUBSET)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith("rounds first") for line in lines), result.stdout


def test_a_spill_is_reported(tmp_path):
    script, report = tmp_path / "spilling.py", tmp_path / "resources.json"
    script.write_text(SPILLING, encoding="utf-8")
    result = run(str(script), str(report))
    assert result.returncode == 1, result.stdout + result.stderr
    (row,) = json.loads(report.read_text(encoding="utf-8"))
    assert row["kernel"] == "_spilling_kernel" and row["spilled"] > 0 and row["stack"] > 0
    assert f"spills {row['spilled']} bytes" in result.stdout


def test_what_must_not_ship():
    compiling = pytest.importorskip("bench.compilation.compiling")
    fine = compiling.Resources(
        "case", "bf16", 86, "module", "kernel", 8, 3, 128, 0, 0, 99 * 1024, 1, 0.17, "shared", True, 64, 0, 0
    )
    assert fine.problems == []
    for change, word in (
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 99 * 1024 + 1}, "shared memory"),
        ({"programs": 0}, "not one program"),
        ({"hmma": 0}, "without a tensor core"),
    ):
        (problem,) = dataclasses.replace(fine, **change).problems
        assert word in problem
    assert dataclasses.replace(fine, hmma=0, dtype="fp32").problems == []


@pytest.mark.parametrize(
    "arch, warps, registers, shared, expected",
    [
        # 255 registers round to 8192 a warp: two warps in each quarter of the file, eight in all
        (80, 4, 255, 0, Occupancy(2, 8 / 64, "registers")),
        # 41 round to 1536 a warp: ten in each quarter, 40 in all, where an undivided file would hold 42
        (80, 2, 41, 0, Occupancy(20, 40 / 64, "registers")),
        (80, 1, 41, 0, Occupancy(32, 32 / 64, "programs")),
        (86, 8, 40, 48 * 1024, Occupancy(2, 16 / 48, "shared")),  # 49 KiB each of 100
        (86, 4, 32, 0, Occupancy(12, 1.0, "warps")),
        (86, 8, 32, 99 * 1024, Occupancy(1, 8 / 48, "shared")),
        (86, 8, 32, 100 * 1024, Occupancy(0, 0.0, "shared")),
        (89, 1, 32, 0, Occupancy(24, 24 / 48, "programs")),
        (90, 16, 64, 75 * 1024, Occupancy(2, 32 / 64, "registers")),
        (90, 16, 32, 113 * 1024, Occupancy(2, 32 / 64, "shared")),
    ],
)
def test_occupancy(arch, warps, registers, shared, expected):
    assert occupancy(arch, warps, registers, shared) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ({"arch": (61,)}, "--arch 61: unknown; choose from 70, 75, 80, 86, 89, 90, 120"),
        ({"dtype": ("int8",)}, "--dtype int8: unknown; choose from bf16"),
        ({"only": ("nothing of this name",)}, "no case has this in its name"),
    ],
)
def test_bad_arguments(given, message):
    resources = pytest.importorskip("bench.resources")
    with pytest.raises(ValueError, match=message):
        resources.capture_all(resources.Args(**given))


def test_a_bad_argument_is_one_line():
    result = run("bench/resources.py", "--arch", "61")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: --arch 61") and result.stderr.count("\n") == 1
