"""torch.compile as training uses it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from minimind.kernels import triton_support
from minimind.modeling import Model
from minimind.utils.files import cache_root


def compile_model(model: nn.Module, cuda_graph: bool = False, whole: bool = True) -> Model:
    """`model` compiled; every batch has one shape. The machine code is kept in minimind's cache folder, so that a
    second run compiles nothing (unless TORCHINDUCTOR_CACHE_DIR names another).

    whole: as one graph; a break is an error. DDP and FSDP, which act between its parts, need it in parts.
    cuda_graph: also record forward and backward as CUDA graphs, which saves what launches cost; it takes memory for
    its own copy of the inputs, and helps small models on fast cards. What cannot be recorded is an error, not left out.
    """
    import torch.compiler.config as settings

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    given = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    settings.cache_key_tag = f"{given}{kernels_fingerprint()}"
    graphs: dict[str, Any] = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
    options = graphs if cuda_graph else None
    return cast(Model, torch.compile(model, fullgraph=whole, dynamic=False, options=options))


def kernels_fingerprint() -> str:
    """Of the sources of the kernels. They and their tile sizes are part of what torch.compile keeps, and it finds a
    kernel's source only where an operator names it, not where a function does that the operator calls."""
    digest = hashlib.sha256()
    for file in sorted(Path(triton_support.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
