"""Built-in data that needs no download: made by rules, nothing random, the same rows on every machine."""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.utils.display import say
from minimind.utils.files import cache_root, make_folder, write_atomically

Conversation = list[dict[str, Any]]


def write_parts(
    name: str,
    title: str,
    parts: Mapping[str, Sequence[dict[str, Any]]],
    cache_dir: str | Path | None,
    console: Console | None,
) -> list[Path]:
    """Write the rows of each part to a .jsonl file under `cache_dir`, unless it exists, and return the paths.

    name: the file name, with {hash} for a hash of the content and {part}; title: a name for messages. `cache_dir`
    defaults to $MINIMIND_CACHE, else ~/.cache/minimind. Raises ValueError if the folder cannot be written.
    """
    console = console or Console(stderr=True)
    folder = make_folder(cache_root(cache_dir) / "corpus")
    paths = []
    for part, rows in parts.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = folder / f"{name.format(hash=blake2b(data, digest_size=8).hexdigest(), part=part)}.jsonl"
        if not path.exists():
            write_atomically(path, data)
            say(console, f"built-in {title}: {len(rows):,} rows in {path}")
        paths.append(path)
    return paths


def as_rows(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of conversations."""
    return [{"conversations": conversation} for conversation in conversations]


def exchange(question: str, answer: str) -> Conversation:
    """A conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shuffled(rows: Sequence[Any]) -> list[Any]:
    """The rows in the order of a hash of their JSON."""
    return sorted(rows, key=digest)


def digest(value: Any) -> int:
    """A 64-bit hash of the JSON of `value`."""
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
