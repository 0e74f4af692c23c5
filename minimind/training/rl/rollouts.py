"""Answers sampled by the inference engine on the live weights of the model in training, and how they are shown.

An answer depends only on the weights, the seed and its prompt's number in the stream: neither the number of processes
nor an interruption changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from minimind.data.packing import Permutation
from minimind.data.prompts import Prompt, PromptSet
from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Completion, Request, SamplingParams
from minimind.modeling import Model
from minimind.rewards import Sample
from minimind.tokenization import Tokenizer
from minimind.training.stages.chats import turns


class DrawnPrompt(NamedTuple):
    """A prompt to answer. number: its position in the stream, which decides the seed; prompt: its index in the set."""

    number: int
    prompt: int


@dataclass(eq=False)
class Answer:
    """One sampled answer.

    prompt, number: as in DrawnPrompt; sample: its index among the prompt's answers. prompt_ids, ids: int64; `ids` has
    the end token if the model `ended` by itself. sampled: which of `ids` the model wrote, the others being of tools;
    None: all. log_probs: float32, of each token it wrote under the distribution it was sampled from. reward: the sum of
    all rewards, NaN where one failed and the answer is left out; score: the reward clipped and normalised, from which
    is learnt. masked: whether the loss leaves the answer out.

    Set later, float32, one for each token it wrote: advantages; reference, log-probabilities under the initial model;
    values, a critic's estimates for the states before the tokens; returns; room, how far a value may move from the old
    one.
    """

    prompt: int
    number: int
    sample: int
    prompt_ids: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    ended: bool
    text: str = ""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    advantages: np.ndarray | None = None
    reference: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None
    room: np.ndarray | None = None
    score: float = 0.0
    masked: bool = False
    sampled: np.ndarray | None = None

    @property
    def written(self) -> int:
        """The number of tokens that the model wrote; only these are learnt from."""
        return len(self.ids) if self.sampled is None else int(self.sampled.sum())

    @property
    def targets(self) -> np.ndarray:
        """`ids`, with -100 for those that the model did not write."""
        return self.ids if self.sampled is None else np.where(self.sampled, self.ids, -100)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the tokens that the model wrote, placed at these among all of `ids`, with 0 elsewhere."""
        if self.sampled is None:
            return values
        row = np.zeros(len(self.ids), values.dtype)
        row[self.sampled] = values
        return row

    def as_sample(self, prompt: Prompt) -> Sample:
        """The answer as rewards see it."""
        ids, reason = self.ids.tolist(), cast(Any, "stop" if self.ended else "length")
        text = prompt.opening + self.text
        return Sample(prompt.messages, text, ids, reason, prompt.reference, prompt.metadata, prompt.thinking)


@dataclass(frozen=True)
class RolloutOptions:
    """samples: answers to each prompt, of at most max_new_tokens each. seed: of the run. ignore_eos: for benchmarks
    with answers of equal length."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


def rollout_engine(
    model: Model,
    tokenizer: Tokenizer,
    longest: int,
    max_new_tokens: int,
    batch: int,
    samples: int = 1,
    weights_dtype: torch.dtype | None = None,
) -> Engine:
    """An engine on the weights of `model`, which it shares where it computes in their dtype. longest: tokens of the
    longest prompt; batch: answers that decode together, of which `samples` share a prompt; weights_dtype: see Engine.
    One cache serves all calls; it holds a batch of such answers, and fewer answers at a time where fewer share a
    prompt."""
    page = 64 if model.device.type == "cuda" else 16
    own = 1 + -(-max_new_tokens // page)  # the first page also holds the end of the prompt
    return Engine(
        model,
        tokenizer,
        kv_tokens=(-(-batch // samples) * -(-longest // page) + batch * own) * page,
        max_batch=batch,
        max_context=longest + max_new_tokens,
        page_size=page,
        weights_dtype=weights_dtype,
    )


class Sampler:
    """Samples from the current weights of `model`; arguments as for `rollout_engine`."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        longest: int,
        max_new_tokens: int,
        batch: int,
        samples: int = 1,
        weights_dtype: torch.dtype | None = None,
    ) -> None:
        self.engine = rollout_engine(model, tokenizer, longest, max_new_tokens, batch, samples, weights_dtype)

    def sample(self, prompts: PromptSet, drawn: Sequence[DrawnPrompt], options: RolloutOptions) -> list[Answer]:
        """options.samples answers to each prompt, in the order of `drawn`. Raises ValueError if the model cannot
        answer."""
        self.engine.refresh_weights()
        requests = [Request(prompts[d.prompt].ids, _params(options, d)) for d in drawn]
        answers = []
        for d, output in zip(drawn, self.engine.generate(requests), strict=True):
            if output.error is not None:
                raise ValueError(f"no answer to prompt {d.prompt}: {output.error}")
            prompt_ids = np.array(output.prompt_token_ids, np.int64)
            answers += [_answer(d, prompt_ids, completion) for completion in output.completions]
        return answers


