"""Measure how long whole commands need to reach a held-out loss: upstream's recipe, transformers with AdamW, and ours.

    python bench/time_to_loss.py --data tang.jsonl web.jsonl --minutes 10 [--upstream CHECKOUT]    # hours on two cores
    python bench/time_to_loss.py --preset nano --minutes 0.3 --sft-minutes 0.2 --seeds 1           # a rehearsal
    python bench/time_to_loss.py --plot                                                  # table and picture of the rows

Every implementation trains on the same file in a process of its own, with empty caches, so that start-up, tokenization
and compilation count; evaluations do not. They take turns, seed by seed. All are evaluated on the same text, in bits
per byte. A short run of each first measures its speed and so how many steps fit into --minutes; its learning rate falls
over these steps. Ours also gets runs planned for --shares of the time.

upstream-style  upstream's recipe with this project's plain model; with --upstream, `upstream` is its own trainer
hf, hf-eager    transformers with AdamW on packed rows, with and without torch.compile (bench/training/recipes.py)
ours            train/pretrain.py --compile, then train/sft.py --compile; ours-eager: without --compile

SFT begins with what the same implementation pretrained on the first file with the same seed (transformers with its best
rate). Rows are added to time_to_loss.csv in --out as runs end, and a run with a row of this commit is not repeated, so
that the command can be interrupted and started again. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

from rich.console import Console

from bench.common.command import check_at_least, run, table_console
from bench.common.record import append, as_dicts, now, package_version, results_folder, stamp
from bench.training.commands import RunPlan, Speed, execute, split_file
from bench.training.loss_curves import TimeToLossRow, curve_text, plot, read, table_of
from minimind.data import builtin_conversations, builtin_corpus
from minimind.training.arguments import PresetName
from minimind.utils.device import choose_device, describe_device
from minimind.utils.files import cache_root, make_folder

StageName = Literal["pretrain", "sft"]
Parts = tuple[Path, Path]  # training and held-out file
LEAST = 5  # steps of a run that is planned for a share of the time
OURS, HF = ("ours", "ours-eager"), ("hf", "hf-eager")


@dataclass(frozen=True)
class Args:
    """Measure the time to a loss. Every default works."""

    data: tuple[str, ...] = ()
    """Files of text, each trained on by itself; empty: the built-in corpus."""
    chats: str | None = None
    """File of conversations for SFT; None: the built-in ones."""
    preset: PresetName = "minimind2-small"
    """Shape of the model."""
    only: tuple[Literal["upstream-style", "upstream", "hf", "hf-eager", "ours", "ours-eager"], ...] = (
        "upstream-style", "hf", "ours", "ours-eager")  # fmt: skip
    """Implementations; upstream needs --upstream."""
    upstream: str | None = None
    """A checkout of upstream MiniMind, whose own trainer (pretraining) and tokenizer are used."""
    upstream_python: str = sys.executable
    """The Python that has what upstream needs: datasets, transformers and torch."""
    minutes: float = 10.0
    """Minutes that a run of pretraining is planned to take."""
    sft_minutes: float = 3.0
    """Minutes that a run of SFT is planned to take; 0: no SFT."""
    shares: tuple[float, ...] = (1.0, 0.2, 0.1, 0.05)
    """Ours is also planned for these shares of --minutes, each with its own schedule."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the initial weights and the data order."""
    hf_lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Peak rates of transformers with AdamW in pretraining."""
    hf_sft_lr: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    """Peak rates of transformers with AdamW in SFT."""
    rows: int | None = None
    """Rows of upstream's batch in pretraining. None: 32 on a GPU, as in its script, 8 on a CPU."""
    accumulation: int | None = None
    """Batches in a step of upstream's pretraining. None: 8 on a GPU, as in its script, 1 on a CPU."""
    heldout_kb: int = 128
    """Kilobytes of text held out from each file."""
    evals: int = 8
    """Evaluations in a run, the last at its end."""
    questions: int = 64
    """Held-out questions that are answered in an evaluation of SFT; the last one answers all."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    work: str | None = None
    """Folder of the runs; None: time-to-loss under $MINIMIND_CACHE or ~/.cache/minimind."""
    plot: bool = False
    """Draw the picture and print the table of the existing rows; run nothing."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""


