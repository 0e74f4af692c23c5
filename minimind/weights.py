"""Weights on disk: upstream's (and HF Llama/Qwen3's) names outside, packed tensors inside, exactly round-trip."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.config import ModelConfig
from minimind.granite_weights import from_granite, is_granite
from minimind.lora import merged_state
from minimind.modeling import Model

StateDict = dict[str, Tensor]


def load_model(
    path: str | Path,
    config: ModelConfig | Mapping[str, Any] | str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Open a trained model, in eval mode.

    path: a run folder, a checkpoint or HF folder (config.json + model.safetensors), or an upstream .pth file.
    config: needed for a .pth: a ModelConfig, a preset's name, or a dict with upstream's or HF's config keys.
    Returns a Model: `model(input_ids).logits` is [B, T, V] in `dtype`. Raises ValueError, naming the file, when
    something is missing or does not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = checkpoint_folder(path)
        cfg = ModelConfig.from_json(folder / "config.json") if config is None else _as_config(config)
        state = _read_folder(folder)
    elif path.is_file():
        if config is None:
            raise ValueError(
                f"{path}: a bare weight file does not tell its shape; pass config= (a preset name or a dict)"
            )
        cfg = _as_config(config)
        state = _read_file(path)
    else:
        raise ValueError(f"{path}: no such file or folder")
    with torch.device("meta"):
        model = Model(cfg)
    packed = from_stock(state, cfg, source=str(path))
    model.load_state_dict({k: v.to(device, dtype) for k, v in packed.items()}, assign=True)
    return model.eval()


def save_weights(model: Model, folder: Path) -> None:
    """Write config.json and model.safetensors (upstream's names, the parameters' own dtype) into `folder`.

    Active LoRA adapters are written merged into the weights; `model` stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    state = {k: v.contiguous() for k, v in to_stock(merged_state(model), model.config).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets its owner alone read it
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def checkpoint_folder(path: Path) -> Path:
    """The folder with the weights: `path` itself, or of a run folder the checkpoint kept as best, else the newest."""
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    steps = sorted(path.glob("checkpoints/step-*")) + sorted(path.glob("checkpoints/best-*"))
    if not steps:
        raise ValueError(f"{path}: neither a checkpoint (config.json + model.safetensors) nor a run folder")
    return steps[-1]


def fingerprint(path: Path) -> str:
    """Which weights a folder or file holds: its name and a hash of its bytes."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digest = hashlib.blake2b(digest_size=8)
    for each in files:
        with each.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"{path.name} {digest.hexdigest()}"


def to_stock(state: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """Packed names and tensors -> upstream's: q/k/v and gate/up apart, one tensor per expert."""
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    out: StateDict = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        base = name if name.startswith("lm_head") else f"model.{name}"
        root = f"model.{prefix}"
        if name.endswith("qkv_proj.weight"):
            parts = tensor.split((heads * dim, groups * dim, groups * dim))
            for key, part in zip("qkv", parts, strict=True):
                out[base.replace("qkv_proj", f"{key}_proj")] = part
        elif name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            out[base.replace("gate_up_proj", "gate_proj")] = gate
            out[base.replace("gate_up_proj", "up_proj")] = up
        elif leaf == "gate_up_proj":
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                out[f"{root}.experts.{e}.gate_proj.weight"] = gate
                out[f"{root}.experts.{e}.up_proj.weight"] = up
        elif leaf == "down_proj":
            for e, expert in enumerate(tensor):
                out[f"{root}.experts.{e}.down_proj.weight"] = expert
        else:
            out[base.replace("mlp.router.", "mlp.gate.")] = tensor
    return out


def from_stock(state: Mapping[str, Tensor], config: ModelConfig, source: str = "state dict") -> StateDict:
    """Upstream's names -> the packed state dict of `Model(config)`; ValueError when a tensor lacks or is left.

    HF Llama's, Qwen3's and Granite MoE's names are read too, and any with what DDP and torch.compile put before them.
    """
    state = _plain_names(state)
    if is_granite(state):
        state = from_granite(state, config)
    left = {k: v for k, v in state.items() if not k.endswith(("freqs_cos", "freqs_sin", "rotary_emb.inv_freq"))}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"{source}: tensor {name!r} is missing; do the weights belong to this config?")
        return left.pop(name)

    out: StateDict = {"embed_tokens.weight": take("model.embed_tokens.weight")}
    head = left.pop("lm_head.weight", None)
    if config.tie_word_embeddings:
        if head is not None and not torch.equal(head, out["embed_tokens.weight"]):
            raise ValueError(
                f"{source}: 'lm_head.weight' is not the embedding, and the config ties the two; "
                "set tie_word_embeddings to false"
            )
    else:
        if head is None:
            raise ValueError(f"{source}: tensor 'lm_head.weight' is missing and the embedding is not tied")
        out["lm_head.weight"] = head
    for i in range(config.num_hidden_layers):
        layer, stock = f"layers.{i}", f"model.layers.{i}"
        attn = f"{stock}.self_attn"
        out[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat([take(f"{attn}.{x}_proj.weight") for x in "qkv"])
        plain = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj"]
        plain += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
        for name in plain:
            out[f"{layer}.{name}.weight"] = take(f"{stock}.{name}.weight")
        if config.num_experts:
            out[f"{layer}.mlp.router.weight"] = take(f"{stock}.mlp.gate.weight")
            experts = [f"{stock}.mlp.experts.{e}" for e in range(config.num_experts)]
            out[f"{layer}.mlp.gate_up_proj"] = torch.stack([_gate_up(take, e) for e in experts])
            out[f"{layer}.mlp.down_proj"] = torch.stack([take(f"{e}.down_proj.weight") for e in experts])
            mlps = [f"mlp.shared_experts.{s}" for s in range(config.num_shared_experts)]
        else:
            mlps = ["mlp"]
        for mlp in mlps:
            out[f"{layer}.{mlp}.gate_up_proj.weight"] = _gate_up(take, f"{stock}.{mlp}")
            out[f"{layer}.{mlp}.down_proj.weight"] = take(f"{stock}.{mlp}.down_proj.weight")
    out["norm.weight"] = take("model.norm.weight")
    if left:
        raise ValueError(f"{source}: tensor {next(iter(left))!r} has no place in this config ({len(left)} such)")
    _check_shapes(out, config, source)
    return out


def _plain_names(state: Mapping[str, Tensor]) -> StateDict:
    out = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while out and all(name.startswith("module.") for name in out):
        out = {name.removeprefix("module."): tensor for name, tensor in out.items()}
    return out


def _gate_up(take, prefix: str) -> Tensor:
    return torch.cat((take(f"{prefix}.gate_proj.weight"), take(f"{prefix}.up_proj.weight")))


def _check_shapes(packed: StateDict, config: ModelConfig, source: str) -> None:
    with torch.device("meta"):
        expected = Model(config).state_dict()
    for name, tensor in packed.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{source}: {name} is {list(tensor.shape)}, the config wants {list(expected[name].shape)}")


def _as_config(config: ModelConfig | Mapping[str, Any] | str) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    return ModelConfig.preset(config) if isinstance(config, str) else ModelConfig.from_dict(config)


def _read_folder(folder: Path) -> StateDict:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file")
    state: StateDict = {}
    for file in files:
        state.update(_read_file(file))
    return state


def _read_file(path: Path) -> StateDict:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable weight file ({reason})") from error
    except Exception as error:  # pickle.UnpicklingError and friends, which weights_only raises
        raise ValueError(
            f"{path}: refused, it holds more than tensors, or is no weight file ({type(error).__name__})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # upstream's file for resuming: the optimizer and the epoch beside the weights
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
    return state