def _params(options: RolloutOptions, drawn: DrawnPrompt) -> SamplingParams:
    return SamplingParams(
        options.max_new_tokens,
        options.temperature,
        seed=derive_seed(options.seed, drawn.number),
        n=options.samples,
        ignore_eos=options.ignore_eos,
    )


def _answer(drawn: DrawnPrompt, prompt_ids: np.ndarray, c: Completion) -> Answer:
    ids, log_probs = np.array(c.token_ids, np.int64), np.array(c.log_probs, np.float32)
    return Answer(drawn.prompt, drawn.number, c.index, prompt_ids, ids, log_probs, c.finish_reason == "stop", c.text)


class PromptStream:
    """An endless stream of the prompts of a set: each once per pass, every pass in a new order. It has no state."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def draw(self, first: int, count: int) -> list[DrawnPrompt]:
        """The prompts numbered first, first + 1, ..., first + count - 1."""
        numbers = np.arange(first, first + count)
        drawn: list[DrawnPrompt] = []
        for epoch in range(first // self.size, (first + count - 1) // self.size + 1):
            in_epoch = numbers[numbers // self.size == epoch]
            order = Permutation(self.size, self.seed, epoch)(in_epoch % self.size)
            drawn += [DrawnPrompt(int(n), int(p)) for n, p in zip(in_epoch, order, strict=True)]
        return drawn


def transcript(tokenizer: Tokenizer, answer: Answer) -> str:
    """One line: the prompt, the answer and its reward."""
    prompt = turns(tokenizer, answer.prompt_ids.tolist())
    cut = "" if answer.ended else " (cut off)"
    return f"{prompt} {answer.text}{cut}  [reward {answer.reward:.3f}]".replace("\n", "\\n")


def show_groups(console: Console, tokenizer: Tokenizer, answers: Sequence[Answer], count: int) -> None:
    """Print the first `count` prompts with their answers: tokens with a positive advantage in green, with a negative
    one in red, the brighter the larger the advantage is among those shown."""
    shown: list[list[Answer]] = []
    for _, group in islice(groupby(answers, key=lambda a: a.number), count):
        shown.append(list(group))
    largest = max(
        (float(np.abs(a.advantages).max(initial=0)) for g in shown for a in g if a.advantages is not None), default=0.0
    )
    for same in shown:
        console.print(Text(turns(tokenizer, same[0].prompt_ids.tolist()).replace("\n", "\\n"), style="bold"))
        for answer in same:
            console.print(_coloured(tokenizer, answer, largest), soft_wrap=True)


def _coloured(tokenizer: Tokenizer, answer: Answer, largest: float) -> Text:
    advantages = np.zeros(answer.written) if answer.advantages is None else answer.advantages
    parts = "".join(f" {name} {value:.3g}" for name, value in answer.parts.items())
    line = Text(f"  reward {answer.reward:7.3f} advantage {advantages.mean():+7.3f} ({parts.strip()}) ")
    for token, advantage in zip(answer.ids.tolist(), answer.spread(advantages).tolist(), strict=True):
        shade = round(55 + 200 * abs(advantage) / largest) if largest and advantage else 0
        colour = "default" if not shade else f"rgb(0,{shade},0)" if advantage > 0 else f"rgb({shade},0,0)"
        line.append(tokenizer.decode([token]).replace("\n", "\\n"), style=colour)
    return line
