"""Chat with a model in the browser: `minimind web`.

    minimind web                                  serves the newest run under runs/ and opens a chat with it
    minimind web --model runs/sft-nano-builtin
    minimind web --tools builtin my.module:TOOLS  tools that the page runs when the model calls them, after asking
    minimind web --url http://127.0.0.1:8998/v1   uses a running server; MINIMIND_API_KEY is its key

Without --url, a server is started for the page and stops with it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from minimind.environments.builtin import named_tools
from minimind.inference.loading import ModelArgs
from minimind.serving.web_tools import TOOLS_VARIABLE, YES_VARIABLE

PAGE = Path(__file__).with_name("web.py")
# Streamlit's options: no usage reports, no prompt for an e-mail address, no button to publish the page, colours.
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
    """Chat with a model in the browser."""

    url: str | None = None
    """Address of a running server, ending in /v1. None starts a server for --model."""
    host: str = "127.0.0.1"
    """Address of the page. 127.0.0.1 serves this machine only, 0.0.0.0 others too."""
    port: int = 8501
    """Port of the page."""
    browser: bool = True
    """Open the page in a browser, if there is one."""
    tools: tuple[str, ...] = ("builtin",)
    """Tools to choose from on the page, which runs what the model calls: builtin, upstream, package.module:NAME of your
    own, or mcp:COMMAND or mcp:http://... of an MCP server."""
    yes: bool = False
    """Run calls without asking before each."""


def main(args: Args) -> int:
    """Serve the page until Ctrl-C; returns the exit status. ValueError, one line, for bad input."""
    if args.url is not None and args.model is not None:
        raise ValueError("--url and --model: give one of them")
    if not 1 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port}: must be between 1 and 65535")
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise ValueError(f"--url {args.url}: must be an address such as http://127.0.0.1:8998/v1")
    named_tools(args.tools)  # fails here, not in the page
    for name in ("streamlit", "openai"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is missing: pip install 'minimind[web]'")
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # also ends the processes that this one started
    if args.url is not None:
        from minimind.serving.web_client import connect

        connect(args.url, None)  # fails here, not in the page, if the proxy cannot be used
        return _page(args, args.url, os.environ.copy())
    environment = {**os.environ, "MINIMIND_API_KEY": secrets.token_urlsafe(24)}  # only the page knows this key
    server = subprocess.Popen(server_command(args), stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = re.search(r" at (http://\S+/v1)", server.stdout.readline())
        if address is None:
            return server.wait() or 2
        return _page(args, address[1], environment)
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
    settings = {"MINIMIND_URL": url, TOOLS_VARIABLE: json.dumps(args.tools), YES_VARIABLE: "1" if args.yes else ""}
    page = subprocess.Popen(command, env=environment | settings)
    try:
        return page.wait()
    except KeyboardInterrupt:
        page.terminate()  # a terminal's Ctrl-C reaches the page too, but kill -INT does not
        page.wait()
        return 0
    finally:
        page.terminate()
