"""The threads of a decode step divide a product: every block is computed once, and a slow thread is helped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from minimind.ops.native_build import cxx

SOURCE = Path(__file__).with_name("split.cpp")


def run(folder: Path, *options: str) -> None:
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "split"
    base = [compiler, "-std=c++17", "-O1", "-pthread", "-DMINIMIND_ISA=generic", "-Wall", "-Wno-unused-function"]
    built = subprocess.run([*base, *options, "-o", program, SOURCE], capture_output=True, text=True)
    if built.returncode and options:
        pytest.skip(f"the compiler does not know {' '.join(options)}")
    assert built.returncode == 0, built.stderr[-2000:]
    result = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_every_block_once_and_a_stuck_thread_is_helped(tmp_path):
    run(tmp_path)


@pytest.mark.heavy
def test_no_two_threads_compute_a_block_under_the_thread_sanitizer(tmp_path):
    run(tmp_path, "-fsanitize=thread")
