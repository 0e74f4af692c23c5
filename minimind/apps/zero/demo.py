"""From nothing to a model that answers, on any machine: `minimind demo` is `minimind zero --budget 5min`."""

from __future__ import annotations

from minimind.apps.zero.command import Args, main

__all__ = ["Args", "main"]
