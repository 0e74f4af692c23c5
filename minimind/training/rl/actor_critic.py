"""A policy and its critic as one module to train: the critic has a trunk of its own, or is a head on the policy's.

A checkpoint is one of the policy, with the critic beside it: critic/, or critic_head.pt for a head. With adapters,
policy and critic are two adapters on one frozen base, and critic_head.pt exists in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.lora import add_adapter, lora_linears
from minimind.lora_files import adapter_config, read_adapter
from minimind.modeling import Model
from minimind.training.parallel import Parallel, from_rank_0
from minimind.value_head import ValueModel, load_value_model, save_value_model
from minimind.weights import load_model, save_weights

M = TypeVar("M", bound=Model)
_HEAD, _CRITIC = "value_head.weight", "critic"
CRITIC = "critic."  # prefix of its parameters' names in an ActorCritic


class ActorCritic(Model):
    """A policy, whose forward this is, with a `critic` that starts with the policy's weights."""

    critic: ValueModel

    @staticmethod
    def from_policy(model: Model) -> ActorCritic:
        """`model`, whose modules are shared, with a critic copied from it, or with an adapter of its own on the same
        frozen weights if `model` has one."""
        both = _around(model, ActorCritic)
        both.critic = _adapted_critic(model) if lora_linears(model) else ValueModel.of(model)
        return both


def with_value_head(model: Model) -> ValueModel:
    """A policy that shares its trunk with its critic: a copy of `model`, or `model` itself if it has an adapter."""
    if not lora_linears(model):
        return ValueModel.of(model, keep_head=True)
    both, weight = _around(model, ValueModel), model.embed_tokens.weight
    both.value_head.weight = nn.Parameter(weight.new_zeros(1, model.config.hidden_size))
    return both


def _adapted_critic(model: Model) -> ValueModel:
    """A critic with an adapter like that of `model`, on the same frozen weights, which are not copied."""
    with torch.device("meta"):
        critic = ValueModel(replace(model.config, tie_word_embeddings=True))
    critic.requires_grad_(False)  # the assigned weights take this over
    names = critic.state_dict().keys()
    frozen: dict[str, Any] = {name: p for name, p in model.named_parameters() if name in names}
    head = model.embed_tokens.weight.new_zeros(1, model.config.hidden_size)
    critic.load_state_dict(frozen | {_HEAD: head}, assign=True)
    critic.compute_dtype, critic.recompute = model.compute_dtype, model.recompute
    add_adapter(critic, adapter_config(model))
    critic.value_head.requires_grad_(True)
    return critic.train(model.training)


def _around(model: Model, kind: type[M]) -> M:
    """A `kind` that shares the modules of `model`."""
    with torch.device("meta"):
        copy = kind(model.config)
    children = dict(copy.named_children())
    for name, module in model.named_children():
        if name in children:
            setattr(copy, name, module)
    copy.compute_dtype, copy.recompute, copy.dropout = model.compute_dtype, model.recompute, model.dropout
    return copy.train(model.training)


def critic_of(model: Model) -> ValueModel:
    """The model that estimates values: the critic of an ActorCritic, or a ValueModel itself."""
    return model.critic if isinstance(model, ActorCritic) else cast(ValueModel, model)


def critic_parameters(model: Model) -> list[nn.Parameter]:
    """The trained parameters that only the critic uses: its own trunk, or the head on the policy's."""
    module = model.critic if isinstance(model, ActorCritic) else cast(ValueModel, model).value_head
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def save_both(model: Model, folder: Path, save: Callable[[Model, Path], None] = save_weights) -> None:
    """Write the policy, as a model to chat with, and the critic beside it. save: writes a model or an adapter."""
    policy = _around(model, Model)
    adapted = bool(lora_linears(policy))
    save(policy, folder)
    if isinstance(model, ActorCritic):
        (save if adapted else save_value_model)(model.critic, folder / _CRITIC)
    if adapted or not isinstance(model, ActorCritic):
        torch.save(critic_of(model).value_head.weight.detach(), folder / f"{_CRITIC}_head.pt")


def load_both(model: Model, checkpoint: Path, parallel: Parallel) -> None:
    """Load what save_both wrote into policy and critic, in place. All ranks call it; rank 0 reads."""
    adapted = bool(lora_linears(model))
    state = _read_both(model, checkpoint, adapted) if parallel.main else {}
    set_model_state_dict(model, state, options=from_rank_0(strict=not adapted))


def _read_both(model: Model, checkpoint: Path, adapted: bool) -> dict[str, Any]:
    own = isinstance(model, ActorCritic)
    critic, folder = critic_of(model), checkpoint / _CRITIC
    state: dict[str, Any] = {}
    if adapted:
        state |= read_adapter(_around(model, Model), checkpoint)
        critic_state = read_adapter(critic, folder) if own else {}
    else:
        state |= load_model(checkpoint, config=model.config).state_dict()
        critic_state = load_value_model(folder, config=critic.config).state_dict() if own else {}
    if adapted or not own:
        critic_state[_HEAD] = torch.load(checkpoint / f"{_CRITIC}_head.pt", weights_only=True)
    return state | {(CRITIC if own else "") + name: value for name, value in critic_state.items()}
