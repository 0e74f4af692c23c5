"""Adapters on disk in peft's form, so that a peft user's adapter loads here and one from here loads in peft:

    adapter_config.json          peft's LoraConfig
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in], lora_B [out, r]
                                 with DoRA also lora_magnitude_vector [out]
    base_model.json              ours: where the base model is and a hash of it, so that no other is taken for it

What an adapter_config.json asks for beyond plain LoRA, rsLoRA and DoRA is refused by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.lora import ROUTED, LoRAConfig, attach, check_name, leaf, lora_linears, matches, projections
from minimind.modeling import Model
from minimind.weights import fingerprint

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_((?P<side>[AB])\.weight|(?P<length>magnitude_vector)(\.weight)?)"
)
# Settings of peft that say nothing about the function the adapter computes; the file's own tensors say where it is.
_OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "use_dora", "use_rslora"}
# Starting points that leave the base's weights as they are; the others (pissa, olora, corda, ...) change them.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def adapter_state(model: Model, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under peft's names."""
    check_name(model, name)
    out: dict[str, Tensor] = {}
    for path, linear in lora_linears(model):
        if name not in linear.adapters:
            continue
        adapter = linear.adapter(name)
        for part, (low, high) in adapter.split(adapter.A.detach(), adapter.B.detach()).items():
            key = f"base_model.model.model.{path.rpartition('.')[0]}.{part}"
            out[f"{key}.lora_A.weight"], out[f"{key}.lora_B.weight"] = low, high
        if adapter.M is not None:
            for part, length in adapter.by_part(adapter.M.detach()).items():
                out[f"base_model.model.model.{path.rpartition('.')[0]}.{part}.lora_magnitude_vector"] = length
    return out


def adapter_config(model: Model, name: str = "default") -> LoRAConfig:
    """The adapter's settings; targets are the projections that it has, in as few names as say so exactly."""
    check_name(model, name)
    adapters = {path: linear.adapter(name) for path, linear in lora_linears(model) if name in linear.adapters}
    places: dict[str, dict[str, bool]] = {}  # leaf -> upstream name -> whether it has the adapter
    for stock, place in projections(model).items():
        has = place.path in adapters and place.part in adapters[place.path].parts
        places.setdefault(leaf(stock), {})[stock] = has
    targets: list[str] = []
    for short, where in places.items():
        targets += [short] if all(where.values()) else [stock for stock, has in where.items() if has]
    config = next(iter(adapters.values())).config
    return replace(config, targets=tuple(targets))


def save_adapter(
    model: Model,
    folder: str | Path,
    name: str = "default",
    base_model: str | Path | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the adapter into `folder`. base_model: where its base model is, a folder, a file or a hub's name;
    base_fingerprint: that of its weights, by which `base_of` knows it again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if base_model is not None and Path(base_model).exists():
        base_model = Path(base_model).resolve()
        note_base(folder, base_model, os.path.relpath(base_model, folder.resolve()), base_fingerprint)
    tensors = {key: t.contiguous().cpu() for key, t in adapter_state(model, name).items()}
    config = adapter_config(model, name)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": list(config.targets or ()),
        "bias": "none",
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets its owner alone read it


def load_adapter(model: Model, folder: str | Path, name: str = "default", *, trainable: bool = False) -> LoRAConfig:
    """Give `model` the adapter in `folder`, ours or peft's, the only one active; its settings are returned.

    folder: with the two files, or a run folder of train/lora.py, whose newest checkpoint is meant. trainable: to go on
    training it; the rest is frozen either way. ValueError, naming the file, when it is not a LoRA adapter of this
    model, or asks for what is not supported here.
    """
    folder = adapter_folder(Path(folder))
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS, model, config)
    attach(model, config, list(tensors), name, trainable)
    with torch.no_grad():
        for key, tensor in _stacked(model, name, tensors).items():
            model.get_parameter(key).copy_(tensor)
    return config


def read_adapter(model: Model, folder: Path, name: str = "default") -> dict[str, Tensor]:
    """The numbers of `folder` for the adapter that `model` has already, by parameter name: a run that is resumed."""
    check_name(model, name)
    return _stacked(model, name, _read_tensors(folder / WEIGHTS, model, adapter_config(model, name)))


def adapter_folder(path: Path) -> Path:
    """The folder with the adapter: `path` itself, or of a run folder the checkpoint kept as best, else the newest."""
    steps = [file for kind in ("step", "best") for file in sorted(path.glob(f"checkpoints/{kind}-*/{CONFIG}"))]
    return steps[-1].parent if steps and not (path / CONFIG).is_file() else path


