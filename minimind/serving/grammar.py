"""Answers that are JSON by construction: tokens that would break it get no probability (llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minimind.inference.requests import Constraint
from minimind.serving.errors import ApiError
from minimind.serving.reply import CALL, END_CALL, END_THINK
from minimind.tokenization import Tokenizer

# As Python's json.dumps writes it, which is what models are shown. Free white space would let a weak one write nothing
# but that.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes constraints for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = tokenizer
        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))

    def json_object(self, reasoning: bool) -> Callable[[], Constraint]:
        return self.json_schema({"type": "object"}, reasoning)

    def json_schema(self, schema: dict[str, Any], reasoning: bool) -> Callable[[], Constraint]:
        """reasoning: the answer begins behind </think>. ApiError 400 for a schema that cannot be met or enforced."""
        return self._constraint(_lark("start: json", json=schema), "response_format", reasoning)

    def tool_calls(self, tools: Sequence[dict[str, Any]], several: bool, reasoning: bool) -> Callable[[], Constraint]:
        """At least one call of one of these functions ({"name", "parameters"}), with arguments of its schema."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": {"type": "object", **(tool.get("parameters") or {})},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        more = ' ("\\n" call)*' if several else ""
        rules = f'start: call{more}\ncall: "{CALL}\\n" json "\\n{END_CALL}"'
        return self._constraint(_lark(rules, json={"anyOf": calls}), "tools", reasoning)

    def _constraint(self, grammar: str, param: str, reasoning: bool) -> Callable[[], Constraint]:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
        matcher.compute_bitmask()  # a schema such as {"$ref": "#"}, which nothing fits, is an error only now
        if problem := matcher.get_error():
            message = f"{param}: this schema cannot be enforced: {_reason(problem)}"
            raise ApiError(400, message, param=param)
        after = self._tokenizer.special_tokens.get(END_THINK) if reasoning else None
        if reasoning and after is None:
            raise ApiError(400, f"{param}: this tokenizer has no token {END_THINK}; switch thinking off", param=param)
        return lambda: GrammarConstraint(matcher.deep_copy(), self._tokenizer.vocab_size, after)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.token_bytes()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.control_tokens.values())
        for name, number in tokenizer.control_tokens.items():
            self.tokens[number] = name.encode()
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        """What the grammar forces is forced as the tokens that the model knows, <tool_call> for example."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._encode(text, "markup")


class GrammarConstraint:
    """matcher: an LLMatcher at its beginning. after: the token from which on it is asked; None: from the first."""

    def __init__(self, matcher: Any, vocab_size: int, after: int | None) -> None:
        self._matcher, self._vocab_size, self._after = matcher, vocab_size, after

    def allowed(self) -> np.ndarray | None:
        if self._after is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # the mask then has the end token alone, as if the answer were complete
            raise ValueError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)

    def advance(self, token_id: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token_id)
        elif token_id == self._after:
            self._after = None


def _reason(problem: str) -> str:
    """llguidance's message as one line, without the grammar and the parser's state that it shows."""
    said = " ".join(re.split(r"\n +\d+ \| |\n<state>", problem)[0].split())
    if said == "NoExtensionBias":
        return "nothing fits it"
    return said.rpartition("failed to compile JSON schema: ")[2][:300]


def _lark(rules: str, **schemas: dict[str, Any]) -> str:
    lines = [f"{name}: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}" for name, schema in schemas.items()]
    return "\n".join([rules, *lines])
