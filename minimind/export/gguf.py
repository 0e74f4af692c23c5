"""A model and its tokenizer as one GGUF file, for llama.cpp and programs built on it (ollama, LM Studio).

    architecture  for                          rotation
    llama         dense                        neighbouring pairs, so rows of q and k are reordered
    qwen3         dense with QK-norm           halves, as here
    qwen3moe      experts with QK-norm         halves, as here
    granitemoe    experts, also shared ones    neighbouring pairs; its multipliers are 1, its attention scale D^-0.5

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors of one dimension and the router stay float32,
as in llama.cpp's own conversion. 4-bit files are made by llama.cpp's own quantizer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minimind.config import ModelConfig, YarnScaling
from minimind.export import replacing
from minimind.lora_files import adapter_config, adapter_state
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.tokenizer import CONFIG_FILE, MODEL_FILE
from minimind.tokenization.training import GGUF_PRE_TOKENIZER, SPLIT_PATTERN
from minimind.weights import to_stock

gguf: Any
try:
    gguf = importlib.import_module("gguf")
except ImportError:  # write_gguf raises
    gguf = None

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
Q8_BLOCK = 32
# In a process of its own: llama.cpp ends the process on errors, and may crash.
_LLAMA_CPP_QUANTIZER = """
import sys, llama_cpp
source, path, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
sys.exit(llama_cpp.llama_model_quantize(source.encode(), path.encode(), params))
"""


def export_gguf(
    model: Model, tokenizer: Tokenizer, path: str | Path, dtype: GgufType = "f16", name: str = "MiniMind"
) -> Path:
    """Write `path`, whole or not at all. dtype: of the matrices; q8_0 stores blocks of 32 integers and a scale.

    Raises ValueError if llama.cpp has no architecture for the model or no pre-tokenizer for the tokenizer, if the rows
    cannot be divided into q8_0's blocks, or if the `gguf` package is missing.
    """
    with replacing(Path(path)) as partial:
        write_gguf(model, tokenizer, partial, dtype, name)
    return Path(path)


def write_gguf(model: Model, tokenizer: Tokenizer, path: Path, dtype: GgufType, name: str) -> None:
    """Like export_gguf, but writes `path` in place; an error leaves it incomplete."""
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
    _write(writer, path)


def write_gguf_adapter(model: Model, path: Path) -> None:
    """Write the model's adapter alone into `path`, for llama.cpp's --lora beside the GGUF file of the base model.

    ValueError for DoRA and for shared experts, which llama.cpp has in other forms. Format: llama.cpp's
    convert_lora_to_gguf.py; its scale is alpha over the rank.
    """
    config, settings = model.config, adapter_config(model)
    if settings.dora:
        raise ValueError("--to gguf: llama.cpp knows no DoRA; add --merge-lora")
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings.alpha * (settings.rank**0.5 if settings.rslora else 1.0))
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = _heads(config) if architecture in _neighbours() else {}
    for key, tensor in adapter_state(model).items():
        stock, kind, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        part = stock.rpartition(".")[2]
        rows = permute_pairs(tensor, heads[part]) if kind == "lora_B" and part in heads else tensor
        writer.add_tensor(f"{names.get_name(stock)}.weight.{kind.lower()}", rows.float().cpu().numpy())
    _write(writer, path)


def _write(writer: Any, path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def architecture_of(config: ModelConfig) -> Any:
    """llama.cpp's architecture for this model, a gguf.MODEL_ARCH. ValueError if there is none."""
    if config.num_experts == 0:
        return gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    if config.qk_norm and config.num_shared_experts:
        raise ValueError("GGUF: llama.cpp has no architecture with both QK-norm and shared experts")
    if not config.norm_topk_prob:
        raise ValueError("GGUF: llama.cpp normalises the gates of the chosen experts, but norm_topk_prob is false here")
    return gguf.MODEL_ARCH.QWEN3MOE if config.qk_norm else gguf.MODEL_ARCH.GRANITE_MOE


def unlikely_beyond(rows: Tensor, tokens: int) -> Tensor:
    """The output projection [V, C] with the rows from `tokens` on replaced by the mean of the others.

    These rows are padding, but llama.cpp samples their ids like any other. With the mean row, their logit is the mean
    logit: never the highest, and of a probability of at most 1 / tokens (Jensen: V e^mean <= sum of e^logit).
    """
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
        if config.num_shared_experts:  # concatenated, they are one feed-forward of their summed width
            writer.add_expert_shared_feed_forward_length(config.num_shared_experts * config.intermediate_size)


