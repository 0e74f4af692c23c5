"""Rewards of sampled answers, composed from the words of a command line.

    --reward number:1 format:0.25 overlong=200..256:0.5 model=runs/reward-nano-builtin:1

Every word is name[=argument][:weight], the weight 1 where none stands there; the reward is the weighted sum. Behind the
last colon stands the weight if it is a number: write it out where an argument ends like one (regex=a:7:1).

    number                    the last number of the answer is the reference's
    exact                     the answer is the reference
    json[=KEY,KEY]            the answer is JSON [with these keys]
    tools                     its tool calls are valid for the tools that the prompt offers
    format[=think|answer]     <think>reasoning</think> and an answer [in <answer></answer>]
    length=LOW..HIGH          so many tokens, with soft bounds
    overlong=LOW..HIGH        a penalty, from 0 at LOW tokens to -1 at HIGH
    repetition[=N]            share of n-grams that do not repeat, N=3
    regex=PATTERN             is found in the answer
    function=PACKAGE.MODULE:FUNCTION   one's own: a list of `Sample`s -> as many numbers
    model=FOLDER              a reward model: a run of train/reward.py, a Hugging Face sequence classifier, or one of
                              InternLM2-Reward's kind (which brings code, and needs --trust-remote-code)
    answer_model=FOLDER       the same, shown the answer alone, what stands behind the reasoning or in <answer></answer>
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from minimind.rewards.base import Reward, Sample
from minimind.rewards.compose import MODELS, RewardError, Rewards, RewardTerm, Scores, Spec, name_parts
from minimind.rewards.scale import RewardScale
from minimind.rewards.verifiers import answer_only
from minimind.rewards.watch import SignalWatch, degenerate, summary

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
    """The reward that the words of --reward describe (above). Raises ValueError, naming the word.

    on_error, of --on-reward-error: what becomes of a sample on which a part fails: "stop" (RewardError), "drop" (it is
    left out), or a number to take instead. device: where reward models run.
    """
    specs = [Spec.parse(word) for word in words]
    where = device or torch.device("cpu")
    models = {folder: _open(folder, where, trust_remote_code) for folder in model_weights(words)}
    made = []
    for spec in specs:
        if spec.name not in MODELS:
            made.append((spec, spec.make()))
            continue
        reward = models[spec.argument or ""]
        made.append((spec, answer_only(reward) if spec.name == "answer_model" else reward))
    return Rewards(name_parts(made), on_error)


def model_weights(words: Sequence[str]) -> dict[str, Path]:
    """Where the weights of the reward models are that the words of --reward name, by what they call each. Raises
    ValueError, naming the word."""
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
