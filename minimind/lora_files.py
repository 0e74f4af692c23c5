"""LoRA adapters on disk in peft's format, so adapters can be exchanged with peft in both directions:

    adapter_config.json          peft's LoraConfig
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in], lora_B [out, r]
                                 with DoRA also lora_magnitude_vector [out]
    base_model.json              ours: the path of the base model and a hash of its weights, to detect a wrong base

Settings in adapter_config.json beyond plain LoRA, rsLoRA and DoRA are refused by name.
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

from minimind.lora import ROUTED, LoRAConfig, attach, check_adapter, leaf, lora_linears, matches, projections
from minimind.modeling import Model
from minimind.weights import fingerprint

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_((?P<side>[AB])\.weight|(?P<length>magnitude_vector)(\.weight)?)"
)
# peft settings that do not change the function; the tensors in the file show which modules are adapted.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "use_dora", "use_rslora"}
# Initialisations that keep the base's weights; the others (pissa, olora, corda, ...) change them.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def adapter_state(model: Model, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under peft's names."""
    check_adapter(model, name)
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
    """The adapter's settings; targets lists its projections with as few names as possible."""
    check_adapter(model, name)
    adapters = {path: linear.adapter(name) for path, linear in lora_linears(model) if name in linear.adapters}
    adapted: dict[str, dict[str, bool]] = {}  # leaf -> upstream name -> whether it has the adapter
    for stock, projection in projections(model).items():
        has = projection.path in adapters and projection.part in adapters[projection.path].parts
        adapted.setdefault(leaf(stock), {})[stock] = has
    targets: list[str] = []
    for short, by_name in adapted.items():
        targets += [short] if all(by_name.values()) else [stock for stock, has in by_name.items() if has]
    config = next(iter(adapters.values())).config
    return replace(config, targets=tuple(targets))


