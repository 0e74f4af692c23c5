"""The web chat: its page without a browser, and with one (slow)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from minimind.serving import web_command, web_tools
from minimind.serving.web_client import (
    LANGUAGES,
    SUGGESTIONS,
    TEXT,
    Call,
    ChatTurn,
    Settings,
    connect,
    fill,
    parse_tools,
)
from minimind.serving.web_command import _OPTIONS, PAGE, Args, main, server_command
from minimind.serving.web_tools import REFUSED, TOOLS_VARIABLE, YES_VARIABLE, may_go_on
from minimind.weights import save_weights
from tests.serving.service import ANSWERS, CALL, WEATHER, serving, taught

ROOT = Path(__file__).parents[2]
HELLO = ANSWERS["hi"]["content"]


@pytest.fixture
def page(server, monkeypatch):
    """The page, run once, with the seed and temperature of a memorised answer."""
    testing = pytest.importorskip("streamlit.testing.v1", reason="needs streamlit: pip install 'minimind[web]'")
    monkeypatch.setenv("MINIMIND_URL", f"{server.root}/v1")
    monkeypatch.delenv("MINIMIND_API_KEY", raising=False)
    app = testing.AppTest.from_file(str(PAGE), default_timeout=60)
    app.run()
    app.slider[0].set_value(0.0).run()
    assert not app.exception
    return app


def said(app):
    return [" ".join(m.value for m in message.markdown) for message in app.chat_message]


def ask(app, question):
    app.chat_input[0].set_value(question).run()
    assert not app.exception


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_local_server_is_reached_without_the_proxy(server, name, proxy, monkeypatch):
    monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("NO_PROXY", "example.com")
    assert [model.id for model in connect(f"{server.root}/v1", None).models.list()] == ["tiny"]
    local = server.root.replace("127.0.0.1", "localhost")
    assert [model.id for model in connect(f"{local}/v1", None).models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("[::1]", True), ("0.0.0.0", True), ("LOCALHOST", True),
     ("app.localhost", True), ("localhost.", True), ("localhost.example", False), ("notlocalhost", False),
     ("10.0.0.5", False), ("example.com", False)],
)  # fmt: skip
def test_local_hosts(host, local, monkeypatch):
    """Other servers are reached through the environment's proxy; one that cannot be used is a one-line error."""
    monkeypatch.setenv("ALL_PROXY", "socks://proxy.example:1")
    if local:
        connect(f"http://{host}:8998/v1", None).close()
    else:
        with pytest.raises(ValueError, match=r"the environment's proxy: .*NO_PROXY") as caught:
            connect(f"http://{host}:8998/v1", None)
        assert "\n" not in str(caught.value)


def test_a_conversation(page):
    assert page.selectbox[0].options == ["tiny"]
    ask(page, "hi")
    assert said(page) == ["hi", HELLO]
    assert re.search(r"\d+ tokens, the first in \d+ ms · \d+ tokens/s", page.chat_message[1].caption[0].value)
    ask(page, "why")
    assert len(said(page)) == 4
    page.sidebar.button[0].click().run()
    assert said(page) == []


def test_reasoning_is_collapsed(page):
    ask(page, "why")
    (thought,) = page.chat_message[1].status
    assert thought.label.startswith("Thought for") and thought.state == "complete"
    assert thought.markdown[0].value == ANSWERS["why"]["reasoning_content"]
    assert said(page)[1].endswith(ANSWERS["why"]["content"])


def test_a_tool_call_shows_a_form_for_its_result(page):
    page.toggle[0].set_value(True).run()
    page.sidebar.text_area[1].set_value(str([WEATHER]).replace("'", '"').replace("False", "false")).run()
    ask(page, "go")
    answer = page.chat_message[1]
    assert "weather" in answer.markdown[0].value and str(CALL["arguments"]["city"]) in answer.code[0].value
    page.text_input[0].set_value('{"degrees": 20}')
    (send,) = [button for button in page.button if button.label == "Send"]
    send.click().run()
    assert not page.exception
    assert len(page.chat_message) == 4 and page.chat_message[2].code[0].value == '{"degrees": 20}'


@pytest.fixture
def tooled(monkeypatch):
    """A page whose weather tool runs here, described so that the model calls it."""
    monkeypatch.setenv(TOOLS_VARIABLE, json.dumps(["builtin", "tests.serving.test_web:weather"]))
    monkeypatch.delenv(YES_VARIABLE, raising=False)
    st = pytest.importorskip("streamlit", reason="needs streamlit: pip install 'minimind[web]'")
    st.cache_resource.clear()
    monkeypatch.setattr(web_tools.PageTools, "schemas", lambda self, names: [WEATHER] if names else [])
    yield
    st.cache_resource.clear()


@pytest.fixture
def unasked(monkeypatch):
    monkeypatch.setenv(YES_VARIABLE, "1")


