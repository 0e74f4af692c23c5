"""How many tokens a request took."""

from __future__ import annotations

from typing import Any

from minimind.inference.requests import Delta


class Usage:
    """From the outputs of finished requests: each prompt once, and all sampled tokens, end tokens included."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._completion = 0

    def take(self, delta: Delta) -> None:
        if delta.output is not None:
            self._prompt += len(delta.output.prompt_token_ids)
            self._cached += delta.output.cached_tokens
            self._completion += delta.output.completion_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
