"""Tests with an engine run twice: with a host in step, as on a CPU, and with a late host, as on a GPU."""

import pytest

from minimind.inference import engine
from minimind.inference.engine import Engine
from minimind.weights import save_weights
from tests.inference.small import TEXT, small_model, small_tokenizer


def pytest_generate_tests(metafunc):
    if any(
        value is Engine or getattr(value, "__name__", "") == "engine_of" for value in vars(metafunc.module).values()
    ):
        metafunc.fixturenames.append("host")
        metafunc.parametrize("host", ["in step", "late"], indirect=True)


@pytest.fixture
def host(request, monkeypatch):
    """Sets the host of a test's engines."""
    monkeypatch.setattr(engine, "host_is_late", lambda device: request.param == "late")
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A folder with a small model, `m`, and a text, book.txt."""
    save_weights(small_model(), tmp_path / "m")
    small_tokenizer().save(tmp_path / "m")
    (tmp_path / "book.txt").write_text(TEXT * 40)
    return tmp_path
