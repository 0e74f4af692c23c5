"""torch.compile as training uses it."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import nn

from minimind.data.files import cache_root
from minimind.modeling import Model


def compile_model(model: nn.Module, cuda_graph: bool = False, whole: bool = True) -> Model:
    """`model` compiled; every batch has one shape. The machine code is kept in minimind's cache folder, so that a
    second run compiles nothing (unless TORCHINDUCTOR_CACHE_DIR names another).

    whole: as one graph; a break is an error. DDP and FSDP, which act between its parts, need it in parts.
    cuda_graph: also record forward and backward as CUDA graphs, which saves what launches cost; it takes memory for
    its own copy of the inputs, and helps small models on fast cards.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    mode = "reduce-overhead" if cuda_graph else None
    return cast(Model, torch.compile(model, fullgraph=whole, dynamic=False, mode=mode))
