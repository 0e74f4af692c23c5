"""The model's configuration: a frozen dataclass, the presets, and the dialects of config.json that it reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class YarnScaling:
    """Context extension by YaRN (Peng et al. 2023, arXiv 2309.00071).

    Positions up to factor * original_max_position_embeddings become usable. attention_factor scales cos and sin, and so
    attention's logits by its square; None: the paper's 0.1 * ln(factor) + 1.
    """

    factor: float = 16.0
    original_max_position_embeddings: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = 1.0


# Exceptions that arbitrary JSON can cause.
_ANY_JSON = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "intermediate_size", "vocab_size", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer; num_experts == 0 means dense. ValueError for shapes that do not fit
    together.

    vocab_size: rows of the embedding. tokenizer_size: the number of the tokenizer's ids if that is smaller, else None.
    """

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1408
    vocab_size: int = 6400
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: YarnScaling | None = None
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    router_aux_loss_level: Literal["sequence", "batch"] = "sequence"
    tokenizer_size: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number above 0")
        if self.tokenizer_size is not None and not 1 <= self.tokenizer_size < self.vocab_size:
            raise ValueError(
                f"tokenizer_size={self.tokenizer_size} must be below vocab_size={self.vocab_size}, or left out"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..num_experts={self.num_experts}"
            )
        if self.num_experts and self.moe_intermediate_size <= 0:
            raise ValueError("moe_intermediate_size must be positive when num_experts > 0")

    @property
    def positions(self) -> int:
        """The longest usable context in tokens, YaRN's scaling included."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        scaled = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
        return max(self.max_position_embeddings, scaled)

    @property
    def num_tokens(self) -> int:
        """The number of ids the model predicts, which are the tokenizer's. Logits, losses and log-probabilities leave
        out further rows, which only pad the vocabulary to a round size."""
        return self.tokenizer_size or self.vocab_size

    @property
    def padding_note(self) -> str | None:
        """One line for display if the vocabulary is padded, else None."""
        if self.tokenizer_size is None:
            return None
        surplus = self.vocab_size - self.num_tokens
        return (
            f"padded vocabulary: {surplus:,} of the model's {self.vocab_size:,} rows are beyond the tokenizer's ids; "
            "they are never sampled, scored or trained"
        )

    def with_tokenizer(self, size: int, where: str) -> ModelConfig:
        """This shape with a tokenizer of `size` ids. ValueError, prefixed with `where`, if the model has fewer rows."""
        if size > self.vocab_size:
            raise ValueError(
                f"{where}: the tokenizer has {size} ids, the model {self.vocab_size} rows for them; use the tokenizer "
                "that the model was trained with"
            )
        return dataclasses.replace(self, tokenizer_size=size if size < self.vocab_size else None)

    @staticmethod
    def preset(name: str, **overrides: Any) -> ModelConfig:
        """The preset `name` (see PRESETS), with fields overridden. ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **overrides)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """Read the config keys of ours, upstream MiniMind2 and 3, or transformers' Llama, Qwen3 and Granite MoE."""
        return _from_dict(dict(raw))

    @staticmethod
    def from_json(path: str | Path) -> ModelConfig:
        """`from_dict` of a file. ValueError, naming the file, if it is no valid config."""
        try:
            return ModelConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except _ANY_JSON as error:
            raise ValueError(f"{path}: not a valid model config ({error}); name another folder") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict; `from_dict` inverts it."""
        fields = dataclasses.asdict(self)
        if self.tokenizer_size is None:  # files without a padded vocabulary do not have this key
            del fields["tokenizer_size"]
        return fields


PRESETS: dict[str, ModelConfig] = {
    # Small enough to learn words within minutes on two CPU cores.
    "nano": ModelConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        qk_norm=True,
        max_position_embeddings=4096,
    ),
    "minimind2-small": ModelConfig(),
    "minimind2": ModelConfig(hidden_size=768, num_hidden_layers=16, head_dim=96, intermediate_size=2048),
    "minimind2-moe": ModelConfig(
        hidden_size=640,
        head_dim=80,
        intermediate_size=1728,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=1728,
        router_aux_loss_coef=0.01,  # upstream's first value, 0.1, costs 0.05 nats (docs/LOG.md)
    ),
    "minimind3": ModelConfig(
        hidden_size=768, num_key_value_heads=4, head_dim=96, intermediate_size=2432, rms_norm_eps=1e-6, qk_norm=True
    ),
    "minimind3-moe": ModelConfig(
        hidden_size=768,
        num_key_value_heads=4,
        head_dim=96,
        intermediate_size=2432,
        rms_norm_eps=1e-6,
        qk_norm=True,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=2432,
        router_aux_loss_coef=5e-4,
        router_aux_loss_level="batch",
    ),
}


GRANITE = ("granitemoe", "granitemoeshared")
_TRANSFORMERS = ("llama", "qwen3", "qwen3_moe", *GRANITE)
_TRANSFORMERS_DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6}


def _from_dict(raw: dict[str, Any]) -> ModelConfig:
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    kind = raw.get("model_type")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={raw['hidden_act']!r} is not supported; only 'silu' (SwiGLU) is")
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported: each token attends to all previous ones")
    out = {k: v for k, v in raw.items() if k in own and k != "rope_scaling" and v is not None}
    hidden = int(raw.get("hidden_size", ModelConfig.hidden_size))
    heads = int(raw.get("num_attention_heads", ModelConfig.num_attention_heads))
    out.setdefault("head_dim", hidden // heads)

    is_v3 = "router_aux_loss_coef" in raw and raw.get("model_type") == "minimind"
    is_v2 = "n_routed_experts" in raw
    if is_v2:  # upstream MiniMind2
        out["num_experts"] = raw["n_routed_experts"]
        out["num_shared_experts"] = raw.get("n_shared_experts", 0)
        out["router_aux_loss_coef"] = raw.get("aux_loss_alpha", 0.1)
        out["router_aux_loss_level"] = "sequence" if raw.get("seq_aux", True) else "batch"
        out.setdefault("intermediate_size", 64 * -(-int(hidden * 8 / 3) // 64))
        out["moe_intermediate_size"] = out["intermediate_size"]
        if raw.get("num_experts_per_tok") == 1:  # MiniMind2 does not normalise a single gate
            out["norm_topk_prob"] = False
    elif is_v3 or kind in ("qwen3", "qwen3_moe"):  # upstream MiniMind3
        out.update(qk_norm=True, router_aux_loss_level=raw.get("router_aux_loss_level", "batch"))
    elif kind in GRANITE:
        out.update(_granite_experts(raw, int(out["head_dim"])))
    if kind in _TRANSFORMERS:  # the defaults of its config classes
        out["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
        out["norm_topk_prob"] = raw.get("norm_topk_prob", False) or kind in GRANITE
        if kind == "qwen3_moe":
            out["num_experts"] = raw.get("num_experts") or raw.get("num_local_experts", 0)
    if not raw.get("use_moe", True) or kind in ("llama", "qwen3"):
        out.update(num_experts=0, num_shared_experts=0, moe_intermediate_size=0, router_aux_loss_coef=0.0)
        for key in ("norm_topk_prob", "router_aux_loss_level"):  # about experts: unused in a dense model
            out.pop(key, None)

    out["rope_scaling"] = _rope_scaling(raw)
    theta = (raw.get("rope_parameters") or {}).get("rope_theta")
    if "rope_theta" not in out and theta is not None:
        out["rope_theta"] = theta
    if kind in _TRANSFORMERS:
        out = {**_TRANSFORMERS_DEFAULTS, **out}
        if kind == "llama" or kind in GRANITE:
            out.setdefault("num_key_value_heads", heads)
    return ModelConfig(**out)


def _granite_experts(raw: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Read Granite's MoE, which is MiniMind2's if its multipliers have no effect. It stores shared experts as one."""
    supported = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": head_dim**-0.5,
    }
    for key, value in supported.items():
        actual = raw.get(key, 1.0)
        if abs(actual - value) > 1e-6 * value:
            raise ValueError(f"{raw['model_type']}: {key}={actual} is not supported; only {value:g} is")
    shared_width = raw.get("shared_intermediate_size", 0)
    shared = raw.get("num_shared_experts", 1 if shared_width else 0)
    return {
        "num_experts": raw.get("num_local_experts", 8),
        "num_shared_experts": shared,
        "moe_intermediate_size": raw["intermediate_size"],
        "intermediate_size": shared_width // shared if shared else raw["intermediate_size"],
    }


def _rope_scaling(raw: dict[str, Any]) -> YarnScaling | None:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters")
    if not scaling or raw.get("inference_rope_scaling") is False:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "yarn"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type {kind!r} is not supported; only 'yarn' is")
    fields = {f.name for f in dataclasses.fields(YarnScaling)}
    for key in ("mscale", "mscale_all_dim", "truncate"):
        if scaling.get(key) is not None:
            raise ValueError(f"rope_scaling: {key}={scaling[key]} is not supported; only YaRN without it is")
    if raw.get("model_type") in _TRANSFORMERS:  # a missing factor means the paper's
        scaling = {"attention_factor": None, **scaling}
    return YarnScaling(**{k: v for k, v in scaling.items() if k in fields})
