"""A stage's script from the command line to its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

from minimind.training.arguments import StageArgs
from minimind.training.parallel import leave, rank
from minimind.training.survey import survey
from minimind.utils.display import say
from minimind.utils.files import is_disk_full
from minimind.utils.startup import command_line, prepare_output, started

Args = TypeVar("Args", bound=StageArgs)


def run_script(main: Callable[[Args, Console], bool], args: type[Args], description: str | None) -> NoReturn:
    """Parse the flags of `args`, call main(flags, console) and exit: 0 when it is done, 130 when it was interrupted,
    2 after one line about bad input, which main raises as ValueError."""
    prepare_output()
    parsed = command_line(args, description)
    console = Console(quiet=rank() > 0)
    started()
    try:
        if parsed.plan:
            told = survey(main, parsed)
            for line in told.lines():
                say(console, line)
            if parsed.plan_json is not None:
                Path(parsed.plan_json).expanduser().write_text(json.dumps(told.figures(), indent=1) + "\n")
            sys.exit(0)
        done = main(parsed, console)
    except (ValueError, OSError) as problem:  # OSError: a full disk, a folder that is not ours
        full = isinstance(problem, OSError) and is_disk_full(problem)
        line = f"error: {problem}" + ("; free some space, then run the same command again" if full else "")
        try:
            say(console, line)
        except OSError:  # standard output itself is what failed: a log on a full disk
            print(line, file=sys.stderr)
        if rank() > 0:  # what went wrong here need not have gone wrong on rank 0
            print(f"rank {rank()}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    leave()
    sys.exit(0 if done else 130)