def weather(city: str) -> str:
    """Weather in a city"""
    return f"20 degrees in {city}"


def test_a_tool_runs_after_the_user_allows_it(tooled, page):
    page.multiselect[0].set_value(["weather"]).run()
    for label, result in (("Run", f"20 degrees in {CALL['arguments']['city']}"), ("Do not run", REFUSED)):
        ask(page, "go")
        assert str(CALL["arguments"]["city"]) in page.chat_message[1].code[0].value and len(page.chat_message) == 2
        (button,) = [button for button in page.button if button.label == label]
        button.click().run()
        assert not page.exception and len(page.chat_message) == 4
        assert page.chat_message[2].code[0].value == result
        page.sidebar.button[0].click().run()


def test_a_tool_that_is_not_on_offer_does_not_run(tooled, unasked, page):
    page.multiselect[0].set_value(["calculate"]).run()
    ask(page, "go")
    assert "there is no tool weather; choose from calculate" in page.chat_message[2].code[0].value


def test_unasked_calls_end(tooled, unasked, page, monkeypatch):
    """The model answers no result of a tool, so it may call on and on."""
    monkeypatch.setattr(web_tools, "TURNS", 2)
    page.multiselect[0].set_value(["weather"]).run()
    ask(page, "go")
    assert 4 <= len(page.chat_message) <= 5 and page.chat_message[2].code[0].value.startswith("20 degrees")
    calls = [ChatTurn("user", "go"), *[ChatTurn("assistant"), ChatTurn("tool")] * 2]
    assert may_go_on(calls[:3]) and not may_go_on(calls) and may_go_on([*calls, ChatTurn("user", "go")])


def test_a_suggestion_is_a_question(page):
    (button,) = [button for button in page.button if button.label == SUGGESTIONS["en"][0]]
    button.click().run()
    assert said(page)[0] == SUGGESTIONS["en"][0] and len(said(page)) == 2


def test_chinese(page):
    page.session_state.language = "zh"
    page.run()
    assert page.chat_input[0].placeholder == TEXT["ask"][1]
    assert page.sidebar.button[0].label == "新对话"
    ask(page, "hi")
    assert "词元" in page.chat_message[1].caption[0].value


