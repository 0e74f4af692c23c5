"""/v1/completions through OpenAI's own client."""

import pytest

from tests.inference.small import greedy
from tests.serving.service import ANSWERS, taught


def complete(server, prompt, **options):
    return server.client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, **options})


def question_of(tokenizer, text="hi"):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def test_tokens_are_those_of_whole_forwards(server):
    model, tokenizer = taught()
    bos = tokenizer.bos_token_id
    ids = [bos, *tokenizer.encode("He")]
    expected = greedy(model, ids, 10)
    for prompt in ("He", ids):
        choice = complete(server, prompt, max_tokens=10).choices[0]
        assert choice.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_rendered_chat_is_answered(server):
    prompt = question_of(taught()[1])
    choice = complete(server, prompt, max_tokens=60).choices[0]
    assert (choice.text, choice.finish_reason) == (ANSWERS["hi"]["content"], "stop")
    pieces = [chunk.choices[0].text for chunk in complete(server, prompt, max_tokens=60, stream=True)]
    assert "".join(pieces) == choice.text and len(pieces) > 5


def test_choices_of_many_prompts_are_numbered_consecutively(server):
    tokenizer = taught()[1]
    prompts = [question_of(tokenizer, text) for text in ("hi", "why")]
    options = {"n": 2, "max_tokens": 60, "seed": 1, "temperature": 1.0}
    answer = complete(server, prompts, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    reasons = [None] * 4
    *chunks, last = complete(server, prompts, stream=True, stream_options={"include_usage": True}, **options)
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in answer.choices]
    assert reasons == [choice.finish_reason for choice in answer.choices]
    assert last.usage == answer.usage or last.usage.total_tokens == answer.usage.total_tokens
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in prompts)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(server, stream):
    prompt = question_of(taught()[1])
    answer = complete(server, prompt, max_tokens=60, logprobs=2, stream=stream)
    logs = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    tokens = [token for log in logs if log for token in log.tokens]
    values = [value for log in logs if log for value in log.token_logprobs]
    offsets = [offset for log in logs if log for offset in log.text_offset]
    tops = [top for log in logs if log for top in log.top_logprobs]
    assert tokens[0] == "H" and offsets[:2] == [0, 1] and offsets == sorted(offsets)
    assert all(
        len(top) == 2 and top[token] == value
        for token, value, top in zip(tokens, values, tops, strict=True)
        if "\ufffd" not in token
    )
    assert complete(server, prompt, max_tokens=2).choices[0].logprobs is None


def test_the_default_limit_is_sixteen_tokens(server):
    assert complete(server, "what?").usage.completion_tokens == 16
