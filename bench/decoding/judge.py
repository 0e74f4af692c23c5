"""Check that a decoder's tokens are the greedy continuation, as far as rounding lets one tell.

The tokens go through this project's plain model in float64, which gives the true logits. Every token must have the
largest logit there, up to rounding: if a decoder's logits are wrong by at most e, its token lies at most 2 e below the
best one. e is measured: the error of plain PyTorch in the same dtype on the same tokens. As in this project's tests, a
decoder's error may be twice that, so a decoder passes if (best - chosen) / (2 e) <= 2. For float32 that allows only
ties in the last digits.

With a float8 cache, e is measured with keys and values rounded as the engine's cache rounds them; for q8_0, with the
weights and the inputs of every product in blocks of 32 integers with one scale, as in llama.cpp; for int8, with both
rounded as in our decoding with 8-bit weights on a CPU (a GPU rounds activations less), and a bfloat16 cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.decoding.implementations import Width
from minimind import ops
from minimind.inference.decode.int8 import rounded_weights
from minimind.inference.decode.kv_cache import FLOAT8, rounded_cache
from minimind.modeling import Linear, Model

ROWS = 4  # checked rows of a batch, spread over it
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "q8_0": torch.float32}


@dataclass(frozen=True)
class Verdict:
    """ratio: the largest (best - chosen) / (2 e) of all tokens; 2 or less passes. error: e, in logits. equal: share of
    the tokens that the float64 model would choose after the same tokens."""

    ratio: float
    error: float
    equal: float

    @property
    def passed(self) -> bool:
        return self.ratio <= 2


@dataclass
class Judge:
    """Checks decoders of one model (float32, on the CPU)."""

    model: Model
    verdicts: dict[tuple, Verdict] = field(default_factory=dict)
    truth_model: Model | None = None

    def judge(self, prompts: Tensor, tokens: list[list[int]], width: Width, float8_cache: bool = False) -> Verdict:
        """prompts int64 [B, P], tokens [B][N]. ValueError if a row or a token is missing."""
        if len(tokens) != len(prompts) or len({len(row) for row in tokens}) != 1:
            lengths = sorted({len(row) for row in tokens})
            raise ValueError(f"{len(prompts)} prompts got {len(tokens)} rows of {lengths} tokens")
        rows = np.unique(np.linspace(0, len(prompts) - 1, ROWS).round().astype(int)).tolist()
        written = torch.tensor([tokens[r] for r in rows])
        ids = torch.cat((prompts[rows], written), dim=1)
        key = (width, float8_cache, *ids.flatten().tolist())
        if key not in self.verdicts:
            self.verdicts[key] = self._verdict(ids, written, width, float8_cache)
        return self.verdicts[key]

    @torch.no_grad()
    def _verdict(self, ids: Tensor, written: Tensor, width: Width, float8_cache: bool) -> Verdict:
        start = ids.shape[1] - written.shape[1] - 1
        mode = ops.get_mode()
        ops.set_mode("reference")
        try:
            if self.truth_model is None:
                self.truth_model = copy.deepcopy(self.model).double()
            truth = self.truth_model(ids[:, :-1]).logits[:, start:]
            plain = rounded_logits(self.model, ids[:, :-1], width, float8_cache)[:, start:].double()
        finally:
            ops.set_mode(mode)
        error = float((plain - truth).abs().max())
        regret = truth.max(dim=-1).values - truth.gather(2, written.unsqueeze(2)).squeeze(2)
        equal = float((regret == 0).double().mean())
        return Verdict(float(regret.max()) / (2 * error), error, equal)


def rounded_logits(model: Model, ids: Tensor, width: Width, float8_cache: bool = False) -> Tensor:
    """Logits [B, T, V] of plain PyTorch with matrices in `width` and, if asked, keys and values rounded to float8."""
    if width == "q8_0":
        model = _with_q8_weights(model)
        hidden = model(ids, return_logits=False).hidden_states
        return round_q8(hidden) @ model.head_weight.t()
    if width == "int8":
        with rounded_cache(model, torch.bfloat16), rounded_weights(model):
            return model(ids).logits
    model = copy.deepcopy(model).to(_DTYPES[width])
    with rounded_cache(model, FLOAT8 if float8_cache else _DTYPES[width]):
        return model(ids).logits


def round_q8(x: Tensor) -> Tensor:
    """x [..., K] float32 as q8_0 stores it: blocks of 32 integers in -127..127 with one float16 scale."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((blocks * inverse).round() * scale.half().float()).flatten(-2)


def _with_q8_weights(model: Model) -> Model:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = round_q8(parameter.data)
    hook: Callable = lambda module, inputs: (round_q8(inputs[0]),)  # noqa: E731
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(hook)
    return model
