"""The model a run begins with: its tokenizer, its shape, and random weights or those of an earlier stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from minimind.config import PRESETS, ModelConfig
from minimind.modeling import OUTPUTS, Model
from minimind.tokenization import Tokenizer, load_tokenizer, require_same_ids, tokenizer_beside
from minimind.training.arguments import StageArgs
from minimind.training.run_folder import newest_finished
from minimind.utils.display import say
from minimind.utils.hub import local_path
from minimind.weights import checkpoint_folder, fingerprint, load_model


@dataclass(frozen=True)
class InitialModel:
    """preset: the shape's name, for messages; weights: a folder or a .pth file, None for random ones."""

    tokenizer: Tokenizer
    config: ModelConfig
    preset: str
    weights: Path | None = None

    @staticmethod
    def from_args(args: StageArgs, console: Console) -> InitialModel:
        """The model that --from, --preset and --tokenizer name. Raises ValueError, naming the flag."""
        if args.from_ is not None:
            earlier = _earlier(local_path(args.from_, "--from", partial(say, console)), args)
            if earlier.config.padding_note:
                say(console, earlier.config.padding_note)
            return earlier
        tokenizer = load_tokenizer(args.tokenizer)
        preset = args.preset or "nano"
        config = ModelConfig.preset(preset)
        if tokenizer.vocab_size != config.vocab_size:
            say(
                console,
                f"the model gets a vocabulary of {tokenizer.vocab_size}, as the tokenizer has, not {config.vocab_size}",
            )
            config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        return InitialModel(tokenizer, config, preset)

    def load(self) -> Model:
        """The model on the CPU in float32; random weights are drawn from the global generator."""
        return Model(self.config) if self.weights is None else load_model(self.weights, self.config)

    def fingerprint(self) -> str | None:
        """The fingerprint of the weights; None for random ones."""
        return None if self.weights is None else fingerprint(self.weights)


@torch.no_grad()
def scale_outputs(model: Model, factor: float) -> None:
    """Multiply the projections into the residual stream by `factor`. With 0 every block begins as the identity (Fixup,
    Zhang et al. 2019, arXiv 1901.09321)."""
    for name, parameter in model.named_parameters():
        if factor != 1 and name.endswith(OUTPUTS):
            parameter.mul_(factor)


def from_newest(args: StageArgs, stage: str) -> str | None:
    """--from, or the newest finished run of `stage`. Under --plan None where there is no such run, or where --preset
    names the shape; else ValueError."""
    if args.from_ is not None or (args.plan and args.preset is not None):
        return args.from_
    try:
        return newest_finished(stage)
    except ValueError:
        if args.plan:
            return None
        raise


def _earlier(path: Path, args: StageArgs) -> InitialModel:
    if path.is_dir():
        try:
            weights = checkpoint_folder(path)
        except ValueError as error:
            raise ValueError(f"--from {error}") from None
        if not (weights / "config.json").is_file():
            raise ValueError(
                f"--from {path}: an adapter without its model; run minimind export --model {path} --merge-lora --to hf "
                "--out merged, then use --from merged"
            )
        config = ModelConfig.from_json(weights / "config.json")
        if args.preset is not None and _preset_of(config) != args.preset:
            raise ValueError(f"--preset {args.preset}: {weights} is a {_preset_of(config)} model; drop --preset")
    elif path.is_file():
        if args.preset is None:
            raise ValueError(f"--from {path}: a bare weight file has no shape; name it with --preset")
        weights, config = path, ModelConfig.preset(args.preset)
    else:
        raise ValueError(f"--from {path}: no such file or folder; check the path given")
    tokenizer = _tokenizer_of(weights, path, args)
    config = config.with_tokenizer(tokenizer.vocab_size, f"--from {path}")
    return InitialModel(tokenizer, config, args.preset or _preset_of(config), weights)


def _tokenizer_of(weights: Path, path: Path, args: StageArgs) -> Tokenizer:
    """The tokenizer beside the weights, or the one of --tokenizer, which must have the same ids unless --new-tokenizer
    is given."""
    original = tokenizer_beside(weights)
    if args.tokenizer is None:
        if original is None:
            raise ValueError(f"--from {path}: there is no tokenizer beside it; name its folder with --tokenizer")
        return original
    named = load_tokenizer(args.tokenizer)
    if original is not None:
        way_out = "drop --tokenizer, or add --new-tokenizer to teach the model another one"
        flag = f"--tokenizer {args.tokenizer}"
        require_same_ids(named, flag, original, f"--from {path}", way_out, args.new_tokenizer)
    return named


def _preset_of(config: ModelConfig) -> str:
    rows, ids = config.vocab_size, config.tokenizer_size
    for name, preset in PRESETS.items():
        if dataclasses.replace(preset, vocab_size=rows, tokenizer_size=ids) == config:
            return name
    return "custom"
