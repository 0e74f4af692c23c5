"""Whether Triton kernels can run in this process."""

from __future__ import annotations

import importlib.util
import os

import torch


def why_no_triton(device: torch.device) -> str | None:
    """None when Triton can run kernels on tensors of `device`, else one short reason.

    A CPU tensor needs Triton's interpreter (TRITON_INTERPRET=1), which is for tests only.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"triton has no {device.type} backend"
