"""Open WebUI in front of the server, in headless Chromium: what a person does there, and the requests that it sends by
itself. docs/serving.md shows how to start it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.interop.test_clients import RESULT, recorded, save
from tests.serving.service import ANSWERS, CALL
from tests.serving.test_web import browser, when

pytestmark = pytest.mark.interop
GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
ENTER = "\ue007"
TOOL = '''
class Tools:
    def weather(self, city: str) -> str:
        """
        Weather in a city
        :param city: a city's name
        """
        return f"20 degrees in {city}"
'''


def settings() -> dict[str, str]:
    """The environment variables of the guide's command."""
    (command,) = re.findall(r"^((?: *[A-Z_]+=\S.*\\\n)+) +open-webui serve", GUIDE.read_text(encoding="utf-8"), re.M)
    return dict(word.split("=", 1) for word in shlex.split(command.replace("\\\n", " ")))


@contextmanager
def open_webui(server: str, folder: Path) -> Iterator[str]:
    """Open WebUI as the guide starts it, without a network; its address."""
    python = os.environ.get("MINIMIND_TEST_OPEN_WEBUI")
    if not python:
        pytest.skip("MINIMIND_TEST_OPEN_WEBUI is not set: the Python that has open-webui")
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    variables = {
        **os.environ,
        **settings(),
        "HF_HUB_OFFLINE": "1",
        "OFFLINE_MODE": "True",
        "OPENAI_API_BASE_URL": server,
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": "a key of the tests, long enough for SHA-256",
    }
    command = [str(Path(python).with_name("open-webui")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            when(lambda: process.poll() is not None or httpx.get(f"{url}/health").is_success, seconds=600)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def prepare(url: str) -> None:
    """Log in as its one user, hide its release notes, and give it a tool."""
    client = httpx.Client(base_url=f"{url}/api/v1", timeout=120)
    user = client.post("/auths/signin", json={"email": "", "password": ""}).json()
    client.headers["Authorization"] = f"Bearer {user['token']}"
    client.post("/users/user/settings/update", json={"ui": {"showChangelog": False}}).raise_for_status()
    tool = {"id": "weather", "name": "Weather", "content": TOOL, "meta": {"description": "Weather in a city"}}
    client.post("/tools/create", json=tool).raise_for_status()


class Page:
    """Open WebUI's page, as a person uses it."""

    def __init__(self, chrome: Any, url: str) -> None:
        self.chrome, self.url = chrome, url

    def new_chat(self) -> None:
        self.chrome.get(self.url)
        when(lambda: self.chrome.find_elements("css selector", "#chat-input"), 240)
        for button in self.chrome.find_elements("xpath", '//button[contains(., "Let\'s Go")]'):
            button.click()

    def click(self, selector: str) -> None:
        kind = "xpath" if selector.startswith("//") else "css selector"
        when(lambda: self.chrome.find_elements(kind, selector)[-1].click() or True)

    def ask(self, text: str) -> None:
        self.click("#chat-input")
        box = self.chrome.find_element("css selector", "#chat-input")
        box.send_keys(text)
        when(lambda: text in box.text)
        box.send_keys(ENTER)

    @property
    def text(self) -> str:
        return self.chrome.find_element("css selector", "#chat-container").text

    def shows(self, *texts: str) -> None:
        when(lambda: all(text in self.text for text in texts), 120)


def tasks(asked: list[tuple[str, Any, int]]) -> list[str]:
    """The first words of the requests that Open WebUI sends by itself."""
    bodies = [body for path, body, _ in asked if path.endswith("/chat/completions")]
    said = [body["messages"][-1]["content"].split("\n") for body in bodies]
    return [lines[1] for lines in said if lines[0] == "### Task:"]


def test_in_a_browser(model, monkeypatch, tmp_path):
    options = {"model": model[0], "tokenizer": model[1], "kv_tokens": 1 << 14}
    with recorded(monkeypatch, **options) as (running, asked), open_webui(f"{running.root}/v1", tmp_path) as url:
        prepare(url)
        with browser() as chrome:
            page = Page(chrome, url)
            page.new_chat()
            page.click("#model-selector-model-button")
            when(lambda: chrome.find_elements("css selector", '[data-value="tiny"]'))
            page.new_chat()
            page.ask("hi")
            page.shows(ANSWERS["hi"]["content"])
            when(
                lambda: {task.split()[0] for task in tasks(asked)} == {"Generate", "Predict"} and len(tasks(asked)) == 3
            )

            page.new_chat()
            page.ask("why")
            page.shows("Thought for", ANSWERS["why"]["content"])
            assert ANSWERS["why"]["reasoning_content"].split()[0] not in page.text, "it is folded away"
            page.click('//button[contains(., "Thought for")]')
            page.shows(*ANSWERS["why"]["reasoning_content"].split("\n\n"))
            page.click('button[aria-label="Regenerate"]')
            page.click('//button[contains(., "Try Again")]')
            page.shows("2/2")

            page.new_chat()
            page.click("#integration-menu-button")
            page.click('//button[contains(., "Tools")]')
            page.click('//button[contains(., "Weather")]')
            bar = "#message-input-container"  # which now shows that one tool is on
            when(lambda: "1" in chrome.find_element("css selector", bar).text)
            page.ask("go")
            page.shows("weather", RESULT)
            assert any(m["role"] == "tool" and m["content"] == f"20 degrees in {CALL['arguments']['city']}"
                       for _, body, _ in asked if body for m in body["messages"])  # fmt: skip
            chrome.save_screenshot(str(tmp_path / "tool.png"))

            engine = running.service.worker.engine
            step = engine.step
            monkeypatch.setattr(engine, "step", lambda: time.sleep(0.5) or step())
            page.new_chat()
            page.ask("hi")
            page.shows("Hello")
            page.click('button[aria-label="Stop"]')
            when(lambda: running.metric('minimind_samples_finished_total{reason="cancelled"}') == 1)
            monkeypatch.setattr(engine, "step", step)
            assert ANSWERS["hi"]["content"] not in page.text
            when(lambda: running.service.worker.in_flight == 0)
            answered = list(asked)
    assert [entry for entry in answered if entry[0].startswith("/v1/chat") and entry[2] != 200] == []
    show = "from importlib.metadata import version; print('open-webui', version('open-webui'))"
    client = subprocess.check_output([os.environ["MINIMIND_TEST_OPEN_WEBUI"], "-c", show], text=True)
    save("open_webui", client.strip(), answered)
