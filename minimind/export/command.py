"""Write a model for other programs: `minimind export --model runs/sft-nano-builtin --to hf --out my-model`.

hf      a folder for transformers, vLLM, trl, Llama-Factory
gguf    one file for llama.cpp and LM Studio: shape, weights, tokenizer and chat template
ollama  a GGUF file and a Modelfile
pth     a weight file for upstream MiniMind
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minimind.config import PRESETS
from minimind.export.gguf import GgufType, write_gguf
from minimind.export.hf import export_hf
from minimind.export.ollama import modelfile
from minimind.export.output import check_free, replacing
from minimind.export.pth import export_pth
from minimind.export.quantize import quantize, quantizer
from minimind.inference.loading import LoadedModel, WeightArgs, open_weights
from minimind.lora import adapter_names, remove_adapters
from minimind.lora_files import adapter_config, save_adapter, write_base
from minimind.weights import fingerprint

DType = Literal["auto", "fp32", "fp16", "bf16", "q8_0", "q4_k_m"]
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GGUF: dict[str, GgufType] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
_DEFAULT = {"hf": "fp32", "pth": "fp32", "gguf": "fp16", "ollama": "fp16"}  # fp32: not one bit is lost
_SUFFIX = {"gguf": ".gguf", "pth": ".pth"}


@dataclass(frozen=True)
class Args(WeightArgs):
    """Write a model for other programs."""

    to: str | None = None
    """hf, gguf, ollama or pth; None: what the ending of --out says."""
    out: str = "model.gguf"
    """The file (gguf, pth) or folder (hf, ollama) to write; it must not be there yet."""
    dtype: DType = "auto"
    """Of the weights. q8_0 (8 bits) and q4_k_m (about 5, by llama.cpp's quantizer) are for gguf and ollama. auto: fp32
    for hf and pth, fp16 for gguf and ollama."""
    merge_lora: bool = False
    """Put the adapter into the weights. Without it, hf keeps it beside them, in OUT/adapter."""


def main(args: Args) -> int:
    out = Path(args.out).expanduser()
    target = target_of(args.to, out)
    dtype = dtype_of(args.dtype, target)
    check_free(out)
    opened = open_weights(args, torch.device("cpu"), merge=args.merge_lora)
    check_adapter(opened, target, args.merge_lora)
    for note in opened.notes:
        print(note)
    for line in WRITERS[target](opened, out, dtype):
        print(line)
    return 0


def target_of(to: str | None, out: Path) -> str:
    by_suffix = {suffix: target for target, suffix in _SUFFIX.items()}
    if to is None:
        if out.suffix not in by_suffix:
            raise ValueError(f"--out {out}: does not say what to write; add --to {', '.join(WRITERS)}")
        return by_suffix[out.suffix]
    if to not in WRITERS:
        raise ValueError(f"--to {to}: unknown; choose from {', '.join(WRITERS)}")
    if out.suffix != _SUFFIX.get(to, "" if out.suffix in by_suffix else out.suffix):
        wanted = f"a file; name it *{_SUFFIX[to]}" if to in _SUFFIX else "a folder; name one"
        raise ValueError(f"--to {to} writes {wanted} with --out, not {out}")
    return to


def dtype_of(dtype: DType, target: str) -> str:
    if dtype == "auto":
        return _DEFAULT[target]
    if target in ("hf", "pth") and dtype not in _TORCH:
        raise ValueError(f"--dtype {dtype}: --to {target} takes {', '.join(_TORCH)}; {dtype} is for gguf")
    if dtype == "q4_k_m":
        quantizer()
    return dtype


def check_adapter(opened: LoadedModel, target: str, merge: bool) -> None:
    if merge and opened.lora is None:
        raise ValueError("--merge-lora: there is no adapter; name one with --lora, or a LoRA run with --model")
    if opened.lora is None or merge:
        return
    if target != "hf":
        raise ValueError(f"--to {target} has no place for the adapter {opened.lora}; add --merge-lora")
    if any("shared_experts" in name for name in adapter_config(opened.model).targets or ()):
        raise ValueError(
            f"--to hf: shared experts, which {opened.lora} adapts, lie in another form there; add --merge-lora"
        )


def write_hf(opened: LoadedModel, out: Path, dtype: str) -> list[str]:
    adapted = bool(adapter_names(opened.model))
    with replacing(out) as folder:
        if adapted:
            save_adapter(opened.model, folder / "adapter", base_model=str(out.resolve()))
            remove_adapters(opened.model)
        export_hf(opened.model, opened.tokenizer, folder, _TORCH[dtype])
        if adapted:
            write_base(folder / "adapter", out.resolve(), "..", fingerprint(folder))
    lines = [f"{out}: {_size(out)}, {dtype}, for transformers, vLLM and trl"]
    if not adapted:
        return [*lines, f"next: minimind chat --model {_quoted(out)}; vllm serve {_quoted(out)}"]
    return [
        *lines,
        f"{out / 'adapter'}: the adapter in peft's form, on top of it",
        f"next: minimind chat --model {_quoted(out / 'adapter')}; "
        f"vllm serve {_quoted(out)} --enable-lora --lora-modules mine={_quoted(out / 'adapter')}",
    ]


def write_one_gguf(opened: LoadedModel, out: Path, dtype: str) -> list[str]:
    with replacing(out) as file:
        _gguf(opened, file, dtype)
    return [f"{out}: {_size(out)}, {dtype}, for llama.cpp and LM Studio", f"next: llama-cli -m {_quoted(out)}"]


def write_ollama(opened: LoadedModel, out: Path, dtype: str) -> list[str]:
    text = modelfile(opened.model.config, opened.tokenizer)
    with replacing(out) as folder:
        folder.mkdir()
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        _gguf(opened, folder / "model.gguf", dtype)
    name = _quoted(out.name.lower())
    return [
        f"{out}: model.gguf, {_size(out)}, {dtype}, and a Modelfile",
        f"next: ollama create {name} -f {_quoted(out / 'Modelfile')} && ollama run {name}",
    ]


def write_pth(opened: LoadedModel, out: Path, dtype: str) -> list[str]:
    with replacing(out) as file:
        export_pth(opened.model, file, _TORCH[dtype])
    config = opened.model.config
    preset = next((name for name, known in PRESETS.items() if known == config), None)
    reading = f"minimind chat --model {_quoted(out)} --preset {preset}"
    if preset is None:
        reading = f"minimind.load_model({str(out)!r}, config=...) in Python: its shape is no preset's"
    return [f"{out}: {_size(out)}, {dtype}, upstream's names", f"next: {reading}"]


WRITERS: dict[str, Callable[[LoadedModel, Path, str], list[str]]] = {
    "hf": write_hf,
    "gguf": write_one_gguf,
    "ollama": write_ollama,
    "pth": write_pth,
}


def _gguf(opened: LoadedModel, path: Path, dtype: str) -> None:
    name = opened.folder.resolve().name if opened.folder is not None else "MiniMind"
    if dtype != "q4_k_m":
        write_gguf(opened.model, opened.tokenizer, path, _GGUF[dtype], name)
        return
    full = path.with_name(f"{path.name}.f32")
    try:
        write_gguf(opened.model, opened.tokenizer, full, "f32", name)
        quantize(full, path)
    finally:
        full.unlink(missing_ok=True)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
