"""From a budget of time to a plan (the preset, the stages, the tokens of each), and the plan's record in the folder.

Each stage's script is asked with --plan what it would do; it measures a step or two on this device. If all stages
together take longer than the budget, each gets a share of the time, but at least as much as it needs to show an effect
on built-in data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console

from minimind.apps.zero.stages import STAGES, Chain, interpreter
from minimind.utils.display import duration, say
from minimind.utils.files import read_json, write_json

BudgetName = Literal["5min", "30min", "2h", "full"]
SECONDS = {"5min": 300.0, "30min": 1800.0, "2h": 7200.0, "full": math.inf}
# Stages that a budget adds to pretraining and SFT if there is time and neither --stages nor --data names stages.
MORE = {"5min": (), "30min": ("dpo",), "2h": ("reason", "dpo", "grpo"), "full": ()}
PASSES = 4  # passes over a text up to which repeated tokens are worth nearly as much as new ones (arXiv 2305.16264)
LEAST = 700_000  # tokens of built-in text; after these, SFT answered 99% of its held-out questions (docs/LOG.md)
# Presets by size. 20 tokens per parameter use compute best (arXiv 2203.15556). Of two presets, the larger one is nearer
# to 20 on a logarithmic scale if it gets more than 20 / r tokens per parameter, where r is the ratio of their sizes.
LADDER = (("nano", 2.8e6), ("minimind2-small", 25.8e6), ("minimind2", 104e6))
BEST_TOKENS = 20.0
START = 6.0  # seconds of a script before its first step and after its last
_EVAL_TOKENS = 65536  # in an evaluation during training, as in StageArgs
_HELD_OUT = 0.05  # share of the tokens, as in StageArgs


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage. flags: those that set its length, none if its data do; tokens, steps, passes: of the run.
    Projected: seconds, on this device, with start-up and evaluations; memory, bytes of a step on a GPU; cards, seconds
    on each GPU. peaks: bf16 FLOP/s of each GPU; shortened: whether the budget shortens the stage."""

    name: str
    flags: tuple[str, ...]
    preset: str
    parameters: int
    tokens: int
    steps: int
    passes: float
    seconds: float
    memory: int
    cards: dict[str, float]
    peaks: dict[str, float]
    flops_per_token: float
    shortened: bool


