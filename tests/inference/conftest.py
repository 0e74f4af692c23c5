"""Tests of engines run twice: with a host that is in step, as on a CPU, and with one that is late, as on a GPU."""

import pytest

from minimind.inference import engine
from minimind.inference.engine import Engine


def pytest_generate_tests(metafunc):
    if any(
        value is Engine or getattr(value, "__name__", "") == "engine_of" for value in vars(metafunc.module).values()
    ):
        metafunc.fixturenames.append("host")
        metafunc.parametrize("host", ["in step", "late"], indirect=True)


@pytest.fixture
def host(request, monkeypatch):
    """Which of the two the engines of a test have."""
    monkeypatch.setattr(engine, "host_is_late", lambda device: request.param == "late")
    return request.param
