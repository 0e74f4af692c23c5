"""Minibatches of rollouts: how sampled answers become batches, and when a rollout is used no further.

A new rollout is sampled from the current weights when the previous one is used up. All ranks know all of its answers,
so that they agree on groups, advantages and minibatches; each trains on its share of every minibatch. The rest of a
rollout is part of the loader's state, so that an interrupted run continues with the same answers, on any number of
processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minimind.config import ModelConfig
from minimind.objectives.policy import Aggregation, PolicyBatch
from minimind.training.parallel import Parallel
from minimind.training.rl.rollouts import Answer

MULTIPLE = 128  # packed rows have a multiple of this length: oneDNN generates code for every new length


def default_micro_batches(answers: int, longest: int, model: ModelConfig, device: torch.device) -> int:
    """Micro-batches of a step on `answers` of at most `longest` tokens each, prompts included. One holds at most 4,096
    tokens of minimind2-small, or 16,384 on a GPU (a backward needs about 0.3 MiB a token on a CPU), and of other models
    as many as their width and depth allow."""
    small = 512 * 8
    tokens = (16384 if device.type == "cuda" else 4096) * small // (model.hidden_size * model.num_hidden_layers)
    return -(-answers * longest // max(1, tokens))


@dataclass(frozen=True)
class Shape:
    """How a rollout becomes batches: `epochs` passes over its answers, each in a new order and divided into
    `minibatches` steps of `micro_batches` parts. PolicyBatch documents the other fields."""

    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    aggregation: Aggregation = "token"
    max_new_tokens: int = 0
    temperature: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps on one rollout."""
        return self.epochs * self.minibatches

    def parts(self, answers: int, rollout: int) -> list[list[np.ndarray]]:
        """For every step and each of its micro-batches, the indices of its answers."""
        steps = []
        for epoch in range(self.epochs):
            generator = np.random.default_rng([self.seed & (1 << 64) - 1, rollout, epoch])
            for step in np.array_split(generator.permutation(answers), self.minibatches):
                steps.append(np.array_split(step, self.micro_batches))
        return steps


@dataclass
class Rollout:
    """answers: of all ranks; next: the number of the next prompt in the stream; figures, seconds: for metrics.jsonl."""

    answers: list[Answer]
    next: int
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class RolloutLoader:
    """The trainer's Loader over rollouts.

    collect(rollout number, number of the next prompt, answers of the previous rollout) -> Rollout: all ranks call it
    together and get the same.
    keepers: objects with state_dict and load_state_dict that keep state between rollouts, by name, such as SPO's value
    tracker; they are saved with the loader.
    """

    def __init__(
        self,
        collect: Callable[[int, int, list[Answer]], Rollout],
        shape: Shape,
        parallel: Parallel,
        device: torch.device,
        keepers: Mapping[str, Any] | None = None,
    ) -> None:
        self.collect, self.shape, self.parallel, self.device = collect, shape, parallel, device
        self.keepers = dict(keepers or {})
        self.rollout: Rollout | None = None
        self.host: list[Answer] | None = None
        self._number = self._next = self._taken = 0  # rollouts made, prompts drawn, micro-batches handed out
        self._parts: list[np.ndarray] = []
        self._fresh: Rollout | None = None
        self._training = 0.0
        self._clock: float | None = None

    def next_batch(self) -> PolicyBatch:
        self.pause()
        if self.rollout is None or self._taken == len(self._parts):
            self._make()
        assert self.rollout is not None
        picked = self._parts[self._taken]
        self._taken += 1
        self.host = [self.rollout.answers[i] for i in picked[self.parallel.rank :: self.parallel.world_size]]
        whole = [self.rollout.answers[i] for i in picked]
        batch = pack(self.host, self.device, sum(a.written for a in whole), len(whole), self.shape)
        self._clock = time.perf_counter()
        return batch

    def fetch(self) -> None:
        """Does nothing: the weights are about to change."""

    def pause(self) -> None:
        """Stop counting training time until the next batch."""
        if self._clock is not None:
            self._training += time.perf_counter() - self._clock
            self._clock = None

    def new_rollout(self) -> Rollout | None:
        """The rollout that was made since the last call, or None."""
        fresh, self._fresh = self._fresh, None
        return fresh

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, with the answers of the current rollout."""
        return {
            "rollout": self._number,
            "next": self._next,
            "taken": self._taken,
            "answers": [_saved(a) for a in self._answers],
            "keepers": {name: keeper.state_dict() for name, keeper in self.keepers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`; a checkpoint's has `step`, the optimizer steps done. The next rollout is
        sampled anew unless it is the current one: after a non-finite loss the weights may be unable to answer."""
        if self.rollout is not None and self._number == state["rollout"] + 1:
            self._taken = 0
            return
        for name, keeper in self.keepers.items():
            keeper.load_state_dict(state["keepers"][name])
        self._number, self._next, self._taken = state["rollout"], state["next"], state["taken"]
        self.rollout, self._parts = None, []
        if state["answers"]:
            self.rollout = Rollout([_restored(saved) for saved in state["answers"]], self._next)
            self._parts = self._cut(self._number - 1)
        if self._number and "step" in state:  # it may have had other micro-batches
            done = state["step"] - (self._number - 1) * self.shape.steps
            self._taken = done * self.shape.micro_batches

    @property
    def _answers(self) -> list[Answer]:
        return [] if self.rollout is None else self.rollout.answers

    def _make(self) -> None:
        trained, self._training = self._training, 0.0
        self.rollout = self.collect(self._number, self._next, self._answers)
        if not self.rollout.answers:
            raise ValueError(f"rollout {self._number + 1}: no answer is left to learn from, as none could be scored")
        if self._number:
            self.rollout.seconds["train"] = trained
        self._next, self._taken, self._fresh = self.rollout.next, 0, self.rollout
        self._parts = self._cut(self._number)
        self._number += 1

    def _cut(self, rollout: int) -> list[np.ndarray]:
        """The indices of the answers in each micro-batch, without masked ones."""
        learnt = np.array([i for i, a in enumerate(self._answers) if not a.masked], np.int64)
        steps = self.shape.parts(len(learnt), rollout)
        return [learnt[part] for step in steps for part in step]


