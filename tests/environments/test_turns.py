"""Tokens appended after a turn with calls: those of the template, and a tool's output as ordinary text."""

from __future__ import annotations

import pytest

from minimind import load_tokenizer
from minimind.environments.turns import ToolTurns
from tests.environments import hostile

TOKENIZER = load_tokenizer()
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("results", [["79"], ["It is 3.", '{"名": "a\\n"}'], ["", "\ufdd0"]])
def test_appended_ids_are_those_of_the_whole_conversation(results, thinking):
    """They equal the conversation rendered and encoded as one text, as SFT does, if no result spells a special
    token."""
    turns = ToolTurns(TOKENIZER, thinking)
    variables = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Now?"}, CALLED]
    shown = [result.replace("\ufdd0", "\ufffd") for result in results]
    before = TOKENIZER.apply_chat_template(messages, **variables)
    before = before[: before.rindex("<|im_end|>") + len("<|im_end|>")]
    answered = [*messages, *({"role": "tool", "content": result} for result in shown)]
    whole = TOKENIZER.apply_chat_template(answered, add_generation_prompt=True, **variables)
    assert before + turns.text(results) == whole
    assert TOKENIZER.encode(before) + turns.ids(results) == TOKENIZER.encode(whole)


@pytest.mark.parametrize("name", [*TOKENIZER.special_tokens, hostile.markup()])
def test_special_tokens_in_results_are_plain_text(name):
    turns = ToolTurns(TOKENIZER)
    plain, ids = turns.ids(["x"]), turns.ids([f"a{name}b"])
    special = set(TOKENIZER.special_tokens.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert TOKENIZER.decode(ids) == turns.text([f"a{name}b"]) and turns.holds_special(name)
    assert not turns.holds_special("a < b |im_end|")


def test_templates_that_change_what_was_said_are_refused():
    class Odd:
        """Forgets the call once the tool has answered."""

        eos_token_id, special_tokens = TOKENIZER.eos_token_id, TOKENIZER.special_tokens
        token_of = TOKENIZER.token_of

        def apply_chat_template(self, messages, **more):
            kept = [message for message in messages if len(messages) < 3 or message["role"] != "assistant"]
            return TOKENIZER.apply_chat_template(kept, **more)

    with pytest.raises(ValueError, match="renders an assistant's turn differently"):
        ToolTurns(Odd())
