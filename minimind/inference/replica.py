"""The model as the engine runs it: in eval mode, in the engine's dtype, on the live weights where they fit.

A parameter that already has the dtype is shared: its changes count at once. Norm weights and the router, which compute
in float32, are always shared. Other matrices are copied, and so is a projection with active low-rank adapters, as the
sum of both; `refresh` remakes the copies where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimind.lora import LoRALinear
from minimind.modeling import Model


class Replica:
    """`model` is a Model of the same shape that follows `source`; copied_bytes: what is not shared."""

    def __init__(self, source: Model, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # initialisation draws, on meta too
            self.model = Model(source.config)
        self.model.compute_dtype = dtype
        self.model.eval().requires_grad_(False)
        self._copies: dict[str, Tensor] = {}
        self.refresh()

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> bool:
        """Follow the source's weights. True if one of them lies at another address than before."""
        before = [p.data_ptr() for p in self.model.parameters() if not p.is_meta]
        state = {name: self._weight(name) for name, _ in self.model.named_parameters()}
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        return before != [p.data_ptr() for p in self.model.parameters()]

    def _weight(self, name: str) -> Tensor:
        path, _, _ = name.rpartition(".")
        module = self._source.get_submodule(path)
        weight = self._source.get_parameter(name).detach()
        if isinstance(module, LoRALinear) and module.active and module.base is None:
            weight = module.merged()
        elif weight.ndim == 1 or path.endswith("router") or weight.dtype == self._dtype:
            self._copies.pop(name, None)
            return weight
        copy = self._copies.get(name)
        if copy is None or copy.device != weight.device:
            copy = self._copies[name] = torch.empty_like(weight, dtype=self._dtype)
        return copy.copy_(weight)
