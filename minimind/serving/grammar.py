"""Constraints that make an answer valid JSON: tokens that would break the grammar get probability 0 (llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minimind.inference.requests import Constraint
from minimind.serving.chat_format import CALL, END_CALL
from minimind.serving.protocol import ApiError
from minimind.tokenization import Tokenizer
from minimind.tokenization.chat_encoder import END_THINK

# The layout of Python's json.dumps, which chat templates use. With free white space a weak model may write only that.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

ANY_OBJECT = {"type": "object"}


class Grammars:
    """Makes constraints for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = tokenizer
        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))

    def json_schema(self, schema: dict[str, Any], reasoning: bool) -> Callable[[], Constraint]:
        """reasoning: the answer begins after </think>. ApiError 400 for a schema that cannot be met or enforced."""
        return self._constraint(_lark("start: json", json=schema), "response_format", reasoning)

    def tool_calls(
        self, tools: Sequence[dict[str, Any]], several: bool, reasoning: bool, form: dict[str, Any] | None = None
    ) -> Callable[[], Constraint]:
        """At least one call of one of these functions ({"name", "parameters"}), with arguments that match its schema.
        several: allow more than one call. form: a schema; the answer may be JSON that matches it instead of calls."""
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
        rules = f'calls: call{more}\ncall: "{CALL}\\n" one_call "\\n{END_CALL}"'
        schema = {"anyOf": calls}
        if form is None:
            return self._constraint(_lark(f"start: calls\n{rules}", one_call=schema), "tools", reasoning)
        grammar = _lark(f"start: calls | json\n{rules}", one_call=schema, json=form)
        return self._constraint(grammar, "tools and response_format", reasoning)

    def _constraint(self, grammar: str, param: str, reasoning: bool) -> Callable[[], Constraint]:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
        matcher.compute_bitmask()  # a schema that nothing can match, such as {"$ref": "#"}, fails only here
        if problem := matcher.get_error():
            message = f"{param}: this schema cannot be enforced: {_reason(problem)}"
            raise ApiError(400, message, param=param)
        after = self._tokenizer.special_tokens.get(END_THINK) if reasoning else None
        if reasoning and after is None:
            raise ApiError(400, f"{param}: this tokenizer has no token {END_THINK}; switch thinking off", param=param)
        return lambda: GrammarConstraint(matcher.deep_copy(), self._tokenizer.vocab_size, after)


class _Vocabulary:
    """The tokenizer in the form that llguidance takes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.token_bytes()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.control_tokens.values())
        for name, number in tokenizer.control_tokens.items():
            self.tokens[number] = name.encode()
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of text that the grammar forces; markers such as <tool_call> become the model's own tokens."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._encode(text, "markup")


class GrammarConstraint:
    """matcher: a fresh LLMatcher. after: the token after which the grammar applies; None: from the first token."""

    def __init__(self, matcher: Any, vocab_size: int, after: int | None) -> None:
        self._matcher, self._vocab_size, self._after = matcher, vocab_size, after

    def allowed(self) -> np.ndarray | None:
        if self._after is not None:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # then the mask allows only the end token, as if the answer were complete
            raise ValueError(f"the grammar cannot continue: {_reason(self._matcher.get_error())}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)

    def advance(self, token_id: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token_id)
        elif token_id == self._after:
            self._after = None


def _reason(problem: str) -> str:
    """llguidance's message in one line, without its print of the grammar and the parser's state."""
    message = " ".join(re.split(r"\n +\d+ \| |\n<state>", problem)[0].split())
    if message == "NoExtensionBias":
        return "nothing can match it"
    return message.rpartition("failed to compile JSON schema: ")[2][:300]


def _lark(rules: str, **schemas: dict[str, Any]) -> str:
    lines = [f"{name}: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}" for name, schema in schemas.items()]
    return "\n".join([rules, *lines])
