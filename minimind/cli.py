"""The `minimind` command. Each subcommand is a module with `Args`, a dataclass of its flags, and `main(args) -> int`.

They are imported when they are asked for: `minimind` alone answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from minimind.utils.starting import leave_on_interrupt, started
from minimind.utils.stdio import prepare_output, with_home

COMMANDS = {
    "chat": ("minimind.apps.chat", "talk to a model in the terminal"),
    "serve": ("minimind.serving.command", "serve a model over HTTP as OpenAI's API does"),
    "web": ("minimind.serving.web_command", "talk to a model in the browser"),
    "evaluate": ("minimind.evaluation.perplexity", "perplexity of a model by context length, or benchmarks"),
    "export": ("minimind.export.command", "write a model for transformers, vLLM, llama.cpp, ollama or upstream"),
    "data": ("minimind.data.download", "fetch upstream's data sets"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: minimind COMMAND [flags]", "", *lines, "", "minimind COMMAND --help lists its flags"])


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
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
        args = tyro.cli(module.Args, prog=f"minimind {name}", description=module.__doc__, args=rest)
        started()
        return module.main(args)
    except BrokenPipeError:  # whoever read our output has enough: no error, and nothing left to write it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main() -> None:
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