def note_base(folder: Path, path: Path, relative: str, base_fingerprint: str | None) -> None:
    """Write into `folder`, an adapter's, where its base model is: its path, also relative to the folder."""
    noted = {"path": str(path), "relative": relative, "fingerprint": base_fingerprint}
    (folder / BASE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def base_of(folder: Path) -> Path:
    """The base model of the adapter in `folder`: the one it was trained on, wherever both lie now. ValueError, naming
    both, where it is not found or another model is in its place."""
    noted, named = _noted(folder / BASE), _noted(folder / CONFIG).get("base_model_name_or_path")
    places = [noted.get("path"), noted.get("relative") and folder / noted["relative"], named]
    if folder.parent.name == "checkpoints" and isinstance(named, str):
        # in a run from before there was base_model.json the path is relative to where it ran
        places.append(folder.parents[2].parent / named)
    found = [path for path in map(Path, filter(None, places)) if path.exists()]
    way_out = f"give --model BASE --lora {folder}"
    if not found:
        raise ValueError(f"{folder}: an adapter, and its base model ({named}) is not here; {way_out}")
    for path in found:
        if not another_base(folder, path):
            return path
    raise ValueError(f"{folder}: {another_base(folder, found[0])}; {way_out}")


def another_base(folder: Path, path: Path) -> str | None:
    """None, or what tells the weights at `path` from those that the adapter in `folder` was trained on."""
    known = _known_base(folder)
    if known is None:
        return None
    own = fingerprint(path)
    return None if known.split()[-1] == own.split()[-1] else f"trained on {known}, and {path} holds {own}"


def named_alone(folder: Path) -> bool:
    """Whether the adapter in `folder` only says a name of its base, as peft's do, which means another model in another
    folder."""
    named = _noted(folder / CONFIG).get("base_model_name_or_path")
    return _known_base(folder) is None and isinstance(named, str) and not Path(named).is_absolute()


def _known_base(folder: Path) -> str | None:
    """The fingerprint of the weights that the adapter in `folder` was trained on, where it was noted."""
    known = _noted(folder / BASE).get("fingerprint")
    if known is None and folder.parent.name == "checkpoints":  # of a run from before there was that file
        known = _noted(folder.parents[1] / "config.json").get("weights")
    return known if isinstance(known, str) and known.strip() else None


def _noted(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none or it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stacked(model: Model, name: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The adapter's parameters by name, made of those of each projection."""
    found: dict[str, Tensor] = {}
    for path, linear in lora_linears(model):
        if name in linear.adapters:
            prefix = path.rpartition(".")[0]
            parts = [tensors[f"model.{prefix}.{part}"] for part in linear.adapter(name).parts]
            for side in parts[0]:
                found[f"{path}.adapters.{name}.{side}"] = torch.cat([sides[side] for sides in parts])
    return found


def _read_config(path: Path) -> LoRAConfig:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a LoRA adapter, ours or peft's")
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only 'LORA' is supported")
    asked = {key: value for key, value in raw.items() if value and key not in _OF_NO_EFFECT | _READ}
    if raw.get("bias", "none") != "none":
        asked["bias"] = raw["bias"]
    if raw.get("init_lora_weights") not in _STARTS:
        asked["init_lora_weights"] = raw["init_lora_weights"]
    for key, value in asked.items():
        raise ValueError(
            f"{path}: {key}={value!r} is not supported, only LoRA, rsLoRA and DoRA are; merge it with peft instead"
        )
    named = raw.get("target_modules")
    partial = raw.get("layers_to_transform") is not None or bool(raw.get("exclude_modules"))
    try:
        return LoRAConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout", 0)),
            targets=tuple(named) if isinstance(named, list) and not partial else None,
            rslora=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path, model: Model, config: LoRAConfig) -> dict[str, dict[str, Tensor]]:
    """{"A": ..., "B": ..., with DoRA "M": ...} by upstream's module name, each of them one of the model's."""
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; adapters are read from safetensors only") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: tensor {key!r} is no LoRA matrix of a projection; it has no place here")
        sides.setdefault(match["module"], {})[match["side"] or "M"] = tensor
    if not sides:
        raise ValueError(f"{path}: holds no tensor")
    known = projections(model)
    for module, pair in sides.items():
        if module not in known:
            raise ValueError(f"{path}: {_why_not(module, model)}")
        weight = model.get_parameter(f"{known[module].path}.weight")
        rows = known[module].rows
        wanted: dict[str, tuple[int, ...]] = {"A": (config.rank, weight.shape[1]), "B": (rows, config.rank)}
        if config.dora:
            wanted["M"] = (rows,)
        found = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        if found != wanted:
            raise ValueError(
                f"{path}: {module} has {found}, this model and r={config.rank} need {wanted}; "
                "the adapter was made for another model"
            )
    for module in known:
        if config.targets is not None and matches(module, config.targets) and module not in sides:
            raise ValueError(
                f"{path}: nothing for {module}, though {CONFIG} names it; the adapter was made for another model"
            )
    return sides


def _why_not(module: str, model: Model) -> str:
    """Why this model has no such projection to adapt."""
    layers = model.config.num_hidden_layers
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    if layer is not None and int(layer[1]) >= layers:
        return f"has {module}, this model has {layers} layers; the adapter was made for another model"
    if ".mlp.experts." in module:
        return f"has {module}, but {ROUTED}; merge it with peft instead"
    return f"has {module}, which this model has not, or not as a projection that takes an adapter"
