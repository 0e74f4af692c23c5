"""Building the native operators, and the reasons given when a part is not built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind.ops import native, native_build
from tests.inference.decode.cases import needs_native

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(native_build.cxx() is None, reason="no C++ compiler on PATH")


def test_the_cpu_part_is_built_where_it_can_be():
    if native_build.why_not_buildable("cpu") is None:
        assert native.why_not(CPU) is None


@needs_compiler
def test_our_declarations_of_torchs_abi_are_torchs_own(tmp_path):
    """Declaring a function twice with different types is a compiler error."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "abi.cpp"
    headers = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
    lines = ["#define USE_CUDA", "#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))"]
    lines += [f"#include <{header}>" for header in headers] + [f'#include "{ROOT}/csrc/torch_abi.h"']
    source.write_text("\n".join(lines))
    command = [native_build.cxx(), "-std=c++20", "-fsyntax-only", f"-I{include}", "-I.", str(source)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    changed = (ROOT / "csrc" / "torch_abi.h").read_text().replace("int64_t* ret_dim", "int32_t* ret_dim")
    (tmp_path / "changed.h").write_text(changed)
    source.write_text(source.read_text().replace(f"{ROOT}/csrc/torch_abi.h", f"{tmp_path}/changed.h"))
    assert subprocess.run(command, capture_output=True).returncode != 0


@needs_native
def test_there_is_one_openmp_runtime_and_it_is_torchs():
    code = (
        "import torch; from minimind.ops import native; native.load(); torch.set_num_threads(3);"
        "import re; print(native.build_info().threads, len(set(re.findall(r'/\\S*(?:libgomp|libomp|libiomp)\\S*',"
        " open('/proc/self/maps').read()))))"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.split() == ["3", "1"]


def test_the_report_says_what_was_built_and_what_is_missing(tmp_path, monkeypatch):
    answer = subprocess.run(
        [sys.executable, "-m", "minimind.ops"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cpp, cuda = answer.stdout.splitlines()
    info = native.build_info()
    assert cpp.startswith("C++: ") and cuda.startswith("CUDA: ") and answer.stderr == ""
    for part, line in (("cpu", cpp), ("cuda", cuda)):
        assert info.missing.get(part, "") in line
    assert all(kernels in cpp for kernels in info.cpu_kernels) and info.compiler in cpp

    library = b"\x7fELF\0" + b"13.0.88|80 86 90" + b"\0more"  # as csrc/cuda/build_info.cpp says it
    (tmp_path / native_build.library_name("cuda")).write_bytes(library)
    missing = {"cpu": "there is no C++ compiler", "cuda": "this PyTorch sees no CUDA GPU"}
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "load", lambda: native.BuildInfo("", (), "", 0, "", "", (), missing))
    assert native.report().splitlines() == [
        "C++: there is no C++ compiler",
        "CUDA: CUDA 13.0.88; sm_80, sm_86, sm_90; not used: this PyTorch sees no CUDA GPU",
    ]


@needs_native
def test_kernels_that_do_not_exist_are_an_error():
    code = "from minimind.ops import native; native.build_info()"
    environment = {**os.environ, "MINIMIND_CPU_KERNELS": "avx1024"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0 and "MINIMIND_CPU_KERNELS=avx1024" in answer.stderr


def build_here(tmp_path: Path, monkeypatch, *tools: str, source: str | None = None) -> dict:
    """build_all in a copy of the sources, register.cpp replaced by `source`, with only `tools` on PATH: the report."""
    root, package, path = tmp_path / "root", tmp_path / "root" / "minimind", tmp_path / "path"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", root)
    if source is not None:
        (root / "csrc" / "register.cpp").write_text(source)
    package.mkdir()
    path.mkdir()
    for tool in tools:
        (path / tool).symlink_to(shutil.which(tool))
    (package / native_build.library_name("cpu")).write_bytes(b"of an earlier build")
    for name in ("CXX", "CUDA_HOME", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(native_build, "ROOT", root)
    native_build.build_all(package)
    return json.loads((package / native_build.REPORT).read_text())


def test_without_a_compiler_it_installs_and_says_so(tmp_path, monkeypatch):
    report = build_here(tmp_path, monkeypatch)
    assert "no C++ compiler; install g++" in report["cpu"]["missing"] and "no nvcc" in report["cuda"]["missing"]
    package = tmp_path / "root" / "minimind"
    assert not (package / native_build.library_name("cpu")).exists()  # what is there no longer counts
    monkeypatch.setattr(native, "PACKAGE", package)
    assert "no C++ compiler" in native._why_not_loadable("cpu")


@needs_compiler
def test_each_missing_tool_is_named(tmp_path, monkeypatch):
    report = build_here(tmp_path, monkeypatch, Path(native_build.cxx()).name)
    assert "no cmake; `pip install cmake`" in report["cpu"]["missing"]


def test_cuda_can_be_left_out_or_demanded(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CUDA", "0")
    assert native_build.why_not_buildable("cuda") == "MINIMIND_CUDA=0 left them out"
    monkeypatch.setenv("MINIMIND_CUDA", "1")
    with pytest.raises(SystemExit, match="MINIMIND_CUDA=1, but there is no nvcc"):
        build_here(tmp_path, monkeypatch)


def test_the_first_error_is_the_compilers():
    output = """
[1/2] Building CXX object
a.cpp:3:9: warning: unused 'error' [-Wunused]
a.cpp:7:1: error: 'x' was not declared
a.cpp:9:1: error: another
ninja: build stopped: subcommand failed."""
    assert native_build.first_error(output) == "a.cpp:7:1: error: 'x' was not declared"
    linking = "/usr/bin/ld: a.o: multiple definition of `f'; b.o: first defined here\ncollect2: error: ld returned 1"
    assert native_build.first_error(linking) == "/usr/bin/ld: a.o: multiple definition of `f'; b.o: first defined here"
    cmake = "CMake Error at CMakeLists.txt:3 (project):\n  No CMAKE_CXX_COMPILER could be found."
    assert native_build.first_error(cmake).endswith("No CMAKE_CXX_COMPILER could be found.")
    assert native_build.first_error("all is well") is None


@needs_compiler
def test_a_compilers_error_reaches_the_user_and_nothing_old_stays(tmp_path, monkeypatch, capsys):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    tools = [t for t in ("cmake", "ninja", "make", "g++", "c++", "as", "ld", "sh", "ar", "ranlib") if shutil.which(t)]
    report = build_here(tmp_path, monkeypatch, *tools, source="int main( {}\n")
    assert "register.cpp:1" in report["cpu"]["missing"] and "error" in report["cpu"]["missing"]
    assert not (tmp_path / "root" / "minimind" / native_build.library_name("cpu")).exists()


@pytest.mark.slow
@needs_compiler
def test_one_wheel_for_every_python_runs_away_from_the_checkout(tmp_path):
    """The wheel's name has the platform but no Python version, and an installation finds its operators and kernels."""
    source = tmp_path / "source"
    for folder in ("csrc", "kernels", "minimind"):
        unwanted = shutil.ignore_patterns("_native_*.so", native_build.REPORT, "__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "constraints.txt", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

    def run(*command: str, cwd: Path = tmp_path, **variables: str) -> str:
        environment = {**os.environ, **variables}
        answer = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr[-3000:]
        return answer.stdout

    run(*pip, "wheel", ".", "--no-deps", "--wheel-dir", str(tmp_path), cwd=source, MINIMIND_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel))
    code = "import minimind.kernels.rope; from minimind.ops import native as n; print(n.__file__); print(n.report())"
    place, cpp, cuda = run(sys.executable, "-c", code, PYTHONPATH=str(site)).splitlines()
    assert place.startswith(str(site))
    assert cpp.startswith("C++: ") and "not used" not in cpp and "not built" not in cpp
    assert "MINIMIND_CUDA=0 left them out" in cuda or "no CUDA GPU" in cuda


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    if native.why_not(CPU) is not None:
        pytest.skip("nothing is built")
    monkeypatch.setattr(native, "source_hash", lambda root, part: "another")
    reason = native._why_not_loadable("cpu")
    assert "are older than csrc/" in reason and "native_build" in reason


def test_a_gpu_runs_code_of_its_architecture_or_ptx(monkeypatch):
    info = native.BuildInfo("", (), "", 1, "", "13.0", (80, 86, 89, 90), {})
    monkeypatch.setattr(native, "load", lambda: info)
    for capability in ((8, 0), (8, 7), (8, 9), (9, 0), (12, 0)):
        assert native._why_no_kernel(capability) is None
    assert "this GPU is sm_75" in native._why_no_kernel((7, 5))