def save_adapter(
    model: Model,
    folder: str | Path,
    name: str = "default",
    base_model: str | Path | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the adapter into `folder`. base_model: the base model's folder, file or hub name. base_fingerprint: the
    fingerprint of its weights, by which `find_base` recognises it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if base_model is not None and Path(base_model).exists():
        base_model = Path(base_model).resolve()
        write_base(folder, base_model, os.path.relpath(base_model, folder.resolve()), base_fingerprint)
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
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes files readable by the owner only


def load_adapter(model: Model, folder: str | Path, name: str = "default", *, trainable: bool = False) -> LoRAConfig:
    """Load the adapter in `folder`, ours or peft's, make it the only active one, and return its settings.

    folder: the folder with the two files, or a run folder of train/lora.py (its best or newest checkpoint is used).
    trainable: whether to train it further; the rest is frozen either way. ValueError, naming the file, if it is not a
    LoRA adapter for this model, or needs an unsupported setting.
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
    """Read the values of an adapter that `model` already has, by parameter name, to resume a run."""
    check_adapter(model, name)
    return _stacked(model, name, _read_tensors(folder / WEIGHTS, model, adapter_config(model, name)))


def adapter_folder(path: Path) -> Path:
    """The folder with the adapter: `path` itself, or a run folder's best checkpoint, or else its newest."""
    steps = [file for kind in ("step", "best") for file in sorted(path.glob(f"checkpoints/{kind}-*/{CONFIG}"))]
    return steps[-1].parent if steps and not (path / CONFIG).is_file() else path


def write_base(folder: Path, path: Path, relative: str, base_fingerprint: str | None) -> None:
    """Record the base model in an adapter's `folder`: its path, its path relative to `folder`, and its fingerprint."""
    record = {"path": str(path), "relative": relative, "fingerprint": base_fingerprint}
    (folder / BASE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def find_base(folder: Path) -> Path:
    """Find the base model that the adapter in `folder` was trained on, even if both were moved. ValueError, naming
    both, if it is missing or another model is in its place."""
    record, name = _read_json(folder / BASE), _read_json(folder / CONFIG).get("base_model_name_or_path")
    places = [record.get("path"), record.get("relative") and folder / record["relative"], name]
    if folder.parent.name == "checkpoints" and isinstance(name, str):
        # in old runs, without base_model.json, the path is relative to the working directory of the run
        places.append(folder.parents[2].parent / name)
    candidates = [path for path in map(Path, filter(None, places)) if path.exists()]
    way_out = f"give --model BASE --lora {folder}"
    if not candidates:
        raise ValueError(f"{folder}: this is an adapter, and its base model ({name}) is not here; {way_out}")
    for path in candidates:
        if not base_mismatch(folder, path):
            return path
    raise ValueError(f"{folder}: {base_mismatch(folder, candidates[0])}; {way_out}")


def base_mismatch(folder: Path, path: Path) -> str | None:
    """None if the adapter in `folder` was trained on the weights at `path` (or its base is unknown), else the
    reason."""
    expected = _base_fingerprint(folder)
    if expected is None:
        return None
    actual = fingerprint(path)
    same = expected.split()[-1] == actual.split()[-1]
    return None if same else f"trained on {expected}, but {path} holds {actual}"


def names_base_only(folder: Path) -> bool:
    """Whether the adapter in `folder` records its base only by a relative name, as peft does, which may mean a
    different model in each working directory."""
    name = _read_json(folder / CONFIG).get("base_model_name_or_path")
    return _base_fingerprint(folder) is None and isinstance(name, str) and not Path(name).is_absolute()


def _base_fingerprint(folder: Path) -> str | None:
    """The recorded fingerprint of the weights that the adapter in `folder` was trained on, or None."""
    recorded = _read_json(folder / BASE).get("fingerprint")
    if recorded is None and folder.parent.name == "checkpoints":  # old runs have no base_model.json
        recorded = _read_json(folder.parents[1] / "config.json").get("weights")
    return recorded if isinstance(recorded, str) and recorded.strip() else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stacked(model: Model, name: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack each projection's tensors into the adapter's parameters, by parameter name."""
    stacked: dict[str, Tensor] = {}
    for path, linear in lora_linears(model):
        if name in linear.adapters:
            prefix = path.rpartition(".")[0]
            parts = [tensors[f"model.{prefix}.{part}"] for part in linear.adapter(name).parts]
            for side in parts[0]:
                stacked[f"{path}.adapters.{name}.{side}"] = torch.cat([sides[side] for sides in parts])
    return stacked


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
    unsupported = {key: value for key, value in raw.items() if value and key not in _IGNORED | _READ}
    if raw.get("bias", "none") != "none":
        unsupported["bias"] = raw["bias"]
    if raw.get("init_lora_weights") not in _INITS:
        unsupported["init_lora_weights"] = raw["init_lora_weights"]
    for key, value in unsupported.items():
        raise ValueError(
            f"{path}: {key}={value!r} is not supported, only LoRA, rsLoRA and DoRA are; merge it with peft instead"
        )
    targets = raw.get("target_modules")
    partial = raw.get("layers_to_transform") is not None or bool(raw.get("exclude_modules"))
    try:
        return LoRAConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout", 0)),
            targets=tuple(targets) if isinstance(targets, list) and not partial else None,
            rslora=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path, model: Model, config: LoRAConfig) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of each projection, {"A": ..., "B": ..., with DoRA "M": ...} by upstream's module name, and
    check them against the model."""
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; adapters are read from safetensors files only") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: tensor {key!r} is not a LoRA matrix of a projection")
        sides.setdefault(match["module"], {})[match["side"] or "M"] = tensor
    if not sides:
        raise ValueError(f"{path}: it contains no tensors")
    available = projections(model)
    for module, pair in sides.items():
        if module not in available:
            raise ValueError(f"{path}: {_why_not(module, model)}")
        weight = model.get_parameter(f"{available[module].path}.weight")
        rows = available[module].rows
        expected: dict[str, tuple[int, ...]] = {"A": (config.rank, weight.shape[1]), "B": (rows, config.rank)}
        if config.dora:
            expected["M"] = (rows,)
        actual = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        if actual != expected:
            raise ValueError(
                f"{path}: {module} has {actual}, this model and r={config.rank} need {expected}; "
                "the adapter was made for another model"
            )
    for module in available:
        if config.targets is not None and matches(module, config.targets) and module not in sides:
            raise ValueError(
                f"{path}: it has nothing for {module}, which {CONFIG} names; the adapter was made for another model"
            )
    return sides


def _why_not(module: str, model: Model) -> str:
    """Explain why this model has no such projection to adapt."""
    layers = model.config.num_hidden_layers
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    if layer is not None and int(layer[1]) >= layers:
        return f"has {module}, this model has {layers} layers; the adapter was made for another model"
    if ".mlp.experts." in module:
        return f"has {module}, but {ROUTED}; merge it with peft instead"
    return f"has {module}, which is not a projection of this model that takes an adapter"
