"""4-bit GGUF files, by llama.cpp's own quantizer: that of llama-cpp-python, or a llama-quantize on the PATH.

It runs in a process of its own: llama.cpp ends the process on what it cannot do, and may crash.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path


def quantizer() -> list[str]:
    """The command that takes a float32 file, the file to write and its type; ValueError where there is none."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-m", "minimind.export.quantize"]
    binary = shutil.which("llama-quantize")
    if binary is None:
        raise ValueError(
            "--dtype q4_k_m: llama.cpp's quantizer is missing; pip install llama-cpp-python, or put llama-quantize on "
            "the PATH"
        )
    return [binary]


def quantize(source: Path, path: Path) -> None:
    """A float32 GGUF -> Q4_K_M, mixed 4- and 6-bit blocks; llama.cpp takes other types where rows are no multiple of
    256. ValueError, with its last word, where it fails."""
    command = [*quantizer(), str(source), str(path), "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f"--dtype q4_k_m: llama.cpp's quantizer failed{_death(done.returncode)} ({said[-1]})")


def _death(status: int) -> str:
    """A crash is told apart from a refusal, whose last word says enough."""
    if status >= 0:
        return ""
    known = {number.value: number.name for number in signal.Signals}
    return f": died by {known.get(-status, f'signal {-status}')}"


def main(source: str, path: str, kind: str) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    return int(llama_cpp.llama_model_quantize(source.encode(), path.encode(), params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
