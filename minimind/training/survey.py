"""--plan: what a run would be, without training and without a run folder.

The stage's own script is run on a few megabytes of the data's rows, with the data's size told beside them, up to the
point where it would train; so that what it would choose is what the plan says. There `estimate.py` counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from minimind.data.mixture import parse_part
from minimind.data.paths import expand_paths
from minimind.data.sampling import FileSample, sample_rows
from minimind.training.arguments import StageArgs
from minimind.training.estimate import DataSize, Estimate, PlanOnly
from minimind.training.parallel import world_size
from minimind.training.parts import NamedFiles

SAMPLE_BYTES = 16 << 20
_LEAST_BYTES = 1 << 16  # of a file, whatever its share
Args = TypeVar("Args", bound=StageArgs)


def survey(main: Callable[[Args, Console], bool], args: Args) -> Estimate:
    """The plan of what `main` would do with `args`. Raises ValueError as it does."""
    if world_size() > 1:
        raise ValueError("--plan: one process counts for all; start it with python instead of torchrun")
    builtin = not args.data or any(name.startswith("builtin:") for name in args.data)
    if args.plan_gb is not None and builtin:
        raise ValueError("--plan-gb: goes with files of --data, whose rows it takes as an example")
    with TemporaryDirectory(prefix="minimind-plan-") as folder:
        sample = None if builtin else DataSurvey.of(args, Path(folder))
        read = sample is not None and not sample.source.whole
        taken = dataclasses.replace(args, **sample.flags(args, Path(folder))) if sample and read else args
        try:
            main(taken, Console(quiet=True))
        except PlanOnly as planned:
            return planned.estimate if sample is None else planned.estimate.about(sample.source)
        except ValueError as problem:
            raise ValueError(_renamed(str(problem), sample)) from None
    raise AssertionError("a stage came to its end without training")


@dataclass(frozen=True)
class DataSurvey:
    """entries: --data with the files' samples in place of the files; files: where each lies, and which it is of."""

    entries: tuple[str, ...]
    files: tuple[tuple[Path, Path], ...]
    source: DataSize

    @classmethod
    def of(cls, args: StageArgs, folder: Path) -> DataSurvey:
        parts = [parse_part(entry) for entry in args.data]
        groups = [expand_paths([part.path]) for part in parts]
        size = sum(path.stat().st_size for group in groups for path in group)
        least = min(_LEAST_BYTES, SAMPLE_BYTES // max(1, sum(map(len, groups))))
        entries, files, taken = [], [], list[FileSample]()
        for number, (entry, part, group) in enumerate(zip(args.data, parts, groups, strict=True)):
            place = folder / str(number) / Path(part.path).name
            for i, path in enumerate(group):
                name = path.name.removesuffix(".gz").removesuffix(".zst")
                copy = place / f"{i:04}" / name if len(group) > 1 else place.parent / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                limit = max(least, SAMPLE_BYTES * path.stat().st_size // max(1, size))
                try:
                    taken.append(sample_rows(path, copy, limit))
                except OSError as error:
                    raise ValueError(f"--data {path}: cannot be read ({error.strerror or error})") from None
                files.append((copy, path))
            entries.append(str(place if len(group) > 1 else files[-1][0]) + entry[len(part.path) :])
        return cls(tuple(entries), tuple(files), _source(taken, args.plan_gb))

    def flags(self, args: Any, folder: Path) -> dict[str, Any]:
        """The flags of `args` that change: what is read, and how many times as much there is; held-out data are left
        out, as nothing is learnt from them."""
        changed: dict[str, Any] = {"data": self.entries, "scale": self.source.scale}
        changed |= {"on_bad_row": "skip", "cache_dir": str(folder / "cache")}
        heldout = getattr(args, "heldout_data", ())
        if heldout:
            changed |= {"heldout_data": ()} | ({"heldout": 0.0} if NamedFiles.of(args.data, heldout).heldout else {})
        return changed


def _source(taken: Sequence[FileSample], plan_gb: float | None) -> DataSize:
    total, sizes = sum(part.total for part in taken), np.concatenate([part.sizes for part in taken])
    if not sizes.sum():
        raise ValueError("--data: no rows in these files")
    size = total if plan_gb is None else plan_gb * 1e9
    whole = all(part.whole for part in taken) and plan_gb is None
    return DataSize(round(size), sizes, 1.0 if whole else size / float(sizes.sum()), whole, plan_gb is not None)


def _renamed(text: str, sample: DataSurvey | None) -> str:
    """With the user's files in place of their samples; the longest name first, as one may begin another."""
    files = sample.files if sample else ()
    for copy, path in sorted(files, key=lambda pair: -len(str(pair[0]))):
        text = text.replace(str(copy), str(path))
    return text
