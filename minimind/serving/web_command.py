"""Talk to a model in the browser: `minimind web`.

minimind web                                      serves the newest run under runs/ and opens a chat with it
minimind web --model runs/sft-nano-builtin
minimind web --url http://127.0.0.1:8998/v1       a server that runs already; MINIMIND_API_KEY is its key
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from minimind.inference.loading import ModelArgs

PAGE = Path(__file__).with_name("web.py")
# What streamlit is told: no reports to its makers, no question for an address at its first start, no button to publish
# the page, colours.
_OPTIONS = {
    "browser.gatherUsageStats": "false",
    "server.showEmailPrompt": "false",
    "client.toolbarMode": "minimal",
    "server.fileWatcherType": "none",
    "theme.primaryColor": "#5b6ee1",
    "theme.baseRadius": "large",
    "theme.showWidgetBorder": "false",
}


@dataclass(frozen=True)
class Args(ModelArgs):
    """Talk to a model in the browser."""

    url: str | None = None
    """A server that runs already, its address up to and with /v1. None: one is started here for --model."""
    host: str = "127.0.0.1"
    """Address of the page: this machine alone; 0.0.0.0 for others too."""
    port: int = 8501
    """Of the page."""
    browser: bool = True
    """Open the page in a browser where there is one."""


def main(args: Args) -> int:
    """The exit status. ValueError, one line, for bad input."""
    if args.url is not None and args.model is not None:
        raise ValueError("--url and --model: give one of them")
    if not 1 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port}: from 1 to 65535")
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise ValueError(f"--url {args.url}: an address such as http://127.0.0.1:8998/v1")
    for name in ("streamlit", "openai"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is missing: pip install 'minimind[web]'")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends what was started here, too
    if args.url is not None:
        from minimind.serving.web_client import connect

        connect(args.url, None)  # a proxy that cannot be used is said here, not in the page
        return _page(args, args.url, os.environ.copy())
    environment = {**os.environ, "MINIMIND_API_KEY": secrets.token_urlsafe(24)}  # the page alone knows it
    server = subprocess.Popen(server_command(args), stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        found = re.search(r" at (http://\S+/v1)", server.stdout.readline())
        if found is None:
            return server.wait() or 2
        return _page(args, found[1], environment)
    finally:
        server.terminate()
        server.wait()


def server_command(args: Args) -> list[str]:
    """`minimind serve` with the flags that name the model."""
    command = [sys.executable, "-m", "minimind.cli", "serve", "--port", "0"]
    for field in dataclasses.fields(ModelArgs):
        value = getattr(args, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        elif value not in (None, False):
            command += [flag, str(value)]
    return command


def _page(args: Args, url: str, environment: dict[str, str]) -> int:
    options = {
        **_OPTIONS,
        "server.address": args.host,
        "server.port": str(args.port),
        "server.headless": str(not args.browser).lower(),
    }
    command = [sys.executable, "-m", "streamlit", "run", str(PAGE)]
    command += [f"--{name}={value}" for name, value in options.items()]
    page = subprocess.Popen(command, env={**environment, "MINIMIND_URL": url})
    try:
        return page.wait()
    except KeyboardInterrupt:
        page.terminate()  # a terminal has told it too, kill -INT has not
        page.wait()
        return 0
    finally:
        page.terminate()
