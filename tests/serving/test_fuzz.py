"""schemathesis with the server's own OpenAPI description: valid and invalid requests, none of which causes a 500."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="pip install 'minimind[dev]'")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.inference.small import small_model  # noqa: E402
from tests.serving.service import serving  # noqa: E402

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/metrics"]
POSTED = ROUTES[:2]


@pytest.fixture(scope="module")
def api():
    with serving(small_model(max_position_embeddings=64), default_max_tokens=4, backend="auto") as running:
        yield schemathesis.openapi.from_url(f"{running.root}/openapi.json")


def fuzz(api, route: str, mode: GenerationMode, examples: int, **options) -> Counter:
    """Statuses of generated requests. They name the right model, since others would only fail for that."""
    (operation,) = (found.ok() for found in api.get_all_operations() if found.ok().path == route)
    statuses: Counter = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **options)
    @given(operation.as_strategy(generation_mode=mode))
    def one(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1
        if response.status_code == 422 and mode is GenerationMode.POSITIVE:  # half a surrogate pair is no text
            assert "\\ud" in json.dumps(case.body), response.text

    one()
    return statuses


@pytest.mark.parametrize("route", ROUTES)
def test_valid_requests_cause_no_server_error(api, route):
    statuses = fuzz(api, route, GenerationMode.POSITIVE, 40 if route in POSTED else 5, derandomize=True)
    if route in POSTED:
        assert statuses[200] >= 3, statuses
    assert not {401, 413, 429} & statuses.keys()


@pytest.mark.parametrize("route", POSTED)
def test_invalid_requests_cause_no_server_error(api, route):
    statuses = fuzz(api, route, GenerationMode.NEGATIVE, 40, derandomize=True)
    assert statuses[422] >= 20, statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("route", POSTED)
def test_a_long_run_finds_no_server_error(api, route, mode):
    assert fuzz(api, route, mode, 1500).total() >= 1500
