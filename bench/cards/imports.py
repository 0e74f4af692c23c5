"""Import modules, report those that cannot be imported, and describe this machine.

    python bench/cards/imports.py bench.kernels train.pretrain transformers

The exit status is 1 if a module cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # `bench`, and no `kernels` for transformers to find

from bench.common.timing import first_line
from minimind.ops import native
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device


def missing(names: list[str]) -> list[str]:
    """A line for each module that cannot be imported."""
    lines = []
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as problem:  # a test module may skip itself, which raises no Exception
            if type(problem).__name__ != "Skipped":
                lines.append(f"{name}: {first_line(problem)}")
    return lines


def main(names: list[str]) -> int:
    """The exit status."""
    lines = missing(names)
    installed = versions(describe_device(choose_device("auto")))
    print(native.report())
    print("\n".join(lines) if lines else "every module can be imported")
    packages = ", ".join(f"{name} {installed[name]}" for name in ("commit", "python", "torch", "triton"))
    print(f"{len(names) - len(lines)} of {len(names)} modules; {installed['device']}; {packages}")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