def check(args: Args) -> None:
    check_at_least(1, seeds=args.seeds, evals=args.evals, heldout_kb=args.heldout_kb)
    check_at_least(0, questions=args.questions, sft_minutes=args.sft_minutes)
    if not args.minutes > 0 or not args.shares or not all(0 < share <= 1 for share in args.shares):
        raise ValueError("--minutes must be above 0, and --shares above 0 and at most 1")
    if not args.only or not args.hf_lr or not args.hf_sft_lr:
        raise ValueError("--only, --hf-lr and --hf-sft-lr need a value each")
    if "upstream" in args.only and args.upstream is None:
        raise ValueError("--only upstream: name its checkout with --upstream")
    if args.upstream is not None and not (Path(args.upstream) / "trainer" / "train_pretrain.py").is_file():
        raise ValueError(f"--upstream {args.upstream}: no trainer/train_pretrain.py in it; clone upstream's repository")
    missing = next((path for path in (*args.data, args.chats) if path and not Path(path).is_file()), None)
    if missing is not None:
        raise ValueError(f"--data or --chats {missing}: no such file")


class Campaign:
    """The runs of one call. table: where the rows are; work: the folder of data, speeds and runs."""

    def __init__(self, args: Args, table: Path, work: Path, console: Console) -> None:
        self.args, self.table, self.work, self.console = args, table, work, console
        self.device = choose_device(args.device)
        self.columns = stamp(self.device, "torch") | {"transformers": package_version("transformers")}
        self.rows = [row for row in read(table) if row.commit == self.columns["commit"]]

    def run(self) -> list[TimeToLossRow]:
        """The rows of all runs, those of an interrupted call included."""
        args, files = self.args, list(self.args.data) or [str(builtin_corpus(console=self.console))]
        texts = {Path(path).name: self._split(path, "pretrain") for path in files}
        chats = self._split(args.chats, "sft") if args.chats else builtin_conversations(console=self.console)
        for seed in args.seeds:
            for file in texts.items():
                self._turn([plan for name in args.only for plan in self._pretraining(name, *file, seed)], seed)
            if args.sft_minutes:
                first = next(iter(texts.items()))
                self._turn([plan for name in args.only for plan in self._sft(name, first, chats, seed)], seed)
        return self.rows

    def _split(self, path: str, stage: StageName) -> Parts:
        return split_file(path, stage, self.work, self.args.heldout_kb << 10)

    def _turn(self, plans: Sequence[RunPlan], seed: int) -> None:
        """Run the plans that have no row, beginning with another one for each seed."""
        first = seed % max(1, len(plans))
        for plan in [*plans[first:], *plans[:first]]:
            if not self._row_of(plan):
                self._run(plan)

    def _pretraining(self, name: str, data: str, parts: Parts, seed: int) -> list[RunPlan]:
        args = self.args
        plan = RunPlan("pretrain", name, data, parts, args.preset, seed, args.minutes, self.work, device=args.device,
                       evals=args.evals, upstream=args.upstream, python=args.upstream_python)  # fmt: skip
        if name in OURS:
            return [dataclasses.replace(plan, minutes=args.minutes * share) for share in args.shares]
        if name in HF:
            return [dataclasses.replace(plan, lr=lr) for lr in args.hf_lr]
        gpu = self.device.type == "cuda"
        rows, accumulation = args.rows or (32 if gpu else 8), args.accumulation or (8 if gpu else 1)
        return [dataclasses.replace(plan, lr=5e-4, rows=rows, accumulation=accumulation)]

    def _sft(self, name: str, file: tuple[str, Parts], chats: Parts, seed: int) -> list[RunPlan]:
        if name == "upstream":
            return []
        args, best = self.args, self._best_pretraining(name, file, seed)
        plan = dataclasses.replace(
            best, stage="sft", data=Path(args.chats).name if args.chats else "built-in conversations", parts=chats,
            minutes=args.sft_minutes, lr=None, init=best.weights, questions=args.questions,
        )  # fmt: skip
        if name in OURS:
            return [plan]
        if name in HF:
            return [dataclasses.replace(plan, lr=lr) for lr in args.hf_sft_lr]
        return [dataclasses.replace(plan, lr=1e-5, rows=16, accumulation=1)]

    def _best_pretraining(self, name: str, file: tuple[str, Parts], seed: int) -> RunPlan:
        """The longest run of the seed, at the rate with the lowest loss; it runs again if its weights are gone."""
        plans = self._pretraining(name, *file, seed)
        longest = [plan for plan in plans if plan.minutes == max(p.minutes for p in plans)]
        best = min(longest, key=lambda plan: self._row_of(plan)[0].heldout_bpb)
        if not best.weights.exists():
            self._execute(best)
        return best

    def _row_of(self, plan: RunPlan) -> list[TimeToLossRow]:
        return [row for row in self.rows if plan.is_of(row)]

    def _run(self, plan: RunPlan) -> None:
        speed = self._speed(plan)
        is_short = plan.stage == "pretrain" and plan.minutes < self.args.minutes
        if is_short and speed.steps_in(60 * plan.minutes) < LEAST:
            self.console.print(
                f"{plan}: left out, its start-up takes {speed.startup:.0f} s and a step {speed.step:.2f} s",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            return
        row = self._execute(plan)
        append(self.table, [row])
        self.rows.append(row)
        exact = "" if row.exact is None else f", {row.exact:.1%} exact"
        self.console.print(
            f"  {row.heldout_bpb:.4f} bits/byte{exact} in {row.seconds:.1f} s, {row.steps} steps", highlight=False
        )

    def _execute(self, plan: RunPlan) -> TimeToLossRow:
        speed = self._speed(plan)
        steps = speed.steps_in(60 * plan.minutes)
        self.console.print(f"{plan}: {steps} steps", highlight=False, soft_wrap=True)
        watched = execute(plan, steps)
        last = watched.points[-1]
        return TimeToLossRow(
            **self.columns | {"date": now()},
            stage=plan.stage, implementation=plan.name, data=plan.data, preset=plan.preset, seed=plan.seed, lr=plan.lr,
            minutes=plan.minutes, steps=steps, tokens=last.tokens, seconds=last.seconds,
            evaluation_seconds=watched.evaluating, heldout_loss=last.nats, heldout_bpb=last.bpb, exact=last.exact,
            curve=curve_text(watched.points),
        )  # fmt: skip

    def _speed(self, plan: RunPlan) -> Speed:
        """The speed of this implementation on this file, measured once."""
        path = self.work / "speeds.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key = f"{self.columns['commit']} {plan.stage} {plan.name} {plan.data} {plan.preset}"
        if key not in known:
            self.console.print(f"{plan}: measuring its speed", highlight=False, soft_wrap=True)
            known[key] = dataclasses.asdict(Speed.measure(plan))
            path.write_text(json.dumps(known, indent=1), encoding="utf-8")
        return Speed(**known[key])


def show(rows: Sequence[TimeToLossRow], picture: Path) -> None:
    """A table of each stage and file, and the picture of all."""
    for kind in dict.fromkeys((row.stage, row.data, row.preset) for row in rows):
        table_console(160).print(table_of([row for row in rows if (row.stage, row.data, row.preset) == kind]))
    plot(rows, picture)


def main(args: Args) -> dict[str, Any]:
    check(args)
    folder = results_folder(args.out, describe_device(choose_device(args.device)))
    table, picture = folder / "time_to_loss.csv", folder / f"time-to-loss-{args.preset}.png"
    if args.plot:
        rows = [row for row in read(table) if row.preset == args.preset]
        if not rows:
            raise ValueError(f"--plot: {table} has no rows of {args.preset}; run the command without --plot first")
    else:
        work = make_folder(Path(args.work) if args.work else cache_root(None) / "time-to-loss")
        rows = Campaign(args, table, work, Console(stderr=True)).run()
        rows = [row for row in rows if row.preset == args.preset]
    show(rows, picture)
    return {"csv": str(table), "png": str(picture), "rows": as_dicts(rows)}


if __name__ == "__main__":
    run(main, Args, __doc__)
