"""Low-rank adapters on a frozen model: y = W x + scale * B (A x). Hu et al. 2021, arXiv 2106.09685.

W holds q, k and v (or gate and up) in one matrix, and each part has its own A and B, like peft's separate modules.
These are stacked too: one product with x gives all A x, and x is kept for the backward once. W needs nothing kept,
since it gets no gradient.

    add_adapter(model, LoRAConfig(rank=8))      then train: only the adapter has requires_grad
    set_adapters(model, ["a", "b"])             use their sum; [] is the base model
    with adapters_off(model):                   use the base model inside
    merge_adapter(model)                        W + scale * B A, free at inference; unmerge_adapter restores W

With DoRA (Liu et al. 2024, arXiv 2402.09353) each row of W + scale * B A is rescaled to a trained length, which starts
as that of W: y = g (W x + scale * B (A x)), g = length / |row|. |row| is a constant in the backward, as in the paper.

minimind/lora_files.py saves adapters in peft's format. Parameters are float32 like the base's, and products run in the
dtype of x. The optimizer must be element-wise (AdamW): Muon would orthogonalise the stacked matrices as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.modeling import MLP, Attention, Linear, Model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUTED = (
    "routed experts take no adapter: they are one tensor per layer, multiplied by grouped kernels that have no "
    "low-rank term"
)


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of an adapter. ValueError for values out of range.

    rank, alpha: the scale is alpha / rank, or alpha / sqrt(rank) with rslora (Kalajdzievski 2023, arXiv 2312.03732).
    dropout: on the input of A, in training; q, k and v (or gate and up) share one draw, where peft draws for each.
    targets: ends of upstream's module names, such as "q_proj", "shared_experts.0.up_proj" or "layers.3.mlp.down_proj";
    None: every projection except routed experts, router, embedding and head. dora: train the rows' lengths too.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoRA alpha={self.alpha}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout={self.dropout}: must lie in [0, 1)")
        if self.targets is not None and not self.targets:
            raise ValueError(f"LoRA targets are empty; name some of {', '.join(TARGETS)}, or give None for all")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Adapter(nn.Module):
    """The low-rank factors of one packed matrix: A [n r, in] and B [rows, r], stacked by part; with DoRA M [rows].

    weights: {"q_proj": [rows, in], ...}, the n parts to adapt. A starts uniform in +-1 / sqrt(in) and B at zero, as in
    peft.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: LoRAConfig) -> None:
        super().__init__()
        self.parts, self.config = {part: len(weight) for part, weight in weights.items()}, config
        parts, weight = self.parts, next(iter(weights.values()))
        width = weight.shape[1]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a = torch.empty(len(parts) * config.rank, width, dtype=dtype, device=weight.device)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(a, a=5**0.5))
        self.B = nn.Parameter(a.new_zeros(sum(parts.values()), config.rank))
        lengths = [weight.detach().to(dtype).norm(dim=1) for weight in weights.values()]
        self.M = nn.Parameter(torch.cat(lengths)) if config.dora else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [..., in] -> scale * B A x of each part, [..., rows]."""
        x = F.dropout(x, self.config.dropout, self.training)
        low = F.linear(x, self.A.to(x.dtype)) * self.config.scale  # [..., n r]
        pieces = zip(low.split(self.config.rank, dim=-1), self.by_part(self.B.to(x.dtype)).items(), strict=True)
        return {part: F.linear(z, b) for z, (part, b) in pieces}

    def gains(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DoRA's factor g of each part's rows, [rows], float32 or wider; {} without DoRA. weights: the frozen parts."""
        if self.M is None:
            return {}
        with torch.no_grad():
            lengths = {
                part: torch.addmm(weights[part].to(b.dtype), b, a, alpha=self.config.scale).norm(dim=1)
                for part, (a, b) in self.split(self.A, self.B).items()
            }
        return {part: length / lengths[part] for part, length in self.by_part(self.M).items()}

    def by_part(self, rows: Tensor) -> dict[str, Tensor]:
        """Split stacked rows into views by part."""
        return dict(zip(self.parts, rows.split(tuple(self.parts.values())), strict=True))

    def split(self, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Split stacked a and b into views (A [r, in], B [rows, r]) by part."""
        pairs = zip(a.split(self.config.rank), self.by_part(b).values(), strict=True)
        return dict(zip(self.parts, pairs, strict=True))


class LoRALinear(nn.Module):
    """A frozen packed projection with named adapters; `weight` keeps its name in the state dict.

    parts: {"q_proj": rows, ...}, in the order of the rows. active: names of the adapters in use. base: a copy of the
    frozen weight while adapters are merged into `weight`, else None.
    """

    def __init__(self, weight: nn.Parameter, parts: dict[str, int]) -> None:
        super().__init__()
        self.weight, self.parts = weight, parts
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.base: Tensor | None
        self.register_buffer("base", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.base is not None or not self.active:
            return y
        frozen = self.by_part(y, dim=-1)
        pieces = dict(frozen)
        for name in self.active:
            adapter = self.adapter(name)
            gains = adapter.gains(self.by_part(self.weight))
            for part, term in adapter(x).items():
                if part in gains:
                    gain = gains[part]
                    term = gain.to(y.dtype) * term + (gain - 1).to(y.dtype) * frozen[part]
                pieces[part] = pieces[part] + term
        whole = tuple(pieces.values())
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim=-1)

    def by_part(self, packed: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """Split `packed` along its dimension of packed rows, `dim`, into views by part."""
        return dict(zip(self.parts, packed.split(tuple(self.parts.values()), dim), strict=True))

    def adapter(self, name: str) -> Adapter:
        """The adapter `name` of this projection."""
        return cast(Adapter, self.adapters[name])

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the active adapters added, in float32 or wider."""
        total = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        rows, frozen = self.by_part(total), self.by_part(self.weight)
        for name in self.active if self.base is None else ():
            adapter = self.adapter(name)
            gains = adapter.gains(frozen)
            for part, (a, b) in adapter.split(adapter.A, adapter.B).items():
                change = b.to(total.dtype) @ a.to(total.dtype) * adapter.config.scale
                if part in gains:
                    gain = gains[part].to(total.dtype)[:, None]
                    change = gain * change + (gain - 1) * frozen[part]
                rows[part].add_(change)
        return total

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapters to `weight` and keep the frozen weight in `base`."""
        total = self.merged()
        self.base = self.weight.detach().clone()
        self.weight.copy_(total)  # in place: CUDA graphs and compiled code hold its address

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the frozen weight exactly."""
        if self.base is not None:
            self.weight.copy_(self.base)
        self.base = None


@dataclass(frozen=True)
class Projection:
    """Location of one of upstream's projections in Model: the packed matrix's path, the part of it, and its rows."""

    path: str
    part: str
    rows: int


def projections(model: Model) -> dict[str, Projection]:
    """All projections that can have an adapter, by upstream's name, such as "model.layers.0.self_attn.q_proj"."""
    by_name = {}
    for path, parts in _packed(model):
        prefix = path.rpartition(".")[0]
        by_name.update({f"model.{prefix}.{part}": Projection(path, part, rows) for part, rows in parts.items()})
    return by_name


def add_adapter(model: Model, config: LoRAConfig, name: str = "default") -> None:
    """Add a trainable adapter that changes nothing yet, make it the only active one, and freeze everything else.

    Call it before making the optimizer and before DDP, FSDP or torch.compile wrap the model. ValueError for a target
    that the model does not have, or a name that is taken.
    """
    attach(model, config, _select(model, config.targets), name, trainable=True)


def attach(model: Model, config: LoRAConfig, names: Sequence[str], name: str, trainable: bool) -> None:
    """add_adapter for the projections `names`; without `trainable` the adapter is frozen too, for inference."""
    _not_merged(model)
    if name in adapter_names(model):
        raise ValueError(f"adapter {name!r} exists already; call remove_adapters, or choose another name")
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r}: must not be empty or contain dots")
    by_name = projections(model)
    selected = {(by_name[stock].path, by_name[stock].part) for stock in names}
    model.requires_grad_(False)
    for path, parts in list(_packed(model)):
        chosen = [part for part in parts if (path, part) in selected]
        if chosen:
            linear = _as_lora(model, path, parts)
            weights = linear.by_part(linear.weight)
            adapter = Adapter({part: weights[part] for part in chosen}, config).train(linear.training)
            linear.adapters[name] = adapter.requires_grad_(trainable)
    model.dropout = model.dropout or config.dropout > 0
    set_adapters(model, [name])


