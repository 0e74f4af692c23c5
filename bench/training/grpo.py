"""The GRPO steps that bench/rl.py compares: one algorithm, model, prompt set, reward and optimizer, implemented twice.

ours         this project's step: the engine answers with the live weights, an answer and its prompt form a packed
             document, log-probabilities are computed without logits; the precision in which this device trains
ours-fp32    the same in float32
naive        upstream MiniMind's step with this project's plain model: float32, prompts padded on the left, the prompt
             computed anew for every answer, keys and values grown by torch.cat, all answers decoded until the last has
             ended, log_softmax of the full logits of prompts and answers for policy and reference

Every step is one update on one rollout, so the probability ratio is 1 and no old policy is scored. A step returns the
log-probabilities that the implementation computed for some of its answers, so that they can be checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.common.naive import KeyValues, hidden_states
from bench.common.timing import peak_mib, synchronize
from bench.common.worker import Handler
from minimind import ops
from minimind.config import ModelConfig
from minimind.data.prompts import Prompt, PromptSet
from minimind.inference.runner import Replica
from minimind.modeling import Model
from minimind.objectives.advantages import group_advantages
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip, with_kl
from minimind.rewards import Rewards, Sample, parse_rewards
from minimind.rope import rope_cos_sin
from minimind.tokenization import load_tokenizer
from minimind.training.optim import build_optimizers
from minimind.training.rl.collector import log_probs_of, score
from minimind.training.rl.loader import Shape, default_micro_batches, pack
from minimind.training.rl.rollouts import Answer, DrawnPrompt, RolloutOptions, Sampler
from minimind.utils.device import choose_precision
from minimind.weights import load_model

BETA, RATE = 0.04, 1e-6


@dataclass(frozen=True)
class RolloutSetting:
    """folder: the model. prompts: their token ids. samples: answers to each prompt, of exactly `new` tokens."""

    folder: Path
    prompts: list[list[int]]
    samples: int
    new: int
    threads: int
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.folder / "config.json")


@dataclass
class RolloutStep:
    """seconds: of each part of the step. answers: for some answers, the ids of the prompt, the ids of the answer and
    their log-probabilities."""

    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "reward": 0.0, "train": 0.0})
    answers: list[tuple[list[int], list[int], list[float]]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(device)
        self.seconds[name] += time.perf_counter() - began


Implementation = Callable[[int], RolloutStep]  # seed -> one step


def ours(s: RolloutSetting, dtype: torch.dtype | None) -> Implementation:
    tokenizer, model = load_tokenizer(), load_model(s.folder, device=s.device)
    model.compute_dtype = dtype or choose_precision(s.device).compute_dtype
    frozen = Replica(load_model(s.folder, device=s.device), model.compute_dtype).model
    optimizer = build_optimizers(model, "adamw", RATE, 0.0)
    longest = max(map(len, s.prompts)) + s.new
    parts = default_micro_batches(len(s.prompts) * s.samples, longest, model.config, s.device)
    shape = Shape(micro_batches=parts, aggregation="sample", max_new_tokens=s.new)
    data = PromptSet([Prompt([{"role": "user", "content": "?"}], ids) for ids in s.prompts], 0)
    batch = min(256, len(s.prompts) * s.samples)
    sampler = Sampler(model, tokenizer, max(map(len, s.prompts)), s.new, batch, s.samples)
    rewards, objective = reward(), with_kl(clip, BETA)

    def step(seed: int) -> RolloutStep:
        result = RolloutStep()
        model.eval()
        with result.part("rollout", s.device):
            drawn = [DrawnPrompt(i, i) for i in range(len(s.prompts))]
            answers = sampler.sample(data, drawn, RolloutOptions(s.samples, s.new, seed=seed, ignore_eos=True))
        with result.part("reward", s.device):
            score(rewards, data, answers)
        with result.part("train", s.device):
            for a, log_probs in zip(answers, log_probs_of(frozen, answers, shape), strict=True):
                a.reference = log_probs
            give_advantages(answers)
            model.train()
            count = sum(len(a.ids) for a in answers)
            for part in np.array_split(np.arange(len(answers)), shape.micro_batches):
                packed = pack([answers[i] for i in part], s.device, count, len(answers), shape)
                loss, aux, _ = policy_loss(model, packed, objective)
                (loss / packed.global_weight + aux * (packed.num_targets / count)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        result.answers = [(a.prompt_ids.tolist(), a.ids.tolist(), a.log_probs.tolist()) for a in answers[:4]]
        return result

    return step


def give_advantages(answers: list[Answer]) -> None:
    groups = torch.tensor([a.number for a in answers])
    rewards = torch.tensor([a.reward for a in answers], dtype=torch.float64)
    advantages = group_advantages(rewards, groups, int(groups.max()) + 1)
    for a, value in zip(answers, advantages.tolist(), strict=True):
        a.advantages = np.full(len(a.ids), value, np.float32)


def reward() -> Rewards:
    """A cheap reward that differs between answers."""
    return parse_rewards(["repetition"])


def naive(s: RolloutSetting) -> Implementation:
    ops.set_mode("reference")
    tokenizer, model = load_tokenizer(), load_model(s.folder, device=s.device)
    frozen = load_model(s.folder, device=s.device).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rewards = reward()
    groups = torch.arange(len(s.prompts)).repeat_interleave(s.samples)

    def step(seed: int) -> RolloutStep:
        result = RolloutStep()
        ids, mask = left_padded(s)
        with result.part("rollout", s.device):
            torch.manual_seed(seed)
            with torch.no_grad():
                ids = naive_generate(model.eval(), ids, mask, s.new)
        answers = ids[:, mask.shape[1] :]
        with result.part("reward", s.device):
            samples = [Sample([], tokenizer.decode(row), row) for row in answers.tolist()]
            advantages = group_advantages(torch.tensor(rewards(samples).total), groups, len(s.prompts))
        with result.part("train", s.device):
            full_mask = torch.cat((mask, mask.new_ones(answers.shape)), dim=1)
            log_probs = naive_log_probs(model.train(), ids, full_mask, s.new)
            with torch.no_grad():
                reference = naive_log_probs(frozen, ids, full_mask, s.new)
            x = reference - log_probs
            gain = (log_probs - log_probs.detach()).exp() * advantages.to(log_probs)[:, None]
            loss = -(gain - BETA * (x.exp() - x - 1)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        rows = zip(s.prompts[:1] * 4, answers.tolist(), log_probs.tolist(), strict=False)
        result.answers = list(rows)[: min(4, s.samples)]
        return result

    return step


def left_padded(s: RolloutSetting) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [prompts x samples, longest prompt]; every prompt is repeated for each of its answers."""
    longest = max(map(len, s.prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in s.prompts], device=s.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in s.prompts], device=s.device)
    return ids.repeat_interleave(s.samples, 0), mask.repeat_interleave(s.samples, 0)


