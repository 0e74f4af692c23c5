"""Built-in text for pretraining: the docstrings of the standard library, PyTorch and NumPy, about 8 MB.

The source files are parsed, never imported.
"""

import ast
import importlib.metadata
import importlib.util
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from rich.console import Console

from minimind.utils.display import ByteProgress, say
from minimind.utils.files import cache_root, disk_full, is_disk_full, locked, make_folder, write_atomically

FORMAT_VERSION = 1
PACKAGES = ("numpy", "torch")
MIN_CHARACTERS = 80
# Tests have few docstrings, vendored packages are copies, and site-packages may be inside the library's folder.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor"}
_NAMES = "docstrings of the standard library, PyTorch and NumPy"


def builtin_corpus(cache_dir: str | Path | None = None, console: Console | None = None) -> Path:
    """The path of a .jsonl file of {"text": ...} rows, built at the first call (about 10 s) under `cache_dir`.

    The content depends only on the installed files. `cache_dir` defaults to $MINIMIND_CACHE, else ~/.cache/minimind.
    Raises ValueError if the folder cannot be written or is full, or the installation has no sources.
    """
    console = console or Console(stderr=True)
    folder = cache_root(cache_dir) / "corpus"
    path = folder / f"docstrings-{_key()}.jsonl"
    if path.exists():
        return path
    make_folder(folder)
    with locked(path.with_suffix(".lock"), "building the built-in corpus", console):
        if not path.exists():
            _write(path, collect(_roots(), console), console)
    return path


def collect(roots: Sequence[Path], console: Console) -> list[str]:
    """Distinct docstrings of at least 80 characters under `roots`, in the order of a hash of their text. Files that
    cannot be read or parsed are left out."""
    files = [file for root in roots for file in _python_files(root)]
    texts: set[str] = set()
    done = 0
    total = sum(size for _, size in files)
    with ByteProgress(console, "collecting English text from docstrings", total) as shown:
        for file, size in files:
            texts.update(text for text in _docstrings(file) if len(text) >= MIN_CHARACTERS)
            done += size
            shown.update(done)
    encoded = sorted((blake2b(data).digest(), data) for data in map(_encode, texts) if data)
    return [data.decode() for _, data in encoded]


def _key() -> str:
    versions = [platform.python_version()]
    for package in PACKAGES:
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append("none")
    digest = blake2b(json.dumps([FORMAT_VERSION, *versions]).encode(), digest_size=8).hexdigest()
    return f"python{versions[0]}-{digest}"


def _roots() -> list[Path]:
    """The folders of the standard library and of the packages, which are not imported."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        roots += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return roots


def _python_files(root: Path) -> list[tuple[Path, int]]:
    """(file, bytes) of each source file under `root`, sorted."""
    files = []
    for file in sorted(root.rglob("*.py")):
        if not _LEFT_OUT.intersection(file.relative_to(root).parts[:-1]):
            try:
                files.append((file, file.stat().st_size))
            except OSError:
                continue
    return files


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def _encode(text: str) -> bytes:
    """The text in UTF-8; empty if it has lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""


def _write(path: Path, texts: list[str], console: Console) -> None:
    if not texts:
        raise ValueError(
            "this Python installation has no library sources to take text from; name a file or folder of your own text "
            "as the training data instead"
        )
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    try:
        write_atomically(path, data)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(path.parent, len(data)) from None
        raise
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    say(console, f"built-in corpus: {len(texts):,} documents, {megabytes:.1f} MB of text ({_NAMES}) in {path}")
