"""An MCP server whose tools work, fail, hang, leave and say too much."""

import os

import anyio
from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("test", log_level="ERROR")
calls = 0


@server.tool()
def add(a: int, b: int) -> int:
    """The sum of two
    numbers."""
    return a + b


@server.tool()
def fails(what: str) -> str:
    """Raises."""
    raise KeyError(what)


@server.tool()
async def forever() -> str:
    """Hangs."""
    await anyio.sleep_forever()


@server.tool()
def leaves() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def megabyte() -> str:
    """Says a megabyte."""
    return "x" * (1 << 20)


@server.tool()
def counts() -> int:
    """How often it was called."""
    global calls
    calls += 1
    return calls


@server.tool()
def picture() -> list:
    """Returns what is not text."""
    return ["a picture:", Image(data=b"", format="png")]


if __name__ == "__main__":
    server.run()