def _add_yarn(writer: Any, scaling: YarnScaling) -> None:
    """Add the YaRN parameters. llama.cpp multiplies cos and sin by (0.1 ln(factor) + 1) * attn_factor, so attn_factor
    corrects the first term if the model has another attention factor."""
    paper = 0.1 * math.log(scaling.factor) + 1.0
    own = paper if scaling.attention_factor is None else scaling.attention_factor
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    writer.add_rope_scaling_attn_factors(own / paper)


def _tensors(model: Model, permuted: bool) -> Iterator[tuple[str, Tensor]]:
    """(upstream's name without '.weight', tensor on the CPU), with experts stacked and shared experts concatenated."""
    config = model.config
    state = {k.removesuffix(".weight"): v.detach().cpu() for k, v in to_stock(model.state_dict(), config).items()}
    heads = _heads(config) if permuted else {}
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
        yield name, permute_pairs(tensor, heads[leaf]) if leaf in heads else tensor


def _heads(config: ModelConfig) -> dict[str, int]:
    """Number of heads of the projections whose rows a rotation of neighbouring pairs reorders."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def _type_of(name: str, tensor: Tensor, dtype: GgufType) -> Any:
    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or name.endswith(".mlp.gate"):
        return types.F32
    if dtype == "q8_0" and tensor.shape[-1] % Q8_BLOCK:
        raise ValueError(f"GGUF: q8_0 needs rows of a multiple of {Q8_BLOCK}, {name} has {tensor.shape[-1]}; use fp16")
    return types[dtype.upper()]


def _file_type(dtype: GgufType) -> Any:
    return gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"]


def add_vocabulary(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add tokens, token types, merges, special ids and the chat template. vocab_size: rows of the model; ids beyond the
    tokenizer's become padding tokens, named as in llama.cpp's own conversion. ValueError for a tokenizer that llama.cpp
    does not support."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        content = json.loads((Path(folder) / MODEL_FILE).read_text(encoding="utf-8"))
        config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE" or content.get("normalizer"):
        raise ValueError("GGUF: only byte-level BPE without a normalizer can be written")
    tokens, types = _tokens(content, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    # the chat template contains bos and eos, and llama.cpp would add them again
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    writer.add_add_eos_token(bool(config.get("add_eos_token", False)))
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(chat_template_of(tokenizer.chat_template))


def chat_template_of(template: str) -> str:
    """The template for llama.cpp's programs. They set enable_thinking to true where nobody asked, which would open a
    thought before every answer, and the model should decide: so a template that knows both names of the switch gets
    `open_thinking` alone. Others are as their models were trained."""
    both = all(re.search(rf"\b{name}\b", template) for name in ("enable_thinking", "open_thinking"))
    return "{%- set enable_thinking = open_thinking -%}\n" + template if both else template


def pre_tokenizer_of(content: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json. ValueError if it has none."""
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        splits = [(s.get("type"), s.get("pattern"), s.get("behavior"), s.get("invert")) for s in steps[:-1]]
        if splits == [("Split", {"Regex": SPLIT_PATTERN}, "Isolated", False)] and not last.get("use_regex"):
            return GGUF_PRE_TOKENIZER
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise ValueError(f"GGUF: this pre-tokenizer ({kinds}) is not supported; GPT-2's and Qwen2's are")


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(kinds.UNUSED)] * vocab_size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, int(kinds.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    return tokens, types


def quantizer() -> list[str]:
    """The command of llama.cpp's quantizer, from llama-cpp-python or the PATH; its arguments are a float32 file, the
    file to write and its type. ValueError if there is none."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", _LLAMA_CPP_QUANTIZER]
    binary = shutil.which("llama-quantize")
    if binary is None:
        raise ValueError(
            "--dtype q4_k_m: llama.cpp's quantizer is missing; pip install llama-cpp-python, or put llama-quantize on "
            "the PATH"
        )
    return [binary]


def quantize(source: Path, path: Path) -> None:
    """Write a float32 GGUF file as Q4_K_M, which mixes 4- and 6-bit blocks. llama.cpp uses other types for rows that
    are not a multiple of 256. ValueError, with the last line of its output, if it fails."""
    command = [*quantizer(), str(source), str(path), "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f"--dtype q4_k_m: llama.cpp's quantizer failed{_signal(done.returncode)} ({lines[-1]})")


def _signal(status: int) -> str:
    """The signal that ended the process, for the error message; "" if it exited by itself."""
    if status >= 0:
        return ""
    names = {number.value: number.name for number in signal.Signals}
    return f": died by {names.get(-status, f'signal {-status}')}"