def adapter_names(model: Model) -> list[str]:
    """Names of the model's adapters, in the order they were added."""
    return list(dict.fromkeys(name for _, linear in lora_linears(model) for name in linear.adapters))


def set_adapters(model: Model, names: Sequence[str]) -> None:
    """Use the base plus the sum of the adapters `names`. requires_grad does not change."""
    _not_merged(model)
    for name in names:
        check_adapter(model, name)
    for _, linear in lora_linears(model):
        linear.active = tuple(name for name in names if name in linear.adapters)


@contextmanager
def adapters_off(model: Model) -> Iterator[None]:
    """Inside the `with` block `model` is its base model; no weights are copied."""
    linears = [linear for _, linear in lora_linears(model)]
    active_before = [linear.active for linear in linears]
    set_adapters(model, [])
    try:
        yield
    finally:
        for linear, active in zip(linears, active_before, strict=True):
            linear.active = active


def empty_copy(model: Model) -> Model:
    """A meta-device model of the same shape and with the same adapters, for load_state_dict(assign=True)."""
    with torch.device("meta"):
        copy = Model(model.config)
        for path, linear in lora_linears(model):
            other = _as_lora(copy, path, linear.parts)
            weights = other.by_part(other.weight)
            for name in linear.adapters:
                adapter = linear.adapter(name)
                other.adapters[name] = Adapter({part: weights[part] for part in adapter.parts}, adapter.config)
            other.active = linear.active
    copy.compute_dtype, copy.recompute, copy.dropout = model.compute_dtype, model.recompute, model.dropout
    return copy.train(model.training)


