"""Low-rank adapters on a frozen model: y = W x + scale * B (A x). Hu et al. 2021, arXiv 2106.09685.

W holds q, k and v (or gate and up) in one matrix; each has an A and a B of its own, as peft's separate modules have.
In memory they are stacked too: one product with x gives all the A x, and x is kept once for all of them. For W nothing
is kept: the gradient of x needs only W, and W gets none.

    add_adapter(model, LoRAConfig(rank=8))      then train: the adapter alone has requires_grad
    set_adapters(model, ["a", "b"])             their sum; [] is the base model
    with adapters_off(model):                   the base model meanwhile
    merge_adapter(model)                        W + scale * B A, no cost at inference; unmerge_adapter puts W back

With DoRA (Liu et al. 2024, arXiv 2402.09353) each row of W + scale * B A is given a trained length, at first that of W:
y = g (W x + scale * B (A x)), g = length / |row|. |row| is a constant in the backward, as in the paper.

Adapters on disk are peft's: minimind/lora_files.py. Parameters are float32 as the base's are, products run in the
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
    """rank r and alpha: scale is alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023, arXiv 2312.03732).

    dropout: probability that a number of x does not reach A, in training; one draw serves q, k and v (or gate and up),
    where peft draws for each. targets: ends of upstream's module names, such as "q_proj", "shared_experts.0.up_proj"
    or "layers.3.mlp.down_proj"; None: every projection but routed experts, router, embedding and head. ValueError for
    numbers that mean nothing. dora: train the rows' lengths too.
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
            raise ValueError(f"LoRA targets are empty; name some of {', '.join(TARGETS)}, or None for all")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Adapter(nn.Module):
    """The low-rank terms of one packed matrix: A [n r, in] and B [rows, r], stacked by part; with DoRA M [rows].

    weights: {"q_proj": [rows, in], ...} of the n parts that have one. A uniform in +-1 / sqrt(in), B zero, as in peft.
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
        """x [..., in] -> the term of each part, [..., rows]."""
        x = F.dropout(x, self.config.dropout, self.training)
        low = F.linear(x, self.A.to(x.dtype)) * self.config.scale  # [..., n r]
        pieces = zip(low.split(self.config.rank, dim=-1), self.by_part(self.B.to(x.dtype)).items(), strict=True)
        return {part: F.linear(z, b) for z, (part, b) in pieces}

    def gains(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With DoRA the factor of each part's rows, [rows], float32 or wider; weights: the frozen ones by part."""
        if self.M is None:
            return {}
        with torch.no_grad():
            lengths = {
                part: torch.addmm(weights[part].to(b.dtype), b, a, alpha=self.config.scale).norm(dim=1)
                for part, (a, b) in self.split(self.A, self.B).items()
            }
        return {part: length / lengths[part] for part, length in self.by_part(self.M).items()}

    def by_part(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of each part's share of `rows`."""
        return dict(zip(self.parts, rows.split(tuple(self.parts.values())), strict=True))

    def split(self, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [r, in], B [rows, r]) of each part, views of the stacked a and b."""
        pairs = zip(a.split(self.config.rank), self.by_part(b).values(), strict=True)
        return dict(zip(self.parts, pairs, strict=True))


class LoRALinear(nn.Module):
    """A frozen packed projection with named adapters; `weight` keeps its name in the state dict.

    parts: {"q_proj": rows, ...} of all its parts. active: the adapters that count. base: the frozen weight, while
    `weight` has adapters merged in.
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
        """Views of what each part has of `packed`, whose dimension `dim` is that of the packed rows."""
        return dict(zip(self.parts, packed.split(tuple(self.parts.values()), dim), strict=True))

    def adapter(self, name: str) -> Adapter:
        return cast(Adapter, self.adapters[name])

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the active adapters, in float32 or wider; as it is where they are merged into it."""
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
        total = self.merged()
        self.base = self.weight.detach().clone()
        self.weight.copy_(total)  # in place: whoever captured its address goes on with the merged weight

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.base is not None:
            self.weight.copy_(self.base)
        self.base = None


@dataclass(frozen=True)
class Projection:
    """Where a projection of upstream's name lives: the path of the packed matrix, which part of it, and its rows."""

    path: str
    part: str
    rows: int


def projections(model: Model) -> dict[str, Projection]:
    """By upstream's module name, such as "model.layers.0.self_attn.q_proj": all that can have an adapter."""
    found = {}
    for path, parts in _packed(model):
        prefix = path.rpartition(".")[0]
        found.update({f"model.{prefix}.{part}": Projection(path, part, rows) for part, rows in parts.items()})
    return found


def add_adapter(model: Model, config: LoRAConfig, name: str = "default") -> None:
    """Give `model` a new adapter that changes nothing yet, the only one active; all but it is frozen.

    Call it before the optimizer is made and before DDP, FSDP or torch.compile wrap the model. ValueError for a target
    that the model does not have, or for a name that is taken.
    """
    attach(model, config, _select(model, config.targets), name, trainable=True)


def attach(model: Model, config: LoRAConfig, names: Sequence[str], name: str, trainable: bool) -> None:
    """add_adapter to the projections `names`; not trainable: for inference, frozen as well."""
    _not_merged(model)
    if name in adapter_names(model):
        raise ValueError(f"adapter {name!r} exists already; remove_adapters, or take another name")
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r}: must be without dots and not empty")
    known = projections(model)
    wanted = {(known[stock].path, known[stock].part) for stock in names}
    model.requires_grad_(False)
    for path, parts in list(_packed(model)):
        mine = {part: rows for part, rows in parts.items() if (path, part) in wanted}
        if mine:
            linear = _as_lora(model, path, parts)
            weights = linear.by_part(linear.weight)
            adapter = Adapter({part: weights[part] for part in mine}, config).train(linear.training)
            linear.adapters[name] = adapter.requires_grad_(trainable)
    model.dropout = model.dropout or config.dropout > 0
    set_adapters(model, [name])


