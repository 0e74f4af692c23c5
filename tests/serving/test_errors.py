"""Invalid requests get the status and form that OpenAI's clients expect and a message of one line, never a 500."""

import inspect
import json

import pytest
import torch
from fastapi.middleware.cors import CORSMiddleware

from minimind import load_tokenizer
from minimind.inference.requests import MAX_SEED, Delta
from minimind.serving.chat_format import ReplyParser, selected_tools
from minimind.serving.protocol import MAX_DEPTH, NEUTRAL, ChatRequest, error_body
from minimind.serving.routes import Choice
from tests.inference.small import small_model
from tests.serving.service import WEATHER, serving

HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONGEST = max(load_tokenizer().special_tokens, key=len)
NAMED = {"type": "function", "function": {"name": "clock"}}
DEEP = {}
for _ in range(MAX_DEPTH):
    DEEP = {"a": DEEP}


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: not supported"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"max_completion_tokens": 3}, 400, "the same limit"),
        ({"n": 100}, 400, "at most 72 samples"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, 400, "no tool 'clock'"),
        ({"tool_choice": "required"}, 400, "there are no tools"),
        ({"tools": [WEATHER, WEATHER]}, 400, "same name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 400, "enforced"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "a context of 1,024"),
        ({"messages": [{"role": "user", "content": "x" * 99_000}]}, 400, "characters, too many for a context of 1,024"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, 422, "64 levels"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, 422, "schema: more than 64"),
        ({"temperature": 2.5}, 422, "less than or equal to 2"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"top_p": -0.1}, 422, "top_p"),
        ({"top_k": -2}, 422, "top_k"),
        ({"seed": 2**63}, 422, "seed"),
        ({"stop": ["x"] * 17}, 422, "stop"),
        ({"ignore_eos": True}, 422, "ignore_eos: Extra inputs are not permitted"),
        ({"best_of": 2}, 422, "best_of: Extra inputs are not permitted"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, 422, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 422, "text"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": -2}, 422, "max_tokens"),
        ({"reasoning_effort": "high"}, 422, "reasoning_effort: Input should be 'medium'"),
        ({"functions": [{"name": "f"}]}, 422, "functions: List should have at most 0 items"),
        ({"web_search_options": {}}, 422, "web_search_options: Extra inputs are not permitted"),
        ({"modalities": ["text", "audio"]}, 422, "modalities: List should have at most 1 item"),
        ({"sampler": 1}, 422, "sampler: Extra inputs are not permitted"),
        ({"model": "gpt-5"}, 404, "this server has 'tiny'"),
    ],
)
def test_invalid_chat_requests_name_the_error(server, change, status, message):
    assert message in error_of(server.http.post(CHAT, json={**HI, **change}), status)["message"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": [5, 10**6]}, 400, "outside the vocabulary"),
        ({"prompt": "x", "echo": True}, 400, "echo: not supported"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of"),
        ({"prompt": "x" * 99_000}, 400, "99,000 characters, too many for a context of 1,024"),
        ({"prompt": LONGEST * 1022}, 200, ""),  # as many characters as fit
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": [["x"]]}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": [1] * 1020, "max_tokens": 5000}, 200, ""),  # ends with the context
    ],
)
def test_invalid_completion_requests_name_the_error(server, change, status, message):
    response = server.http.post(COMPLETIONS, json={"model": "tiny", "temperature": 0, **change})
    if status == 200:
        assert response.json()["choices"][0]["finish_reason"] in ("length", "stop")
    else:
        assert message in error_of(response, status)["message"]


def test_malformed_bodies(server):
    json_type = {"Content-Type": "application/json"}
    for body, status in ((b"{", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"", 422)):
        assert error_of(server.http.post(CHAT, content=body, headers=json_type), status)["message"]
    for body in ("[1]", "3", '{"model": "tiny", "messages": "\\ud800"}', '{"temperature": NaN}', '{"seed": 1e999}'):
        error_of(server.http.post(CHAT, content=body, headers=json_type), 422)
    lone = json.dumps({**HI, "messages": [{"role": "user", "content": "\ud800"}]})
    assert server.http.post(CHAT, content=lone, headers=json_type).status_code == 200
    field = json.dumps({**HI, "a\nb": 1})
    assert "a b: Extra" in error_of(server.http.post(CHAT, content=field, headers=json_type), 422)["message"]
    tools = json.dumps({**HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]})
    assert server.http.post(CHAT, content=tools, headers=json_type).status_code in (200, 400)
    error_of(server.http.get(CHAT), 405)
    error_of(server.http.get("/v1/poems"), 404)


