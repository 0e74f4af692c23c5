"""Which files --data and its like name: files, folders and glob patterns, by one set of rules for all of them.

Below a folder and in a pattern's "**" links to folders are followed, but for those that lead back to a folder they lie
in; hidden names (.git, .cache) are left out, unless a pattern spells the dot. Every file is read once, under the first
of its names: a link and another spelling of a path are the same file. What is left out and what is named twice is said.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from minimind.utils.progress import say

EXTENSIONS = tuple(kind + packing for kind in (".jsonl", ".txt") for packing in ("", ".gz", ".zst"))
_KNOWN = f"expected one of {' '.join(EXTENSIONS)}"
# Why an entry is left out.
HIDDEN, OTHER, LOOP, UNREADABLE = "hidden", "of another kind", "leading back to its own folder", "unreadable"


@dataclass
class DataFiles:
    """files: by what they really are, under the first name of each; twice: (a further name, the first one); left_out:
    entries by the reason."""

    files: dict[Path, Path] = field(default_factory=dict)
    twice: list[tuple[Path, Path]] = field(default_factory=list)
    left_out: dict[str, dict[Path, None]] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        first = self.files.setdefault(path.resolve(), path)
        if first is not path:
            self.twice.append((path, first))

    def leave(self, kind: str, path: Path) -> None:
        self.left_out.setdefault(kind, {})[path] = None

    def lines(self) -> list[str]:
        """What a reader should know, a line each."""
        said = []
        if self.left_out:
            parts = [f"{len(paths):,} {kind} ({next(iter(paths))})" for kind, paths in self.left_out.items()]
            said.append(f"not read: {', '.join(parts)}; {len(self.files):,} files are")
        if self.twice:
            again, first = self.twice[0]
            name = f"{again} again" if again == first else f"{again} is {first}"
            said.append(f"named more than once and read once: {len(self.twice):,} files, the first: {name}")
        return said


def expand_paths(patterns: Sequence[str | Path], console: Console | None = None) -> list[Path]:
    """Files named by files, folders and glob patterns; what is left out or named twice is said on `console`.

    The order is that of `patterns`, sorted within each. Raises ValueError when a pattern matches nothing, a folder
    holds no file of a known extension or cannot be read, or a named file has an unknown one.
    """
    found = find_files(patterns)
    if console is not None:
        for line in found.lines():
            say(console, line)
    return list(found.files.values())


def find_files(patterns: Sequence[str | Path]) -> DataFiles:
    """`expand_paths`, with what is to be said."""
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise ValueError("no data given; name at least one file, folder or glob pattern")
    found = DataFiles()
    for pattern in patterns:
        for path in _expand_one(str(pattern), found):
            found.add(path)
    return found


def _expand_one(pattern: str, found: DataFiles) -> list[Path]:
    if not pattern:  # Path("") is the current folder: all below it would be data
        raise ValueError("an empty name among the data; give files, folders or glob patterns")
    path = Path(pattern).expanduser()
    if os.path.isfile(path):
        if not path.name.endswith(EXTENSIONS):
            raise ValueError(f"{pattern}: unknown kind of file; {_KNOWN}")
        return [path]
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            raise ValueError(f"{pattern}: cannot be read ({error.strerror}); check its permissions") from None
        files = _of_known_kind(_below(path, found), found)
        if not files:
            raise ValueError(f"{pattern}: no data file in this folder; {_KNOWN}")
        return files
    matched = sorted(_matches(path, found))
    if not matched:
        raise ValueError(f"{pattern}: no such file, folder or match; check the path given")
    entries, walked = dict[Path, None](), set[Path]()
    for match in matched:
        if not os.path.isdir(match):
            entries[match] = None
        elif walked.isdisjoint(match.parents):
            walked.add(match)
            entries |= dict.fromkeys(_below(match, found))
    files = _of_known_kind(list(entries), found)
    if not files:
        raise ValueError(f"{pattern}: matches no data file, only such as {matched[0]}; {_KNOWN}")
    return files


def _of_known_kind(entries: Sequence[Path], found: DataFiles) -> list[Path]:
    files = []
    for entry in entries:
        if not os.path.isfile(entry):  # a link to nothing, a socket
            found.leave(UNREADABLE, entry)
        elif not entry.name.endswith(EXTENSIONS):
            found.leave(OTHER, entry)
        else:
            files.append(entry)
    return files


def _below(folder: Path, found: DataFiles) -> list[Path]:
    """All that is no folder below `folder`, sorted."""
    return sorted(entry for entry in _walk(folder, found) if not os.path.isdir(entry))


def _walk(folder: Path, found: DataFiles, hidden: bool = False, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every entry below `folder`, folders before what is in them. above: the folders that it was reached through."""
    here = folder.resolve()
    above = above | {here, *here.parents}
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        found.leave(UNREADABLE, folder)
        return
    for entry in entries:
        path = folder / entry.name
        below = os.path.isdir(path)
        if entry.name.startswith(".") and not hidden:
            found.leave(HIDDEN, path)
        elif below and entry.is_symlink() and path.resolve() in above:
            found.leave(LOOP, path)
        else:
            yield path
            if below:
                yield from _walk(path, found, hidden, above)


def _matches(pattern: Path, found: DataFiles) -> list[Path]:
    """What a glob pattern matches. "**" is any number of folders, none of them hidden."""
    parts = pattern.parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(str(pattern))]
    first = parts.index("**")
    hidden = any(part.startswith(".") for part in parts[first:])
    matched = []
    for base in map(Path, glob.glob(str(Path(*parts[:first]))) if first else ["."]):
        entries = [base, *_walk(base, found, hidden)] if os.path.isdir(base) else []
        matched += [entry for entry in entries if _fits(entry.relative_to(base).parts, parts[first:])]
    return matched


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a path's names are what a pattern's parts say; a hidden one is where the part spells its dot."""
    if not parts or (parts[0] != "**" and not names):
        return not parts and not names
    if names and names[0].startswith(".") and not parts[0].startswith("."):
        return parts[0] == "**" and _fits(names, parts[1:])
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (bool(names) and _fits(names[1:], parts))
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
