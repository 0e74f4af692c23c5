"""Write a model for other programs: `minimind export --model runs/sft-nano-builtin --to hf --out my-model`.

    hf      a folder for transformers, vLLM, trl, Llama-Factory
    gguf    one file for llama.cpp and LM Studio: shape, weights, tokenizer and chat template
    ollama  a folder with a GGUF file and a Modelfile
    pth     a weight file for upstream MiniMind

Existing files are never overwritten.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minimind.config import PRESETS
from minimind.export import check_free, replacing
from minimind.export.gguf import GgufType, quantize, quantizer, write_gguf, write_gguf_adapter
from minimind.export.hf import export_hf
from minimind.export.ollama import modelfile
from minimind.inference.loading import LoadedModel, WeightArgs, open_weights
from minimind.lora import adapter_names, remove_adapters
from minimind.lora_files import adapter_config, save_adapter, write_base
from minimind.modeling import Model
from minimind.weights import fingerprint, to_stock

DType = Literal["auto", "fp32", "fp16", "bf16", "q8_0", "q4_k_m"]
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GGUF: dict[str, GgufType] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
_DEFAULT = {"hf": "fp32", "pth": "fp32", "gguf": "fp16", "ollama": "fp16"}  # fp32 keeps every bit
_SUFFIX = {"gguf": ".gguf", "pth": ".pth"}


@dataclass(frozen=True)
class Args(WeightArgs):
    """Write a model for other programs."""

    to: str | None = None
    """Format: hf, gguf, ollama or pth. None takes it from the ending of --out, .gguf or .pth."""
    out: str = "model.gguf"
    """File (gguf, pth) or folder (hf, ollama) to write; it must not exist yet."""
    dtype: DType = "auto"
    """Data type of the weights; auto: fp32 for hf and pth, fp16 for gguf and ollama.
    q8_0 (8 bits) and q4_k_m (about 5 bits, by llama.cpp's quantizer) are for gguf and ollama."""
    merge_lora: bool = False
    """Merge the adapter into the weights. Without this, hf writes it to OUT/adapter, gguf to NAME-lora.gguf beside
    NAME.gguf."""


def main(args: Args) -> int:
    """Write the files; returns the exit status. ValueError, one line, for bad input."""
    out = Path(args.out).expanduser()
    target = target_of(args.to, out)
    dtype = dtype_of(args.dtype, target)
    check_free(out)
    loaded = open_weights(args, torch.device("cpu"), merge=args.merge_lora)
    check_adapter(loaded, target, args.merge_lora)
    for note in loaded.notes:
        print(note)
    for line in WRITERS[target](loaded, out, dtype):
        print(line)
    return 0


def target_of(to: str | None, out: Path) -> str:
    """The format to write, from --to or the ending of --out. ValueError if they disagree or neither says."""
    by_suffix = {suffix: target for target, suffix in _SUFFIX.items()}
    if to is None:
        if out.suffix not in by_suffix:
            raise ValueError(f"--out {out}: its ending names no format; add --to {', '.join(WRITERS)}")
        return by_suffix[out.suffix]
    if to not in WRITERS:
        raise ValueError(f"--to {to}: unknown; choose from {', '.join(WRITERS)}")
    if out.suffix != _SUFFIX.get(to, "" if out.suffix in by_suffix else out.suffix):
        expected = f"a file; name it *{_SUFFIX[to]}" if to in _SUFFIX else "a folder; name one"
        raise ValueError(f"--to {to} writes {expected} with --out, not {out}")
    return to


def dtype_of(dtype: DType, target: str) -> str:
    """The data type to write. ValueError if the target does not support it or its quantizer is missing."""
    if dtype == "auto":
        return _DEFAULT[target]
    if target in ("hf", "pth") and dtype not in _TORCH:
        raise ValueError(f"--dtype {dtype}: --to {target} takes {', '.join(_TORCH)}; {dtype} is for gguf")
    if dtype == "q4_k_m":
        quantizer()
    return dtype


def check_adapter(loaded: LoadedModel, target: str, merge: bool) -> None:
    """ValueError for --merge-lora without an adapter, and for an adapter that the target cannot keep separate."""
    if merge and loaded.lora is None:
        raise ValueError("--merge-lora: there is no adapter; name one with --lora, or a LoRA run with --model")
    if loaded.lora is None or merge:
        return
    if target not in ("hf", "gguf"):
        raise ValueError(f"--to {target} cannot keep the adapter {loaded.lora} separate; add --merge-lora")
    if any("shared_experts" in name for name in adapter_config(loaded.model).targets or ()):
        raise ValueError(
            f"--to {target}: {loaded.lora} adapts shared experts, stored differently in this format; add --merge-lora"
        )


def write_hf(loaded: LoadedModel, out: Path, dtype: str) -> list[str]:
    adapted = bool(adapter_names(loaded.model))
    with replacing(out) as folder:
        if adapted:
            save_adapter(loaded.model, folder / "adapter", base_model=str(out.resolve()))
            remove_adapters(loaded.model)
        export_hf(loaded.model, loaded.tokenizer, folder, _TORCH[dtype])
        if adapted:
            write_base(folder / "adapter", out.resolve(), "..", fingerprint(folder))
    lines = [f"{out}: {_size(out)}, {dtype}, for transformers, vLLM and trl"]
    if not adapted:
        return [*lines, f"next: minimind chat --model {_quoted(out)}; vllm serve {_quoted(out)}"]
    return [
        *lines,
        f"{out / 'adapter'}: its adapter, in peft's form",
        f"next: minimind chat --model {_quoted(out / 'adapter')}; "
        f"vllm serve {_quoted(out)} --enable-lora --lora-modules mine={_quoted(out / 'adapter')}",
    ]


def write_one_gguf(loaded: LoadedModel, out: Path, dtype: str) -> list[str]:
    beside = out.with_name(f"{out.stem}-lora.gguf")
    adapted = bool(adapter_names(loaded.model))
    if adapted:
        check_free(beside)
    with replacing(out) as file, replacing(beside) if adapted else nullcontext() as adapter:
        if adapter is not None:
            write_gguf_adapter(loaded.model, adapter)
            remove_adapters(loaded.model)
        _gguf(loaded, file, dtype)
    line = f"{out}: {_size(out)}, {dtype}, for llama.cpp and LM Studio"
    if not adapted:
        return [line, f"next: llama-cli -m {_quoted(out)}"]
    return [line, f"{beside}: its adapter", f"next: llama-cli -m {_quoted(out)} --lora {_quoted(beside)}"]


def write_ollama(loaded: LoadedModel, out: Path, dtype: str) -> list[str]:
    text = modelfile(loaded.model.config, loaded.tokenizer)
    with replacing(out) as folder:
        folder.mkdir()
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        _gguf(loaded, folder / "model.gguf", dtype)
    name = _quoted(out.name.lower())
    return [
        f"{out}: model.gguf, {_size(out)}, {dtype}, and a Modelfile",
        f"next: ollama create {name} -f {_quoted(out / 'Modelfile')} && ollama run {name}",
    ]


def write_pth(loaded: LoadedModel, out: Path, dtype: str) -> list[str]:
    with replacing(out) as file:
        export_pth(loaded.model, file, _TORCH[dtype])
    config = loaded.model.config
    preset = next((name for name, known in PRESETS.items() if known == config), None)
    reading = f"minimind chat --model {_quoted(out)} --preset {preset}"
    if preset is None:
        reading = f"minimind.load_model({str(out)!r}, config=...) in Python, since no preset has its shape"
    return [f"{out}: {_size(out)}, {dtype}, upstream's names", f"next: {reading}"]


WRITERS: dict[str, Callable[[LoadedModel, Path, str], list[str]]] = {
    "hf": write_hf,
    "gguf": write_one_gguf,
    "ollama": write_ollama,
    "pth": write_pth,
}


def _gguf(loaded: LoadedModel, path: Path, dtype: str) -> None:
    name = loaded.folder.resolve().name if loaded.folder is not None else "MiniMind"
    if dtype != "q4_k_m":
        write_gguf(loaded.model, loaded.tokenizer, path, _GGUF[dtype], name)
        return
    full = path.with_name(f"{path.name}.f32")
    try:
        write_gguf(loaded.model, loaded.tokenizer, full, "f32", name)
        quantize(full, path)
    finally:
        full.unlink(missing_ok=True)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def export_pth(model: Model, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a .pth file as upstream MiniMind saves and, strictly, loads it: a state dict with upstream's names in
    `dtype`, which contains the tied output head too.

    Raises ValueError for models that upstream's code does not have: an untied output head, QK-norm with shared experts.
    """
    torch.save(pth_state(model, dtype), path)


def pth_state(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    config = model.config
    if not config.tie_word_embeddings:
        raise ValueError("--to pth: upstream ties the output head to the embedding; this model does not")
    if config.qk_norm and config.num_shared_experts:
        raise ValueError("--to pth: upstream has no model with both QK-norm and shared experts")
    stock = to_stock(model.state_dict(), config)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in stock.items()}
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
