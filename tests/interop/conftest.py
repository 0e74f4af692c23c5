import json
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model() -> tuple[Any, Any]:
    """A model that has memorised the answers of test_clients.conversations, and its tokenizer."""
    from tests.interop.test_clients import conversations
    from tests.serving.service import teach

    learnt = conversations()
    return teach(learnt, [json.dumps(learnt, ensure_ascii=False)], vocabulary=640, positions=4096)
