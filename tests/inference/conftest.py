import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Products as small as these gain nothing from a second thread and lose much to waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
