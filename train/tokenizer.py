"""Train a byte-level BPE tokenizer on your own data.

    python train/tokenizer.py --data corpus.jsonl notes/ 'books/*.txt' --vocab-size 6400 --out my_tokenizer

The folder it writes loads with load_tokenizer(folder) and with transformers' AutoTokenizer.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from minimind.data.formats import FormatName, RowFormat
from minimind.data.paths import expand_paths, find_files
from minimind.data.reader import BadRows, iter_texts
from minimind.tokenization import Tokenizer, load_tokenizer
from minimind.tokenization.training import train_bpe
from minimind.utils.display import say
from minimind.utils.startup import command_line, prepare_output, started

ReadTexts = Callable[..., Iterator[str]]  # iter_texts with its options bound
SAMPLE_BYTES = 2_000_000
# --overwrite only removes these.
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}


@dataclass(frozen=True)
class Config:
    """Train a byte-level BPE tokenizer on text, chat or preference data."""

    data: tuple[str, ...]
    """Files (.jsonl or .txt, also compressed), folders, or glob patterns."""
    out: Path
    """Folder to write tokenizer.json and tokenizer_config.json into."""
    vocab_size: int = 6400
    """Number of entries: 256 bytes, the special tokens, and merges."""
    weights: tuple[float, ...] = ()
    """One per --data entry: 3 repeats its texts three times, 0.1 uses every tenth. Empty: 1 for all."""
    eval_data: tuple[str, ...] = ()
    """Data to measure on instead of a sample of --data. Its texts are not trained on."""
    min_frequency: int = 2
    """Pairs of tokens that occur fewer times than this in the texts are never merged."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be read, or skip it."""
    format: FormatName = "auto"
    """Format of the rows: auto (ours and upstream's), messages (OpenAI, trl), sharegpt or alpaca."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of rows and messages to ignore. An unknown field is an error."""
    overwrite: bool = False
    """Replace an existing folder."""


def main(config: Config) -> None:
    """Train, save and measure. Raises ValueError for an unusable setting or file."""
    check_out(config)
    sources = weighted_sources(config)
    read = partial(iter_texts, on_bad_row=config.on_bad_row, row_format=RowFormat(config.format, config.ignore_fields))
    held_out = {text for path in eval_paths(config) for text in read(path)}
    console = Console(stderr=True)
    for line in find_files(config.data).lines():
        say(console, line)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        texts = stream(sources, read, held_out, progress)
        model = train_bpe(texts, config.vocab_size, min_frequency=config.min_frequency)
    save_atomically(load_tokenizer().with_model(model), config.out)
    tokenizer = load_tokenizer(config.out)
    print(f"{config.out}: {tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:12]}")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"fewer entries than --vocab-size {config.vocab_size}: the data has no more pairs to merge")
    for path in eval_paths(config) or [path for path, _ in sources]:
        report(path, tokenizer, read)


def check_out(config: Config) -> None:
    """Raise ValueError unless the output folder may be written."""
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is a file; name a folder")
    names = {path.name for path in config.out.iterdir()} if config.out.is_dir() else set()
    if names and not config.overwrite:
        raise ValueError(f"--out {config.out} is not empty; choose another folder or add --overwrite")
    if others := sorted(names - TOKENIZER_FILES):
        raise ValueError(f"--out {config.out} also holds {others[0]}; choose another folder")


def weighted_sources(config: Config) -> list[tuple[Path, float]]:
    """Every file with its weight."""
    weights = config.weights or (1.0,) * len(config.data)
    if len(weights) != len(config.data):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(config.data)} entries of --data")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"--weights {' '.join(f'{w:g}' for w in weights)}: give numbers of 0 or more")
    sources: dict[Path, tuple[Path, float]] = {}
    for entry, weight in zip(config.data, weights, strict=True):
        for path in expand_paths([entry]):
            if config.weights and path.resolve() in sources:
                raise ValueError(f"--data: {path} is in two entries; give it one weight")
            sources.setdefault(path.resolve(), (path, weight))
    return list(sources.values())


def eval_paths(config: Config) -> list[Path]:
    """The files of --eval-data, in order."""
    return expand_paths(config.eval_data) if config.eval_data else []


def stream(sources: list[tuple[Path, float]], read: ReadTexts, held_out: set[str], progress: Progress) -> Iterator[str]:
    """Yield the texts of all sources, each source repeated or thinned out evenly by its weight."""
    for number, (path, weight) in enumerate(sources, 1):
        task = progress.add_task(f"reading {number}/{len(sources)} {path.name}", total=path.stat().st_size)
        owed, bad = 0.0, BadRows()
        for text in read(path, bad=bad):
            progress.advance(task, len(text.encode()))
            if text in held_out:
                continue
            owed += weight
            for _ in range(int(owed)):
                yield text
            owed -= int(owed)
        progress.update(task, completed=path.stat().st_size)
        if bad.count:
            say(progress.console, f"{path}: {bad}")
    progress.add_task("merging pairs", total=None)


def save_atomically(tokenizer: Tokenizer, out: Path) -> None:
    """Write to a temporary folder and rename it, so that `out` is never incomplete."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staged:
        new, old = Path(staged, "new"), Path(staged, "old")
        tokenizer.save(new)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise


def report(path: Path, tokenizer: Tokenizer, read: ReadTexts) -> None:
    """Print the bytes per token of the first megabytes of a file."""
    sample, size = [], 0
    for text in read(path):
        sample.append(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    tokens = sum(map(len, tokenizer.encode_batch(sample, allow_special=False)))
    if tokens:
        print(f"{path.name}: {size / tokens:.2f} bytes/token ({size} bytes, {tokens} tokens)")


if __name__ == "__main__":
    prepare_output()
    config = command_line(Config, __doc__)
    started()
    try:
        main(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
