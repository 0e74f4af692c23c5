"""Train a chat model from random weights and write a report about it, in one command: `minimind zero`.

    minimind zero --budget 5min                                  the same as `minimind demo`; downloads nothing
    minimind zero --budget full --data pretrain=pretrain_hq.jsonl sft=sft_mini_512.jsonl
    minimind zero --budget full                                  downloads upstream's data first
    minimind zero --budget 2h --plan                             only prints the plan

The stages run one after another, each by its script in train/ and in its own folder under --out. Then follow perplexity
by context length, and the benchmarks and exports that the flags name. The report is index.html in --out/report. After
an interruption the same command continues.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from minimind.apps.zero.planning import MORE, BudgetName, Plan, State, alone_in, make_plan
from minimind.apps.zero.report import write_report
from minimind.apps.zero.results import closing_lines
from minimind.apps.zero.running import Clock, StageView, run_stage, was_stopped
from minimind.apps.zero.stages import STAGES, Chain, FinalFlags, StageName, shown
from minimind.data.download import FOR_STAGES, HubName, fetch_for_stages
from minimind.utils.display import duration, say
from minimind.utils.hub import HubModel

PresetName = Literal["nano", "minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"]


@dataclass(frozen=True)
class Args:
    """Train a chat model from random weights. Every default works."""

    budget: BudgetName = "5min"
    """Time for all stages on this device, whose speed is measured first. It decides the preset, the stages and their
    tokens. full: no limit and all of the data, like upstream's Zero run."""
    stages: tuple[StageName, ...] = ()
    """Stages to run. Empty: pretrain and sft, those that --data names, and more with a larger budget and built-in data
    (docs/zero.md)."""
    data: tuple[str, ...] = ()
    """STAGE=FILE ..., training data of a stage: a file, a folder or a glob, as its script takes them; repeat a stage to
    add files. Stages without files use built-in data."""
    preset: PresetName | None = None
    """Model shape. None: the budget decides."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Weights to start the first stage from, if that is not pretrain: a run, a Hugging Face folder, or a
    name on a hub."""
    flags: tuple[str, ...] = ()
    """STAGE='--flag value ...', further flags of a stage's script."""
    hub: Literal["auto", "modelscope", "huggingface", "none"] = "auto"
    """Where --budget full downloads upstream's data to dataset/, if --data is empty. auto: ModelScope, or else Hugging
    Face. none: it takes the built-in data instead."""
    ppl: tuple[str, ...] = ()
    """Texts for the perplexity by context length of the last model, as minimind evaluate takes them. Empty: that of the
    pretrained model on its held-out text."""
    tasks: tuple[str, ...] = ()
    """Benchmarks of lm-evaluation-harness to run on the last model: ceval, cmmlu, ..."""
    limit: int | None = None
    """With --tasks: at most this many questions of each."""
    export: tuple[Literal["hf", "gguf", "ollama", "pth"], ...] = ()
    """Formats to export the last model to, in --out/export."""
    price: float | None = None
    """Price of an hour of this device, in any currency; adds costs to the plan and the report."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache_dir: str | None = None
    """Where tokenized data is kept. None: $MINIMIND_CACHE or ~/.cache/minimind."""
    plan: bool = False
    """Only print the plan: stages, tokens, hours, memory and cost. Trains nothing and creates no folder."""
    out: str | None = None
    """Folder for all stages. None: runs/zero-BUDGET."""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/zero-{self.budget}").expanduser()

    @property
    def evals(self) -> int:
        """Number of evaluations during a stage."""
        return 4 if self.budget == "5min" else 10

    def chain(self) -> Chain:
        """The stages to run. Raises ValueError, in one line that names the flag."""
        names: list[str] = list(self.stages)
        if not names:
            named = {entry.partition("=")[0] for entry in self.data} & STAGES.keys()
            names = [*named, *([] if self.from_ else ["pretrain"]), "sft", *([] if named else MORE[self.budget])]
        if self.preset is not None and self.from_ is not None:
            raise ValueError(f"--preset {self.preset}: {self.from_} has a shape of its own; drop --preset")
        return Chain.of(names, self.data, self.from_, self.flags, self.common())

    @property
    def final(self) -> FinalFlags:
        return FinalFlags(self.ppl, self.tasks, self.limit, self.export)

    def check(self) -> None:
        """Raise ValueError, in one line that names the flag."""
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise ValueError(f"--price {self.price:g}: must be 0 or more")
        if self.limit is not None and (self.limit < 1 or not self.tasks):
            raise ValueError(f"--limit {self.limit}: at least 1, together with --tasks")
        for flag, wanted, package, install in (
            ("--tasks", bool(self.tasks), "lm_eval", "eval"),
            ("--export", {"gguf", "ollama"} & set(self.export), "gguf", "export"),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"{flag}: needs the package {package}; run `pip install 'minimind[{install}]'`")

    def common(self) -> tuple[str, ...]:
        """Flags of every stage that may change when the run is resumed."""
        device = () if self.device == "auto" else ("--device", self.device)
        cache = () if self.cache_dir is None else ("--cache-dir", self.cache_dir)
        return "--evals", str(self.evals), *device, *cache

    def asked(self) -> dict[str, Any]:
        """The flags that must stay the same when the run is resumed."""
        files = [f"{name}={os.path.abspath(os.path.expanduser(file))}" for name, _, file in
                 (entry.partition("=") for entry in self.data)]  # fmt: skip
        origin = self.from_
        if origin is not None and HubModel.parse(origin) is None:
            origin = os.path.abspath(os.path.expanduser(origin))
        return {"budget": self.budget, "stages": list(self.stages), "data": files, "preset": self.preset,
                "from": origin, "flags": list(self.flags)}  # fmt: skip


def main(args: Args) -> int:
    console = Console()
    args.check()
    chain = args.chain()
    if args.plan:
        for line in planned(args, chain, console)[1].lines(args.price):
            say(console, line)
        return 0
    with alone_in(args.folder):
        state = State.open(args.folder, args.asked())
        if state.chain is None:
            state.chain, state.plan = planned(args, chain, console)
        state.chain = dataclasses.replace(state.chain, common=args.common())
        state.starts.append(time.time())
        state.write()
        return run(state, args.final, args.price, console)


def planned(args: Args, chain: Chain, console: Console) -> tuple[Chain, Plan]:
    chain = with_upstream_data(args, chain, console)
    return make_plan(args.budget, chain, bool(args.stages), args.preset, args.evals, console)


def with_upstream_data(args: Args, chain: Chain, console: Console) -> Chain:
    """`chain` with upstream's files where --budget full has no --data; downloaded to dataset/ if they are not there.
    Raises ValueError, in one line, if no hub answers."""
    stages = [name for name in chain.names if name in FOR_STAGES]
    if args.budget != "full" or args.data or args.hub == "none" or not stages:
        return chain
    hubs: list[HubName] = ["modelscope", "huggingface"] if args.hub == "auto" else [args.hub]
    here = "name your files with --data, or take the built-in data with --hub none"
    try:
        files = fetch_for_stages(stages, Path("dataset"), [] if args.plan else hubs, console)
    except ValueError as problem:
        raise ValueError(f"--budget full: takes upstream's data, but {problem}; {here}") from None
    return dataclasses.replace(chain, data={name: (str(path),) for name, path in files.items()})


def run(state: State, final: FinalFlags, price: float | None, console: Console) -> int:
    """Train the unfinished stages, evaluate and export, and write the report after each, interrupted or not. Returns
    the exit status."""
    assert state.chain is not None and state.plan is not None
    for line in state.plan.lines(price):
        say(console, line)
    status = 0
    for number, stage in enumerate(state.plan.stages):
        if state.finished(stage.name):
            say(console, f"{stage.name}: finished before, {duration(state.seconds.get(stage.name, 0.0))}")
            continue
        status = run_one(state, number, console)
        state.write()
        write_report(state, price)
        if status:
            break
    if not status:
        status = finish(state, final, console)
    page = write_report(state, price)
    for line in closing_lines(state, page, status):
        say(console, line)
    return status


def finish(state: State, final: FinalFlags, console: Console) -> int:
    """Run the final steps whose product does not exist yet. Returns the exit status."""
    assert state.chain is not None
    for step in final.steps(state.chain, state.folder):
        if step.product.exists():
            continue
        say(console, f"{step.what}: {shown(step.command)}")
        step.product.parent.mkdir(parents=True, exist_ok=True)
        view = StageView(console, step.what, Clock(0.0, 0.0))
        log = state.folder / "zero.log"
        status = run_stage(step.command, step.product, log, view, console, partial(state.spend, step.what))
        state.write()
        if status and was_stopped(status):
            return 130
        if status and not step.optional:
            return 2
        if status:
            say(console, f"{step.what}: failed, see above; the run continues without it")
    return 0


def run_one(state: State, number: int, console: Console) -> int:
    """Train stage `number`. Returns the exit status: 0 done, 130 interrupted, 2 failed."""
    assert state.chain is not None and state.plan is not None
    stages = state.plan.stages
    name, remaining = stages[number].name, [s for s in stages[number:] if not state.finished(s.name)]
    out = state.folder / name
    command = state.command(name)
    say(console, f"stage {number + 1} of {len(stages)}, {name}, {STAGES[name].what}: {shown(command)}")
    clock = Clock(stages[number].seconds, sum(s.seconds for s in remaining[1:]))
    view = StageView(console, f"{name} {number + 1}/{len(stages)}", clock)
    status = run_stage(command, out, state.folder / "zero.log", view, console, lambda s: state.spend(name, s))
    if status == 0 and state.finished(name):
        return 0
    return 130 if was_stopped(status) else 2
