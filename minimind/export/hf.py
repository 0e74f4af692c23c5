"""A folder that transformers, vLLM and programs built on them load with their own model classes.

    dense                    LlamaForCausalLM
    dense, QK-norm           Qwen3ForCausalLM
    experts, QK-norm         Qwen3MoeForCausalLM
    experts, also shared     GraniteMoeSharedForCausalLM, with multipliers of 1 and an attention scale of D^-0.5

config.json has rope_theta and rope_scaling at the top level, as transformers 4 wrote them and 5 still reads them.
`load_model` opens the folder too, for which it contains `num_shared_experts` and `router_aux_loss_level`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minimind.config import ModelConfig, YarnScaling
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.tokenizer import CONFIG_FILE
from minimind.weights import to_granite, to_stock

# The sampling of `minimind chat`; transformers' pipeline and vLLM read it from generation_config.json.
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def export_hf(model: Model, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json, generation_config.json, model.safetensors (in `dtype`) and the tokenizer into `folder`.

    Rows of the model beyond the tokenizer's ids are kept, and generation_config.json suppresses them.
    Raises ValueError if transformers has no architecture for the model.
    """
    config, folder = model.config, Path(folder)
    description = hf_config(config, tokenizer, dtype)
    stock = to_stock(model.state_dict(), config)
    state = to_granite(stock, config) if description["model_type"] == "granitemoeshared" else stock
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    if (answers := response_template(tokenizer)) is not None:
        file = folder / CONFIG_FILE
        _write(file, {"response_template": answers, **json.loads(file.read_text(encoding="utf-8"))})
    _write(folder / "config.json", description)
    _write(folder / "generation_config.json", _generation(config, tokenizer))
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(
        folder / "config.json", folder / "model.safetensors"
    )  # safetensors creates files that only the owner may read


def response_template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """How to read an answer's thought, tool calls and text, in the form of transformers 5; vLLM's parser `hf` takes it
    too. None for a chat template without <think> and <tool_call>.
    Source: transformers/utils/chat_parsing/response_templates.py"""
    template = tokenizer.chat_template or ""
    if "<think>" not in template or "<tool_call>" not in template:
        return None
    question = [{"role": "user", "content": "?"}]
    asked = tokenizer.apply_chat_template(question)
    header = tokenizer.apply_chat_template(question, add_generation_prompt=True).removeprefix(asked)
    ends = [tokenizer.decode([end]) for end in dict.fromkeys((tokenizer.eos_token_id, tokenizer.pad_token_id))]
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": header.partition("<think>")[0],
        "fields": {
            "thinking": {"open": "<think>", "close": ["</think>", *ends], "content": "text"},
            "tool_calls": {  # space before a mark would be text, and replace the text before it
                "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
                "content_args": {"allow_non_json": True},  # a call that is no JSON stays text instead of an exception
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": rf"\s*(?:{'|'.join(map(re.escape, ends))})", "content": "text"},
        },
    }  # fmt: skip


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of transformers' own class for this shape."""
    architecture, own = _architecture(config)
    scaling = config.rope_scaling
    return {
        "architectures": [architecture],
        **own,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _positions(config),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _yarn(scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 5 calls it dtype but reads this too
    }


def _architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The name of transformers' class, and the config keys that are specific to it."""
    if config.num_experts == 0:
        size = {"intermediate_size": config.intermediate_size}
        if config.qk_norm:
            return "Qwen3ForCausalLM", {"model_type": "qwen3", **size, "use_sliding_window": False}
        return "LlamaForCausalLM", {"model_type": "llama", **size, "mlp_bias": False}
    experts = {
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_aux_loss_level": config.router_aux_loss_level,
        "output_router_logits": False,
    }
    if config.qk_norm:
        if config.num_shared_experts:
            raise ValueError("--to hf: transformers has no architecture with QK-norm and plain shared experts")
        return "Qwen3MoeForCausalLM", {
            "model_type": "qwen3_moe",
            **experts,
            "intermediate_size": config.intermediate_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "num_experts": config.num_experts,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
    if not config.norm_topk_prob:
        raise ValueError(
            "--to hf: transformers' architecture without QK-norm normalises the gates of the chosen experts, but "
            "norm_topk_prob is false here"
        )
    return "GraniteMoeSharedForCausalLM", {
        "model_type": "granitemoeshared",
        **experts,
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
        "shared_intermediate_size": config.num_shared_experts * config.intermediate_size,
        "num_shared_experts": config.num_shared_experts,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": config.head_dim**-0.5,
    }


def _positions(config: ModelConfig) -> int:
    """max_position_embeddings; with YaRN the stretched length, from which transformers 4 derives the factor."""
    scaling = config.rope_scaling
    if scaling is None:
        return config.max_position_embeddings
    return round(scaling.factor * scaling.original_max_position_embeddings)


def _yarn(scaling: YarnScaling) -> dict[str, Any]:
    fields = {"rope_type": "yarn", **dataclasses.asdict(scaling)}
    return {key: value for key, value in fields.items() if value is not None}


def _generation(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    surplus = list(range(tokenizer.vocab_size, config.vocab_size))
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        **SAMPLING,
        **({"suppress_tokens": surplus} if surplus else {}),
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