def pack(answers: Sequence[Answer], device: torch.device, tokens: int, samples: int, shape: Shape) -> PolicyBatch:
    """One row of documents, a prompt and an answer each, padded to a multiple of MULTIPLE.

    tokens, samples: the tokens that the model wrote and the answers of all ranks in this batch.
    """
    lengths = np.array([len(a.prompt_ids) + len(a.ids) - 1 for a in answers], np.int64)
    ends = lengths.cumsum()
    size = -(-max(1, int(lengths.sum())) // MULTIPLE) * MULTIPLE
    ids, targets = np.zeros(size, np.int64), np.full(size, -100, np.int64)
    for a, start, end in zip(answers, ends - lengths, ends, strict=True):
        ids[start:end] = np.concatenate((a.prompt_ids, a.ids))[: end - start]
        first = start + len(a.prompt_ids) - 1
        targets[first : first + len(a.ids)] = a.targets
    at = np.flatnonzero(targets != -100)

    def placed(name: str) -> Tensor | None:
        """The field `name` of all answers at their targets, float32 [1, size]."""
        parts = [getattr(a, name) for a in answers]
        if any(part is None for part in parts):
            return None
        row = np.zeros(size, np.float32)
        row[at] = np.concatenate([np.zeros(0, np.float32), *parts])
        return _to_device(row, device)

    bounds = np.concatenate(([0], ends, [size] if size > lengths.sum() else [])).astype(np.int32)
    old_log_probs, advantages = placed("log_probs"), placed("advantages")
    zeros = torch.zeros(1, size, device=device)
    return PolicyBatch(
        _to_device(ids, device),
        _to_device(targets, device),
        _to_device(bounds, device)[0],
        zeros if old_log_probs is None else old_log_probs,
        zeros if advantages is None else advantages,
        len(at),
        max(1, tokens),
        max(1, samples),
        shape.aggregation,
        shape.max_new_tokens,
        shape.temperature,
        placed("reference"),
        placed("values"),
        placed("returns"),
        placed("room"),
    )


def _to_device(row: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(row).unsqueeze(0)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _saved(answer: Answer) -> dict[str, Any]:
    values = {f.name: getattr(answer, f.name) for f in fields(Answer)}
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}


def _restored(saved: dict[str, Any]) -> Answer:
    values: dict[str, Any] = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in saved.items()}
    return Answer(**values)


class DriftStop:
    """Stops updating the policy for the rest of a rollout once it has drifted too far from what sampled the rollout; a
    critic learns on.

    target: mean KL(mu || p) per token (k3), measured by the forward of every step. Above it, the gradients of the
    `policy` parameters are removed before the optimizer step. Waits for the device once a step. Raises ValueError for a
    target that is not above 0.
    """

    def __init__(self, target: float, policy: Sequence[nn.Parameter], parallel: Parallel) -> None:
        if not 0 < target < math.inf:
            raise ValueError(f"--target-kl {target}: must be above 0; drop the flag to learn from whole rollouts")
        self.target, self.policy, self.parallel = target, list(policy), parallel
        self.stopped, self.taken = False, 0  # whether the rest of the rollout is skipped; its steps so far
        self._sums: list[Tensor] = []
        self._weight = 0.0

    def begin(self) -> dict[str, float]:
        """Start a new rollout; returns policy_steps, the updates of the policy on the previous one."""
        taken, self.stopped, self.taken = self.taken, False, 0
        return {"policy_steps": float(taken)}

    def add(self, batch: PolicyBatch, figures: dict[str, Tensor]) -> None:
        """Add the figures that policy_loss returned for a micro-batch."""
        self._sums.append(figures["behaviour_kl"].detach())
        self._weight += batch.global_weight

    def before_update(self) -> None:
        """Remove the policy's gradients if it has drifted too far. All ranks call it and agree."""
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
