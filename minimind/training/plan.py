"""--plan: the length, memory and hours of a run, without training and without a run folder.

The stage's own script runs on a few megabytes of sampled rows, knowing the size of all data, up to the point where it
would train; so it makes exactly the choices that the run would make. Then estimate.py computes the cost.

A file is divided into equal parts, and one stretch is read at a random place of each. The sample has the rows whose
first byte lies in a stretch, so that every row is equally likely, long or short. A compressed file is sampled from its
beginning only.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar

import numpy as np
import zstandard
from rich.console import Console

from minimind.data.mixture import parse_part
from minimind.data.paths import expand_paths
from minimind.training.arguments import StageArgs
from minimind.training.data_split import NamedFiles
from minimind.training.parallel import world_size

SAMPLE_BYTES = 16 << 20
_LEAST_BYTES = 1 << 16  # of a file, whatever its share
_GROUPS = 32  # groups of consecutive documents, whose variance gives a sample's error
_STRETCHES = 64  # places of a large file to sample
_LEAST_STRETCH = 1 << 14  # bytes of a stretch
_AHEAD = 1 << 14  # compressed bytes read at once; all of them count as used
Args = TypeVar("Args", bound=StageArgs)


class PlanOnly(Exception):  # noqa: N818 - no error
    """Raised in place of training by a stage under --plan."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__("planned")
        self.estimate = estimate


def survey(main: Callable[[Args, Console], bool], args: Args) -> Estimate:
    """The plan of the run that main(args, console) would do. Raises ValueError as `main` does."""
    if world_size() > 1:
        raise ValueError("--plan: one process counts for all; start it with python instead of torchrun")
    builtin = not args.data or any(name.startswith("builtin:") for name in args.data)
    if args.plan_gb is not None and builtin:
        raise ValueError("--plan-gb: goes with files of --data, whose rows it takes as an example")
    with TemporaryDirectory(prefix="minimind-plan-") as folder:
        sample = None if builtin else DataSample.from_files(args, Path(folder))
        partly = sample is not None and not sample.source.whole
        sampled_args = dataclasses.replace(args, **sample.flags(args, Path(folder))) if sample and partly else args
        try:
            main(sampled_args, Console(quiet=True))
        except PlanOnly as planned:
            return planned.estimate if sample is None else planned.estimate.with_source(sample.source)
        except ValueError as problem:
            raise ValueError(_with_real_paths(str(problem), sample)) from None
    raise AssertionError("a stage came to its end without training")


@dataclass(frozen=True)
class DataSource:
    """The size of --data. bytes: of its text; sizes: int64, bytes of each row that was read; scale: the size of all
    data as a multiple of what was read; whole: whether all was read; declared: whether --plan-gb gave the bytes."""

    bytes: int
    sizes: np.ndarray
    scale: float
    whole: bool
    declared: bool


