import pytest
import torch

for module in ("fastapi", "openai", "llguidance", "prometheus_client", "uvicorn"):
    pytest.importorskip(module, reason="pip install 'minimind[serve,dev]'")

from tests.serving.service import serving, taught  # noqa: E402  # they need what is looked for above


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
    with serving(*taught()) as running:
        yield running
