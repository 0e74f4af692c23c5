"""The token cache: every file is tokenized once, into memory-mapped arrays keyed by its content and the tokenizer."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.data.build import PART_BYTES, PROGRESS, build, load_bad_rows
from minimind.data.corpus import CODES, DOCUMENTS, HASHES, META, TOKENS, Corpus, TokenizedFile
from minimind.data.encoding import ConversationRecipe, PreferenceRecipe, Recipe, TextRecipe
from minimind.data.formats import AUTO, RowFormat
from minimind.data.paths import EXTENSIONS, expand_paths
from minimind.data.reader import START, BadRows, bad_row_error, decompressed_size, reporter
from minimind.data.split import hash_texts
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.utils.display import ByteProgress, say
from minimind.utils.files import cache_root, locked, make_folder, read_json, write_json

FORMAT_VERSION = 2
_HASH_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000  # a file changed less than 2 s ago may change again within one clock tick


def open_corpus(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    on_bad_row: str = "error",
    console: Console | None = None,
    part_bytes: int = PART_BYTES,
    form: RowFormat = AUTO,
) -> Corpus:
    """The documents of `paths` (files, folders, globs) as tokens: bos, text, eos, in order.

    New files are tokenized now, with progress on `console` (default: standard error), and stored under `cache_dir`
    (default: $MINIMIND_CACHE, else ~/.cache/minimind). Memory is constant. A build that was killed resumes after its
    last complete part of `part_bytes` of text. If several processes open the same file, one builds and the others wait.
    Names of special tokens in the text are encoded as plain text.

    Raises ValueError, in one line, on a bad row (file:line, unless `on_bad_row` is "skip"), a file without documents, a
    vocabulary of more than 65536 tokens, and a folder that is full or cannot be written.
    """
    recipe = TextRecipe(tokenizer, form)
    return _open(paths, recipe, EXTENSIONS, cache_dir, on_bad_row, console, part_bytes)


def open_conversations(
    paths: Sequence[str | Path],
    encoder: ChatEncoder,
    cache_dir: str | Path | None = None,
    on_bad_row: str = "error",
    console: Console | None = None,
    part_bytes: int = PART_BYTES,
    form: RowFormat = AUTO,
) -> Corpus:
    """The conversations of `paths` as tokens with loss codes; cache and errors as in `open_corpus`.

    A conversation ends with its last assistant turn. Also raises ValueError, naming file:line, on a conversation
    without an assistant turn, an unknown role or field, an empty message, and tools that are not JSON.
    """
    recipe = ConversationRecipe(encoder, form)
    return _open(paths, recipe, (".jsonl",), cache_dir, on_bad_row, console, part_bytes)


def open_preferences(
    paths: Sequence[str | Path],
    encoder: ChatEncoder,
    cache_dir: str | Path | None = None,
    on_bad_row: str = "error",
    console: Console | None = None,
    part_bytes: int = PART_BYTES,
    longest: int | None = None,
    share: bool = True,
    form: RowFormat = AUTO,
) -> Corpus:
    """The preference pairs of `paths` as tokens with loss codes; cache and errors as in `open_corpus`. longest, share:
    as in PreferenceRecipe.

    Also raises ValueError, naming file:line, on a missing side, a malformed message, a side that does not end with the
    assistant, sides that answer different prompts, and sides that are the same.
    """
    recipe = PreferenceRecipe(encoder, longest, share, form)
    return _open(paths, recipe, (".jsonl",), cache_dir, on_bad_row, console, part_bytes)


def _open(
    paths: Sequence[str | Path],
    recipe: Recipe[Any],
    extensions: Sequence[str],
    cache_dir: str | Path | None,
    on_bad_row: str,
    console: Console | None,
    part_bytes: int,
) -> Corpus:
    """Open files with one of `extensions`, which may be followed by .gz or .zst, as `recipe` reads them."""
    console = console or Console(stderr=True)
    reporter("", on_bad_row, None)
    if recipe.vocab_size > 1 << 16:
        raise ValueError(
            f"the tokenizer has {recipe.vocab_size} tokens, but the token cache stores 16-bit numbers; "
            "use a vocabulary of at most 65536"
        )
    root = cache_root(cache_dir)
    files = expand_paths(paths)
    other = next((file for file in files if not _has_extension(file, extensions)), None)
    if other is not None:
        raise ValueError(f"{other}: this kind of data comes as {' or '.join(extensions)}; leave the file out")
    return Corpus.from_files([_open_source(file, recipe, root, on_bad_row, console, part_bytes) for file in files])


def _open_source(
    path: Path, recipe: Recipe[Any], root: Path, on_bad_row: str, console: Console, part_bytes: int
) -> TokenizedFile:
    try:
        stamp = _stamp(path)
        key = _key(path, _content_hash(path, stamp, root, console), recipe)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    folder = root / "tokens" / key
    source = _complete(folder, path)
    if source is None:
        make_folder(folder)
        with locked(folder.parent / f"{key}.lock", f"tokenizing {path.name}", console):
            source = _complete(folder, path) or _built(folder, path, recipe, on_bad_row, console, part_bytes, stamp)
    if source.hashes is None:
        with suppress(OSError, ValueError):  # a read-only cache still has the tokens
            make_folder(folder)
            with locked(folder.parent / f"{key}.lock", f"reading {path.name}", console):
                source = _complete(folder, path) or source
                if source.hashes is None:
                    _add_hashes(folder, path, recipe, console)
                    source = _complete(folder, path) or source
    bad = load_bad_rows(source.meta["bad"])
    if bad.count and on_bad_row == "error":
        raise bad_row_error(path, *bad.first[0])
    if bad.count:
        line, reason = bad.first[0]
        text = f"{path}: {bad.count} bad rows left out, the first at {path}:{line}: {reason}"
        say(console, text)
    return source


def _built(
    folder: Path, path: Path, recipe: Recipe[Any], on_bad_row: str, console: Console, part_bytes: int, stamp: list[int]
) -> TokenizedFile:
    if (folder / META).exists():
        say(console, f"{folder}: damaged; tokenizing the file again")
        for name in (META, PROGRESS, TOKENS, DOCUMENTS, CODES, HASHES):
            (folder / name).unlink(missing_ok=True)
    began = time.monotonic()
    build(folder, path, recipe, on_bad_row, console, part_bytes)
    if _stamp(path) != stamp:
        (folder / META).unlink()
        raise ValueError(f"{path}: changed while it was being tokenized; run again when it is complete")
    source = _complete(folder, path)
    if source is None:
        raise ValueError(f"{folder}: the tokens just written cannot be read back; check the disk")
    done = f"{source.meta['documents']:,} documents, {source.meta['tokens']:,} tokens"
    say(console, f"tokenized {path.name}: {done} in {time.monotonic() - began:.1f} s")
    return source


def _add_hashes(folder: Path, path: Path, recipe: Recipe[Any], console: Console) -> None:
    """Add the hashes that a cache of an earlier version lacks; the tokens and the identity of the data stay."""
    temporary = folder / f".{HASHES}.{os.getpid()}.tmp"
    title = f"reading {path.name} again for copies of documents"
    try:
        with open(temporary, "wb") as file, ByteProgress(console, title, decompressed_size(path)) as shown:
            for document in recipe.read(path, "skip", START, BadRows()):
                file.write(hash_texts([document.text]).tobytes())
                shown.update(document.end.offset)
        os.replace(temporary, folder / HASHES)
    finally:
        temporary.unlink(missing_ok=True)


def _complete(folder: Path, path: Path) -> TokenizedFile | None:
    """The tokenized file in `folder`; None unless it is complete and its arrays have the right sizes."""
    meta = read_json(folder / META)
    try:
        if meta is None or any(os.path.getsize(folder / n) != size for n, size in meta["sizes"].items()):
            return None
        load_bad_rows(meta["bad"])
        return TokenizedFile.open(folder, path, meta)
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _has_extension(path: Path, extensions: Sequence[str]) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith(tuple(extensions))


def _key(path: Path, content_hash: str, recipe: Recipe[Any]) -> str:
    """The name of the cache entry: a hash of the content, the kind of file and the recipe."""
    kind = next(extension for extension in EXTENSIONS if path.name.endswith(extension))
    parts = [FORMAT_VERSION, kind, content_hash, *recipe.key()]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _stamp(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _content_hash(path: Path, stamp: list[int], root: Path, console: Console) -> str:
    """blake2b of the file's bytes, stored under `root` and reused while the file's stamp stays the same."""
    resolved = str(path.resolve())
    memo = root / "hashes" / f"{blake2b(os.fsencode(resolved), digest_size=16).hexdigest()}.json"
    saved = read_json(memo)
    if saved is not None and saved.get("stamp") == stamp and isinstance(saved.get("hash"), str):
        return saved["hash"]
    digest = blake2b(digest_size=32)
    with open(path, "rb") as file, ByteProgress(console, f"checking {path.name}", stamp[0]) as shown:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            shown.update(file.tell())
    if time.time_ns() - max(stamp[1:3]) > _SETTLED_NS and _stamp(path) == stamp:
        with suppress(OSError, ValueError):  # a memo only saves time, and the cache may be read-only
            make_folder(memo.parent)
            write_json(memo, {"path": resolved, "stamp": stamp, "hash": digest.hexdigest()})
    return digest.hexdigest()
