"""Stop learning from a rollout once the policy has left what sampled it, the critic excepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimind.objectives.policy import PolicyBatch
from minimind.training.parallel import Parallel


class DriftStop:
    """target: mean KL(mu || p) per token (k3), measured by the forward of every step. Where it is above that, this step
    and the rest of the rollout's leave `policy` as it is: its gradients are taken away before the optimizer sees them.

    Waits for the device once a step. Raises ValueError for a target that is not above 0.
    """

    def __init__(self, target: float, policy: Sequence[nn.Parameter], parallel: Parallel) -> None:
        if not 0 < target < math.inf:
            raise ValueError(f"--target-kl {target}: must be above 0; leave it out to learn from all of a rollout")
        self.target, self.policy, self.parallel = target, list(policy), parallel
        self.stopped, self.taken = (False, 0)  # whether for the rest of the rollout; its steps that moved the policy
        self._sums: list[Tensor] = []
        self._weight = 0.0

    def begin(self) -> dict[str, float]:
        """A new rollout; how many steps moved the policy on the one before."""
        taken, self.stopped, self.taken = self.taken, False, 0
        return {"policy_steps": float(taken)}

    def see(self, batch: PolicyBatch, figures: dict[str, Tensor]) -> None:
        """What policy_loss told of a micro-batch."""
        self._sums.append(figures["behaviour_kl"].detach())
        self._weight += batch.global_weight

    def before_update(self) -> None:
        """All ranks call it, and agree."""
        sums, weight = torch.stack(self._sums).sum(), self._weight
        self._sums, self._weight = [], 0.0
        if not self.stopped:
            self.stopped = float(self.parallel.sum(sums)) / weight > self.target
        if self.stopped:
            for parameter in self.policy:
                parameter.grad = None
        self.taken += not self.stopped

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self.stopped, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped, self.taken = state["stopped"], state["taken"]
