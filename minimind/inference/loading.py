"""The command-line flags that name a model, and loading the model with its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minimind.config import PRESETS, ModelConfig, YarnScaling
from minimind.inference.decode.int8 import WeightsDTypeName, choose_weights_dtype
from minimind.inference.decode.kv_cache import FLOAT8, KVDTypeName
from minimind.lora import merge_adapter, remove_adapters
from minimind.lora_files import CONFIG, adapter_folder, base_mismatch, find_base, load_adapter, names_base_only
from minimind.modeling import Model
from minimind.tokenization import Tokenizer, load_tokenizer, require_same_ids, tokenizer_beside
from minimind.utils.device import choose_device, choose_precision
from minimind.utils.hub import HubModel, local_path
from minimind.weights import checkpoint_folder, load_model

MAX_YARN = 1024  # the tables of cosines grow with the factor: 2,048 positions become two million

DTypeName = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FLOAT8}


@dataclass(frozen=True)
class WeightArgs:
    """Flags that name a model."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["--load"])] = None
    """A run folder, a checkpoint or Hugging Face folder, an upstream .pth file (with --preset), or a name on a hub:
    OWNER/NAME, OWNER/NAME@REVISION, modelscope:OWNER/NAME.
    A run of train/lora.py stands for its base model with the adapter. None: the newest run under runs/."""
    preset: str | None = None
    """Shape of the model in a .pth file: nano, minimind2-small, minimind2, minimind2-moe, minimind3, minimind3-moe."""
    tokenizer: str | None = None
    """Folder with tokenizer.json. None: the model's own; for a .pth file that in its folder, else the shipped one."""
    new_tokenizer: bool = False
    """Allow a --tokenizer, or a --lora with a tokenizer, that the model was not trained with."""
    lora: str | None = None
    """Folder of a LoRA adapter, in this project's or peft's form, to merge into the weights."""
    yarn: float | None = None
    """Stretch the context with YaRN by this factor."""
    yarn_original: int | None = None
    """With --yarn: number of positions that the model was trained on. None: the config's, or 2048."""


@dataclass(frozen=True)
class ModelArgs(WeightArgs):
    """Flags that name a model, a device and data types."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""
    dtype: DTypeName = "auto"
    """Data type of the computation; auto: bf16 if the device supports it, else fp16 on a GPU, else fp32."""
    kv_dtype: KVDTypeName = "auto"
    """Data type of the key/value cache; auto: as --dtype; fp8 takes half of bf16's memory (docs/decoding.md)."""
    weights_dtype: WeightsDTypeName = "auto"
    """Data type of the weights when decoding; auto: as --dtype; int8 is faster on a CPU. On a GPU it halves what a step
    of up to eight sequences of a dense model reads, but weights take 1.6 times bf16's memory (docs/decoding.md)."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model. model: float32, on its device. dtype: of the computation. kv_dtype: of the key/value cache.
    weights_dtype: of the weights when decoding, or None for dtype. stage: the training stage; None if its folder does
    not say. folder: for results; None for a single file
    or a hub's cache. notes: lines that the user should see. lora: folder of its
    adapter, or None."""

    model: Model
    tokenizer: Tokenizer
    dtype: torch.dtype
    stage: str | None
    folder: Path | None
    notes: list[str]
    lora: Path | None = None
    kv_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None


def open_model(args: ModelArgs) -> LoadedModel:
    """Load the model that the flags name. ValueError, one line, that names the file or the flag."""
    device = choose_device(args.device)
    precision = choose_precision(device, args.dtype)
    dtype = precision.compute_dtype
    kv_dtype = dtype if args.kv_dtype == "auto" else _DTYPES[args.kv_dtype]
    weights_dtype = choose_weights_dtype(args.weights_dtype, device)
    loaded = open_weights(args, device, dtype)
    slow = args.dtype == "auto" and dtype == torch.float32
    notes = [*loaded.notes, *([f"--dtype fp32: {precision.reason}"] if slow else [])]
    return dataclasses.replace(loaded, kv_dtype=kv_dtype, weights_dtype=weights_dtype, notes=notes)


def open_weights(
    args: WeightArgs, device: torch.device, dtype: torch.dtype = torch.float32, merge: bool = True
) -> LoadedModel:
    """Like open_model, on a given device. merge: merge an adapter into the weights; otherwise it stays attached."""
    notes: list[str] = []
    source = _newest_run() if args.model is None else local_path(args.model, "--model", notes.append)
    notes += [] if args.model else [f"model: {source}"]
    path, lora = _base_and_adapter(source, args.lora)
    config = stretched(_config_of(path, args.preset), args)
    tokenizer = _tokenizer_of(path, lora, args, notes)
    config = config.with_tokenizer(tokenizer.vocab_size, f"--model {path}")
    if config.padding_note:
        notes.append(config.padding_note)
    model = load_model(path, config, device)
    if lora is not None:
        if args.lora is None and names_base_only(adapter_folder(lora)):
            notes.append(f"{lora}: gives only its base model's name; {path.absolute()} is assumed to be that model")
        if other := base_mismatch(adapter_folder(lora), _weights_of(path)):
            notes.append(f"{lora}: {other}; right if that is the same model in another form")
        _adapt(model, lora, merge)
    own = source.is_dir() and (args.model is None or HubModel.parse(args.model) is None)  # not a hub's cache
    return LoadedModel(model, tokenizer, dtype, _stage_of(source), source if own else None, notes, lora)


