"""Write docs/PERFORMANCE.md, docs/recipe.md and the READMEs' tables from the committed rows of bench/results.

    python bench/performance.py [--check]

No figure on those pages is typed. In the READMEs, only the text between markers is replaced. --check writes nothing.
The exit status is 1 if --check finds a page that differs from the rows, or if a missed target has no reason
(bench/report/targets.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find


from bench.cards.tasks import CardSetting, tasks
from bench.common.command import run
from bench.common.record import RESULTS, ROOT
from bench.report.projections import default_tiles, minimind_zero
from bench.report.readme import blocks
from bench.report.recipe import PAGE as RECIPE_PAGE
from bench.report.recipe import page as recipe_page
from bench.report.rows import Device, devices
from bench.report.tables import sections
from bench.report.targets import CPU, GPU, NEEDS_CARD, UNEXPLAINED, Target, judged, table

PAGE = "docs/PERFORMANCE.md"
READMES = "README.md", "README_zh.md"
RESOURCES = RESULTS / "resources.json"  # python bench/resources.py --arch 86 89 90 --dtype bf16 --json it
REMAINING = """\
Nobody has run this project on a GPU yet. On a machine that has one, with CUDA's nvcc on PATH:

```bash
pip install -e '.[gpu,serve,dev]' liger-kernel pytest-xdist     # builds csrc/ for sm_80, 86, 89 and 90
python bench/card.py --rehearse --all --minutes 60              # every command on a CPU, with the smallest sizes
python bench/card.py --all                                      # all of it; run it again after any interruption
(cd build/card && cp work/card.json work/rows/* ../../bench/results/DEVICE)     # DEVICE: a name of the GPU
python bench/performance.py                                     # these pages, with the new rows
git add bench/results docs README.md README_zh.md && git commit
```

`--data FILE... --chats FILE...` trains on real text instead of the built-in one (`minimind data download pretrain_hq
sft_mini_512`). Tasks run in the order below while their estimates fit `--minutes`. Each is a process of its own and is
stopped after twice its estimate; a task that fails stops no other, and is in the table at the end with the last line of
its log. A task that is done is not repeated. Without `--all`, only the tasks for a quarter of an hour run.

### A quarter of an hour of a GPU without a network

`bench/card.py` runs the most valuable tasks first: does it import, are the kernels right, does pretraining run, how
fast are training and decoding, then other implementations, sanitizers and GRPO (bench/cards/tasks.py).
`bench/card_pack.py` makes a folder to copy to that machine: the committed source, the native operators built here,
wheels of the packages that a machine with Python 3.12, PyTorch, Triton and transformers lacks, and text with its tokens
(33 MB in all).

```bash
# with a network; the working tree must be committed and the native operators built
python bench/card.py --rehearse --minutes 60                # every task on a CPU, with the smallest sizes: minutes
python bench/card_pack.py --check PYTHON                    # build/card-pack, rehearsed in a fresh Python 3.12 with
                                                            # no index and only PYTHON's PyTorch and its requirements
# on the GPU machine
bash card-pack/start.sh --minutes 9 --out results
bash card-pack/start.sh --minutes 4 --before results/card.tar.gz --out results      # later, or on another GPU
```

`results/card.tar.gz` is written after every task and every 20 seconds, so that an interruption loses little: logs,
rows, profiles, and a table of the outcome of each task (`card.md`). The second call runs the tasks that are not done,
first those that have not been tried at its commit; `--part 3 4` and `--only NAME` select. If the machine stays,
`--before` is not needed. The archive's `card.json` and `rows/` belong in bench/results/DEVICE.

