"""Tools of MCP servers (modelcontextprotocol.io), by the `mcp` package.

    mcp:COMMAND ...        start a server and speak to it over its standard streams
    mcp:http://HOST/PATH   connect to one that runs (streamable HTTP)

As with other MCP clients, a command sees only HOME, PATH and the like of this process's environment. `env` gives it
more: mcp:env TOKEN=... COMMAND.

Each process that runs tools (worker.py) has a connection of its own, and a server of its own where it starts one. A
call that takes too long is cancelled at the server. If the server ends, its process ends too, and the next one starts
it again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from minimind.environments.tools import ToolFunction, ToolTimeoutError, as_text

PREFIX = "mcp:"
_CONNECT = 30.0  # seconds to start a server and list its tools
_MOST_PAGES = 100  # of a list of tools


class ServerGoneError(Exception):
    """The connection to the server has ended."""


def mcp_tools(word: str) -> list[ToolFunction]:
    """The tools of the server that `word` names, which a worker can call. Raises ValueError, in one line, if the server
    cannot be reached or has no tools, or the package is not installed."""
    with connected(word, _CONNECT) as tools:
        return tools


@contextmanager
def connected(word: str, seconds: float) -> Iterator[list[ToolFunction]]:
    """A context connected to the server that `word` names, in which its tools can be called. seconds: limit of a call.
    Raises as `mcp_tools`."""
    try:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client  # noqa: F401  in version 1 there is none
    except ImportError:
        raise ValueError(f"{word}: needs the mcp package, version 2 or newer: pip install 'minimind[mcp]'") from None
    server = _server(word)
    with start_blocking_portal() as portal:
        session = portal.wrap_async_context_manager(_session(server, word))
        try:
            client, described = session.__enter__()
        except Exception as error:
            raise ValueError(f"{word}: no MCP server answers ({_reason(error)})") from None
        try:
            if not described:
                raise ValueError(f"{word}: the server has no tools")
            yield [_tool(word, each, partial(portal.call, _call, client, each.name, seconds)) for each in described]
        finally:
            session.__exit__(None, None, None)


def _server(word: str) -> Any:
    """What Client takes: an address or a command."""
    from mcp import StdioServerParameters

    address = word.removeprefix(PREFIX).strip()
    if address.startswith(("http://", "https://")):
        return address
    try:
        command, *arguments = shlex.split(address)
    except ValueError as error:
        raise ValueError(f"{word}: write {PREFIX}COMMAND or {PREFIX}http://...; {error}".rstrip("; ")) from None
    return StdioServerParameters(command=command, args=arguments)


def _session(server: Any, word: str) -> AbstractAsyncContextManager[tuple[Any, list[Any]]]:
    """The connected client, and the tools that the server describes."""
    import anyio
    from mcp import Client

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Any, list[Any]]]:
        with anyio.fail_after(_CONNECT) as limit:
            async with Client(server) as client:
                page = await client.list_tools()
                tools = list(page.tools)
                for _ in range(_MOST_PAGES):
                    if page.next_cursor is None:
                        break
                    page = await client.list_tools(cursor=page.next_cursor)
                    tools += page.tools
                limit.deadline = math.inf
                yield client, tools

    return opened()


def _tool(word: str, described: Any, call: Callable[[dict[str, Any]], str]) -> ToolFunction:
    description = " ".join((described.description or described.title or described.name).split())

    def function(**arguments: Any) -> str:
        return call(arguments)

    return ToolFunction(described.name, description, described.input_schema, function, path=word)


async def _call(client: Any, name: str, seconds: float, arguments: dict[str, Any]) -> str:
    """What a tool returns, as text. Raises ValueError with the server's words where the tool failed, ToolTimeoutError,
    and ServerGoneError."""
    import anyio
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED

    try:
        with anyio.fail_after(seconds):
            result = await client.call_tool(name, arguments)
    except TimeoutError:
        raise ToolTimeoutError from None
    except MCPError as error:
        if error.code == CONNECTION_CLOSED:
            raise ServerGoneError from None
        raise ValueError(error.message) from None
    text = "\n".join(_text(block) for block in result.content)
    if not text and result.structured_content is not None:
        text = as_text(result.structured_content)
    if result.is_error:
        raise ValueError(text or "the tool failed")
    return text


def _text(block: Any) -> str:
    """A part of a result; what is not text by its kind."""
    return block.text if block.type == "text" else f"[{block.type}]"


def _reason(error: BaseException) -> str:
    """The first error of a group, in one line."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    if isinstance(error, TimeoutError):
        return f"not in {_CONNECT:g} s"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