@dataclass(frozen=True)
class DataSample:
    """Sampled rows of --data. entries: --data with the samples in place of the files; files: (sample, file) pairs."""

    entries: tuple[str, ...]
    files: tuple[tuple[Path, Path], ...]
    source: DataSource

    @classmethod
    def from_files(cls, args: StageArgs, folder: Path) -> DataSample:
        """Sample every file of --data, in proportion to its size, into `folder`."""
        parts = [parse_part(entry) for entry in args.data]
        groups = [expand_paths([part.path]) for part in parts]
        size = sum(path.stat().st_size for group in groups for path in group)
        least = min(_LEAST_BYTES, SAMPLE_BYTES // max(1, sum(map(len, groups))))
        entries, files, samples = [], [], list[FileSample]()
        for number, (entry, part, group) in enumerate(zip(args.data, parts, groups, strict=True)):
            place = folder / str(number) / Path(part.path).name
            for i, path in enumerate(group):
                name = path.name.removesuffix(".gz").removesuffix(".zst")
                copy = place / f"{i:04}" / name if len(group) > 1 else place.parent / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                limit = max(least, SAMPLE_BYTES * path.stat().st_size // max(1, size))
                try:
                    samples.append(sample_rows(path, copy, limit))
                except OSError as error:
                    raise ValueError(f"--data {path}: cannot be read ({error.strerror or error})") from None
                files.append((copy, path))
            entries.append(str(place if len(group) > 1 else files[-1][0]) + entry[len(part.path) :])
        return cls(tuple(entries), tuple(files), _source(samples, args.plan_gb))

    def flags(self, args: Any, folder: Path) -> dict[str, Any]:
        """The flags to change so that a stage reads the sample: the files, the scale and the cache; held-out files are
        left out, as they are not trained on."""
        changed: dict[str, Any] = {"data": self.entries, "scale": self.source.scale}
        changed |= {"on_bad_row": "skip", "cache_dir": str(folder / "cache")}
        heldout = getattr(args, "heldout_data", ())
        if heldout:
            unnamed = NamedFiles.from_flags(args.data, heldout).heldout
            changed |= {"heldout_data": ()} | ({"heldout": 0.0} if unnamed else {})
        return changed


def _source(samples: Sequence[FileSample], plan_gb: float | None) -> DataSource:
    total, sizes = sum(part.total for part in samples), np.concatenate([part.sizes for part in samples])
    if not sizes.sum():
        raise ValueError("--data: no rows in these files")
    size = total if plan_gb is None else plan_gb * 1e9
    whole = all(part.whole for part in samples) and plan_gb is None
    return DataSource(round(size), sizes, 1.0 if whole else size / float(sizes.sum()), whole, plan_gb is not None)


def _with_real_paths(text: str, sample: DataSample | None) -> str:
    """`text` with the user's files in place of their samples; longest first, as one name may begin another."""
    files = sample.files if sample else ()
    for copy, path in sorted(files, key=lambda pair: -len(str(pair[0]))):
        text = text.replace(str(copy), str(path))
    return text


@dataclass(frozen=True)
class DataFigures:
    """The training data, without the held-out part.

    documents: in a pass; tokens: in a pass, as rows hold them; error, documents_error: two standard errors as a share,
    0 where all was read. p50, p95, p99, longest: tokens of a document. cut, dropped: shares of the documents that do
    not fit into a row whole, and that are left out; in_pieces: whether cut documents are learnt to their end. bytes,
    read_bytes: of the text, and of the part that was read. lengths: int64, tokens of the documents that were read.
    """

    documents: int
    tokens: int
    p50: int
    p95: int
    p99: int
    longest: int
    cut: float
    dropped: float
    in_pieces: bool = False
    error: float = 0.0
    documents_error: float = 0.0
    bytes: int | None = None
    read_bytes: int | None = None
    declared: bool = False
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def lines(self, noun: str) -> list[str]:
        documents_error, error = (
            f" ±{error:.1%}" if self.error else "" for error in (self.documents_error, self.error)
        )
        lines = []
        if self.error and self.bytes is not None and self.read_bytes is not None:
            origin = "as --plan-gb says" if self.declared else "from all over"
            lines.append(
                f"data: {self.bytes / 1e9:.3g} GB, of which {self.read_bytes / 1e6:.3g} MB were read, {origin}; "
                "figures below are extrapolated from them, ± two standard errors"
            )
        longest = f"longest {'read ' if self.error else ''}{self.longest:,}"
        lines.append(
            f"{noun}: {spell_count(self.documents)}{documents_error}, {spell_count(self.tokens)} tokens a pass{error}; "
            f"tokens of one: p50 {self.p50:,}, p95 {self.p95:,}, p99 {self.p99:,}, {longest}"
        )
        return lines


@dataclass(frozen=True)
class CardFigures:
    """The run on a known GPU. micro_tokens: of a forward and backward; bytes: of the GPU's memory; hours: projected."""

    name: str
    utilisation: float
    micro_tokens: int
    bytes: int
    fits: bool
    hours: float

    def line(self) -> str:
        misfit = "" if self.fits else ", which does not fit"
        return (
            f"  {self.name} at {self.utilisation:.0%}: {spell_hours(self.hours)}; {self.bytes / 2**30:.1f} GiB with "
            f"{self.micro_tokens:,} tokens at once{misfit}"
        )


@dataclass(frozen=True)
class Estimate:
    """A plan. what: the noun for documents; tokens: of the whole run, padding included, in reinforcement learning an
    upper bound; flops: of the run; measured: how the hours on this machine were measured, empty where they were not;
    notes: what was chosen and why."""

    stage: str
    preset: str
    parameters: int
    active: int
    trained: int
    what: str
    data: DataFigures
    row: int
    rows: int
    fill: float
    epochs: float
    steps: int
    step_tokens: int
    micro_tokens: int
    tokens: int
    optimizer: str
    peak_lr: float
    schedule: str
    flops_per_token: float
    flops: float
    device: str
    measured: str
    measured_hours: float
    cards: tuple[CardFigures, ...]
    notes: tuple[str, ...] = ()

    def with_source(self, source: DataSource) -> Estimate:
        """The estimate with the size of its data, and with standard errors where only a part was read."""
        sizes: dict[str, Any] = {"bytes": source.bytes, "read_bytes": int(source.sizes.sum())}
        if not source.whole:
            lengths = self.data.lengths
            sizes["error"] = relative_error(lengths, source.sizes)
            sizes["documents_error"] = relative_error(np.ones_like(lengths), source.sizes)
        data = dataclasses.replace(self.data, **sizes, declared=source.declared)
        return dataclasses.replace(self, data=data)

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["data"].pop("lengths")
        return values

    def lines(self) -> list[str]:
        trained = "" if self.trained == self.parameters else f", {self.trained / 1e6:.3f}M of them trained"
        size = f"{self.parameters / 1e6:.1f}M parameters ({self.active / 1e6:.1f}M active){trained}"
        step = f" of {self.step_tokens:,} tokens" if self.step_tokens else ""
        here = f"this machine, {self.device}: {spell_hours(self.measured_hours)}, {self.measured}"
        return [
            f"plan of {self.stage}, {self.preset}, {size}: nothing is trained, no run folder is made",
            *self.data.lines(self.what),
            *([self._rows()] if self.rows else []),
            f"run: passes {self.epochs:.3g}, steps {self.steps:,}{step}; {spell_count(self.tokens)} tokens"
            f"{'' if self.rows else ' at most, prompts included'}",
            f"optimizer: {self.optimizer}, peak rate {self.peak_lr:g}, {self.schedule}",
            *(["choices that depend on the data, made from the rows read:"] if self.data.error and self.notes else []),
            *self.notes,
            f"compute: {self.flops_per_token / 1e6:,.0f} MFLOP a token, {self.flops:.2e} FLOP in all",
            *([here] if self.measured else []),
            "projected, not measured, from an assumed share of each GPU's bf16 rate:",
            *(card.line() for card in self.cards),
        ]

    def _rows(self) -> str:
        data = self.data
        fates = f"{data.cut:.2%} of the {self.what} are cut, {data.dropped:.2%} left out"
        if data.in_pieces:
            fates = f"{data.cut:.2%} of the {self.what} are longer and cut into pieces, all of which are trained on"
        return f"rows: --seq-len {self.row}, {self.rows:,} a pass, {self.fill:.1%} filled; {fates}"


def relative_error(lengths: np.ndarray, sizes: np.ndarray) -> float:
    """Two standard errors, as a share, of a number of tokens extrapolated by bytes: the ratio estimator over groups of
    consecutive documents of `lengths` tokens and rows of `sizes` bytes."""
    groups = min(_GROUPS, len(lengths), len(sizes))
    if groups < 2:
        return 1.0
    tokens, weight = (
        np.array([part.sum() for part in np.array_split(values.astype(np.float64), groups)])
        for values in (lengths, sizes)
    )
    rest = tokens - tokens.sum() / weight.sum() * weight
    return float(2 * math.sqrt(groups) * rest.std(ddof=1) / tokens.sum())


def spell_count(number: float) -> str:
    """`number` to three digits, with B or M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def spell_hours(hours: float) -> str:
    """`hours` in hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


@dataclass(frozen=True)
class FileSample:
    """total: bytes of the whole text, estimated if it is compressed; sizes: int64 [rows], the bytes of each sampled
    row, in order; whole: whether the sample has all rows."""

    total: float
    sizes: np.ndarray
    whole: bool


def sample_rows(path: Path, out: Path, limit: int, seed: int = 0) -> FileSample:
    """Write a sample of about `limit` bytes of the rows of `path` to `out`, uncompressed; all rows of a smaller
    file."""
    packed = path.name.endswith((".gz", ".zst"))
    with open(path, "rb") as file, open(out, "wb") as target:
        size = path.stat().st_size
        rows = _first(file, path, limit) if packed else _stretches(file, size, limit, seed)
        sizes = []
        for row in rows:
            target.write(row if row.endswith(b"\n") else row + b"\n")
            sizes.append(len(row))
        taken = sum(sizes)
        if not packed:
            return FileSample(size, np.array(sizes, np.int64), taken >= size)
        whole = taken < limit
        total = taken if whole else taken * size / max(1, file.tell())
        return FileSample(total, np.array(sizes, np.int64), whole)


class _SmallReads:
    """A file that is read `_AHEAD` bytes at a time: since Python 3.12 gzip asks for 128 KiB."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, _AHEAD))


def _first(file: IO[bytes], path: Path, limit: int) -> Iterator[bytes]:
    """The first rows of a compressed file."""
    if path.name.endswith(".gz"):
        raw: Any = gzip.GzipFile(fileobj=_SmallReads(file), mode="rb")  # type: ignore[call-overload]
    else:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        raw = unpacker.stream_reader(file, _AHEAD, read_across_frames=True, closefd=False)
    stream = io.BufferedReader(raw)
    taken = 0
    while taken < limit and (row := stream.readline()):
        taken += len(row)
        yield row
    stream.detach()


def _stretches(file: IO[bytes], size: int, limit: int, seed: int) -> Iterator[bytes]:
    if size <= limit:
        yield from file
        return
    count = max(1, min(_STRETCHES, limit // _LEAST_STRETCH))
    length, part = limit // count, size / count
    places = np.random.default_rng(seed).random(count)
    empty = True
    for i, place in enumerate(places.tolist()):
        begin = int(i * part + place * (part - length))
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()
        while file.tell() < begin + length and (row := file.readline()):
            empty = False
            yield row
    if empty:  # rows longer than the parts
        file.seek(0)
        yield file.readline()
