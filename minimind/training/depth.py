"""Depth warm-up: the first steps of a run train the lowest layers alone, which costs a fraction of a step.

The outputs of the other layers begin at zero, so these are the identity until they are trained: the model is whole at
every step, and adding layers does not change what it computes (Net2Net, Chen et al. 2015, arXiv 1511.05641; progressive
stacking, Gong et al. 2019). docs/recipe.md has what it gains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minimind.modeling import OUTPUTS, Model


@dataclass(frozen=True)
class DepthWarmup:
    """The first `steps` steps train `layers` layers, and then all are trained. cost: of such a step, as a share of that
    of the whole model."""

    steps: int = 0
    layers: int = 0
    cost: float = 1.0

    @staticmethod
    def of(model: Model, steps: int, layers: int) -> DepthWarmup:
        """The warm-up of `model` over `steps` steps. The cost is in proportion to parameters."""
        waiting = sum(p.numel() for layer in model.layers[layers:] for p in layer.parameters())
        return DepthWarmup(steps, layers, 1 - waiting / model.num_parameters())

    def apply(self, model: Model, step: int) -> None:
        """Let `model` run and train the layers of `step`, from 0. The others have no gradients and no optimizer state
        until then."""
        depth = self.layers if step < self.steps else None
        if self.steps and model.depth != depth:
            model.depth = depth
            for layer in model.layers[self.layers :]:
                layer.requires_grad_(depth is None)

    def work(self, first: int, last: int) -> float:
        """The cost of the steps from `first` to before `last`, in steps of the whole model."""
        shallow = max(0, min(last, self.steps) - min(first, self.steps))
        return last - first - shallow * (1 - self.cost)

    def describe(self, model: Model) -> str:
        """One line for the start of a run."""
        return f"the first {self.steps:,} steps train {self.layers} of {len(model.layers)} layers (--depth-warmup)"


WHOLE = DepthWarmup()  # every step trains all layers


@torch.no_grad()
def close_upper_layers(model: Model, layers: int) -> None:
    """Make all but the lowest `layers` layers the identity: their projections into the residual stream become zero."""
    for layer in model.layers[layers:]:
        for name, parameter in layer.named_parameters():
            if name.endswith(OUTPUTS):
                parameter.zero_()