def test_a_missing_server_is_an_error_on_the_page(monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1", reason="needs streamlit: pip install 'minimind[web]'")
    monkeypatch.setenv("MINIMIND_URL", "http://127.0.0.1:9/v1")
    app = testing.AppTest.from_file(str(PAGE), default_timeout=60).run()
    assert "minimind serve" in app.error[0].value and app.chat_input[0].disabled and not app.exception


def test_every_text_is_in_both_languages():
    assert all(len(texts) == len(LANGUAGES) and all(texts) for texts in TEXT.values())
    for texts in TEXT.values():
        assert len({len(re.findall(r"{[^}]*}", text)) for text in texts}) == 1
    assert all(len(SUGGESTIONS[language]) == 4 for language in LANGUAGES)


def test_an_answer_closed_early_frees_its_slot(server):
    turn = ChatTurn("assistant")
    pieces = fill(server.client, Settings("tiny", max_tokens=900, temperature=0), [ChatTurn("user", "what?")], turn)
    for _ in range(3):
        next(pieces)
    pieces.close()
    assert turn.stopped and turn.message() is not None
    end = time.perf_counter() + 5
    while server.service.worker.in_flight:
        assert time.perf_counter() < end
        time.sleep(0.01)


def test_the_oldest_rounds_are_dropped(server):
    long = [ChatTurn("user", "word " * 110), ChatTurn("assistant", "word " * 110)] * 2
    turn = ChatTurn("assistant")
    list(fill(server.client, Settings("tiny", temperature=0), [*long, ChatTurn("user", "hi")], turn))
    assert turn.dropped == 2 and turn.content == HELLO and not turn.error and not turn.stopped
    alone = ChatTurn("assistant")
    list(fill(server.client, Settings("tiny"), [ChatTurn("user", "word " * 2000)], alone))
    assert "context" in alone.error and alone.message() is None


def test_messages_are_sent_back_whole():
    turn = ChatTurn("assistant", "a", "b", [Call("c", "f", "{}")])
    assert turn.message() == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "b",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    for wrong in ("{", "{}", "[1]"):
        with pytest.raises(ValueError, match="not"):
            parse_tools(wrong)


def test_streamlit_options_exist_and_disable_its_questions():
    config = pytest.importorskip("streamlit.config", reason="needs streamlit: pip install 'minimind[web]'")
    assert not set(_OPTIONS) - set(config.get_config_options())
    assert _OPTIONS["server.showEmailPrompt"] == "false", "its first start in a terminal would wait for an address"


def test_the_server_gets_the_flags_of_the_model():
    command = server_command(Args(model="m", lora="l", yarn=4.0, port=1))
    assert command[4:] == ["--port", "0", "--model", "m", "--lora", "l", "--yarn", "4.0", "--device", "auto",
                           "--dtype", "auto", "--kv-dtype", "auto", "--weights-dtype", "auto"]  # fmt: skip
    for flags, message in (
        ({"model": "m", "url": "u"}, "--url and --model: give one of them"),
        ({"url": "127.0.0.1:8998"}, "--url 127.0.0.1:8998: must be an address such as http://"),
        ({"tools": ("no.such:tool",)}, "--tools no.such:tool: cannot import no.such"),
        ({"model": "m", "port": 65536}, "--port 65536: must be between 1 and 65535"),
    ):
        with pytest.raises(ValueError, match=message):
            main(Args(**flags))


@contextmanager
def browser():
    """Headless Chromium; skips with a reason if it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'minimind[interop]'")
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1280,860"):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@contextmanager
def web(*flags):
    """Runs `minimind web` in a process and yields its address."""
    pytest.importorskip("streamlit", reason="needs streamlit: pip install 'minimind[web]'")
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    command = [sys.executable, "-m", "minimind.cli", "web", "--no-browser", "--port", str(port), *flags]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM, "it ends what it started"


def when(condition, seconds=60):
    end = time.perf_counter() + seconds
    while True:
        try:
            if value := condition():
                return value
        except Exception as problem:  # the page is not there yet, or was just drawn anew
            last = problem
        else:
            last = None
        if time.perf_counter() > end:
            raise AssertionError("it did not come to that") from last
        time.sleep(0.05)


def test_an_interrupt_ends_the_page_and_its_server(monkeypatch):
    """kill -INT reaches only `minimind web`, not the processes that it started."""
    pages = []

    class Page:
        def __init__(self, command, env):
            self.ended = False
            pages.append(self)

        def wait(self):
            if not self.ended:
                if len(pages) > 1:
                    raise AssertionError("it would wait for ever")
                pages.append(self)
                raise KeyboardInterrupt

        def terminate(self):
            self.ended = True

    monkeypatch.setattr(web_command.subprocess, "Popen", Page)
    assert web_command._page(Args(), "http://127.0.0.1:9/v1", {}) == 0
    assert pages[0].ended


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Types questions and sees their answers; the default top_p leaves only the memorised ones."""
    model, tokenizer = taught()
    save_weights(model, tmp_path / "taught")
    tokenizer.save(tmp_path / "taught")
    with browser() as chrome, web("--model", str(tmp_path / "taught"), "--dtype", "fp32") as url:
        when(lambda: chrome.get(url) or True)

        def find(selector):
            return chrome.find_elements("css selector", selector)

        def type_in(text):
            box = when(lambda: find('[data-testid="stChatInputTextArea"]'))[0]
            box.send_keys(text + "\ue007")  # Enter

        def messages():
            return [element.text for element in find('[data-testid="stChatMessage"]')]

        when(lambda: "MiniMind" in find("h1")[0].text)
        type_in("hi")
        when(lambda: len(messages()) == 2 and HELLO in messages()[1] and "tokens/s" in messages()[1])
        chrome.find_element("xpath", '//button[contains(., "New chat")]').click()
        when(lambda: not messages())
        type_in("why")
        when(lambda: "Thought for" in messages()[1] and ANSWERS["why"]["content"] in messages()[1])
        assert ANSWERS["why"]["reasoning_content"][:10] not in messages()[1], "it is folded away"
        chrome.save_screenshot(str(tmp_path / "chat.png"))
        assert (tmp_path / "chat.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_stop_button(tmp_path):
    """Stops an answer that would take minutes; its text so far stays."""
    options = {"model": slow_model(), "tokenizer": taught()[1], "kv_tokens": 1 << 13}
    with serving(**options) as running, browser() as chrome, web("--url", f"{running.root}/v1") as url:
        when(lambda: chrome.get(url) or True)
        box = when(lambda: chrome.find_elements("css selector", '[data-testid="stChatInputTextArea"]'))[0]
        box.send_keys("what?\ue007")
        stop = when(lambda: chrome.find_elements("xpath", '//button[contains(., "Stop")]'))[0]
        when(lambda: running.metric("minimind_generated_tokens_total") > 3)
        stop.click()
        when(lambda: running.service.worker.in_flight == 0)
        when(lambda: "stopped" in chrome.find_elements("css selector", '[data-testid="stChatMessage"]')[1].text)
        assert running.metric("minimind_generated_tokens_total") < 500


def slow_model():
    from minimind import ModelConfig
    from minimind.modeling import Model

    return Model(ModelConfig(64, 2, 4, 2, 16, 128, taught()[1].vocab_size, max_position_embeddings=4096)).eval()
