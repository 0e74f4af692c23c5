"""The CPU kernels of every instruction set beside float64, in a program without torch (parity/main.cpp). So an emulator
can run those of ARM; those of macOS are at least compiled."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minimind.ops import native
from minimind.ops.native_build import cxx
from tests.csrc import amx, forms

PROGRAM, CPU = Path(__file__).parent / "parity", forms.ROOT / "csrc/cpu"
HERE = forms.ARM if platform.machine() in ("aarch64", "arm64") else forms.X86
# GCC 12 finds its own headers' undefined registers uninitialised; Clang has one of these names.
UNINITIALIZED = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", *UNINITIALIZED]
QEMU = shutil.which("qemu-aarch64")


def compile_form(command: list[str], name: str, given: list[str], folder: Path) -> Path:
    target = folder / f"{name}.o"
    options = [*forms.COMMON, f"-DMINIMIND_ISA={name}", *forms.for_compiler(command, given)]
    compile_files(command, [PROGRAM / "form.cpp"], target, "-c", *options)
    return target


def compile_files(command: list[str], files: Sequence[Path], target: Path, *options: str) -> None:
    full = [*command, "-std=c++17", "-O1", "-pthread", *WARNINGS, *options, *map(str, files), "-o", str(target)]
    result = subprocess.run(full, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(full)}\n{result.stderr[-4000:]}"


def build(
    command: list[str], flags: dict[str, list[str]], folder: Path, *options: str, may_use_amx: Path = CPU / "amx.cpp"
) -> Path:
    """The program with the kernels of these instruction sets, linked statically if `options` say so."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda form: compile_form(command, *form, folder), flags.items()))
    sources = [file for file in PROGRAM.glob("*.cpp") if file.name != "form.cpp"]
    sources += [CPU / f"{name}.cpp" for name in ("dispatch", "threads", "sample")] + [may_use_amx]
    defined = [f"-DMINIMIND_{name.upper()}" for name in flags]
    compile_files(command, [*sources, *objects], folder / "parity", *defined, *options)
    return folder / "parity"


def assert_parity(command: list[str], *names: str) -> None:
    """Run the program: it must have compared the kernels of all of `names`, the best first."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert result.stdout.splitlines()[-1].split(" : ")[0].split() == list(names), result.stdout


def assert_parity_here(folder: Path, *names: str) -> None:
    compiler, flags = cxx(), forms.flags(HERE)
    if compiler is None or not names:
        pytest.skip("no C++ compiler, or the native operators are not built")
    assert_parity([str(build([compiler], {name: flags[name] for name in names}, folder))], *names)


@pytest.mark.heavy
def test_the_best_kernels_of_this_processor_and_generic(tmp_path):
    kernels = native.build_info().cpu_kernels
    assert_parity_here(tmp_path, *dict.fromkeys([*kernels[:1], *kernels[-1:]]))


@pytest.mark.slow
def test_all_kernels_of_this_processor(tmp_path):
    assert_parity_here(tmp_path, *native.build_info().cpu_kernels)


@pytest.mark.slow
@pytest.mark.skipif(amx.why_not() is not None, reason=str(amx.why_not()))
def test_kernels_of_amx(tmp_path):
    names, flags = ["amx", "avx512_bf16", "generic"], forms.flags(HERE)
    replaced = {} if amx.HERE else {"may_use_amx": amx.build_emulator(tmp_path)}
    program = build([str(cxx())], {name: flags[name] for name in names}, tmp_path, **replaced)
    assert_parity([str(program)], *names)


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory) -> Path:
    command = forms.cross_compiler()
    if command is None:
        pytest.skip("no compiler for ARM: tests/README.md says how to install one")
    return build(command, forms.flags(forms.ARM), tmp_path_factory.mktemp("arm"), "-static")


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64: tests/README.md says how to install it")
@pytest.mark.parametrize(
    "processor, names",
    [
        ("cortex-a72", ["neon", "generic"]),  # Raspberry Pi 4
        ("cortex-a76", ["neon_dotprod", "neon", "generic"]),  # Raspberry Pi 5
        ("max", ["neon_bf16", "neon_dotprod", "neon", "generic"]),
    ],
)
def test_kernels_of_arm_in_an_emulator(arm_program, processor, names):
    assert_parity([str(QEMU), "-cpu", processor, str(arm_program)], *names)


@pytest.mark.slow
def test_the_operators_compile_for_macos(tmp_path):
    """Clang, other types behind the same names, and none of Linux's headers."""
    command = forms.zig("aarch64-macos")
    if command is None:
        pytest.skip("ziglang is not installed: tests/README.md says how to install it")
    arm = forms.flags(forms.ARM)
    compile_form(command, "neon_bf16", arm["neon_bf16"], tmp_path)
    defined = [f"-DMINIMIND_{name.upper()}" for name in arm]
    for file in [forms.ROOT / "csrc/register.cpp", *CPU.glob("*.cpp")]:
        if file.name != "kernels.cpp":
            compile_files(command, [file], tmp_path / f"{file.stem}.o", "-c", *defined, '-DMINIMIND_COMPILER="clang"')
