"""The stages of `minimind zero`: their scripts, the stage that each continues from, and the commands that run them."""

from __future__ import annotations

import re
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
        ScriptStage("sums", "sft", "learns to answer sums, mostly wrongly, as a start for GRPO", (), 1, flags=_WEAK),
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
        flags: list[str] = []
        before = self.before(name)
        if before is not None and out is not None:
            flags += ["--from", str(out / before)]
        elif self.origin is not None and "sums" not in (name, before):
            flags += ["--from", self.origin]
        elif preset is not None:
            flags += ["--preset", preset]
        if files := self.data.get(name):
            flags += ["--data", *files]
        return [*flags, *STAGES[name].flags, *self.common, *self.extra.get(name, ())]

    def command(self, name: str, flags: Sequence[str]) -> list[str]:
        """The script with `flags`, as arguments for a Python interpreter."""
        return [str(script(STAGES[name].script)), *flags]

    @property
    def device_flags(self) -> tuple[str, ...]:
        """--device as the stages get it; empty where it is left open."""
        at = self.common.index("--device") if "--device" in self.common else len(self.common)
        return self.common[at : at + 2]

    def answers(self) -> str:
        """The last stage that leaves a chat model."""
        own = [name for name in self.names if name != "sums" and not (name == "grpo" and "sums" in self.names)]
        return own[-1] if own else self.names[-1]


@dataclass(frozen=True)
class FinalStep:
    """A command that runs when all stages are finished. command: for a Python interpreter; product: the file or folder
    that exists once it has run; optional: whether the run goes on if it fails."""

    what: str
    command: tuple[str, ...]
    product: Path
    optional: bool = False


@dataclass(frozen=True)
class FinalFlags:
    """What the user asks for after the stages: texts and benchmarks to evaluate on, and formats to export to."""

    ppl: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    export: tuple[str, ...] = ()

    def steps(self, chain: Chain, folder: Path) -> list[FinalStep]:
        """Perplexity by context length of the pretrained model on its held-out text (or of the last model on the texts
        of --ppl), benchmarks, and exports of the last model. folder: of all stages."""
        last = folder / chain.answers()
        device = chain.device_flags
        steps = []
        heldout = folder / "pretrain" / "heldout.jsonl"
        texts = self.ppl or ((str(heldout),) if "pretrain" in chain.names and heldout.exists() else ())
        lengths = _contexts(texts)
        if lengths:
            model, into = last if self.ppl else folder / "pretrain", folder / "evaluation"
            flags = ("--ppl", *texts, "--context", ",".join(map(str, lengths)), "--tokens", "32768")
            command = ("evaluate", "--model", str(model), *flags, *device, "--out", str(into))
            product = into / "perplexity.json"
            steps.append(FinalStep("perplexity by context length", _program(command), product, not self.ppl))
        if self.tasks:
            into = folder / "evaluation" / re.sub(r"[^\w.-]+", "_", "-".join(self.tasks))
            limit = () if self.limit is None else ("--limit", str(self.limit))
            command = ("evaluate", "--model", str(last), "--tasks", *self.tasks, *limit, *device, "--out", str(into))
            steps.append(FinalStep("benchmarks", _program(command), into / "tasks.json"))
        for name in self.export:
            product = folder / "export" / EXPORTS[name]
            command = ("export", "--model", str(last), "--to", name, "--out", str(product))
            steps.append(FinalStep(f"export to {name}", _program(command), product))
        return steps


EXPORTS = {"hf": "hf", "gguf": "model.gguf", "ollama": "ollama", "pth": "model.pth"}  # names in export/
_CONTEXTS = (128, 256, 512, 1024, 2048)
_BYTES_PER_TOKEN = 8  # more than any text here has, so that the longest context surely fits


def _contexts(texts: Sequence[str]) -> list[int]:
    """The context lengths for which these files have enough text; all lengths if one of them is not a plain file."""
    paths = [Path(text).expanduser() for text in texts]
    if not all(path.is_file() for path in paths):
        return list(_CONTEXTS)
    tokens = sum(path.stat().st_size for path in paths) // _BYTES_PER_TOKEN
    return [length for length in _CONTEXTS if length < tokens]


def _program(command: Sequence[str]) -> tuple[str, ...]:
    return ("-m", "minimind", *command)


def script(name: str) -> Path:
    """The path of train/NAME.py: inside the package if that is installed, beside it in a checkout."""
    package = Path(minimind.__file__).parent
    for folder in (package / "train", package.parent / "train"):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise ValueError(f"train/{name}.py is not in {package} or beside it: the installation is damaged, repeat it")


def shown(command: Sequence[str]) -> str:
    """The command line as a person would type it in the current folder."""
    if tuple(command[:2]) == ("-m", "minimind"):
        return shlex.join(command[1:])
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
