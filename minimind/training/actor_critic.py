"""A policy with its critic as one module to train: the critic on a trunk of its own, or a head on the policy's.

A checkpoint of it is one of the policy, with the critic beside it: critic/, or critic_head.pt where it is a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.data.files import sync
from minimind.modeling import Model
from minimind.training.parallel import Parallel, from_rank_0
from minimind.value_head import ValueModel, load_value_model, save_value_model
from minimind.weights import load_model, save_weights

_HEAD, _CRITIC = "value_head.weight", "critic"
CRITIC = "critic."  # how the names of its parameters begin in an ActorCritic


class ActorCritic(Model):
    """A policy, whose forward is its own; `critic`: a ValueModel that begins with the policy's weights."""

    critic: ValueModel

    @staticmethod
    def of(model: Model) -> ActorCritic:
        """`model` itself, its parameters shared, with a critic copied from it."""
        with torch.device("meta"):
            both = ActorCritic(model.config)
        both.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        both.compute_dtype, both.recompute = model.compute_dtype, model.recompute
        both.critic = ValueModel.of(model)
        return both.train(model.training)


def critic_of(model: Model) -> ValueModel:
    """What values come from: of an ActorCritic its critic, a ValueModel itself."""
    return model.critic if isinstance(model, ActorCritic) else cast(ValueModel, model)


def critic_parameters(model: Model) -> list[nn.Parameter]:
    """What learns with the critic alone: all of its own trunk, or the head on the policy's."""
    if isinstance(model, ActorCritic):
        return list(model.critic.parameters())
    return list(cast(ValueModel, model).value_head.parameters())


def save_both(model: Model, folder: Path) -> None:
    """The policy as a model to chat with, and the critic; see the module's docstring."""
    save_weights(_policy(model), folder)
    if isinstance(model, ActorCritic):
        save_value_model(model.critic, folder / _CRITIC)
        for path in (folder / _CRITIC).iterdir():
            sync(path)
    else:
        torch.save(model.state_dict()[_HEAD], folder / f"{_CRITIC}_head.pt")


def load_both(model: Model, checkpoint: Path, parallel: Parallel) -> None:
    """Take policy and critic back to what save_both wrote, in place; all ranks call it, rank 0 reads."""
    state: dict[str, Any] = {}
    if parallel.main:
        state |= load_model(checkpoint, config=model.config).state_dict()
        if isinstance(model, ActorCritic):
            critic = load_value_model(checkpoint / _CRITIC, config=model.critic.config).state_dict()
            state |= {CRITIC + name: value for name, value in critic.items()}
        else:
            state[_HEAD] = torch.load(checkpoint / f"{_CRITIC}_head.pt", weights_only=True)
    set_model_state_dict(model, state, options=from_rank_0())


def _policy(model: Model) -> Model:
    """A plain Model on the same parameters."""
    with torch.device("meta"):
        policy = Model(model.config)
    own = policy.state_dict().keys()
    policy.load_state_dict({k: v for k, v in model.state_dict().items() if k in own}, assign=True)
    return policy
