"""Answers of the model in training: sampled by the engine on its live weights, and scored.

What is sampled depends on the weights, the seed and a prompt's number in the stream, and on nothing that ran before:
not on how many processes share the prompts, nor on whether the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minimind.data.packing import Permutation
from minimind.data.prompts import PromptSet
from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Completion, Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import Tokenizer


class DrawnPrompt(NamedTuple):
    """A prompt to be answered: its number in the stream of prompts, which decides the seed, and in the set."""

    number: int
    prompt: int


@dataclass(eq=False)
class Answer:
    """One sampled answer.

    prompt, number: as in Drawn; sample: which of the prompt's answers. prompt_ids, ids: int64, ids with the end token
    where the model `ended` by itself. log_probs: float32, of each of `ids` under the weights and the distribution that
    it was sampled from. reward: what all rewards come to, NaN where one failed and the answer is to be left out; score:
    what is learnt from in its place, clipped and normalised. masked: whether the loss leaves it out.

    Made later, float32, one for each of `ids`: advantages; reference, log-probabilities under the frozen model; values
    of the states that the tokens were drawn from, of a critic; returns; room, how far a value may move from the old.
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


@dataclass(frozen=True)
class RolloutOptions:
    """samples of each prompt, of at most max_new_tokens each. seed: of the run. ignore_eos: for benchmarks, whose
    answers should be of one length."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


class Sampler:
    """Samples from `model` as it is at each call. longest: tokens of any prompt; batch: answers that decode together,
    `samples` of which share a prompt.

    The engine shares the model's weights where they have the dtype that it computes in. One cache serves all calls; it
    holds a batch of such answers, and of answers that share less as many as fit at a time.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, longest: int, max_new_tokens: int, batch: int, samples: int = 1
    ) -> None:
        page = 64 if model.device.type == "cuda" else 16
        own = 1 + -(-max_new_tokens // page)  # the first page holds the end of the prompt as well
        pages = -(-batch // samples) * -(-longest // page) + batch * own
        self.engine = Engine(
            model,
            tokenizer,
            kv_tokens=pages * page,
            max_batch=batch,
            max_context=longest + max_new_tokens,
            page_size=page,
        )

    def sample(self, prompts: PromptSet, drawn: Sequence[DrawnPrompt], how: RolloutOptions) -> list[Answer]:
        """`how.samples` answers to each, in the order of `drawn`. Raises ValueError where the model cannot answer."""
        self.engine.refresh_weights()
        requests = [Request(prompts[d.prompt].ids, _params(how, d)) for d in drawn]
        answers = []
        for d, output in zip(drawn, self.engine.generate(requests), strict=True):
            if output.error is not None:
                raise ValueError(f"no answer to prompt {d.prompt}: {output.error}")
            prompt_ids = np.array(output.prompt_token_ids, np.int64)
            answers += [_answer(d, prompt_ids, completion) for completion in output.completions]
        return answers


def _params(how: RolloutOptions, drawn: DrawnPrompt) -> SamplingParams:
    return SamplingParams(
        how.max_new_tokens,
        how.temperature,
        seed=derive_seed(how.seed, drawn.number),
        n=how.samples,
        ignore_eos=how.ignore_eos,
    )


def _answer(drawn: DrawnPrompt, prompt_ids: np.ndarray, c: Completion) -> Answer:
    ids, log_probs = np.array(c.token_ids, np.int64), np.array(c.log_probs, np.float32)
    return Answer(drawn.prompt, drawn.number, c.index, prompt_ids, ids, log_probs, c.finish_reason == "stop", c.text)


class PromptStream:
    """Every prompt of a set once in a pass, each pass in another order; without end, nothing to remember."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def draw(self, first: int, count: int) -> list[DrawnPrompt]:
        """The prompts with the numbers first, first + 1, ..."""
        numbers = np.arange(first, first + count)
        found: list[DrawnPrompt] = []
        for epoch in range(first // self.size, (first + count - 1) // self.size + 1):
            mine = numbers[numbers // self.size == epoch]
            order = Permutation(self.size, self.seed, epoch)(mine % self.size)
            found += [DrawnPrompt(int(n), int(p)) for n, p in zip(mine, order, strict=True)]
        return found
