"""The model as the engine runs it: in eval mode, in the engine's dtype, on the live weights where they fit.

A parameter that already has the dtype is shared: its changes count at once. Norm weights and the router, which compute
in float32, are always shared. Other matrices are copied, and so is a projection with active low-rank adapters, as the
sum of both; `refresh` remakes the copies where they lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.lora import LoRALinear
from minimind.modeling import Model


class Replica:
    """`model` is a Model of the same shape that follows `source` in `dtype`; copied_bytes: what is not shared. config:
    the source's, None, or one with another tokenizer."""

    def __init__(self, source: Model, dtype: torch.dtype, config: ModelConfig | None = None) -> None:
        self.dtype = dtype
        self._get_source: Callable[[], Model | None] = lambda: source
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # initialisation draws, on meta too
            self.model = Model(config or source.config)
        self.model.compute_dtype = dtype
        self.model.eval().requires_grad_(False)
        self._copies: dict[str, Tensor] = {}
        self.refresh()

    @property
    def _source(self) -> Model:
        source = self._get_source()
        if source is None:
            raise RuntimeError("the model whose weights these are is gone")
        return source

    def let_go_of_source(self) -> None:
        """Leave it to others to keep the source alive. Its weights are held on to all the same."""
        self._get_source = weakref.ref(self._source)

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> bool:
        """Follow the source's weights. True if one of them lies at another address than before."""
        before = [p.data_ptr() for p in self.model.parameters() if not p.is_meta]
        names = [name for name, _ in self.model.named_parameters()]
        self._make_room([name for name in names if not self._is_shared(name)])
        self.model.load_state_dict({name: self._weight(name) for name in names}, assign=True)
        self.model.requires_grad_(False)
        return before != [p.data_ptr() for p in self.model.parameters()]

    def _make_room(self, names: list[str]) -> None:
        """Keep the copies of `names` that lie where their weights do, and make those that are missing."""
        weights = {name: self._source.get_parameter(name) for name in names}
        old = self._copies
        self._copies = {n: old[n] for n, w in weights.items() if n in old and old[n].device == w.device}
        for name in names:
            if name not in self._copies:
                self._copies[name] = torch.empty_like(weights[name], dtype=self.dtype)

    def _is_shared(self, name: str) -> bool:
        weight, path = self._source.get_parameter(name), name.rpartition(".")[0]
        if self._adapted(path) is not None:
            return False
        return weight.ndim == 1 or path.endswith("router") or weight.dtype == self.dtype

    def _adapted(self, path: str) -> LoRALinear | None:
        """The module at `path`, if it is a projection with active adapters that are not merged into its weight."""
        module = self._source.get_submodule(path)
        return module if isinstance(module, LoRALinear) and module.active and module.base is None else None

    def _weight(self, name: str) -> Tensor:
        weight = self._source.get_parameter(name).detach()
        if name not in self._copies:
            return weight
        adapted = self._adapted(name.rpartition(".")[0])
        return self._copies[name].copy_(weight if adapted is None else adapted.merged())
