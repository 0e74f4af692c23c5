"""Load and save model weights, under the tensor names of upstream, HF Llama, Qwen3 and Granite MoE.

Model holds packed tensors; conversion is exact in both directions. transformers' Granite MoE computes the same function
as MiniMind2's MoE: its gates are the softmax over the chosen experts' logits, MiniMind2's the softmax over all experts,
normalised over the chosen.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.config import ModelConfig
from minimind.lora import merged_state
from minimind.modeling import Model

StateDict = dict[str, Tensor]


def load_model(
    path: str | Path,
    config: ModelConfig | Mapping[str, Any] | str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a trained model in eval mode; `model(input_ids).logits` is [B, T, V] in `dtype`.

    path: a run folder, a checkpoint or HF folder (config.json + model.safetensors or pytorch_model.bin), or an upstream
      .pth file.
    config: needed for a .pth: a ModelConfig, a preset's name, or a dict with upstream's or HF's config keys.
    ValueError, naming the file, if something is missing or does not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = checkpoint_folder(path)
        cfg = ModelConfig.from_json(folder / "config.json") if config is None else _as_config(config)
        state = _read_folder(folder)
    elif path.is_file():
        if config is None:
            raise ValueError(
                f"{path}: a weight file alone does not define the model's shape; pass config= (a preset name or a dict)"
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
    """Write config.json and model.safetensors into `folder`, under upstream's names and in the parameters' dtype.

    Active LoRA adapters are merged in the file; `model` itself does not change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    state = {k: v.contiguous() for k, v in to_stock(merged_state(model), model.config).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files readable by the owner only
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def checkpoint_folder(path: Path) -> Path:
    """The folder with the weights: `path` itself, or a run folder's best checkpoint, or else its newest."""
    if (path / "config.json").is_file() and _weight_files(path):
        return path
    steps = sorted(path.glob("checkpoints/step-*")) + sorted(path.glob("checkpoints/best-*"))
    if not steps:
        raise ValueError(f"{path}: neither a checkpoint (config.json + model.safetensors) nor a run folder")
    return steps[-1]


def _weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint or Hugging Face folder; upstream writes its own classes as .bin."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fingerprint(path: Path) -> str:
    """Identify the weights in a folder or file, by its name and a hash of its bytes."""
    files = [path]
    if path.is_dir():
        files = _weight_files(path) or sorted(path.glob("*.bin"))
    digest = hashlib.blake2b(digest_size=8)
    for name in files:
        with name.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"{path.name} {digest.hexdigest()}"


def to_stock(state: Mapping[str, Tensor], config: ModelConfig) -> StateDict:
    """Model's packed tensors -> upstream's: separate q/k/v and gate/up, one tensor per expert."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    out: StateDict = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        base = name if name.startswith("lm_head") else f"model.{name}"
        root = f"model.{prefix}"
        if name.endswith("qkv_proj.weight"):
            parts = tensor.split((heads * dim, kv_heads * dim, kv_heads * dim))
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
    """Upstream's tensors -> the packed state dict of `Model(config)`; ValueError if a tensor is missing or left over.

    HF Llama's, Qwen3's and Granite MoE's names work too, also with the prefixes of DDP and torch.compile.
    """
    state = _plain_names(state)
    if is_granite(state):
        state = from_granite(state, config)
    remaining = {k: v for k, v in state.items() if not k.endswith(("freqs_cos", "freqs_sin", "rotary_emb.inv_freq"))}

    def take(name: str) -> Tensor:
        if name not in remaining:
            raise ValueError(f"{source}: tensor {name!r} is missing; do the weights belong to this config?")
        return remaining.pop(name)

    out: StateDict = {"embed_tokens.weight": take("model.embed_tokens.weight")}
    head = remaining.pop("lm_head.weight", None)
    if config.tie_word_embeddings:
        if head is not None and not torch.equal(head, out["embed_tokens.weight"]):
            raise ValueError(
                f"{source}: 'lm_head.weight' differs from the embedding, but the config ties the two; "
                "set tie_word_embeddings to false"
            )
    else:
        if head is None:
            raise ValueError(f"{source}: tensor 'lm_head.weight' is missing, but the config does not tie the embedding")
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
    if remaining:
        raise ValueError(
            f"{source}: {len(remaining)} tensors have no place in this config, such as {next(iter(remaining))!r}"
        )
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
            raise ValueError(f"{source}: {name} is {list(tensor.shape)}, the config needs {list(expected[name].shape)}")


def _as_config(config: ModelConfig | Mapping[str, Any] | str) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    return ModelConfig.preset(config) if isinstance(config, str) else ModelConfig.from_dict(config)


def _read_folder(folder: Path) -> StateDict:
    files = _weight_files(folder)
    if not files:
        raise ValueError(f"{folder}: it has no .safetensors file and no pytorch_model.bin")
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
    except Exception as error:  # pickle.UnpicklingError and others, raised by weights_only
        raise ValueError(
            f"{path}: refused: not a weight file, or it holds more than tensors ({type(error).__name__})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # upstream's checkpoint for resuming also holds the optimizer and the epoch
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
    return state


def is_granite(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have Granite MoE's names."""
    return any(".block_sparse_moe." in name for name in state)


def to_granite(stock: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Upstream's tensors of a MoE, from to_stock, under the names of transformers' Granite MoE:

    model.layers.0.block_sparse_moe.router.layer.weight     [E, C]
    model.layers.0.block_sparse_moe.input_linear.weight     [E, 2 I, C]   gate above up
    model.layers.0.block_sparse_moe.output_linear.weight    [E, C, I]
    model.layers.0.shared_mlp.input_linear.weight           [2 I, C]      I summed over the shared experts
    model.layers.0.shared_mlp.output_linear.weight          [C, I]
    """
    out = {name: tensor for name, tensor in stock.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        root = f"model.layers.{layer}"
        mlp, moe = f"{root}.mlp", f"{root}.block_sparse_moe"

        def expert(kind: str, group: str, count: int, mlp: str = mlp) -> list[Tensor]:
            return [stock[f"{mlp}.{group}.{e}.{kind}_proj.weight"] for e in range(count)]

        out[f"{moe}.router.layer.weight"] = stock[f"{mlp}.gate.weight"]
        gate, up, down = (torch.stack(expert(k, "experts", config.num_experts)) for k in ("gate", "up", "down"))
        out[f"{moe}.input_linear.weight"] = torch.cat((gate, up), dim=1)
        out[f"{moe}.output_linear.weight"] = down
        if config.num_shared_experts:
            shared = [expert(k, "shared_experts", config.num_shared_experts) for k in ("gate", "up", "down")]
            out[f"{root}.shared_mlp.input_linear.weight"] = torch.cat((*shared[0], *shared[1]))
            out[f"{root}.shared_mlp.output_linear.weight"] = torch.cat(shared[2], dim=1)
    return out


def from_granite(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of to_granite; other tensors keep their names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        root, _, leaf = name.rpartition(".block_sparse_moe.")
        if root:
            out.update(_routed(f"{root}.mlp", leaf, tensor))
        elif ".shared_mlp." in name:
            root, _, leaf = name.rpartition(".shared_mlp.")
            out.update(_shared(f"{root}.mlp.shared_experts", leaf, tensor, config.num_shared_experts))
        else:
            out[name] = tensor
    return out


def _routed(mlp: str, leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    if leaf == "router.layer.weight":
        return {f"{mlp}.gate.weight": tensor}
    experts = enumerate(tensor)
    if leaf == "output_linear.weight":
        return {f"{mlp}.experts.{e}.down_proj.weight": down for e, down in experts}
    return {
        f"{mlp}.experts.{e}.{kind}_proj.weight": half
        for e, both in experts
        for kind, half in zip(("gate", "up"), both.chunk(2), strict=True)
    }


def _shared(prefix: str, leaf: str, tensor: Tensor, count: int) -> dict[str, Tensor]:
    name: Callable[[int, str], str] = lambda s, kind: f"{prefix}.{s}.{kind}_proj.weight"  # noqa: E731
    if leaf == "output_linear.weight":
        return {name(s, "down"): part for s, part in enumerate(tensor.chunk(count, dim=1))}
    gate, up = tensor.chunk(2)
    return {
        name(s, kind): part for kind, half in (("gate", gate), ("up", up)) for s, part in enumerate(half.chunk(count))
    }
