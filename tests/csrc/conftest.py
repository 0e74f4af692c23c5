"""The CUDA kernels, built for the emulator once a session."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from tests.csrc import emulated


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = os.environ.get("MINIMIND_EMULATED_LIBRARY")
    path = Path(built) if built else emulated.build_library(tmp_path_factory.mktemp("emulated"), "-O1")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@pytest.fixture
def ops(library):
    """The operators; ldmatrix must not have met a bank conflict by the end."""
    before = library.emulator_bank_conflicts()
    yield getattr(torch.ops, emulated.NAMESPACE)
    assert library.emulator_bank_conflicts() == before
