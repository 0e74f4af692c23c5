"""docs/PERFORMANCE.md, and the tables of README.md and README_zh.md, from the committed rows of bench/results.

    python bench/performance.py [--check]

No figure on those pages is typed: the README's stand between markers, the rest of it is left alone. --check writes
nothing and fails where a page is not what the rows say. The exit status is 1 then, and where a target was missed whose
reason nobody has given (bench/report/targets.py).
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


from bench.cards.slices import slices
from bench.report.projections import default_tiles, minimind_zero
from bench.report.readme import blocks
from bench.report.rows import RESULTS, Device, devices
from bench.report.tables import sections
from bench.report.targets import CPU, GPU, NEEDS_CARD, UNEXPLAINED, judged, table
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]
PAGE = "docs/PERFORMANCE.md"
READMES = "README.md", "README_zh.md"
RESOURCES = RESULTS / "resources.json"  # python bench/resources.py --arch 86 89 90 --dtype bf16 --json it
REMAINING = """\
Nobody has run this project on a GPU yet. On a machine that has one, with CUDA's nvcc on PATH:

```bash
pip install -e '.[gpu,serve,dev]' liger-kernel pytest-xdist     # builds csrc/ for sm_80, 86, 89 and 90
python bench/campaign.py --smoke                                # every command at its smallest; rows are thrown away
python bench/campaign.py                                        # all of it; run it again after any interruption
python bench/performance.py                                     # these pages, with the new rows
git add bench/results docs README.md README_zh.md && git commit
```

`--data FILE... --chats FILE...` trains the end-to-end run and the throughput slices on real text instead of the
built-in one (`minimind data download pretrain_hq sft_mini_512`). Where a card is lent for minutes at a time,
`--minutes 9` ends before ten are over: slices are begun in the order below while their estimate fits, what is cut off
is run again, and what passed at the commit is not. A slice that fails stops no other, and is named at the end with the
last line of its log.

### A quarter of an hour of a card without a network

`bench/card.py` asks the most valuable questions first: does it import, are the kernels right, does pretraining run, how
fast are training and decoding, then peers, sanitizers and GRPO (bench/cards/questions.py). Each is a process of its
own, cut off after twice its estimate; none needs another's success. `bench/card_pack.py` makes the folder that travels:
the committed source, the native operators as they are built here, wheels of what a machine with Python 3.12, PyTorch,
Triton and transformers lacks, and text with its tokens (33 MB in all).

```bash
# where there is a network; the working tree must be committed and the native operators built
python bench/card.py --rehearse --minutes 60                # every question on a CPU, as small as it goes: minutes
python bench/card_pack.py --check PYTHON                    # build/card-pack, rehearsed in a fresh Python 3.12 with
                                                            # no index and PYTHON's PyTorch and its company alone
# on the card
bash card-pack/start.sh --minutes 9 --out results
bash card-pack/start.sh --minutes 4 --before results/card.tar.gz --out results      # later, or on another card
```

`results/card.tar.gz` is written anew after every question and every 20 seconds, so that a cut leaves what was done:
logs, rows, profiles, and a table of what became of each question (`card.md`). The second call asks what is not done,
first what was not tried at its commit; `--part 3 4` and `--only NAME` choose. Where the machine stays, `--before` is
not needed. The archive's `rows/` belongs into bench/results/DEVICE. The campaign runs there as well, once `start.sh`
has unpacked the source and the wheels:

```bash
cd /tmp/minimind-card/source
export PYTHONPATH=$PWD:/tmp/minimind-card/site MINIMIND_COMMIT=...      # what card-pack/commit says
python bench/campaign.py --minutes 9; tar czf results.tgz bench/results
```

