"""Expand files, folders and glob patterns, as --data takes them, into a list of data files.

Links to folders are followed, except those that lead back to a folder that contains them. Hidden names (.git, .cache)
are left out unless a pattern spells the dot. Every file is read once, under the first path that names it, even if links
or other spellings name it again. Files that are left out or named twice are reported.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from minimind.utils.display import say

EXTENSIONS = tuple(kind + compression for kind in (".jsonl", ".txt") for compression in ("", ".gz", ".zst"))
_EXPECTED = f"expected one of {' '.join(EXTENSIONS)}"
# Reasons for leaving out an entry.
HIDDEN, OTHER, LOOP, UNREADABLE = "hidden", "of another kind", "leading back to its own folder", "unreadable"


@dataclass
class DataFiles:
    """files: resolved path -> first name; twice: (repeated name, first name); left_out: reason -> entries."""

    files: dict[Path, Path] = field(default_factory=dict)
    twice: list[tuple[Path, Path]] = field(default_factory=list)
    left_out: dict[str, dict[Path, None]] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        first = self.files.setdefault(path.resolve(), path)
        if first is not path:
            self.twice.append((path, first))

    def leave_out(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, {})[path] = None

    def lines(self) -> list[str]:
        """Reports for the user, one line each."""
        lines = []
        if self.left_out:
            parts = [f"{len(paths):,} {reason} ({next(iter(paths))})" for reason, paths in self.left_out.items()]
            lines.append(f"not read: {', '.join(parts)}; {len(self.files):,} files read")
        if self.twice:
            again, first = self.twice[0]
            name = f"{again} again" if again == first else f"{again} is {first}"
            lines.append(f"named more than once and read once: {len(self.twice):,} files, the first: {name}")
        return lines


def expand_paths(patterns: Sequence[str | Path], console: Console | None = None) -> list[Path]:
    """Expand files, folders and glob patterns into files; `console` reports files left out or named twice.

    The order is that of `patterns`, sorted within each. Raises ValueError if a pattern matches nothing, a folder cannot
    be read or has no data file, or a named file has an unknown extension.
    """
    data = find_files(patterns)
    if console is not None:
        for line in data.lines():
            say(console, line)
    return list(data.files.values())


def find_files(patterns: Sequence[str | Path]) -> DataFiles:
    """Like `expand_paths`, but returns the files and the reports instead of printing."""
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise ValueError("no data given; name at least one file, folder or glob pattern")
    data = DataFiles()
    for pattern in patterns:
        for path in _expand_one(str(pattern), data):
            data.add(path)
    return data


def _expand_one(pattern: str, data: DataFiles) -> list[Path]:
    if not pattern:  # Path("") is the current folder
        raise ValueError("an empty name in the data; give files, folders or glob patterns")
    path = Path(pattern).expanduser()
    if os.path.isfile(path):
        if not path.name.endswith(EXTENSIONS):
            raise ValueError(f"{pattern}: unknown kind of file; {_EXPECTED}")
        return [path]
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            raise ValueError(f"{pattern}: cannot be read ({error.strerror}); check its permissions") from None
        files = _data_files(_below(path, data), data)
        if not files:
            raise ValueError(f"{pattern}: no data file in this folder; {_EXPECTED}")
        return files
    matched = sorted(_matches(path, data))
    if not matched:
        raise ValueError(f"{pattern}: no such file, folder or match; check the path given")
    entries, walked = dict[Path, None](), set[Path]()
    for match in matched:
        if not os.path.isdir(match):
            entries[match] = None
        elif walked.isdisjoint(match.parents):
            walked.add(match)
            entries |= dict.fromkeys(_below(match, data))
    files = _data_files(list(entries), data)
    if not files:
        raise ValueError(f"{pattern}: matches no data file, only other files such as {matched[0]}; {_EXPECTED}")
    return files


def _data_files(entries: Sequence[Path], data: DataFiles) -> list[Path]:
    """The entries with a known extension; leaves out the others."""
    files = []
    for entry in entries:
        if not os.path.isfile(entry):  # a dangling link, a socket
            data.leave_out(UNREADABLE, entry)
        elif not entry.name.endswith(EXTENSIONS):
            data.leave_out(OTHER, entry)
        else:
            files.append(entry)
    return files


def _below(folder: Path, data: DataFiles) -> list[Path]:
    """Everything below `folder` except folders, sorted."""
    return sorted(entry for entry in _walk(folder, data) if not os.path.isdir(entry))


def _walk(folder: Path, data: DataFiles, hidden: bool = False, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield every entry below `folder`, each folder before its content. above: the parent folders, resolved."""
    here = folder.resolve()
    above = above | {here, *here.parents}
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        data.leave_out(UNREADABLE, folder)
        return
    for entry in entries:
        path = folder / entry.name
        below = os.path.isdir(path)
        if entry.name.startswith(".") and not hidden:
            data.leave_out(HIDDEN, path)
        elif below and entry.is_symlink() and path.resolve() in above:
            data.leave_out(LOOP, path)
        else:
            yield path
            if below:
                yield from _walk(path, data, hidden, above)


def _matches(pattern: Path, data: DataFiles) -> list[Path]:
    """The entries that a glob pattern matches. "**" matches any number of folders that are not hidden."""
    parts = pattern.parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(str(pattern))]
    first = parts.index("**")
    hidden = any(part.startswith(".") for part in parts[first:])
    matched = []
    for base in map(Path, glob.glob(str(Path(*parts[:first]))) if first else ["."]):
        entries = [base, *_walk(base, data, hidden)] if os.path.isdir(base) else []
        matched += [entry for entry in entries if _fits(entry.relative_to(base).parts, parts[first:])]
    return matched


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a path's names match a pattern's parts. A part must spell the dot to match a hidden name."""
    if not parts or (parts[0] != "**" and not names):
        return not parts and not names
    if names and names[0].startswith(".") and not parts[0].startswith("."):
        return parts[0] == "**" and _fits(names, parts[1:])
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (bool(names) and _fits(names[1:], parts))
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
