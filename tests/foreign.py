"""Call native programs of other projects in separate processes, so that a crash fails one test with a clear message.
The other functions are the calls of llama.cpp that tests make in this way. This file imports no torch, as every call
imports it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def call(
    program: str, function: Callable[..., Any], *args: Any, timeout: float = 300, python: str = sys.executable
) -> Any:
    """Call function(*args), a top-level function of a module, in a new Python process; arguments and result are sent as
    JSON. python: the interpreter. AssertionError if `program`, whose code the function runs, dies of a signal, raises
    an exception or does not return in time.
    """
    __tracebackhide__ = True
    command = [python, "-X", "faulthandler", "-m", "tests.foreign"]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "errors": "replace"}
    request = json.dumps([function.__module__, function.__qualname__, args])
    try:
        done = subprocess.run(command, input=request, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{program} was not done after {timeout:g} s") from None
    if done.returncode == 0:
        return json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("Extension modules")]
    said = "\n".join(lines[-12:]) or "no message"
    raise AssertionError(f"{program} {_end(done.returncode)} ({said})")


def _end(status: int) -> str:
    if status >= 0:
        return "failed"
    names = {number.value: number.name for number in signal.Signals}
    return f"died by {names.get(-status, f'signal {-status}')}"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code may print, too
    module, function, args = json.load(sys.stdin)
    answer = getattr(importlib.import_module(module), function)(*args)
    with answers:
        json.dump(answer, answers)


def greedy(path: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Tokens that follow each prompt, all prompts of one length; keys and values in float32."""
    import numpy as np

    from bench.decoding.llama_cpp import LlamaCpp

    decoder = LlamaCpp(Path(path), len(prompts), len(prompts[0]) + new, 1, True)
    tokens = [decoder.prefill(np.array(prompts))]
    for _ in range(new - 1):
        tokens.append(decoder.step(tokens[-1]))
    decoder.close()
    return np.stack(tokens, axis=1).tolist()


def tokenize(path: str, texts: list[str]) -> dict[str, Any]:
    """The ids of each text, and the chat template of the file."""
    import llama_cpp

    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    return {"ids": ids, "chat_template": model.metadata["tokenizer.chat_template"]}


def chat(path: str, messages: list[dict[str, str]], new: int) -> dict[str, Any]:
    """The greedy answer of `new` tokens, how many tokens the prompt had, and every token that was read."""
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False)
    found: Any = model.create_chat_completion(
        messages,  # type: ignore[arg-type, unused-ignore]
        temperature=0.0,
        max_tokens=new,
        repeat_penalty=1.0,
    )
    prompt = found["usage"]["prompt_tokens"]
    read = model.input_ids[: prompt + new - 1].tolist()  # all but the newest token were read
    return {"text": found["choices"][0]["message"]["content"], "prompt": prompt, "read": read}


def complete(path: str, text: str, new: int) -> list[str]:
    """The texts of a completion's choices."""
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=64, n_threads=1, verbose=False)
    found: Any = model.create_completion(text, max_tokens=new)
    return [choice["text"] for choice in found["choices"]]


if __name__ == "__main__":
    main()
