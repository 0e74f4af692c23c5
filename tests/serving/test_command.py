"""`minimind serve` as a user runs it: in a process, with the command that it prints, ended by a signal."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from minimind.serving.command import NEEDED, Args, greeting, main, open_service
from minimind.weights import save_weights
from tests.serving.service import ANSWERS, taught

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = taught()
    place = tmp_path_factory.mktemp("taught")
    save_weights(model, place)
    tokenizer.save(place)
    return place


@pytest.fixture
def process(folder):
    command = [sys.executable, "-m", "minimind.cli", "serve", "--model", str(folder), "--port", "0", "--dtype", "fp32"]
    environment = {**os.environ, "MINIMIND_API_KEY": "k3y", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    yield running
    running.kill()
    running.communicate()


def test_the_printed_command_works_and_a_signal_lets_streams_finish(process, folder):
    first, curl = process.stdout.readline(), process.stdout.readline()
    url = re.match(rf"serving {folder.name} at (http://127.0.0.1:\d+)/v1", first)[1]
    _, *words = shlex.split(curl.replace("$MINIMIND_API_KEY", "k3y"))
    assert words[:2] == ["-N", f"{url}/v1/chat/completions"]
    with pytest.raises(ValueError, match=r"--port \d+: .*choose another"):
        main(Args(model=str(folder), port=int(url.rpartition(":")[2])))
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    body = words[words.index("-d") + 1].replace("Hello!", "hi").replace('"stream"', '"temperature": 0, "stream"')
    with httpx.stream("POST", words[1], content=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        process.send_signal(signal.SIGTERM)
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in text
    content = "".join(re.findall(r'"content":"([^"]*)"', text))
    assert content == ANSWERS["hi"]["content"]
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 70000}, "between 0 and 65535"),
        ({"max_queue": -1}, "--max-queue -1: must be a finite number of at least 0"),
        ({"drain_seconds": float("inf")}, "--drain-seconds inf: must be a finite number of at least 0"),
        ({"allow_origin": ("chat.example.com",)}, "--allow-origin chat.example.com: must be a scheme and a host"),
        ({"allow_origin": ("https://a.b/c",)}, "--allow-origin https://a.b/c: must be a scheme and a host"),
        ({"max_body_mib": float("nan")}, "--max-body-mib nan: must be a finite number of at least"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_flags_are_one_line(folder, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        main(Args(**{"model": str(folder), "port": 0, **change}))
    assert "\n" not in str(caught.value)


def test_notes_at_the_start(folder, monkeypatch):
    monkeypatch.delenv("MINIMIND_API_KEY", raising=False)
    service, notes = open_service(Args(model=str(folder), host="0.0.0.0"))
    assert any("anyone who reaches 0.0.0.0" in note for note in notes)
    assert service.model == folder.name and service.api_key is None
    assert "http://127.0.0.1:80/v1" in greeting(service, "0.0.0.0", 80)
    service, notes = open_service(Args(model=str(folder), api_key="secret", name="other", host="::1"))
    line = greeting(service, "::1", 80)
    assert "secret" not in line and "Bearer $MINIMIND_API_KEY" in line and '"other"' in line and "[::1]:80" in line
    assert not any("anyone" in note for note in notes)


def test_a_missing_extra_names_the_command_to_install_it(folder, monkeypatch):
    for name in NEEDED:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match=rf"{name} is missing: pip install 'minimind\[serve\]'"):
                main(Args(model=str(folder)))
