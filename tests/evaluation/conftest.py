"""Tests of evaluation run with both hosts, as in tests/inference."""

from tests.inference.conftest import host, pytest_generate_tests  # noqa: F401