@pytest.mark.parametrize("route", ["embeddings", "responses", "moderations", "images/generations", "audio/speech"])
def test_what_openai_has_and_this_server_does_not_is_said(server, route):
    message = error_of(server.http.post(f"/v1/{route}", json={"model": "tiny", "input": "hi"}), 404)["message"]
    assert message == (
        f"POST /v1/{route}: this server has no {route.split('/')[0]}, only /v1/chat/completions, /v1/completions and "
        "/v1/models"
    )


def call_of(arguments):
    """A conversation with a call that has these arguments, and the result of the call."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    ]


@pytest.mark.parametrize("arguments", ['{"city": "Par', "null", "", "3", "[" * 200, json.dumps(DEEP), "<|im_end|>"])
def test_cut_or_malformed_calls_can_be_sent_back(server, arguments):
    """The server itself returns such answers, with finish_reason length."""
    response = server.http.post(CHAT, json={**HI, "messages": call_of(arguments)})
    assert response.status_code == 200, response.text
    prompt = server.service.prompts.prompt(ChatRequest(model="tiny", messages=call_of(arguments)))[0]
    text = server.service.tokenizer.decode(prompt, skip_special_tokens=False)
    written = json.dumps(json.loads(arguments)) if arguments.startswith('{"a') else arguments or "{}"
    assert f'"arguments": {written}}}' in text


WRITTEN = """<think>
so
</think>
I ask.<tool_call>
{"name": "weather", "arguments": {"city": "\\u00c5s \\"x\\"", "days": [1, {"a": null}]}}
</tool_call>
<tool_call>{"name": "clock", "arguments": "now"}</tool_call>"""


def test_answers_cut_at_any_length_can_be_sent_back(server):
    for end in range(len(WRITTEN) + 1):
        choice = Choice(ReplyParser(tools=True))
        choice.take(Delta("", 0, WRITTEN[:end], (), (), (), "length"))
        message = {"role": "assistant", "content": choice.reply.content, "reasoning_content": choice.reply.reasoning}
        if choice.reply.calls:
            message["tool_calls"] = [
                {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in choice.reply.calls
            ]
        messages = [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "go on"}]
        ids, _ = server.service.prompts.prompt(ChatRequest(model="tiny", messages=messages))
        text = server.service.tokenizer.decode(ids, skip_special_tokens=False)
        assert all(name in text and arguments in text for name, arguments in choice.reply.calls[1:])


ANSWERED = [
    {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}], "id": "u1"},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
    {"role": "tool", "tool_call_id": "c1", "content": None, "name": None, "is_error": False},
    {"role": "tool", "tool_call_id": "c1", "content": "ok", "name": "weather"},
]


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": ANSWERED},
        dict.fromkeys(
            ("reasoning_effort", "prediction", "functions", "function_call", "modalities", "audio", "verbosity", "n",
             "web_search_options", "safety_identifier", "prompt_cache_key", "tools", "stop", "a_later_invention")
        ),
        {"reasoning_effort": "medium", "verbosity": "medium", "modalities": ["text"], "functions": []},
        {"safety_identifier": "me", "prompt_cache_key": "k", "store": False, "function_call": "none"},
        {"logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text", "json_schema": None}, "stream_options": None},
        {"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": None}, "extra": None}]},
        {"tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}], "parallel_tool_calls": True},
        {"tools": [{"function": {**WEATHER["function"], "returns": {"type": "string"}, "strict": True}}]},
        {"metadata": {"chat": {"id": 1}}, "user": 7, "service_tier": "flex", "prompt_cache_retention": "24h"},
        {"prediction": {"type": "content", "content": "hello"}, "store": True, "seed": -1, "logit_bias": {}},
        {"max_completion_tokens": 2, "top_k": -1, "top_p": 0, "stop": ""},
        {"stop": ["", "x"], "tools": [], "tool_choice": "auto", "frequency_penalty": 0, "n": 1},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": False}},
        dict(NEUTRAL),
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *ANSWERED]},
    ],
)  # fmt: skip
def test_neutral_values_are_accepted(server, extra):
    response = server.http.post(CHAT, json={**HI, **extra})
    assert response.status_code == 200, response.text


def test_boundary_values_take_effect(server):
    """A top_p of 0 takes the likeliest token, a top_k of -1 keeps all, and an empty stop string stops nothing."""
    likeliest = server.http.post(CHAT, json={**HI, "max_tokens": 8, "temperature": 0}).json()["choices"]
    found = server.http.post(CHAT, json={**HI, "max_tokens": 8, "temperature": 1, "top_p": 0, "stop": [""]})
    assert found.json()["choices"] == likeliest
    drawn = [server.http.post(CHAT, json={**HI, "max_tokens": 8, "seed": 3, "top_k": k}).json() for k in (-1, 0)]
    assert drawn[0]["choices"] == drawn[1]["choices"]


def test_arguments_as_an_object_are_those_of_their_json(server):
    prompts = [
        server.service.prompts.prompt(ChatRequest(model="tiny", messages=call_of(arguments)))
        for arguments in ({"city": "Paris"}, '{"city": "Paris"}')
    ]
    assert prompts[0] == prompts[1]


def test_null_inside_a_schema_is_kept():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}}
    asked = ChatRequest(model="tiny", messages=[{"role": "user", "content": "x"}], tools=[tool])
    assert selected_tools(asked)[0]["function"]["parameters"] == {"properties": {"x": {"default": None}}}


def test_a_stream_without_obfuscation(server):
    options = {"include_usage": True, "include_obfuscation": False}
    response = server.http.post(CHAT, json={**HI, "stream": True, "stream_options": options})
    assert response.status_code == 200 and "[DONE]" in response.text


def test_minus_one_takes_all_tokens_that_fit(server):
    prompt = {"model": "tiny", "prompt": [3] * 20, "max_tokens": -1}
    body = server.http.post(COMPLETIONS, json=prompt).json()
    choice, usage = body["choices"][0], body["usage"]
    assert choice["finish_reason"] == "stop" or usage["total_tokens"] == server.service.context


@pytest.mark.parametrize(
    "kind", [None, "", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "text/json"]
)
def test_json_without_its_content_type_is_json(server, kind):
    """curl -d declares a form, fetch in Node plain text. A web page could send those without a preflight request."""
    headers = {} if kind is None else {"Content-Type": kind}
    body = json.dumps(HI)
    assert server.http.post(CHAT, content=body, headers=headers).status_code == 200
    for origin in ("https://elsewhere.example", "http://localhost:3000", "null"):
        answer = server.http.post(CHAT, content=body, headers={**headers, "Origin": origin})
        assert "Content-Type: application/json" in error_of(answer, 415)["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_web_pages_may_use_any_json_content_type(server, kind):
    headers = {"Content-Type": kind, "Origin": "http://localhost:3000"}
    assert server.http.post(CHAT, content=json.dumps(HI), headers=headers).status_code == 200


def test_a_path_without_v1_gets_a_hint(server):
    assert "the API is below /v1" in error_of(server.http.post("/chat/completions", json=HI), 404)["message"]
    assert "below" not in error_of(server.http.get("/v1/poems"), 404)["message"]


def preflight(running, origin, **more):
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
    return running.http.options(CHAT, headers={**asks, "Access-Control-Request-Headers": "authorization,content-type"})


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:8080", "http://0.0.0.0:5173", "http://app.localhost",
     "tauri://localhost", "capacitor://localhost"],
)  # fmt: skip
def test_local_pages_may_call(server, origin):
    answer = preflight(server, origin)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    answer = server.http.post(CHAT, json=HI, headers={"Origin": origin})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "origin",
    ["https://elsewhere.example", "http://localhost.elsewhere.example", "http://notlocalhost", "null", "app://obsidian.md",
     "http://127.0.0.1.elsewhere.example", "chrome-extension://abcdef"],
)  # fmt: skip
def test_foreign_pages_may_not_call(server, origin):
    assert "access-control-allow-origin" not in preflight(server, origin).headers
    answer = server.http.post(CHAT, json=HI, headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_allowed_pages_may_call_and_preflight_needs_no_key():
    with serving(api_key="secret", allow_origins=("https://chat.example.com",)) as running:
        answer = preflight(running, "https://chat.example.com")
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"
        answer = running.http.post(CHAT, json=HI, headers={"Origin": "https://chat.example.com"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"


def test_origins_of_files_and_programs_can_be_allowed():
    with serving(allow_origins=("null", "app://obsidian.md")) as running:
        for origin in ("null", "app://obsidian.md"):
            assert preflight(running, origin).headers["access-control-allow-origin"] == origin
        assert "access-control-allow-origin" not in preflight(running, "https://elsewhere.example").headers


def test_private_network_preflight(server):
    asks = {"Access-Control-Request-Private-Network": "true"}
    answer = preflight(server, "http://localhost:3000", **asks)
    assert answer.status_code == 200
    if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
        assert answer.headers["access-control-allow-private-network"] == "true"
    assert preflight(server, "https://elsewhere.example", **asks).status_code == 400
    for method in ("PUT", "DELETE", "PATCH"):
        answer = preflight(server, "http://localhost:3000", **{"Access-Control-Request-Method": method})
        assert answer.status_code == 400 and "method" in answer.text


def test_a_message_is_one_line_of_utf8():
    """Clients choose names of fields and functions, and a message may repeat them."""
    assert error_body(400, "a\ud800\n b", "c\udfff")["error"]["message"] == "a? b"
    assert error_body(400, "a", "c\udfff")["error"]["param"] == "c?"


def test_models_and_health(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    error_of(server.http.get("/v1/models/other"), 404)
    assert server.http.get("/health").json() == {"status": "ok", "model": "tiny"}
    assert server.http.get("/docs").status_code == 200


def test_metrics(server):
    before = server.metric("minimind_time_to_first_token_seconds_count")
    server.chat("hi")
    assert server.metric("minimind_time_to_first_token_seconds_count") == before + 1
    assert server.metric("minimind_requests_waiting") == server.metric("minimind_requests_running") == 0
    assert server.metric("minimind_kv_cache_usage_ratio") == 0 < server.metric("minimind_generated_tokens_total")
    assert server.metric("minimind_batch_limit") == 8
    text = server.http.get("/metrics").text
    assert 'minimind_http_responses_total{route="/v1/chat/completions",status="200"}' in text
    assert 'minimind_samples_finished_total{reason="stop"}' in text


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 5e-324}, {"temperature": 1e-38}, {"temperature": 1e-5}, {"temperature": 2}, {"top_p": 5e-324},
        {"min_p": 1}, {"min_p": 5e-324}, {"top_k": 2**31 - 1}, {"presence_penalty": -2}, {"presence_penalty": 2},
        {"repetition_penalty": 0.1}, {"repetition_penalty": 10, "presence_penalty": 2, "temperature": 1e-5},
    ],
)  # fmt: skip
def test_extreme_sampling_values_are_served(server, extreme):
    for more in ({}, {"logprobs": True, "top_logprobs": 5}):
        body = {**HI, "max_tokens": 6, **extreme, **more}
        assert server.http.post(CHAT, json=body).status_code == 200


def test_documented_bounds_are_the_checked_ones(server):
    """The description has them as floats, in which 2^63 - 1 would be 2^63."""
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        (integer,) = (kind for kind in schemas[name]["properties"]["seed"]["anyOf"] if kind["type"] == "integer")
        assert integer["minimum"] == -(2**63) and integer["exclusiveMaximum"] == 2**63 and "maximum" not in integer


def test_json_of_the_greatest_depth_is_accepted(server):
    deep = DEEP["a"]
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    call = {"function": {"name": "f", "arguments": json.dumps(deep)}}
    for more in (
        {"tools": [tool]},
        {"tools": [tool], "tool_choice": "required"},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
    ):
        assert server.http.post(CHAT, json={**HI, **more}).status_code == 200, more


def test_the_largest_seed_is_accepted(server):
    assert server.http.post(CHAT, json={**HI, "seed": MAX_SEED}).status_code == 200
    assert server.http.post(CHAT, json={**HI, "seed": -(2**63)}).status_code == 200


def test_the_key_is_required():
    with serving(api_key="s3cret-ключ") as running:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer"}):
            response = running.http.post(CHAT, json=HI, headers=header)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            error_of(running.http.get("/v1/models", headers=header), 401)
            error_of(running.http.post(CHAT, content=b"{", headers=header), 401)
        key = {"Authorization": "bearer s3cret-ключ".encode()}
        assert running.http.get("/v1/models", headers=key).status_code == 200
        assert running.http.get("/health").status_code == running.http.get("/metrics").status_code == 200


def test_a_body_that_is_too_large():
    with serving(max_body=10_000) as running:
        large = {**HI, "messages": [{"role": "user", "content": "x" * 10_000}]}
        assert error_of(running.http.post(CHAT, json=large), 413)["code"] == "body_too_large"
        content = (json.dumps(large).encode()[i : i + 1000] for i in range(0, 12_000, 1000))
        headers = {"Content-Type": "application/json"}
        error_of(running.http.post(CHAT, content=content, headers=headers), 413)  # chunked: no length is given
        assert running.http.post(CHAT, json=HI).status_code == 200


def test_an_engine_that_fails_answers_with_500_and_goes_on(monkeypatch):
    with serving() as running:
        engine = running.service.worker.engine
        step, failing = engine.step, [True]

        def fail():
            if failing and engine._requests:
                failing.clear()
                raise MemoryError("no")
            return step()

        monkeypatch.setattr(engine, "step", fail)
        assert "engine failed: MemoryError" in error_of(running.http.post(CHAT, json=HI), 500)["message"]
        failing.append(True)
        with running.http.stream("POST", CHAT, json={**HI, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "MemoryError" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert lines[-1] == "data: [DONE]"
        assert running.http.post(CHAT, json=HI).status_code == 200
        assert running.service.worker.in_flight == 0


def test_nan_weights_are_an_error():
    model = small_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with serving(model) as running:
        assert "not finite" in error_of(running.http.post(CHAT, json=HI), 500)["message"]


def test_a_refused_request_frees_its_place_in_the_queue():
    with serving(max_queue=0, max_batch=1) as running:
        for _ in range(3):
            error_of(running.http.post(COMPLETIONS, json={"model": "tiny", "prompt": [10**6]}), 400)
        assert running.service.worker.in_flight == 0
        assert running.http.post(COMPLETIONS, json={"model": "tiny", "prompt": [1]}).status_code == 200