`bench/profile.sh` adds the views of nsys and ncu. Two GPUs (`torchrun --nproc-per-node 2 train/pretrain.py`,
docs/scaling.md) and vLLM (docs/export/vllm.md) are not among the tasks."""


@dataclass(frozen=True)
class Args:
    """Write the pages."""

    check: bool = False
    """Write nothing; fail if a page differs from the rows."""


def _targets(targets: Sequence[Target], device: Device) -> list[str]:
    """The targets that have rows of this device."""
    results = judged(targets, device)
    measured = [(target, value) for target, value in results if value is not None]
    if not measured:
        return []
    missing = len(results) - len(measured)
    note = [f"Targets that are not measured here: {missing} of {len(results)}."] if missing else []
    return [f"On {device.name} (`bench/results/{device.folder.name}`):", table(measured, ""), *note]


def page(every: Sequence[Device]) -> str:
    """docs/PERFORMANCE.md."""
    cpus, gpus = [d for d in every if d.is_cpu], [d for d in every if not d.is_cpu]
    parts = [
        "# Performance",
        "Written by `python bench/performance.py` from the rows under bench/results/: no figure here is typed. "
        "**Measured** ones stand under the name of the device that gave them, each with the commit of its row; n is "
        "the number of timed runs, p20 and p80 are their 20th and 80th percentiles. **Projected** ones are "
        "in a section of their own.",
        "## Targets",
        *(part for device in cpus for part in _targets(CPU, device)),
        *(part for device in gpus for part in _targets(GPU, device)),
    ]
    if not gpus:
        parts += ["On a GPU:", table(judged(GPU, None), NEEDS_CARD)]
    parts += ["## Commands that remain to be run on a card", REMAINING, _tasks()]
    parts += ["## Projected: time and cost of MiniMind-Zero", minimind_zero(every)]
    parts += ["## Default tile sizes by architecture", _tiles(every)]
    parts += ["## Measured"]
    for device in every:
        parts += [f"### {device.name}", f"bench/results/{device.folder.name}", *sections(device, "####")]
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    """Wrap paragraphs; leave tables, headings and code as they are."""
    fenced = part.split("```")
    for i in range(0, len(fenced), 2):
        paragraphs = fenced[i].split("\n\n")
        fenced[i] = "\n\n".join(
            p if p.startswith(("|", "#", "\n")) else fill(p, 120, break_on_hyphens=False, break_long_words=False)
            for p in paragraphs
        )
    return "```".join(fenced)


def _tasks() -> str:
    setting = CardSetting(False, Path())
    quick, every = tasks(setting), tasks(setting, everything=True)
    lines = [f"{task.minutes:4g} min  {task.name}" for task in every]
    lines.insert(len(quick), "          with --all:")
    minutes, all_minutes = (sum(task.minutes for task in group) for group in (quick, every))
    lines.append(f"{minutes:4.3g} min  in all, {all_minutes:g} with --all, estimated for an H200 and not measured")
    return "```text\n" + "\n".join(lines) + "\n```"


def _tiles(every: Sequence[Device]) -> str:
    head = (
        "Chosen for sm_80 and newer from the resource report and arithmetic; an entry for sm_90 where its shared "
        "memory holds larger tiles of a matrix product. None is measured until a row of tuning.csv says so: "
        "`python bench/kernels.py --tune OP` on a card."
    )
    return f"{head}\n\n{default_tiles(every, RESOURCES)}"


def with_blocks(text: str, texts: dict[str, str], name: str) -> str:
    """A README with the text between its markers replaced. ValueError for a marker without a block or a block without
    markers."""
    for block, content in texts.items():
        begin, end = f"<!-- generated: {block} -->", f"<!-- end: {block} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: needs {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    unknown = set(re.findall(r"<!-- generated: (\w+) -->", text)) - texts.keys()
    if unknown:
        raise ValueError(f"{name}: no code makes the block {', '.join(sorted(unknown))}")
    return text


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Path -> text of every page."""
    every = devices()
    texts_of = {root / PAGE: page(every), root / RECIPE_PAGE: recipe_page()}
    texts = blocks(every)
    for language, name in enumerate(READMES):
        path = root / name
        own = {block: words[language] for block, words in texts.items()}
        texts_of[path] = with_blocks(path.read_text(encoding="utf-8"), own, name)
    return texts_of


def main(args: Args) -> int:
    """The exit status."""
    texts, wrong = pages(), []
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            name = path.relative_to(ROOT)
            wrong.append(f"{name}: differs from the rows of bench/results; run python bench/performance.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    missed = texts[ROOT / PAGE].count(UNEXPLAINED)
    if missed:
        wrong.append(f"{missed} targets were missed and {UNEXPLAINED}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main, Args, __doc__)
