"""The `minimind` command. Each subcommand is a module with `Args`, a dataclass of its flags, and `main(args) -> int`.

A module is imported only when its subcommand runs, so that `minimind` alone answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from minimind.utils.startup import leave_on_interrupt, prepare_output, reflow_help, started, with_home

COMMANDS = {
    "demo": ("minimind.apps.zero.command", "train a small chat model from nothing, in minutes, on any machine"),
    "zero": ("minimind.apps.zero.command", "the same with a time budget, your own data and further stages"),
    "chat": ("minimind.apps.chat", "chat with a model in the terminal"),
    "serve": ("minimind.serving.command", "serve a model over HTTP with OpenAI's API"),
    "web": ("minimind.serving.web_command", "chat with a model in the browser"),
    "evaluate": ("minimind.evaluation.perplexity", "measure perplexity, run benchmarks, or test the use of tools"),
    "export": ("minimind.export.command", "write a model for transformers, vLLM, llama.cpp, ollama or upstream"),
    "data": ("minimind.data.download", "download upstream's data sets"),
}


def usage() -> str:
    """The help text of the command without arguments."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: minimind COMMAND [flags]", "", *lines, "", "minimind COMMAND --help lists its flags"])


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand. Returns the exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from minimind import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        import tyro

        module = importlib.import_module(COMMANDS[name][0])
        reflow_help(module.Args)
        args = tyro.cli(module.Args, prog=f"minimind {name}", description=module.__doc__, args=rest)
        started()
        return module.main(args)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main() -> None:
    """The entry point of the `minimind` command."""
    leave_on_interrupt()
    prepare_output()
    try:
        arguments = with_home(sys.argv[1:])
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
