"""Plan the training runs for upstream's files, from sample rows scaled to the files' sizes.

    python bench/plans.py --samples FOLDER

FOLDER holds sample rows in upstream's formats: sft.jsonl, dpo.jsonl and rlaif.jsonl. Rows of the other files are made
from them as upstream's README describes those files (`MADE`). Nothing is trained and no time is measured. The plans are
written to bench/results/plans.json, their tables to docs/plans.md.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

from rich.console import Console

from bench.common.command import run
from bench.common.record import RESULTS, ROOT
from bench.report.rows import markdown
from minimind.training.plan import spell_count, spell_hours, survey
from minimind.utils.display import say

PRESETS = ("minimind2-small", "minimind2")
Message = dict[str, str]


@dataclass(frozen=True)
class File:
    """One of upstream's files: its stage, its size, the sample file and the way of making rows, and flags of the
    stage."""

    name: str
    stage: str
    gigabytes: float
    source: str
    made: str = "as they are"
    flags: dict[str, Any] = field(default_factory=dict)


# Sizes from upstream's README when these files were current (2025); dpo.jsonl had two versions.
FILES = (
    File("pretrain_hq.jsonl", "pretrain", 1.6, "sft.jsonl", "texts of up to 512 characters"),
    File("sft_mini_512.jsonl", "sft", 1.2, "sft.jsonl"),
    File("sft_2048.jsonl", "sft", 9.0, "sft.jsonl", "conversations of up to 2048 characters"),
    File("r1_mix_1024.jsonl", "reason", 0.34, "sft.jsonl", "answers as thoughts of others"),
    File("dpo.jsonl", "dpo", 0.9, "dpo.jsonl"),
    File("dpo.jsonl, the later one", "dpo", 0.055, "dpo.jsonl"),
    File("dpo.jsonl", "reward", 0.9, "dpo.jsonl"),
    File("lora_medical.jsonl", "lora", 0.034, "sft.jsonl"),
    File("rlaif-mini.jsonl", "grpo", 0.001, "rlaif.jsonl", flags={"reward": ("repetition",)}),
    File("rlaif-mini.jsonl", "ppo", 0.001, "rlaif.jsonl", flags={"reward": ("repetition",)}),
    File("rlaif-mini.jsonl", "spo", 0.001, "rlaif.jsonl", flags={"reward": ("repetition",)}),
)


@dataclass(frozen=True)
class Args:
    """Plan the training runs for upstream's files."""

    samples: str
    """Folder with sft.jsonl, dpo.jsonl and rlaif.jsonl."""
    preset: tuple[str, ...] = PRESETS
    """Model shapes."""
    cache_dir: str | None = None
    """Folder of tokenized data; None: $MINIMIND_CACHE or ~/.cache/minimind."""
    results: str = str(RESULTS / "plans.json")
    """File of the plans."""
    page: str = str(ROOT / "docs" / "plans.md")
    """File of the tables."""


