"""Serve a model over HTTP as OpenAI's API does: `minimind serve`.

    minimind serve                                    the newest run under runs/
    minimind serve --model runs/sft-nano-builtin --lora runs/lora-nano-builtin --port 8998
    minimind serve --host 0.0.0.0 --api-key SECRET    for other machines too; or MINIMIND_API_KEY

Any client of OpenAI's works with base_url http://127.0.0.1:8998/v1. The API is described at /docs.
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

from minimind.inference.decode.ops import Backend
from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel, ModelArgs, open_model

if TYPE_CHECKING:
    from minimind.serving.service import Service

KEY_VARIABLE = "MINIMIND_API_KEY"
NEEDED = ("fastapi", "uvicorn", "llguidance", "prometheus_client")


@dataclass(frozen=True)
class Args(ModelArgs):
    """Serve a model over HTTP as OpenAI's API does."""

    host: str = "127.0.0.1"
    """Address to listen on: this machine alone; 0.0.0.0 for others too."""
    port: int = 8998
    """0 finds a free one."""
    api_key: str | None = None
    """What clients must give; None takes MINIMIND_API_KEY, and without that lets everybody in."""
    allow_origin: tuple[str, ...] = ()
    """Web pages that may call from a browser, such as https://chat.example.com; '*': all. Pages that this machine
    serves may anyway."""
    name: str | None = None
    """What clients call the model; None: the name of its folder or file."""
    max_batch: int = 32
    """Answers that are written together."""
    max_queue: int = 256
    """Answers that may wait for that; one more is refused with status 429."""
    max_context: int | None = None
    """Tokens of prompt and answer; None: as many as the model has positions."""
    kv_tokens: int | None = None
    """Tokens that the cache of keys and values holds; None: see the engine's line at the start."""
    max_tokens: int = 1024
    """Longest answer where the request does not say."""
    max_body_mib: float = 4.0
    """Largest body of a request."""
    drain_seconds: float = 30.0
    """After Ctrl-C or SIGTERM, how long running answers may take; a second Ctrl-C ends at once."""
    backend: Backend = "auto"
    """native, the compiled ops; reference, plain PyTorch; auto: native where it is built."""


def main(args: Args) -> int:
    """The exit status. ValueError, one line, for bad input."""
    _check(args)
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is missing: pip install 'minimind[serve]'")
    from minimind.serving.server import Server, listen

    with listen(args.host, args.port) as place:  # before the model is read: a taken port is said at once
        service, notes = open_service(args)
        port = place.getsockname()[1]
        for note in notes:
            print(note, file=sys.stderr)

        def greet() -> None:
            print(greeting(service, args.host, port), flush=True)

        Server(service, args.drain_seconds, greet).run([place])
    return 0


def open_service(args: Args) -> tuple[Service, list[str]]:
    """The service, its engine not started, and what a user should know."""
    from minimind.serving.metrics import Metrics
    from minimind.serving.service import Service
    from minimind.serving.worker import EngineWorker

    opened = open_model(args)
    notes = opened.notes
    engine = Engine(
        opened.model, opened.tokenizer, dtype=opened.dtype, kv_dtype=opened.kv_dtype, backend=args.backend,
        max_batch=args.max_batch, max_context=args.max_context, kv_tokens=args.kv_tokens, seed=time.time_ns() % 2**31,
    )  # fmt: skip
    notes.append(engine.describe())
    if opened.tokenizer.chat_template is None:
        notes.append("its tokenizer has no chat template: /v1/completions works, /v1/chat/completions does not")
    elif opened.stage == "pretrain":
        notes.append("it was only pretrained: it continues text (/v1/completions), it does not answer")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(args.host):
        notes.append(f"anyone who reaches {args.host} can use this model: --api-key or {KEY_VARIABLE} asks for a key")
    metrics = Metrics()
    worker = EngineWorker(engine, args.max_queue, metrics.first_token.observe)
    service = Service(
        worker, opened.tokenizer, args.name or _name_of(args, opened), metrics, args.max_tokens,
        int(args.max_body_mib * 2**20), key, args.allow_origin,
    )  # fmt: skip
    return service, notes


def greeting(service: Service, host: str, port: int) -> str:
    """Where it is, and a line to try."""
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


def _name_of(args: Args, opened: LoadedModel) -> str:
    if opened.folder is not None:
        folder = opened.folder.resolve()
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
                f"--allow-origin {origin}: scheme and host alone, such as https://chat.example.com, or '*', or null "
                "for pages opened as files"
            )
    for flag, value, least in (
        ("max-queue", args.max_queue, 0),
        ("max-tokens", args.max_tokens, 1),
        ("drain-seconds", args.drain_seconds, 0),
        ("max-body-mib", args.max_body_mib, 2**-10),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"--{flag} {value:g}: a number of at least {least:g}")