`bench/profile.sh` adds what nsys and ncu see. Still by hand, and in no slice: two GPUs (`torchrun --nproc-per-node 2
train/pretrain.py`, docs/scaling.md), vLLM (docs/export/vllm.md)."""


@dataclass(frozen=True)
class Args:
    """Write the pages."""

    check: bool = False
    """Write nothing; fail where a page is not what the rows say."""


def page(found: Sequence[Device]) -> str:
    """docs/PERFORMANCE.md."""
    cpus, gpus = [d for d in found if d.is_cpu], [d for d in found if not d.is_cpu]
    parts = [
        "# Performance",
        "Written by `python bench/performance.py` from the rows under bench/results/: no figure here is typed. "
        "**Measured** ones stand under the name of the device that gave them, each with the commit of its row; n is "
        "the number of timed runs, p20 and p80 what 20 and 80 of a hundred of them stay below. **Projected** ones are "
        "in a section of their own.",
        "## Targets",
        *(part for device in cpus for part in (f"On {device.name}:", table(judged(CPU, device), "not measured here"))),
        *(part for device in gpus for part in (f"On {device.name}:", table(judged(GPU, device), "not measured here"))),
    ]
    if not gpus:
        parts += ["On a GPU:", table(judged(GPU, None), NEEDS_CARD)]
    parts += ["## Commands that remain to be run on a card", REMAINING, _slices()]
    parts += ["## Projected: time and cost of MiniMind-Zero", minimind_zero(found)]
    parts += ["## Default tile sizes by architecture", _tiles(found)]
    parts += ["## Measured"]
    for device in found:
        parts += [f"### {device.name}", f"bench/results/{device.folder.name}", *sections(device, "####")]
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    """Paragraphs in lines; tables, headings and code as they are."""
    fenced = part.split("```")
    for i in range(0, len(fenced), 2):
        paragraphs = fenced[i].split("\n\n")
        fenced[i] = "\n\n".join(
            p if p.startswith(("|", "#", "\n")) else fill(p, 120, break_on_hyphens=False, break_long_words=False)
            for p in paragraphs
        )
    return "```".join(fenced)


def _slices() -> str:
    lines = [f"{piece.minutes:4g} min  {piece.name}" for piece in slices(cuda=True)]
    total = sum(piece.minutes for piece in slices(cuda=True))
    lines.append(f"{total:4g} min  in all, estimated for an H100 and not measured")
    return "```text\n" + "\n".join(lines) + "\n```"


def _tiles(found: Sequence[Device]) -> str:
    head = (
        "Chosen for sm_80 and newer from the resource report and arithmetic; an entry for sm_90 where its shared "
        "memory holds larger tiles of a matrix product. None is measured until a row of tuning.csv says so: "
        "`python bench/kernels.py --tune OP` on a card."
    )
    return f"{head}\n\n{default_tiles(found, RESOURCES)}"


def with_blocks(text: str, texts: dict[str, str], name: str) -> str:
    """A README with what stands between its markers replaced. ValueError for a marker without its block, or the other
    way round."""
    for block, content in texts.items():
        begin, end = f"<!-- generated: {block} -->", f"<!-- end: {block} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: needs {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    unknown = set(re.findall(r"<!-- generated: (\w+) -->", text)) - texts.keys()
    if unknown:
        raise ValueError(f"{name}: nothing makes the block {', '.join(sorted(unknown))}")
    return text


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every page as the rows have it."""
    found = devices()
    made = {root / PAGE: page(found)}
    texts = blocks(found)
    for language, name in enumerate(READMES):
        path = root / name
        own = {block: words[language] for block, words in texts.items()}
        made[path] = with_blocks(path.read_text(encoding="utf-8"), own, name)
    return made


def main(args: Args) -> int:
    """The exit status."""
    made, wrong = pages(), []
    for path, text in made.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            wrong.append(f"{path.relative_to(ROOT)}: not what bench/results says; run python bench/performance.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    missed = made[ROOT / PAGE].count(UNEXPLAINED)
    if missed:
        wrong.append(f"{missed} targets were missed and {UNEXPLAINED}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        status = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)
