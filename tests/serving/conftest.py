import importlib.util

import pytest

NEEDED = ("fastapi", "httpx", "llguidance", "openai", "prometheus_client", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(
            f"tests/serving not run: without {', '.join(MISSING)}; pip install 'minimind[serve,dev]'"
        )


@pytest.fixture(scope="package")
def server():
    """A server with a model that was trained on ANSWERS."""
    from tests.serving.service import serving, taught

    with serving(*taught()) as running:
        yield running
