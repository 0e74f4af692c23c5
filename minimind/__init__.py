"""MiniMind: train tiny language models from scratch, as fast as the hardware allows.

The names in __all__ are the stable public API. They load on first use, so that data workers, which need no torch, start
quickly.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LAZY = {"ModelConfig": "minimind.config", "load_model": "minimind.weights", "load_tokenizer": "minimind.tokenization"}
__all__ = ["ModelConfig", "__version__", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'minimind' has no attribute {name!r}")


def _map_kernels() -> None:
    """Map minimind.kernels to the folder kernels/ beside this package, in a checkout; setup.py does so on
    installation."""
    beside = Path(__file__).parent.parent / "kernels"
    if not (Path(__file__).parent / "kernels").is_dir() and beside.is_dir():
        spec = ModuleSpec("minimind.kernels", None, is_package=True)
        spec.submodule_search_locations = [str(beside)]
        sys.modules[spec.name] = globals()["kernels"] = module_from_spec(spec)


_map_kernels()
