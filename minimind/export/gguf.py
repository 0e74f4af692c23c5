"""A model and its tokenizer as one GGUF file, for llama.cpp and what is built on it (ollama, LM Studio).

    llama     dense                          rotates neighbouring pairs: rows of q and k are put in that order
    qwen3     dense with QK-norm             rotates halves, as this project does
    qwen3moe  experts with QK-norm           the same
    granitemoe  experts, also shared ones    neighbouring pairs; its multipliers are 1, its attention scale D^-0.5

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors of one dimension and the router stay float32,
as in llama.cpp's own conversion.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minimind.config import ModelConfig, YarnScaling
from minimind.export.gguf_vocabulary import add_vocabulary
from minimind.export.output import replacing
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.weights import to_stock

gguf: Any
try:
    gguf = importlib.import_module("gguf")
except ImportError:  # export_gguf says so
    gguf = None

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
Q8_BLOCK = 32


def export_gguf(
    model: Model, tokenizer: Tokenizer, path: str | Path, dtype: GgufType = "f16", name: str = "MiniMind"
) -> Path:
    """Write `path`; dtype is that of the matrices: q8_0 holds blocks of 32 integers and a scale.

    Raises ValueError where llama.cpp has no architecture for the model or no pre-tokenizer for the tokenizer, where
    q8_0 does not divide the rows, and where the `gguf` package is missing.
    """
    with replacing(Path(path)) as partial:
        write_gguf(model, tokenizer, partial, dtype, name)
    return Path(path)


def write_gguf(model: Model, tokenizer: Tokenizer, path: Path, dtype: GgufType, name: str) -> None:
    """export_gguf without its care for what is there already or half-written."""
    if gguf is None:
        raise ValueError("GGUF files need the gguf package: pip install 'minimind[export]'")
    config = model.config.with_tokenizer(tokenizer.vocab_size, "GGUF")
    architecture = architecture_of(config)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, config, name, dtype)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for stock, tensor in _tensors(model, permuted=architecture in _neighbours()):
        kind = _type_of(stock, tensor, dtype)
        tensor = unlikely_beyond(tensor, config.num_tokens) if stock == head else tensor
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(f"{names.get_name(stock)}.weight", data, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def architecture_of(config: ModelConfig) -> Any:
    """llama.cpp's architecture that computes what `config` does: a gguf.MODEL_ARCH."""
    if config.num_experts == 0:
        return gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    if config.qk_norm and config.num_shared_experts:
        raise ValueError("GGUF: llama.cpp has no architecture with both QK-norm and shared experts")
    if not config.norm_topk_prob:
        raise ValueError("GGUF: llama.cpp normalises the gates of the chosen experts; norm_topk_prob is false here")
    return gguf.MODEL_ARCH.QWEN3MOE if config.qk_norm else gguf.MODEL_ARCH.GRANITE_MOE


def unlikely_beyond(rows: Tensor, tokens: int) -> Tensor:
    """An output projection [V, C] that says little of ids from `tokens` on, which llama.cpp draws like any other: their
    rows become the mean of the others. Their logit is then the mean logit, never the highest, and each has at most a
    probability of 1 / tokens (Jensen: V e^mean <= sum of e^logit), in practice far less."""
    if tokens == len(rows):
        return rows
    return torch.cat((rows[:tokens], rows[:tokens].mean(dim=0, keepdim=True).expand(len(rows) - tokens, -1)))


def permute_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head [D / 2 first halves, D / 2 second halves] -> [first, second, first, second, ...]."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _neighbours() -> tuple[Any, ...]:
    return gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.GRANITE_MOE


def _add_shape(writer: Any, config: ModelConfig, name: str, dtype: GgufType) -> None:
    scaling = config.rope_scaling
    writer.add_name(name)
    writer.add_file_type(_file_type(dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        _add_yarn(writer, scaling)
    if config.num_experts == 0:
        writer.add_feed_forward_length(config.intermediate_size)
        return
    writer.add_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture_of(config) is gguf.MODEL_ARCH.GRANITE_MOE:
        writer.add_logit_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_embedding_scale(1.0)
        writer.add_attention_scale(config.head_dim**-0.5)
        if config.num_shared_experts:  # side by side they are one feed-forward of their summed width
            writer.add_expert_shared_feed_forward_length(config.num_shared_experts * config.intermediate_size)


def _add_yarn(writer: Any, scaling: YarnScaling) -> None:
    """llama.cpp multiplies cos and sin by (0.1 ln(factor) + 1) * attn_factor: the second undoes the first where the
    model has another factor."""
    paper = 0.1 * math.log(scaling.factor) + 1.0
    own = paper if scaling.attention_factor is None else scaling.attention_factor
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    writer.add_rope_scaling_attn_factors(own / paper)


def _tensors(model: Model, permuted: bool) -> Iterator[tuple[str, Tensor]]:
    """Upstream's names without '.weight', experts stacked, shared experts side by side: tensors on the CPU."""
    config = model.config
    state = {k.removesuffix(".weight"): v.detach().cpu() for k, v in to_stock(model.state_dict(), config).items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        for kind in ("gate_proj", "up_proj", "down_proj"):
            experts = [state.pop(f"{mlp}.experts.{e}.{kind}") for e in range(config.num_experts)]
            shared = [state.pop(f"{mlp}.shared_experts.{s}.{kind}") for s in range(config.num_shared_experts)]
            if experts:
                state[f"{mlp}.experts.{kind}"] = torch.stack(experts)
            if shared:
                state[f"{mlp}.shared_experts.{kind}"] = torch.cat(shared, dim=int(kind == "down_proj"))
    for name, tensor in state.items():
        leaf = name.rpartition(".")[2]
        yield name, permute_pairs(tensor, heads[leaf]) if permuted and leaf in heads else tensor


def _type_of(name: str, tensor: Tensor, dtype: GgufType) -> Any:
    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or name.endswith(".mlp.gate"):
        return types.F32
    if dtype == "q8_0" and tensor.shape[-1] % Q8_BLOCK:
        raise ValueError(f"GGUF: q8_0 needs rows of a multiple of {Q8_BLOCK}, {name} has {tensor.shape[-1]}; take f16")
    return types[dtype.upper()]


def _file_type(dtype: GgufType) -> Any:
    return gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"]
