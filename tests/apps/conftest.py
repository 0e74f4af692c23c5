"""Tests of the chat run with both hosts, as those of the engine do."""

from tests.inference.conftest import host, pytest_generate_tests  # noqa: F401
