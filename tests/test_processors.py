"""Runs the numeric tests as on other processors, thread counts and installations: `make test-processors`.

Environment variables keep ATen, oneDNN, MKL and the native operators from using this processor's newer instructions, so
sums run in another order and round differently, as on an older processor. Others shuffle the sums (sum_order.py), to
imitate processors that we do not have. A configuration that this machine does not support is skipped with the reason.
MINIMIND_TEST_PYTHONS names other interpreters (another Python or PyTorch) as paths separated by colons; each needs the
project's dependencies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind.ops import native

ROOT = Path(__file__).parents[1]
PYTHONS = [path for path in os.environ.get("MINIMIND_TEST_PYTHONS", "").split(os.pathsep) if path]
NUMERIC = [
    "tests/csrc/test_cuda_emulated.py",
    "tests/export/test_hf.py",
    "tests/inference",
    "tests/kernels",
    "tests/objectives",
    "tests/ops",
    "tests/rewards",
    "tests/training",
    *(
        f"tests/test_{name}.py"
        for name in ("bench_rl", "golden", "lora", "lora_files", "modeling", "value_head", "weights")
    ),
]
NOT_NUMERIC = [  # files, names and processes: the same on every processor
    *(f"tests/inference/test_{name}.py" for name in ("detokenizer", "requests", "scheduler")),
    *(
        f"tests/training/test_{name}.py"
        for name in (
            "arguments",
            "averaging",
            "batches",
            "checkpoint",
            "data_split",
            "job",
            "lengthen",
            "plan",
            "plan_sample",
            "profiling",
            "references",
            "run_folder",
        )
    ),
]
# What CI runs: the tests whose results come from the native operators or from products of PyTorch. The others of
# NUMERIC compute with numpy (kernels in Triton's interpreter), with code compiled once for any processor (csrc/cuda
# emulated), or are about schedules, files and whole scripts.
ARITHMETIC = [
    "tests/inference",
    "tests/kernels/test_linear_cross_entropy.py",
    "tests/kernels/test_linear_distillation.py",
    "tests/kernels/test_linear_log_probs.py",
    "tests/objectives",
    "tests/ops",
    "tests/training/rl",
    *(
        f"tests/training/test_{name}.py"
        for name in ("convergence", "depth", "muon", "optim", "padded", "pairs", "ppo_spo", "reason")
    ),
    *(f"tests/test_{name}.py" for name in ("golden", "lora", "modeling", "value_head", "weights")),
]
NOT_ARITHMETIC = [f"tests/inference/test_{name}.py" for name in ("engine_service", "late")]
# What stands for a whole processor, then one thing at a time.
CONFIGURATIONS = {
    "before_avx": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MINIMIND_CPU_KERNELS": "generic", "OMP_NUM_THREADS": "1",
    },
    "with_avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MINIMIND_CPU_KERNELS": "avx2", "OMP_NUM_THREADS": "1",
    },
    "aten_default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten_avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn_sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn_avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn_avx512_core": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "onednn_avx512_core_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "mkl_avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl_compatible": {"MKL_CBWR": "COMPATIBLE"},
    "kernels_generic": {"MINIMIND_CPU_KERNELS": "generic"},
    "kernels_avx2": {"MINIMIND_CPU_KERNELS": "avx2"},
    "kernels_avx2_vnni": {"MINIMIND_CPU_KERNELS": "avx2_vnni"},
    "kernels_avx512": {"MINIMIND_CPU_KERNELS": "avx512"},
    "kernels_avx512_vnni": {"MINIMIND_CPU_KERNELS": "avx512_vnni"},
    "kernels_avx512_bf16": {"MINIMIND_CPU_KERNELS": "avx512_bf16"},
    "kernels_amx": {"MINIMIND_CPU_KERNELS": "amx"},  # emulated: tests/csrc/test_amx.py
    "kernels_neon": {"MINIMIND_CPU_KERNELS": "neon"},
    "kernels_neon_dotprod": {"MINIMIND_CPU_KERNELS": "neon_dotprod"},
    "kernels_neon_bf16": {"MINIMIND_CPU_KERNELS": "neon_bf16"},
    "sums_shuffled": {"MINIMIND_TEST_SUM_ORDER": "1"},
    "sums_shuffled_again": {"MINIMIND_TEST_SUM_ORDER": "2"},
    "threads_1": {"OMP_NUM_THREADS": "1"},
    "threads_2": {"OMP_NUM_THREADS": "2"},
    "threads_3": {"OMP_NUM_THREADS": "3"},
}  # fmt: skip


def why_not(environment: dict[str, str]) -> str | None:
    kernels = environment.get("MINIMIND_CPU_KERNELS")
    if kernels is None:
        return None
    missing = native.why_not(torch.device("cpu"))
    if missing is None and kernels not in native.build_info().cpu_kernels:
        missing = f"this processor or build has no {kernels} kernels"
    return missing


def assert_green(root: Path, environment: dict[str, str], python: str = sys.executable, some: bool = False) -> None:
    """Run the numeric tests in `root`, or those of arithmetic alone, showing their output as they run, since they take
    minutes."""
    ignored = [f"--ignore={path}" for path in NOT_NUMERIC + NOT_ARITHMETIC * some]
    tests = [*ARITHMETIC, "-k", "not triton"] if some else NUMERIC
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *workers(python), *ignored, *tests]
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    assert process.wait() == 0, "".join(lines[-80:])
    assert re.search(r"\d+ passed", lines[-1]), lines[-1]


def workers(python: str) -> list[str]:
    """Use two processes if pytest-xdist is installed for that interpreter."""
    found = subprocess.run([python, "-c", "import xdist"], capture_output=True).returncode == 0
    return ["-n", "2", "--dist", "loadfile"] if found else []


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_numbers_of_another_processor(name):
    reason = why_not(CONFIGURATIONS[name])
    if reason is not None:
        pytest.skip(reason)
    assert_green(ROOT, CONFIGURATIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["before_avx", "with_avx2"])
def test_arithmetic_of_another_processor(name):
    """What CI runs beside the plain suite."""
    reason = why_not(CONFIGURATIONS[name])
    if reason is not None:
        pytest.skip(reason)
    assert_green(ROOT, CONFIGURATIONS[name], some=True)


def test_every_named_test_is_there():
    """pytest itself refuses a missing path, but not one that is to be ignored."""
    for path in NUMERIC + NOT_NUMERIC + ARITHMETIC + NOT_ARITHMETIC:
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    """Copy the tree without built files, and set a PATH without a compiler."""
    root, tools = tmp_path / "tree", tmp_path / "bin"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    tools.mkdir()
    for tool in ("bash", "sh", "git", "env", "pgrep", "uname"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    assert_green(root, {"PATH": str(tools), "CXX": "", "CC": ""})


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS or [pytest.param("", marks=pytest.mark.skip("none named"))])
def test_another_python_or_pytorch(python):
    assert_green(ROOT, {}, python)
