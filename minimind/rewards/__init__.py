"""Rewards of sampled answers, composed from the words of --reward.

    --reward number:1 format:0.25 overlong=200..256:0.5 model=runs/reward-nano-builtin:1

Each word is name[=argument][:weight], with weight 1 by default; the reward is the weighted sum. A number after the last
colon is always the weight, so give one if the argument ends in a colon and a number (regex=a:7:1).

    number                    the answer's last number equals the reference's
    exact                     the answer equals the reference
    json[=KEY,KEY]            the answer is JSON [with these keys]
    tools                     its tool calls are valid for the tools that the prompt offers
    format[=think|answer]     <think>reasoning</think> and an answer [in <answer></answer>]
    length=LOW..HIGH          number of tokens, with soft bounds
    overlong=LOW..HIGH        a penalty, from 0 at LOW tokens to -1 at HIGH
    repetition[=N]            share of n-grams that do not repeat, N=3
    regex=PATTERN             the pattern matches in the answer
    function=PACKAGE.MODULE:FUNCTION   your own function: a list of `Sample`s -> one number for each
    model=FOLDER              a reward model: a run of train/reward.py, a Hugging Face sequence classifier, or a model
                              like InternLM2-Reward (which brings its own code and needs --trust-remote-code)
    answer_model=FOLDER       the same, but it sees only the final answer, without the reasoning
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.rewards.compose import (
    MODELS,
    RewardError,
    Rewards,
    RewardScale,
    RewardTerm,
    Scores,
    SignalWatch,
    Spec,
    degenerate,
    make_terms,
    summary,
)
from minimind.rewards.rules import Reward, Sample, answer_only

if TYPE_CHECKING:
    import torch

__all__ = [
    "Reward",
    "RewardError",
    "RewardScale",
    "RewardTerm",
    "Rewards",
    "Sample",
    "Scores",
    "SignalWatch",
    "degenerate",
    "model_weights",
    "parse_rewards",
    "summary",
]


def parse_rewards(
    words: Sequence[str], on_error: str = "drop", device: torch.device | None = None, trust_remote_code: bool = False
) -> Rewards:
    """Build the reward that the words of --reward describe. ValueError, naming the word, if one is wrong.

    on_error: the value of --on-reward-error; see Rewards. device: where reward models run.
    """
    specs = [Spec.parse(word) for word in words]
    import torch  # here, so that the chat page starts without it

    device = device or torch.device("cpu")
    models = {folder: _open(folder, device, trust_remote_code) for folder in model_weights(words)}
    rewards = []
    for spec in specs:
        if spec.name not in MODELS:
            rewards.append((spec, spec.make()))
            continue
        reward = models[spec.argument or ""]
        rewards.append((spec, answer_only(reward) if spec.name == "answer_model" else reward))
    return Rewards(make_terms(rewards), on_error)


def model_weights(words: Sequence[str]) -> dict[str, Path]:
    """The folders with the weights of the reward models in the words of --reward: {folder as written: path}.
    ValueError, naming the word, if one does not exist."""
    from minimind.rewards.model import reward_weights

    folders = {spec.argument or "" for spec in map(Spec.parse, words) if spec.name in MODELS}
    try:
        return {folder: reward_weights(folder) for folder in sorted(folders)}
    except ValueError as error:
        raise ValueError(f"--reward {error}") from None


def _open(folder: str, device: torch.device, trust_remote_code: bool) -> Reward:
    from minimind.rewards.model import model_reward

    try:
        return model_reward(folder, device, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"--reward {error}") from None
