"""The stages of `minimind zero`: their scripts, the stage that each continues from, and the commands that run them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import minimind

StageName = Literal["pretrain", "sft", "reason", "dpo", "grpo"]
ARITHMETIC = "builtin:arithmetic"  # --data of train/sft.py for the built-in task of reinforcement learning
# The same flags with which train/grpo.py trains its initial model if there is none.
_WEAK = ("--data", ARITHMETIC, "--epochs", "1", "--seq-len", "256", "--batch-tokens", "1024")


@dataclass(frozen=True)
class ScriptStage:
    """A stage that can be run. name: also its folder's; script: its file in train/; what: a description for people;
    after: the stages that it can continue from (the last of them that is run; with none, from random weights);
    weight: its share of the time when the budget is too small for all; length: the flag that shortens it, and usual:
    that flag's default, if it is a number; flags: further flags that it always gets."""

    name: str
    script: str
    what: str
    after: tuple[str, ...]
    weight: float
    length: str = "--tokens"
    usual: int = 0
    flags: tuple[str, ...] = ()


STAGES = {
    stage.name: stage
    for stage in (
        ScriptStage("pretrain", "pretrain", "learns language from text", (), 6),
        ScriptStage("sft", "sft", "learns to answer from conversations", ("pretrain",), 3),
        ScriptStage("reason", "reason", "learns to think before it answers", ("pretrain", "sft"), 2),
        ScriptStage("dpo", "dpo", "learns which of two answers is preferred", ("pretrain", "sft", "reason"), 1),
        # a chat model has never seen the built-in sums, so GRPO starts from a model that learnt to do them badly
        ScriptStage("sums", "sft", "learns sums, most of them wrong, for GRPO to mend", (), 1, flags=_WEAK),
        ScriptStage("grpo", "grpo", "learns from rewards for its answers",
                    ("pretrain", "sft", "reason", "dpo", "sums"), 2, "--rollouts", 120),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """The stages to run. names: in order; data: files by stage, without those that use built-in data; origin: initial
    weights of the first stage; extra: further flags by stage; common: flags of all stages."""

    names: tuple[str, ...]
    data: dict[str, tuple[str, ...]]
    origin: str | None
    extra: dict[str, tuple[str, ...]]
    common: tuple[str, ...]

    @staticmethod
    def of(
        names: Sequence[str], data: Sequence[str], origin: str | None, extra: Sequence[str], common: Sequence[str]
    ) -> Chain:
        """Check the words of the flags and order the stages. Raises ValueError, in one line that names the flag."""
        files: dict[str, tuple[str, ...]] = {}
        for name, file in (_split("--data", entry, "FILE") for entry in data):
            files[name] = (*files.get(name, ()), file)
        flags: dict[str, tuple[str, ...]] = {}
        for name, text in (_split("--flags", entry, "'--lr 1e-4'") for entry in extra):
            try:
                flags[name] = (*flags.get(name, ()), *shlex.split(text))
            except ValueError as problem:
                raise ValueError(f"--flags {name}={text}: a shell could not read this ({problem})") from None
        alone = set(names) == {"grpo"} and origin is not None
        wanted = {*names, *({"sums"} if "grpo" in names and not files.get("grpo") and not alone else ())}
        for flag, given in (("--data", files), ("--flags", flags)):
            if unused := [name for name in given if name not in wanted]:
                raise ValueError(f"{flag} {unused[0]}=...: {unused[0]} is not among the stages; add it with --stages")
        ordered = tuple(name for name in STAGES if name in wanted)
        if origin is not None and ordered[0] == "pretrain":
            raise ValueError(
                f"--from {origin}: pretraining starts from random weights; name later stages with --stages"
            )
        if ordered[0] not in ("pretrain", "sums") and origin is None:
            raise ValueError(f"--stages {' '.join(names)}: {ordered[0]} needs a model; name it with --from")
        return Chain(ordered, files, origin, flags, tuple(common))

    def builtin(self, name: str) -> bool:
        """Whether the stage uses built-in data."""
        return not self.data.get(name)

    def before(self, name: str) -> str | None:
        """The stage that `name` continues from; None if it starts from --from or random weights."""
        return next((other for other in reversed(self.names) if other in STAGES[name].after), None)

    def flags(self, name: str, preset: str | None, out: Path | None) -> list[str]:
        """The flags of the stage's script, without its length. out: the folder of all stages; None in a plan, which
        uses random weights of the same shape in place of an earlier stage's."""
        found: list[str] = []
        before = self.before(name)
        if before is not None and out is not None:
            found += ["--from", str(out / before)]
        elif self.origin is not None and "sums" not in (name, before):
            found += ["--from", self.origin]
        elif preset is not None:
            found += ["--preset", preset]
        if files := self.data.get(name):
            found += ["--data", *files]
        return [*found, *STAGES[name].flags, *self.common, *self.extra.get(name, ())]

    def command(self, name: str, flags: Sequence[str]) -> list[str]:
        """The script with `flags`, as arguments for a Python interpreter."""
        return [str(script(STAGES[name].script)), *flags]

    def answers(self) -> str:
        """The last stage that leaves a chat model."""
        own = [name for name in self.names if name != "sums" and not (name == "grpo" and "sums" in self.names)]
        return own[-1] if own else self.names[-1]


def script(name: str) -> Path:
    """The path of train/NAME.py: inside the package if that is installed, beside it in a checkout."""
    package = Path(minimind.__file__).parent
    for folder in (package / "train", package.parent / "train"):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise ValueError(f"train/{name}.py is not in {package} or beside it: the installation is damaged, repeat it")


def shown(command: Sequence[str]) -> str:
    """The command line as a person would type it in the current folder."""
    path = Path(command[0])
    name = f"train/{path.name}" if Path("train", path.name).is_file() else str(path)
    return shlex.join(["python", name, *command[1:]])


def interpreter(command: Sequence[str]) -> list[str]:
    return [sys.executable, *command]


def _split(flag: str, entry: str, example: str) -> tuple[str, str]:
    name, equals, rest = entry.partition("=")
    if not equals or name not in STAGES or not rest:
        known = ", ".join(name for name in STAGES if name != "sums")
        raise ValueError(f"{flag} {entry}: name the stage, as in {flag} sft={example}; the stages are {known}")
    return name, rest
