import importlib.util

import pytest
import torch

NEEDED = ("fastapi", "httpx", "llguidance", "openai", "prometheus_client", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(
            f"tests/serving not run: without {', '.join(MISSING)}; pip install 'minimind[serve,dev]'"
        )


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Products as small as these gain nothing from a second thread and lose much to waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def server(_one_thread):
    """With a model that was taught ANSWERS."""
    from tests.serving.service import serving, taught

    with serving(*taught()) as running:
        yield running
