"""Serve a model over HTTP with OpenAI's API: `minimind serve`.

    minimind serve                                    the newest run under runs/
    minimind serve --model runs/sft-nano-builtin --lora runs/lora-nano-builtin --port 8998
    minimind serve --host 0.0.0.0 --api-key SECRET    reachable from other machines; or set MINIMIND_API_KEY

OpenAI's clients work with base_url http://127.0.0.1:8998/v1. /docs describes the API.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel, ModelArgs, open_model
from minimind.inference.runner import Backend

if TYPE_CHECKING:
    from minimind.serving.service import Service

KEY_VARIABLE = "MINIMIND_API_KEY"
NEEDED = ("fastapi", "uvicorn", "llguidance", "prometheus_client")


@dataclass(frozen=True)
class Args(ModelArgs):
    """Serve a model over HTTP with OpenAI's API."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 serves this machine only, 0.0.0.0 others too."""
    port: int = 8998
    """Port to listen on; 0 finds a free one."""
    api_key: str | None = None
    """Key that clients must send. None takes MINIMIND_API_KEY; without that no key is needed."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages that may call the API, such as https://chat.example.com; '*' allows all.
    Pages on this machine are always allowed."""
    name: str | None = None
    """Name of the model in the API. None: the name of its folder or file."""
    max_batch: int = 32
    """Answers that are generated at the same time."""
    max_queue: int = 256
    """Answers that may wait in the queue; further ones are refused with status 429."""
    max_context: int | None = None
    """Tokens of prompt and answer together. None: all positions of the model."""
    kv_tokens: int | None = None
    """Tokens that the key/value cache holds. None: a size that the engine chooses and prints at the start."""
    max_tokens: int = 1024
    """Limit of answers whose request has none, in tokens."""
    max_body_mib: float = 4.0
    """Largest request body, in MiB."""
    drain_seconds: float = 30.0
    """How long running answers may take after Ctrl-C or SIGTERM; a second Ctrl-C ends the server at once."""
    backend: Backend = "auto"
    """Decoding operators: native (compiled), reference (plain PyTorch), or auto: native if it is built."""


def main(args: Args) -> int:
    """Serve until Ctrl-C; returns the exit status. ValueError, one line, for bad input."""
    _check(args)
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is missing: pip install 'minimind[serve]'")
    from minimind.serving.app import Server, listen

    with listen(args.host, args.port) as listener:  # before the model is loaded, so that a taken port fails at once
        service, notes = open_service(args)
        port = listener.getsockname()[1]
        for note in notes:
            print(note, file=sys.stderr)

        def greet() -> None:
            print(greeting(service, args.host, port), flush=True)

        Server(service, args.drain_seconds, greet).run([listener])
    return 0


def open_service(args: Args) -> tuple[Service, list[str]]:
    """The service, with its engine not yet started, and lines that the user should see."""
    from minimind.serving.service import Metrics, Service
    from minimind.serving.worker import EngineWorker

    loaded = open_model(args)
    notes = loaded.notes
    engine = Engine(
        loaded.model, loaded.tokenizer, dtype=loaded.dtype, kv_dtype=loaded.kv_dtype,
        weights_dtype=loaded.weights_dtype, backend=args.backend, max_batch=args.max_batch,
        max_context=args.max_context, kv_tokens=args.kv_tokens, seed=time.time_ns() % 2**31,
    )  # fmt: skip
    notes.append(engine.describe())
    if loaded.tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: /v1/completions works, /v1/chat/completions does not")
    elif loaded.stage == "pretrain":
        notes.append("the model was only pretrained: it continues text (/v1/completions) but does not answer questions")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(args.host):
        notes.append(f"anyone who reaches {args.host} can use this model; --api-key or {KEY_VARIABLE} requires a key")
    metrics = Metrics()
    worker = EngineWorker(engine, args.max_queue, metrics.first_token.observe)
    service = Service(
        worker, loaded.tokenizer, args.name or _name_of(args, loaded), metrics, args.max_tokens,
        int(args.max_body_mib * 2**20), key, args.allow_origin,
    )  # fmt: skip
    return service, notes


def greeting(service: Service, host: str, port: int) -> str:
    """The server's address and a curl command to try it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}"
    key = "" if service.api_key is None else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    chat = service.tokenizer.chat_template is not None
    body: dict[str, object] = {"model": service.model, "stream": True}
    body |= {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Once upon"}
    route = "chat/completions" if chat else "completions"
    data = shlex.quote(json.dumps(body))
    return (
        f"serving {service.model} at {url}/v1, described at {url}/docs; try\n"
        f"  curl -N {url}/v1/{route} -H 'Content-Type: application/json'{key} -d {data}"
    )


def _name_of(args: Args, loaded: LoadedModel) -> str:
    if loaded.folder is not None:
        folder = loaded.folder.resolve()
        return folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name
    return Path(args.model or "minimind").stem


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(args: Args) -> None:
    for origin in args.allow_origin:
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+", origin):
            raise ValueError(
                f"--allow-origin {origin}: must be a scheme and a host, such as https://chat.example.com, or '*', or "
                "null for pages opened as files"
            )
    for flag, value, least in (
        ("max-queue", args.max_queue, 0),
        ("max-tokens", args.max_tokens, 1),
        ("drain-seconds", args.drain_seconds, 0),
        ("max-body-mib", args.max_body_mib, 2**-10),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"--{flag} {value:g}: must be a finite number of at least {least:g}")
