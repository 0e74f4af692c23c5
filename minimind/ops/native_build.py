"""Builds the native operators (csrc/) with CMake. setup.py calls it on installation; in a checkout run

    python minimind/ops/native_build.py

Neither this module nor csrc/ needs torch, since pip builds before it installs torch. A part that cannot be built is
left out, and the reason is written to _native_build.json for minimind/ops/native.py. MINIMIND_CUDA=0 skips the CUDA
part; MINIMIND_CUDA=1 makes it an error if the CUDA part cannot be built; MINIMIND_CUDA_ARCHS="86;90" builds it for
these architectures alone, in less time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PARTS = ("cpu", "cuda")
REPORT = "_native_build.json"


def library_name(part: str) -> str:
    """File name of a part's library."""
    return f"_native_{part}.so"


def source_hash(root: Path, part: str) -> str:
    """Hash of all sources of one part's library."""
    digest = hashlib.sha256()
    folders = [root / "csrc", root / "csrc" / part]
    files = [file for folder in folders for file in sorted(folder.glob("*"))]
    for file in [root / "CMakeLists.txt", *files]:
        if file.suffix in (".txt", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def build_all(destination: Path) -> list[Path]:
    """Build all possible parts into `destination`; return the files there, the report last."""
    report, files = {}, []
    with _locked():
        for part in PARTS:
            entry = report[part] = _build(part, destination / library_name(part))
            if entry["missing"] is None:
                files.append(destination / library_name(part))
            else:
                (destination / library_name(part)).unlink(missing_ok=True)
        _replace(destination / REPORT, json.dumps(report, indent=1).encode())
    return [*files, destination / REPORT]


def _build(part: str, target: Path) -> dict[str, Any]:
    hash_before = source_hash(ROOT, part)
    missing = why_not_buildable(part)
    start = time.monotonic()
    if missing is None:
        missing = _compile(part, target)
    if missing is None:
        _say(f"{part}: built in {time.monotonic() - start:.0f} s")
    elif part == "cuda" and os.environ.get("MINIMIND_CUDA") == "1":
        raise SystemExit(f"MINIMIND_CUDA=1, but {missing}")
    else:
        _say(f"{part}: not built: {missing}")
    return {"missing": missing, "sources": hash_before, "version": nvcc_version() if part == "cuda" else ""}


def why_not_buildable(part: str) -> str | None:
    """Why a part cannot be built on this machine and what to do; None if it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"they build on Linux and macOS, not on {sys.platform}"
    if not (ROOT / "csrc" / part).is_dir():
        return f"csrc/{part} is not there"
    if part == "cuda" and os.environ.get("MINIMIND_CUDA") == "0":
        return "MINIMIND_CUDA=0 left them out"
    if part == "cuda" and nvcc() is None:
        return "there is no nvcc; put the CUDA toolkit's bin folder on PATH and install again"
    if cxx() is None:
        return "there is no C++ compiler; install g++ or clang and install again"
    if shutil.which("cmake") is None:
        return "there is no cmake; `pip install cmake` and install again"
    if shutil.which("ninja") is None and shutil.which("make") is None:
        return "there is neither ninja nor make; `pip install ninja` and install again"
    return None


def cxx() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on PATH."""
    chosen = os.environ.get("CXX")
    return (
        shutil.which(chosen.split()[0])
        if chosen
        else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    )


def nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, or nvcc on PATH or in $CUDA_HOME/bin."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or (
        shutil.which("nvcc", path=f"{home}/bin") if home else None
    )


def nvcc_version() -> str:
    """CUDA's version, such as "13.0"; "" without nvcc."""
    compiler = nvcc()
    if compiler is None:
        return ""
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", answer)
    return release.group(1) if release else ""


def _compile(part: str, target: Path) -> str | None:
    """Configure and build; return the first error."""
    folder = ROOT / "build" / f"native-{part}"
    options = [f"-DMINIMIND_PARTS={part}", "-DCMAKE_BUILD_TYPE=Release"]
    if part == "cuda":
        archs = os.environ.get("MINIMIND_CUDA_ARCHS")  # without it, forget those of an earlier build
        options.append(f"-DMINIMIND_CUDA_ARCHS={archs}" if archs else "-UMINIMIND_CUDA_ARCHS")
        options.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
    ninja = shutil.which("ninja")
    if ninja is not None:
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    error = _run(configure)
    if error is not None:  # files of an earlier build may refer to tools that are gone
        shutil.rmtree(folder, ignore_errors=True)
        error = _run(configure)
    if error is None:
        error = _run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    if error is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, (folder / library_name(part)).read_bytes())
    return error


def _run(command: list[str]) -> str | None:
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if answer.returncode == 0:
        return None
    print(answer.stdout, file=sys.stderr)
    last = next((line for line in reversed(answer.stdout.splitlines()) if line.strip()), "no output")
    failed = f"`{' '.join(command[:2])}` failed with status {answer.returncode}: {last}"
    return first_error(answer.stdout) or failed


def first_error(output: str) -> str | None:
    """The most useful line of a failed build's output: a compiler's or linker's error, else any line with "error"."""
    lines = [line.strip() for line in output.splitlines()]
    compilers = r"\berror\b ?(:|#|[A-Z]\d+)|multiple definition|undefined reference"
    for pattern in (compilers, r"(?i)\b(error|killed)\b"):
        for i, line in enumerate(lines):
            if re.search(pattern, line):
                return " ".join(lines[i : i + 2]) if line.startswith("CMake Error") else line
    return None


def _replace(target: Path, content: bytes) -> None:
    """Replace a file atomically: no process loads half of a library, and those that have it open keep the old one."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, target)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Allow one build of this tree at a time."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "native.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(f"minimind native operators, {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    build_all(ROOT / "minimind")
