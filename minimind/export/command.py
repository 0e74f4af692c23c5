"""Write a model for other programs: `minimind export --model runs/sft-nano --out model.gguf`.

The file runs in llama.cpp, ollama and LM Studio: shape, weights, tokenizer and chat template are all in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind.export.gguf import GgufType, export_gguf
from minimind.inference.loading import ModelArgs, open_model


@dataclass(frozen=True)
class Args(ModelArgs):
    """Write a model for other programs."""

    out: str = "model.gguf"
    """The file to write; its name ends in .gguf."""
    type: GgufType = "f16"
    """Of the matrices. q8_0: 8 bits and a scale for every 32."""


def main(args: Args) -> int:
    path = Path(args.out).expanduser()
    if path.suffix != ".gguf":
        raise ValueError(f"--out {args.out}: only .gguf files are written; name it so")
    opened = open_model(args)
    for note in opened.notes:
        print(note)
    name = opened.folder.name if opened.folder is not None else Path(args.model or "minimind").stem
    export_gguf(opened.model, opened.tokenizer, path, args.type, name)
    print(f"{path}: {path.stat().st_size / 2**20:,.1f} MiB, {args.type}; try it: llama-cli -m {path}")
    return 0