def main(args: Args, console: Console | None = None) -> None:
    console = console or Console(stderr=True)
    plans = []
    with TemporaryDirectory(prefix="minimind-plans-") as folder:
        for file in FILES:
            data = make(file, Path(args.samples), Path(folder))
            for preset in args.preset:
                say(console, f"planning {file.stage} of {file.name}, {preset}")
                plans.append({"file": file.name, "made": file.made} | plan(file, data, preset, args.cache_dir))
    Path(args.results).write_text(json.dumps(plans, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(args.page).write_text(page(plans), encoding="utf-8")


def plan(file: File, data: Path, preset: str, cache_dir: str | None) -> dict[str, Any]:
    """The figures of a stage's --plan, with the defaults that it has on a GPU."""
    names = runpy.run_path(str(ROOT / "train" / f"{file.stage}.py"))
    flags: dict[str, Any] = {"plan": True, "plan_gb": file.gigabytes, "plan_gpu": True, "plan_measure": False}
    flags |= {"data": (str(data),), "preset": preset, "cache_dir": cache_dir, "device": "cpu", **file.flags}
    return survey(names["main"], names["Args"](**flags)).figures()


def make(file: File, samples: Path, folder: Path) -> Path:
    """A data file with rows like those of `file`."""
    source = samples / file.source
    if file.made not in MADE:
        return source
    lines = source.read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["conversations"] for line in lines]
    out = folder / file.name
    with out.open("w", encoding="utf-8") as target:
        for row in MADE[file.made](conversations):
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
    return out


def texts(conversations: list[list[Message]]) -> Iterator[dict[str, Any]]:
    """Texts of up to 512 characters, joined from the messages of consecutive conversations."""
    for messages in joined(conversations, 512):
        yield {"text": "\n".join(m["content"] for m in messages)}


def longer(conversations: list[list[Message]]) -> Iterator[dict[str, Any]]:
    """Conversations of up to 2,048 characters, joined from consecutive ones."""
    for messages in joined(conversations, 2048):
        yield {"conversations": messages}


def joined(conversations: list[list[Message]], limit: int) -> Iterator[list[Message]]:
    """Consecutive conversations joined as long as they have at most `limit` characters."""
    current: list[Message] = []
    for messages in conversations:
        if current and size_of(current) + size_of(messages) > limit:
            yield current
            current = []
        current = current + messages
    yield current


def thoughts(conversations: list[list[Message]]) -> Iterator[dict[str, Any]]:
    """The first exchange of a conversation with the next one's first answer as its reasoning, up to 1,024
    characters."""
    for messages, others in pairwise(conversations):
        question, answer, thought = messages[0], messages[1], others[1]
        if size_of([question, answer, thought]) <= 1024:
            content = f"<think>\n{thought['content']}\n</think>\n<answer>\n{answer['content']}\n</answer>"
            yield {"conversations": [question, {"role": "assistant", "content": content}]}


MADE: dict[str, Callable[[list[list[Message]]], Iterator[dict[str, Any]]]] = {
    "texts of up to 512 characters": texts,
    "conversations of up to 2048 characters": longer,
    "answers as thoughts of others": thoughts,
}


def size_of(messages: list[Message]) -> int:
    """Characters of all messages."""
    return sum(len(m["content"]) for m in messages)


def page(plans: list[dict[str, Any]]) -> str:
    """The text of docs/plans.md."""
    cards = ", ".join(f"{card['name']} {card['utilisation']:.0%}" for card in plans[0]["cards"])
    parts = (
        "# Training plans for upstream's files",
        fill(
            "Written by `python bench/plans.py --samples FOLDER`, which runs every stage with `--plan` "
            "([docs/training.md](training.md)) and the defaults that it has on a GPU. Nothing was trained or timed. "
            "Upstream's files were not used: sample rows of the same formats, with the lengths that upstream "
            "describes, were scaled to the files' sizes. The numbers of tokens are right as far as these rows resemble "
            "the files; ± is two standard errors of the sample alone.",
            120,
        ),
        "## The data",
        markdown(
            (
                "file", "size", "rows read", "stage", "documents", "tokens a pass",
                "tokens a document: p50 / p95 / p99 / longest",
                "--seq-len", "cut", "left out",
            ),
            [data_row(p) for p in plans if p["preset"] == plans[0]["preset"]],
        ),
        "## The runs",
        fill(
            "Times are projected from the model's operations at an assumed share of each GPU's bf16 rate: "
            f"{cards}. Memory is that on a 24 GB GPU, with as many tokens at once as fit. For reinforcement learning, "
            "the times assume that every answer has the maximum length and that decoding reaches 60% of the GPU's "
            "memory bandwidth; the reward model's time is not included.",
            120,
        ),
        markdown(
            (
                "file", "stage", "preset", "passes", "steps", "tokens a step", "optimizer, peak rate", "memory",
                *(card["name"] for card in plans[0]["cards"]),
            ),
            [run_row(p) for p in plans],
        ),
        "## The choices and their reasons",
        "\n".join(f"- {p['file']}, {p['stage']}: {'; '.join(chosen(p))}" for p in plans if chosen(p)),
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def data_row(p: dict[str, Any]) -> tuple[str, ...]:
    data = p["data"]
    spread = " / ".join(f"{data[name]:,}" for name in ("p50", "p95", "p99", "longest"))
    fates = (str(p["row"]), f"{data['cut']:.1%}", f"{data['dropped']:.1%}") if p["rows"] else ("", "", "")
    return (
        f"{p['file']}", f"{data['bytes'] / 1e9:g} GB", p["made"], p["stage"],
        f"{spell_count(data['documents'])} ±{data['documents_error']:.0%}",
        f"{spell_count(data['tokens'])} ±{data['error']:.0%}", spread, *fates,
    )  # fmt: skip


def run_row(p: dict[str, Any]) -> tuple[str, ...]:
    first = p["cards"][0]
    step = f"{p['step_tokens']:,}" if p["step_tokens"] else "varies"
    room = "" if first["fits"] else ", too much"
    return (
        p["file"], p["stage"], p["preset"], f"{p['epochs']:.2g}", f"{p['steps']:,}", step,
        f"{p['optimizer']}, {p['peak_lr']:g}",
        f"{first['bytes'] / 2**30:.1f} GiB ({first['micro_tokens']:,} tokens){room}",
        *(spell_hours(card["hours"]) for card in p["cards"]),
    )  # fmt: skip


def chosen(p: dict[str, Any]) -> list[str]:
    """Notes about flags that the data decided; only for the first preset, since the others have the same."""
    if p["preset"] != PRESETS[0]:
        return []
    return [note for note in p["notes"] if note.startswith("--")]


if __name__ == "__main__":
    run(main, Args, __doc__)
