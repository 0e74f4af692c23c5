"""What a reward looks at, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A prompt and one sampled answer.

    prompt: the messages before the answer, of which the system's may carry "tools". text: the answer as it was written,
    reasoning and markup included, without the token that ends the turn; a <think> that the prompt wrote is at its
    beginning. token_ids: those that the model wrote. finish_reason: "length" where it was cut off. reference: the right
    answer, where the prompt has one. metadata: what else the row of the data held, for rewards of one's own. thinking:
    whether the prompt asked for reasoning (True) or for none (False); None: left to the model.
    """

    prompt: Sequence[Mapping[str, Any]]
    text: str
    token_ids: Sequence[int] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None


Reward = Callable[[Sequence[Sample]], np.ndarray]
"""samples -> float64 [n], one number each; NaN: this sample could not be judged."""