@dataclass(frozen=True)
class Plan:
    """The plan of all stages. budget: its name; device: that of the measurements; notes: reasons, a line each."""

    budget: str
    preset: str | None
    device: str
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from dataclasses.asdict(plan) after a round trip through JSON."""
        stages = [StagePlan(**{**stage, "flags": tuple(stage["flags"])}) for stage in fields["stages"]]
        return Plan(**{**fields, "stages": tuple(stages), "notes": tuple(fields["notes"])})

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def lines(self, price: float | None = None) -> list[str]:
        cards = list(self.stages[0].cards)
        rows = [["stage", "tokens", "passes", "steps", "here", *cards, "a GPU's memory"]]
        for stage in self.stages:
            there = [_short(stage.cards[card]) for card in cards]
            length = [f"{stage.tokens:,}", f"{stage.passes:.3g}", f"{stage.steps:,}"]
            rows.append([stage.name, *length, duration(stage.seconds), *there, f"{stage.memory / 2**30:.1f} GiB"])
        sums = [_short(sum(stage.cards[card] for stage in self.stages)) for card in cards]
        rows.append(["all", "", "", "", duration(self.seconds), *sums, ""])
        money = [] if price is None else [f"cost here: about {self.seconds / 3600 * price:.2f} at {price:g} an hour"]
        return [
            f"plan of --budget {self.budget}: {', '.join(stage.name for stage in self.stages)}; "
            f"{self.stages[0].preset}, {self.stages[0].parameters / 1e6:.1f}M parameters",
            *self.notes,
            *columns(rows),
            f"here: {self.device}; projected from a measured step of each stage, with starts and evaluations",
            "cards and memory: projected, not measured, from the model's operations and a share of the card's bf16 "
            "rate that a step is assumed to reach (docs/plans.md)",
            *money,
        ]


Ask = Callable[[str, str | None], dict[str, Any]]


def make_plan(
    budget: BudgetName, chain: Chain, chosen: bool, preset: str | None, evals: int, console: Console
) -> tuple[Chain, Plan]:
    """(the stages to run, their plan). chosen: whether the user named the stages; if not, those that do not fit are
    left out. evals: number of evaluations during each stage. Raises ValueError with the error line of a script."""
    began = time.monotonic()
    known: dict[tuple[str, str | None], dict[str, Any]] = {}

    def ask(name: str, shape: str | None) -> dict[str, Any]:
        if (name, shape) not in known:
            say(console, f"measuring a step of {name}" + (f" of {shape}" if shape else ""))
            known[name, shape] = ask_script(chain, name, shape)
        return known[name, shape]

    notes: list[str] = []
    if preset is None and chain.origin is None:
        preset, why = choose_preset(SECONDS[budget], chain, ask)
        notes.append(why)
    left = SECONDS[budget]
    while True:
        drafts = [draft(chain, name, ask(name, preset), budget, evals) for name in chain.names]
        left = SECONDS[budget] - (time.monotonic() - began)
        least = sum(d.overhead + d.least for d in drafts)
        optional = [n for n in chain.names if n not in ("pretrain", "sft", "sums")]
        if chosen or least <= left or not optional:
            break
        notes.append(f"{optional[-1]}: left out, as there is no time for it; name it with --stages to run it anyway")
        names = [n for n in chain.names if n not in (optional[-1], "sums")]
        chain = dataclasses.replace(chain, names=tuple(names))
    if least > left:
        notes.append(f"this device needs about {duration(least)} to learn anything; the run takes more than the budget")
    seconds = share_out(drafts, left)
    stages = tuple(d.cut(time_of) for d, time_of in zip(drafts, seconds, strict=True))
    device = str(ask(chain.names[0], preset)["device"])
    return chain, Plan(budget, preset, device, stages, tuple(notes))


def ask_script(chain: Chain, name: str, preset: str | None) -> dict[str, Any]:
    """Run the stage's script with --plan. Returns the content of its --plan-json."""
    with TemporaryDirectory(prefix="minimind-zero-") as folder:
        file = Path(folder) / "plan.json"
        flags = [*chain.flags(name, preset, None), "--plan", "--plan-json", str(file)]
        answer = subprocess.run(
            interpreter(chain.command(name, flags)), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if answer.returncode or not file.exists():
            lines = (answer.stdout + answer.stderr).strip().splitlines() or ["it failed without a message"]
            raise ValueError(f"{name}: {lines[-1].removeprefix('error: ')}")
        return json.loads(file.read_text(encoding="utf-8"))


def choose_preset(budget: float, chain: Chain, ask: Ask) -> tuple[str, str]:
    """(the largest preset for which time and text suffice, the reason in one line)."""
    if math.isinf(budget):
        if chain.builtin(chain.names[0]):
            return "nano", "preset nano: the built-in data are small; --preset sets another"
        return "minimind2-small", "preset minimind2-small: upstream's for a whole run; --preset sets another"
    first = chain.names[0]
    share = STAGES[first].weight / sum(STAGES[name].weight for name in chain.names)
    name, size = LADDER[0]
    for larger, parameters in LADDER[1:]:
        smaller, wanted = ask(first, name), BEST_TOKENS / (parameters / size) * parameters
        text = PASSES * smaller["data"]["tokens"]
        affordable = share * budget / (_per_token(smaller) * parameters / size)
        if min(text, affordable) >= wanted:  # extrapolated from the smaller preset; now measure the larger one
            affordable = share * budget / _per_token(ask(first, larger))
        if min(text, affordable) < wanted:
            what, enough = ("time", affordable) if affordable < text else ("text", text)
            return name, (
                f"preset {name}: the {what} is enough for {enough / 1e6:,.1f}M tokens of {larger}; with fewer than "
                f"{wanted / 1e6:,.0f}M the smaller preset learns more; --preset sets another"
            )
        name, size = larger, parameters
    return name, f"preset {name}: the largest one that --budget considers; --preset sets another"


@dataclass(frozen=True)
class Draft:
    """A stage whose length is still open. whole, least: most and fewest seconds of training that are of use; most: the
    length that `whole` pays for, as a multiple of the script's own; overhead: seconds besides training, at any length;
    rigid: the length is fixed."""

    name: str
    estimate: dict[str, Any]
    whole: float
    least: float
    overhead: float
    most: float
    rigid: bool

    def cut(self, seconds: float) -> StagePlan:
        """The plan of the stage if it trains for `seconds`."""
        estimate, stage = self.estimate, STAGES[self.name]
        part = self.most * min(1.0, seconds / self.whole) if self.whole else self.most
        usual = stage.usual or estimate["tokens"]
        length = _round_down(part * usual)
        flags: tuple[str, ...] = ()
        if not self.rigid and length != usual and part != 1.0:
            flags, part = (stage.length, str(length)), length / usual
        else:
            part = 1.0
        own = self.whole / self.most
        card = {c["name"]: c["hours"] * 3600 * part for c in estimate["cards"]}
        peaks = {c["name"]: estimate["flops"] / (c["utilisation"] * c["hours"] * 3600) for c in estimate["cards"]}
        like_here = min(estimate["cards"], key=lambda c: abs(c["micro_tokens"] - estimate["micro_tokens"]))
        return StagePlan(
            name=self.name,
            flags=flags,
            preset=estimate["preset"],
            parameters=estimate["parameters"],
            tokens=round(estimate["tokens"] * part),
            steps=max(1, math.ceil(estimate["steps"] * part)),
            passes=estimate["epochs"] * part,
            seconds=self.overhead + own * part,
            memory=like_here["bytes"],
            cards=card,
            peaks=peaks,
            flops_per_token=estimate["flops_per_token"],
            shortened=part < 1,
        )


def draft(chain: Chain, name: str, estimate: dict[str, Any], budget: BudgetName, evals: int) -> Draft:
    own = estimate["measured_hours"] * 3600
    length = {STAGES[name].length, "--epochs", "--tokens", "--rollouts"}
    rigid = bool(length & set(chain.extra.get(name, ()))) or name == "sums" or budget == "full"
    most = PASSES if name == "pretrain" and not rigid else 1.0
    least = 0.0
    if rigid or (chain.builtin(name) and name != "pretrain"):
        least = own  # these data are small, and part of them teaches nothing visible
    elif chain.builtin(name):
        least = own * min(1.0, LEAST / estimate["tokens"])
    held = _HELD_OUT * estimate["data"]["tokens"]
    scored = (evals + 1) * min(held, _EVAL_TOKENS) + min(held, 1e6)
    return Draft(name, estimate, own * most, least, START + scored * _per_token(estimate) / 3, most, rigid)


def share_out(drafts: Sequence[Draft], seconds: float) -> list[float]:
    """Seconds of training for each stage. If not all fit whole, the time is divided in proportion to the stages'
    weights, within each stage's least and whole time."""
    room = seconds - sum(d.overhead for d in drafts)

    def given(level: float) -> list[float]:
        return [min(d.whole, max(d.least, level * STAGES[d.name].weight)) for d in drafts]

    low, high = 0.0, max((d.whole / STAGES[d.name].weight for d in drafts), default=0.0)
    if sum(given(high)) <= room:
        return given(high)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(given(middle)) <= room else (low, middle)
    return given(low)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column left and the others right; returns a line for each row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        .rstrip()
        for row in rows
    ]  # fmt: skip


