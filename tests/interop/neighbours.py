"""Other programs, each in a Python of its own, and the models they get.

MINIMIND_TEST_VLLM=/path/to/python names the interpreter that has vLLM; without it the tests of vLLM are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.export.hf import export_hf
from minimind.modeling import Model
from tests.export.small import CONFIGS, model_of

PROMPTS = torch.randint(16, 6400, (2, 100), generator=torch.Generator().manual_seed(1)).tolist()
NEW = 48
PRESETS = ("minimind2", "minimind2-moe", "minimind3", "minimind3-moe")


def interpreter(name: str) -> str:
    """The Python that MINIMIND_TEST_<NAME> names; skips the test where it names none."""
    variable = f"MINIMIND_TEST_{name}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python")
    return os.environ[variable]


def shapes() -> dict[str, ModelConfig]:
    """The small shapes of tests/export, and two layers of each preset: their head sizes are 80 and 96 too."""
    cut = {name: dataclasses.replace(ModelConfig.preset(name), num_hidden_layers=2) for name in PRESETS}
    return {**CONFIGS, **cut}


def write(model: Model, folder: Path) -> str:
    export_hf(model, load_tokenizer(), folder)
    return str(folder)


@contextmanager
def running(
    command: list[str], log: Path, health: str = "/health", seconds: float = 300, **environment: str
) -> Iterator[str]:
    """Start a server with `command`, in which PORT stands for a free port; gives its address when `health` answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [word.replace("PORT", port) for word in command],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + seconds
            while not answers(address + health):
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
