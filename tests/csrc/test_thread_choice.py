"""The number of threads of a decode step follows the time that steps take."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from minimind.ops.native_build import cxx


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("program") / "thread_choice"
    source = Path(__file__).with_name("thread_choice.cpp")
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Werror", "-o", path, source], check=True)
    return path


@pytest.mark.parametrize("most", [2, 3, 8])
def test_all_threads_on_an_idle_machine_and_one_beside_another_program(program, most):
    """Three phases: all threads are 1.6 times as fast as one; another program makes them a hundred times slower; that
    program has ended."""
    lines = subprocess.run([program, str(most)], check=True, capture_output=True, text=True).stdout.splitlines()
    idle, busy, again = ([float(figure) for figure in line.split()] for line in lines)
    assert idle[0] < 0.02 * 2000 and idle[2] < 1.02
    # two slow steps, then two with each further number of threads that is slow, and one in between
    assert busy[1] <= 2 + 3 * 3 and busy[0] > 0.98 * 20_000 and busy[2] < 1.1
    assert again[0] < 0.6 * 20_000 and again[2] < 1.4


def test_prompts_try_other_numbers_only_when_they_become_slow(program):
    lines = subprocess.run([program, "2", "4096"], check=True, capture_output=True, text=True).stdout.splitlines()
    idle, busy, again = ([float(figure) for figure in line.split()] for line in lines)
    assert idle == [0, -1, 1.0]
    assert busy[1] <= 2 + 3 and busy[0] > 0.98 * 20_000 and busy[2] < 1.1
    assert again[0] < 0.6 * 20_000 and again[2] < 1.4


def test_one_thread_is_never_left(program):
    lines = subprocess.run([program, "1"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["2000", "0"], ["20000", "0"], ["20000", "0"]]