def stretched(config: ModelConfig, args: WeightArgs) -> ModelConfig:
    """`config` with the YaRN scaling of --yarn and --yarn-original."""
    if args.yarn is None:
        if args.yarn_original is not None:
            raise ValueError("--yarn-original: needs --yarn")
        return config
    if not 1 <= args.yarn <= MAX_YARN:
        raise ValueError(f"--yarn {args.yarn:g}: must be between 1 and {MAX_YARN}")
    if args.yarn_original is not None and args.yarn_original < 1:
        raise ValueError(f"--yarn-original {args.yarn_original}: must be at least 1")
    scaling = config.rope_scaling or YarnScaling()
    original = args.yarn_original or scaling.original_max_position_embeddings
    scaling = dataclasses.replace(scaling, factor=args.yarn, original_max_position_embeddings=original)
    return dataclasses.replace(config, rope_scaling=scaling)


def _config_of(path: Path, preset: str | None) -> ModelConfig:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    if path.is_dir():
        if preset is not None:
            raise ValueError(f"--preset {preset}: {path} has a config.json of its own; drop --preset")
        return ModelConfig.from_json(checkpoint_folder(path) / "config.json")
    if not path.exists():
        raise ValueError(f"--model {path}: no such file or folder")
    if preset is None:
        raise ValueError(f"--model {path}: a bare weight file does not tell its shape; name it with --preset")
    return ModelConfig.preset(preset)


def _tokenizer_of(path: Path, lora: Path | None, args: WeightArgs, notes: list[str]) -> Tokenizer:
    """The tokenizer of the adapter, else of the weights, else the shipped one; --tokenizer must give the same ids."""
    if args.new_tokenizer and args.tokenizer is None and args.lora is None:
        raise ValueError("--new-tokenizer: goes with --tokenizer, which names the new one, or with --lora")
    model, allow_other = f"--model {path}", args.new_tokenizer
    own = tokenizer_beside(path) or tokenizer_beside(_weights_of(path))
    if lora is not None and (adapted := tokenizer_beside(adapter_folder(lora))) is not None:
        if own is not None and args.lora is not None:  # without --lora, base_of has compared the weights
            way_out = (
                "name the model that the adapter was trained on, or add --new-tokenizer if another one is intended"
            )
            require_same_ids(adapted, f"--lora {lora}", own, model, way_out, allow_other)
        own = adapted
    if args.tokenizer is not None:
        named = load_tokenizer(args.tokenizer)
        if own is not None:
            way_out = "drop --tokenizer, or add --new-tokenizer to use it anyway"
            require_same_ids(named, f"--tokenizer {args.tokenizer}", own, model, way_out, allow_other)
        return named
    if own is None:
        notes.append(f"{path} has no tokenizer: the shipped one is used; a model with another one needs --tokenizer")
    return own or load_tokenizer()


def _stage_of(path: Path) -> str | None:
    """The stage in the config.json of the run folder that `path` is or lies in; None if there is none."""
    for folder in (path, *path.parents[:3]):
        try:
            stage = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("stage")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(stage, str):
            return stage
    return None


def _newest_run() -> Path:
    folders = [*Path("runs").glob("*/checkpoints"), *Path("runs").glob("*/*/checkpoints")]  # and of minimind zero
    runs = [folder.parent for folder in folders if any(folder.glob("step-*"))]
    if not runs:
        raise ValueError("--model: name one, since there is no run under runs/ (minimind demo trains a small model)")
    return max(runs, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def _base_and_adapter(path: Path, lora: str | None) -> tuple[Path, Path | None]:
    """The folders of the weights and of the adapter. `path` may be a run of train/lora.py or any adapter's folder."""
    if lora is not None:
        return path, Path(lora).expanduser()
    folder = adapter_folder(path)
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return path, None
    return find_base(folder), path


def _weights_of(path: Path) -> Path:
    return checkpoint_folder(path) if path.is_dir() else path


def _adapt(model: Model, folder: Path, merge: bool) -> None:
    load_adapter(model, folder)
    if merge:
        merge_adapter(model)
        remove_adapters(model)  # back to a plain model, with the merged weights
