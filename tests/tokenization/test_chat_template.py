"""Chat templates: comparison with upstream's renderings, and properties of the shipped template."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.tokenization import load_tokenizer
from minimind.tokenization.chat_template import render_chat

GOLDEN = json.loads((Path(__file__).parent / "golden_chat.json").read_text(encoding="utf-8"))
CASES = [(name, key) for name in ("minimind2", "minimind3") for key in GOLDEN[name]["render"]]
SHIPPED = load_tokenizer()
HEADER = "<|im_start|>assistant\n"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"城市": "string"}}}


@pytest.mark.parametrize(("name", "key"), CASES)
def test_upstream_templates_render_as_upstream_does(name: str, key: str) -> None:
    conversation, *options = key.split("|")
    variables: dict[str, Any] = {"open_thinking": True} if "open_thinking" in options else {}
    rendered = render_chat(
        GOLDEN[name]["template"],
        GOLDEN["convs"][conversation],
        tools=GOLDEN["tools"] if "tools=True" in options else None,
        add_generation_prompt="gen=True" in options,
        **variables,
    )
    assert rendered == GOLDEN[name]["render"][key]


def test_turns() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": "2", "reasoning_content": "\nadd\n"},
        {"role": "assistant", "content": None, "reasoning_content": ""},
        {"role": "tool", "content": {"温度": 21}},
    ]
    assert SHIPPED.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        '<|im_start|>tool\n<tool_response>\n{"温度": 21}\n</tool_response><|im_end|>\n'
    )


@pytest.mark.parametrize("name", ["enable_thinking", "open_thinking"])
def test_thinking_switch(name: str) -> None:
    on: dict[str, Any] = {name: True}
    off: dict[str, Any] = {name: False}
    question = [{"role": "user", "content": "hi"}]
    plain = SHIPPED.apply_chat_template(question, add_generation_prompt=True)
    assert plain == f"<|im_start|>user\nhi<|im_end|>\n{HEADER}"
    opened = SHIPPED.apply_chat_template(question, add_generation_prompt=True, **on)
    assert opened == plain + "<think>\n"
    closed = SHIPPED.apply_chat_template(question, add_generation_prompt=True, **off)
    assert closed == plain + "<think>\n\n</think>\n\n"
    assert SHIPPED.apply_chat_template(question, **off) == plain.removesuffix(HEADER)


def test_enable_thinking_wins_over_its_alias() -> None:
    both: dict[str, Any] = {"enable_thinking": True, "open_thinking": False}
    rendered = SHIPPED.apply_chat_template([], add_generation_prompt=True, **both)
    assert rendered == HEADER + "<think>\n"


@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_reply_begins_with_the_generation_prompt(thinking: bool | None) -> None:
    variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    if thinking:
        messages[1]["reasoning_content"] = "greet"
    prompt = SHIPPED.apply_chat_template(messages[:1], add_generation_prompt=True, **variables)
    assert SHIPPED.apply_chat_template(messages, **variables).startswith(prompt)


def test_reasoning_written_inside_the_content_is_kept() -> None:
    messages = [{"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"}]
    assert SHIPPED.apply_chat_template(messages, enable_thinking=False).count("<think>") == 1


def test_tools_from_argument_and_message_and_in_both_common_forms_render_alike() -> None:
    """A model that is trained on bare descriptions meets OpenAI's form at a server."""
    question = {"role": "user", "content": "?"}
    system: dict[str, Any] = {"role": "system", "content": "Be brief."}
    given_apart = SHIPPED.apply_chat_template([system, question], tools=[WEATHER])
    bare = WEATHER["function"]
    schema = json.dumps(bare, ensure_ascii=False)
    assert "Be brief.\n\n" in given_apart
    assert f"<tools>\n{schema}\n</tools>" in given_apart
    for own in ([WEATHER], json.dumps([WEATHER], ensure_ascii=False), [bare]):
        assert SHIPPED.apply_chat_template([{**system, "tools": own}, question]) == given_apart
    without_system = SHIPPED.apply_chat_template([question], tools=[WEATHER])
    assert without_system == given_apart.replace("Be brief.\n\n", "")


def test_a_leading_system_messages_tools_reach_upstreams_template() -> None:
    template = GOLDEN["minimind3"]["template"]
    system, question = {"role": "system", "content": "S"}, {"role": "user", "content": "?"}
    expected = render_chat(template, [system, question], tools=GOLDEN["tools"])
    own = {**system, "tools": json.dumps(GOLDEN["tools"])}
    assert "get_weather" in expected
    assert render_chat(template, [own, question]) == expected


@pytest.mark.parametrize("tools", ["[]", "", [], None])
def test_no_tools_and_no_words_is_no_system_turn(tools: Any) -> None:
    messages = [{"role": "system", "content": "", "tools": tools}, {"role": "user", "content": "hi"}]
    assert SHIPPED.apply_chat_template(messages) == "<|im_start|>user\nhi<|im_end|>\n"


CALL = {"name": "weather", "arguments": {"城市": "巴黎"}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"type": "function", "function": CALL}],
        CALL,
        json.dumps(CALL),
        json.dumps([CALL]),
        [{"name": "weather", "arguments": '{"城市": "巴黎"}'}],
    ],
)
def test_tool_calls_in_every_form(calls: Any) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"城市": "巴黎"}}\n</tool_call>'
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert SHIPPED.apply_chat_template([message]) == f"{HEADER}{text}<|im_end|>\n"
    twice = {"role": "assistant", "content": "ok", "tool_calls": [CALL, CALL]}
    assert SHIPPED.apply_chat_template([twice]) == f"{HEADER}ok\n{text}\n{text}<|im_end|>\n"


WORDS = st.text(alphabet="ab <>|/\n你。😀", max_size=8) | st.sampled_from(["<think>", "</think>", "<|im_end|>"])
CALLS = st.lists(st.fixed_dictionaries({"name": WORDS, "arguments": st.dictionaries(WORDS, WORDS, max_size=2)}))
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": WORDS}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": WORDS}),
    st.fixed_dictionaries(
        {"role": st.just("system"), "content": WORDS}, optional={"tools": st.just("[]") | CALLS.map(json.dumps)}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": WORDS | st.none()},
        optional={"reasoning_content": WORDS | st.none(), "tool_calls": CALLS | CALLS.map(json.dumps)},
    ),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(MESSAGES, max_size=6), st.none() | st.just([WEATHER]), st.sampled_from([None, True, False]))
def test_more_messages_only_append(messages: list, tools: list | None, thinking: bool | None) -> None:
    variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    renders = [SHIPPED.apply_chat_template(messages[:k], tools, **variables) for k in range(len(messages) + 1)]
    for shorter, longer in pairwise(renders):
        assert longer.startswith(shorter)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_sandbox_refuses(template: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        render_chat(template, [{"role": "user", "content": "hi"}])


def test_language_of_hugging_face_templates() -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert render_chat(template, [{"role": "a", "b": "<é>"}] * 2) == '{"role": "a", "b": "<é>"}4'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"content": "hi"}], "message 0"),
        (["hi"], "message 0"),
        ([{"role": "user", "content": "a"}, {"role": "narrator"}], 'message 1 has the role "narrator"'),
        ([{"role": "assistant", "content": "", "tool_calls": "{oops"}], "message 0: tool_calls is a string but not"),
    ],
)
def test_malformed_conversations_are_named(messages: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SHIPPED.apply_chat_template(messages)


def test_broken_template_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="chat template"):
        render_chat("{% if %}", [])