def _short(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else "<1s"


def _per_token(estimate: Mapping[str, Any]) -> float:
    """Seconds of training per token, optimizer steps included."""
    return estimate["measured_hours"] * 3600 / max(1, estimate["tokens"])


def _round_down(number: float) -> int:
    """Round down to two significant digits."""
    whole = max(1, int(number))
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit


_STATE = "zero.json"
_HEARTBEAT = 5.0  # seconds between saves of a stage's time, which is how much a kill can lose


@dataclass
class State:
    """asked: the flags that may not change; chain, plan: made from them at the first start, None before; seconds: time
    spent on each stage over all starts; starts: the Unix time of each start."""

    folder: Path
    asked: dict[str, Any]
    chain: Chain | None = None
    plan: Plan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    _written: float = 0.0

    @staticmethod
    def open(folder: Path, asked: dict[str, Any]) -> State:
        """The state in `folder`, or a new one. Raises ValueError if the folder was begun with other flags, or holds
        something else."""
        fields = read_json(folder / _STATE)
        if fields is None:
            if (folder / _STATE).exists():
                raise ValueError(f"{folder / _STATE}: damaged; put it back, or name another folder with --out")
            if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
                raise ValueError(f"--out {folder}: not empty, and no folder of minimind zero; name another folder")
            return State(folder, asked)
        state = State.of(folder, fields)
        differ = [name for name in asked if state.asked.get(name) != asked[name]]
        if differ:
            differences = ", ".join(
                f"--{name} {spelt(state.asked.get(name))} (now {spelt(asked[name])})" for name in differ
            )
            raise ValueError(f"--out {folder}: begun with {differences}; repeat that command or name another folder")
        return state

    @staticmethod
    def of(folder: Path, fields: Mapping[str, Any]) -> State:
        chain = fields["chain"]
        for part in ("data", "extra"):
            chain[part] = {name: tuple(values) for name, values in chain[part].items()}
        made = Chain(**{**chain, "names": tuple(chain["names"]), "common": tuple(chain["common"])})
        return State(folder, fields["asked"], made, Plan.of(fields["plan"]), fields["seconds"], fields["starts"])

    def write(self) -> None:
        assert self.chain is not None and self.plan is not None
        write_json(
            self.folder / _STATE,
            {
                "asked": self.asked,
                "chain": dataclasses.asdict(self.chain),
                "plan": dataclasses.asdict(self.plan),
                "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
                "starts": self.starts,
            },
        )
        self._written = time.monotonic()

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the time of `stage`."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if time.monotonic() - self._written > _HEARTBEAT:
            self.write()

    def command(self, stage: str) -> list[str]:
        """The script of a stage with all its flags, as it is run and can be run by hand."""
        assert self.chain is not None and self.plan is not None
        planned = self.plan.stage(stage)
        flags = [*self.chain.flags(stage, planned.preset, self.folder), *planned.flags]
        return self.chain.command(stage, [*flags, "--out", str(self.folder / stage)])

    def finished(self, stage: str) -> bool:
        return (self.folder / stage / "finished").exists()


def spelt(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock `folder`. Raises ValueError if another process has locked it; a dead process holds no lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".zero.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--out {folder}: another minimind zero works in it; wait, or name another folder") from None
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise ValueError(f"--out {folder}: cannot be written ({reason}); name another folder") from None
    try:
        yield
    finally:
        lock.release()
