"""Compilers' flags for each instruction set of the CPU kernels, and compilers for other processors."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
X86, ARM = "x86_64|AMD64", "aarch64|arm64"
# What every file of kernels is compiled with, as CMakeLists.txt says.
COMMON = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


def flags(processor: str) -> dict[str, list[str]]:
    """The instruction sets in CMakeLists.txt for X86 or ARM, and flags of each; generic comes last."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    part = re.split(r"\n  (?:else|end)if", text.split(f'CMAKE_SYSTEM_PROCESSOR MATCHES "{processor}")')[1])[0]
    variables = {f"${{{name}}}": value for name, value in re.findall(r"set\((\w+) ([^)]*)\)", part)}
    found = {}
    for name, given in re.findall(r"minimind_kernels\((\w+) ([^)]*)\)", part):
        for variable, value in variables.items():
            given = given.replace(variable, value)
        found[name] = given.split()
    return found | {"generic": []}


def cross_compiler() -> list[str] | None:
    """A C++ compiler for Linux on ARM: g++, or clang from the package ziglang; None without either."""
    found = shutil.which("aarch64-linux-gnu-g++")
    return [found] if found else zig("aarch64-linux-musl")


def zig(target: str) -> list[str] | None:
    """Clang for `target` from the package ziglang, which has the headers of other systems; None without it."""
    return [sys.executable, "-m", "ziglang", "c++", "-target", target] if importlib.util.find_spec("ziglang") else None


def for_compiler(command: list[str], given: list[str]) -> list[str]:
    """`given` as this compiler spells it: zig has names of processors in place of -march=armv8.2-a."""
    if "ziglang" not in command:
        return given
    return [re.sub(r"-march=armv[\d.]+-a", "-mcpu=generic", flag) for flag in given]
