"""A running average of the weights (--ema): a <- a + (1 - d) (w - a) after every step, float32, beside the weights.

Where the rate does not fall, the average does in part what a falling rate does: the noise of single steps cancels out,
at no cost but 4 bytes a parameter (Izmailov et al. 2018, arXiv 1803.05407; Kaddour 2022, 2209.14981). d is the decay,
but (1 + t) / (10 + t) after t steps where that is less, so that the first weights do not stay in it for long: early on
it is over the last tenth of the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minimind.modeling import Model

FOLDER = "average"  # in a checkpoint


class WeightAverage:
    """Of what is trained of `model`, which may be replicated or sharded: each process averages what it holds. Begins
    with the weights as they are. updates: steps taken in."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self._to_shards()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._values = [weight.detach().clone() for weight in self._weights()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer. Waits for nothing."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._values, self._weights(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights meanwhile, where these lie; then its own again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._to_shards()
        for weight, value in zip(self._weights(), self._values, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    def _weights(self) -> list[Tensor]:
        """What this process holds of them."""
        return [p.to_local() if isinstance(p, DTensor) else p.data for p in self._parameters]

    def _to_shards(self) -> None:
        """A forward without a backward leaves whole parameters in place of the shards, and would leave them as they
        are."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