def naive_log_probs(model: Model, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """[B, new]: gathered from the log_softmax of the full logits, as upstream does it."""
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)[:, -new:]


def naive_generate(model: Model, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """ids [B, T], padded on the left -> [B, T + new], sampled at temperature 1."""
    table = rope_cos_sin(model.config, torch.arange(ids.shape[1] + new, device=ids.device))
    past: KeyValues = [None] * len(model.layers)
    inputs = ids
    for _ in range(new):
        logits = _next_logits(model, inputs, mask, past, table)
        inputs = torch.multinomial(logits.softmax(-1), 1)
        ids, mask = torch.cat((ids, inputs), dim=1), torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return ids


def _next_logits(model: Model, ids: Tensor, mask: Tensor, past: KeyValues, table: tuple[Tensor, Tensor]) -> Tensor:
    """ids [B, T] at the last T positions of mask [B, S] -> logits [B, V] of the next token."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    visible = mask[:, None, None, :].bool()
    if ids.shape[1] > 1:
        square = torch.ones(ids.shape[1], mask.shape[1], dtype=torch.bool, device=ids.device)
        visible = visible & square.tril(mask.shape[1] - ids.shape[1])
    bias = torch.zeros(visible.shape, device=ids.device).masked_fill(~visible, -1e9)
    return hidden_states(model, ids, past, table, positions, bias)[:, -1] @ model.head_weight.t()


IMPLEMENTATIONS: dict[str, Callable[[RolloutSetting], Implementation]] = {
    "ours": partial(ours, dtype=None),
    "ours-fp32": partial(ours, dtype=torch.float32),
    "naive": naive,
}


def start(name: str, setting: RolloutSetting) -> Handler:
    """In a process of its own: a seed -> its RolloutStep; None -> the peak memory in MiB."""
    torch.set_num_threads(setting.threads)
    step = IMPLEMENTATIONS[name](setting)
    return lambda seed: peak_mib(setting.device) if seed is None else step(seed)
