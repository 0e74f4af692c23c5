"""MiniMind: train tiny language models from scratch, as fast as the hardware allows.

The names below are the stable public API. They load on first use, so that data workers, which need no torch,
start quickly.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "ModelConfig": "minimind.config",
    "load_model": "minimind.weights",
    "load_tokenizer": "minimind.tokenization",
}
__all__ = ["ModelConfig", "__version__", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'minimind' has no attribute {name!r}")