def adapter_names(model: Model) -> list[str]:
    return list(dict.fromkeys(name for _, linear in lora_linears(model) for name in linear.adapters))


def set_adapters(model: Model, names: Sequence[str]) -> None:
    """Make the model base + the sum of the adapters `names`. What may be trained stays as it is."""
    _not_merged(model)
    for name in names:
        check_name(model, name)
    for _, linear in lora_linears(model):
        linear.active = tuple(name for name in names if name in linear.adapters)


@contextmanager
def adapters_off(model: Model) -> Iterator[None]:
    """`model` is its base meanwhile: the frozen weights alone, of which no other copy is made."""
    linears = [linear for _, linear in lora_linears(model)]
    before = [linear.active for linear in linears]
    set_adapters(model, [])
    try:
        yield
    finally:
        for linear, active in zip(linears, before, strict=True):
            linear.active = active


def empty_copy(model: Model) -> Model:
    """A model of the shape of `model` and with its adapters, on the meta device: for load_state_dict(assign=True)."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # initialisation draws, on meta too
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
    """Add the active adapters into the weights, rounded once to their dtype. The frozen weights are kept beside."""
    _not_merged(model)
    if not any(linear.active for _, linear in lora_linears(model)):
        raise ValueError("merge_adapter: no adapter is active; load or set one first")
    for _, linear in lora_linears(model):
        if linear.active:
            linear.merge()


def unmerge_adapter(model: Model) -> None:
    """The frozen weights as they were, to the last bit; the adapters are active again."""
    for _, linear in lora_linears(model):
        linear.unmerge()


def remove_adapters(model: Model) -> None:
    """A plain model again, all of it trainable: with what was merged, without what was not."""
    for path, linear in lora_linears(model):
        with torch.device("meta"):
            plain = Linear(linear.weight.shape[1], linear.weight.shape[0])
        plain.weight = linear.weight
        _replace(model, path, plain.train(linear.training))
    model.dropout = False
    model.requires_grad_(True)


def merged_state(model: Model) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what `model` does: the active adapters are in its weights."""
    state = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." not in key}
    for path, linear in lora_linears(model):
        state[f"{path}.weight"] = linear.merged().to(linear.weight.dtype)
    return state


def _packed(model: Model) -> Iterator[tuple[str, dict[str, int]]]:
    """(path, {part: rows}) of every projection matrix outside the routed experts, in the model's order."""
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
    """Upstream's names of the projections that `targets` mean."""
    known = list(projections(model))
    if targets is None:
        return known
    for target in targets:
        if not any(matches(name, (target,)) for name in known):
            routed = model.config.num_experts and ("expert" in target or target in TARGETS)
            reason = ROUTED if routed else "this model has no such projection"
            choices = dict.fromkeys(leaf(name) for name in known)
            raise ValueError(f"LoRA target {target!r}: {reason}; choose from {', '.join(choices)}")
    return [name for name in known if matches(name, targets)]


def matches(name: str, targets: tuple[str, ...]) -> bool:
    """peft's rule: a target is a module's name or the end of it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def leaf(stock: str) -> str:
    """An upstream name without layer and block: what comes after self_attn or mlp."""
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
    """(path, module) of every projection that has adapters."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]


def check_name(model: Model, name: str) -> None:
    known = adapter_names(model)
    if name not in known:
        raise ValueError(f"no adapter {name!r} in this model; it has {', '.join(known) or 'none'}")


def _not_merged(model: Model) -> None:
    if any(linear.base is not None for _, linear in lora_linears(model)):
        raise ValueError("an adapter is merged into the weights; call unmerge_adapter first")