def merge_adapter(model: Model) -> None:
    """Merge the active adapters into the weights, rounded once to their dtype; the frozen weights are kept in
    `base`."""
    _not_merged(model)
    if not any(linear.active for _, linear in lora_linears(model)):
        raise ValueError("merge_adapter: no adapter is active; load or activate one first")
    for _, linear in lora_linears(model):
        if linear.active:
            linear.merge()


def unmerge_adapter(model: Model) -> None:
    """Restore the frozen weights exactly and use the adapters separately again."""
    for _, linear in lora_linears(model):
        linear.unmerge()


def remove_adapters(model: Model) -> None:
    """Turn `model` back into a plain, trainable model. Merged adapters stay in its weights; others are dropped."""
    for path, linear in lora_linears(model):
        with torch.device("meta"):
            plain = Linear(linear.weight.shape[1], linear.weight.shape[0])
        plain.weight = linear.weight
        _replace(model, path, plain.train(linear.training))
    model.dropout = False
    model.requires_grad_(True)


def merged_state(model: Model) -> dict[str, Tensor]:
    """The state dict of an equivalent plain model, with the active adapters merged into its weights."""
    state = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." not in key}
    for path, linear in lora_linears(model):
        state[f"{path}.weight"] = linear.merged().to(linear.weight.dtype)
    return state


def _packed(model: Model) -> Iterator[tuple[str, dict[str, int]]]:
    """(path, {part: rows}) of each projection matrix outside the routed experts, in the model's order."""
    cfg = model.config
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            yield f"{path}.qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv}
            yield f"{path}.o_proj", {"o_proj": cfg.hidden_size}
        elif isinstance(module, MLP):
            inner = cfg.intermediate_size
            yield f"{path}.gate_up_proj", {"gate_proj": inner, "up_proj": inner}
            yield f"{path}.down_proj", {"down_proj": cfg.hidden_size}


def _select(model: Model, targets: tuple[str, ...] | None) -> list[str]:
    """Upstream's names of the projections that `targets` select."""
    available = list(projections(model))
    if targets is None:
        return available
    for target in targets:
        if not any(matches(name, (target,)) for name in available):
            routed = model.config.num_experts and ("expert" in target or target in TARGETS)
            reason = ROUTED if routed else "this model has no such projection"
            choices = dict.fromkeys(leaf(name) for name in available)
            raise ValueError(f"LoRA target {target!r}: {reason}; choose from {', '.join(choices)}")
    return [name for name in available if matches(name, targets)]


def matches(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a target is the module's name or ends it, which is peft's rule."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def leaf(stock: str) -> str:
    """The part of upstream's name after self_attn or mlp."""
    return stock.split(".", 4)[4]


def _as_lora(model: Model, path: str, parts: dict[str, int]) -> LoRALinear:
    module = model.get_submodule(path)
    if not isinstance(module, LoRALinear):
        assert isinstance(module, Linear)
        lora = LoRALinear(cast(nn.Parameter, module.weight), parts).train(module.training)
        _replace(model, path, lora)
        return lora
    return module


def _replace(model: Model, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_linears(model: Model) -> list[tuple[str, LoRALinear]]:
    """(path, module) of each projection that has adapters."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]


def check_adapter(model: Model, name: str) -> None:
    """ValueError if `model` has no adapter of this name."""
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"no adapter {name!r} in this model; it has {', '.join(names) or 'none'}")


def _not_merged(model: Model) -> None:
    if any(linear.base is not None for _, linear in lora_linears(model)):
        raise ValueError("an adapter is merged into the weights; call unmerge_adapter first")
