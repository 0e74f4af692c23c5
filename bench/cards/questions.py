"""What bench/card.py asks: the questions in order of value, for a quarter of an hour of a card.

Minutes are estimates for an H200, compilation included; nobody has run these commands on a card yet. A rehearsal asks
the same on a CPU as small as it goes; what has no form there needs a card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cards.slices import DECODE_TESTS, UNPOOLED, Slice

# Held to fixed lists of shapes (bench/kernel_check.py). Hypothesis would compile a kernel for every random one.
FIRST_OPS = ("rms_norm", "add_rms_norm", "rope", "rope_qk_norm", "swiglu", "linear_cross_entropy")
OTHER_OPS = ("linear_log_probs", "linear_distillation", "moe")
PEERS = {  # question -> ops, preset; what our kernels are timed against
    "elementwise": (("rms_norm", "add_rms_norm", "rope", "swiglu"), "minimind2-small"),
    "losses": (("linear_cross_entropy", "linear_log_probs"), "minimind2-small"),
    "moe": (("moe",), "minimind2-moe"),
}
MODULES = ("transformers", "llguidance", "fastapi", "pytest", "xdist")  # imported late, or by tests
OF_A_CARD = ("liger_kernel",)


@dataclass(frozen=True)
class CardQuestion(Slice):
    """part: the group that it belongs to, counted from 1; card: whether it needs one; telling: the last lines with
    these words say what came out, instead of the last of all."""

    part: int = 0
    card: bool = False
    telling: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardSetting:
    """work: the folder of all that questions leave; data: text to train on, the built-in corpus where there is none."""

    rehearse: bool
    work: Path
    data: Sequence[str] = ()

    @property
    def preset(self) -> str:
        return "nano" if self.rehearse else "minimind2-small"

    @property
    def rows(self) -> tuple[str, ...]:
        """Flags that say where a benchmark's rows go."""
        return "--out", str(self.work / "rows")

    @property
    def text(self) -> tuple[str, ...]:
        return ("--data", *self.data) if self.data else ()


def questions(setting: CardSetting) -> list[CardQuestion]:
    asked = [
        *_works(setting), *_trains(setting), *_decodes(setting), *_larger(setting), *_timelines(setting),
        _check(setting, 7, "kernels, the rest", OTHER_OPS, 1.0), *_peers(setting), _decode_tests(setting),
        *_sanitized(), _grpo(setting),
    ]  # fmt: skip
    ours = sorted({name for question in asked for name in _modules(question.command)})
    theirs = MODULES if setting.rehearse else MODULES + OF_A_CARD
    command = (sys.executable, "bench/cards/imports.py", *ours, *theirs)
    return [CardQuestion("imports", command, 0.7, part=1), *asked]


def run_folder(work: Path, name: str) -> Path:
    """Of a question that trains."""
    return work / "runs" / name.replace(" ", "-")


def _modules(command: Sequence[str]) -> list[str]:
    """The Python files of a command, as names to import."""
    return [part.removesuffix(".py").replace("/", ".") for part in command if part.endswith(".py")]


def _bench(part: int, name: str, minutes: float, script: str, *flags: str) -> CardQuestion:
    return CardQuestion(name, (sys.executable, f"bench/{script}.py", *flags), minutes, part=part)


def _check(s: CardSetting, part: int, name: str, ops: Sequence[str], minutes: float) -> CardQuestion:
    """On a CPU one op alone, in Triton's interpreter."""
    flags = ("--ops", ops[0], "--device", "cpu") if s.rehearse else ("--ops", *ops)
    command = (sys.executable, "bench/kernel_check.py", *flags)
    environment = {"TRITON_INTERPRET": "1"} if s.rehearse else {}
    return CardQuestion(f"parity of {name}", command, minutes, environment=environment, part=part)


def _works(s: CardSetting) -> list[CardQuestion]:
    native = _bench(1, "parity of native operators", 0.5, "native_check")
    return [native, _check(s, 1, "kernels", FIRST_OPS, 1.0)]


def _pretrain(s: CardSetting, part: int, name: str, minutes: float, tokens: int, *flags: str) -> CardQuestion:
    """No checkpoint but the last: writing them is not asked about. A rehearsal trains as few steps as are profiled."""
    size = ("--seq-len", "64", "--batch-tokens", "256") if s.rehearse else ()
    tokens = 256 * 6 if s.rehearse else tokens
    command = (
        sys.executable, "train/pretrain.py", "--compile", *flags, "--preset", s.preset, "--tokens", str(tokens), *size,
        "--evals", "2", "--eval-tokens", "16384", "--save-every", "100000", *s.text,
        "--out", str(run_folder(s.work, name)),
    )  # fmt: skip
    return CardQuestion(name, command, minutes, part=part, telling=("tokens/s", "held-out loss"))


def _trains(s: CardSetting) -> list[CardQuestion]:
    return [
        _pretrain(s, 2, "pretrain", 1.5, 4_000_000, "--profile"),
        _throughput(s, 3, "throughput small", 1.2, s.preset, ("ours", "upstream-style")),
    ]


def _throughput(
    s: CardSetting, part: int, name: str, minutes: float, preset: str, peers: Sequence[str], *flags: str
) -> CardQuestion:
    small = ("--rows", "2", "--seq-len", "64", "--steps", "1", "--warmup", "1")
    size = small if s.rehearse else ("--rows", "64", "--steps", "20", "--warmup", "5")
    given = ("--preset", preset, "--peer", *peers, *size, *flags, *s.text, *s.rows)
    return _bench(part, name, minutes, "throughput", *given)


def _decodes(s: CardSetting) -> list[CardQuestion]:
    """The last shows what it costs to be ready for a long context."""
    size = ("--preset", s.preset, *(("--turns", "1", "--prompt", "8", "--new", "4") if s.rehearse else ()))
    large = "4" if s.rehearse else "64"
    long = "2048" if s.rehearse else "32768"
    asked = (
        ("decode batch 1", 0.7, ("1",), ("ours", "naive"), ()),
        ("decode batch 64", 0.7, (large,), ("ours", "naive"), ()),
        ("decode, context 32768", 0.7, ("1", large), ("ours",), ("--max-context", long)),
    )
    return [
        _bench(4, name, minutes, "decode", "--batch", *batch, "--peer", *peers, *flags, *size, *s.rows)
        for name, minutes, batch, peers, flags in asked
    ]


def _larger(s: CardSetting) -> list[CardQuestion]:
    preset = "nano" if s.rehearse else "minimind2"
    return [
        _throughput(s, 5, "throughput minimind2", 1.2, preset, ("ours", "upstream-style")),
        _throughput(s, 5, "throughput minimind2, Muon", 0.8, preset, ("ours",), "--optimizer", "muon"),
    ]


def _timelines(s: CardSetting) -> list[CardQuestion]:
    graph = _pretrain(s, 6, "pretrain, CUDA graph", 1.0, 2_000_000, "--cuda-graph")
    return [
        _bench(6, "timeline of decoding", 0.5, "timelines", "--what", "decode", "--preset", s.preset, *s.rows),
        replace(graph, card=True),
    ]


def _peers(s: CardSetting) -> list[CardQuestion]:
    tokens, repeat = ("64", "1") if s.rehearse else ("16384", "30")
    found = [
        _bench(8, f"peers of kernels, {what}", 1.0, "kernels", "--ops", *ops, "--presets", preset,
               "--tokens", tokens, "--repeat", repeat, *s.rows)
        for what, (ops, preset) in PEERS.items()
    ]  # fmt: skip
    others = ("ours-eager", "hf") if s.rehearse else ("ours", "compile", "hf", "liger")
    training = _throughput(s, 8, "peers of training", 2.0, "minimind2-small", others)  # nano's shape is no Llama's
    return [*found, training]


def _decode_tests(s: CardSetting) -> CardQuestion:
    """The engine and its operators against the model; on a CPU the tests are only found."""
    how = ("--collect-only",) if s.rehearse else ("-n", "8", "-p", "no:benchmark")
    files = [f"tests/{name}.py" for name in DECODE_TESTS]
    return CardQuestion("parity of decoding", (sys.executable, "-m", "pytest", "-q", *how, *files), 1.0, part=9)


def _sanitized() -> list[CardQuestion]:
    native, kernels = (("bench/native_check.py",), ("bench/kernel_check.py", "--ops", "rms_norm", "swiglu", "moe"))
    return [
        CardQuestion(
            f"{tool} of {what}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, *script),
            minutes,
            "compute-sanitizer",
            UNPOOLED,
            part=10,
            card=True,
        )
        for what, script, minutes in (("native operators", native, 0.7), ("kernels", kernels, 1.5))
        for tool in ("memcheck", "racecheck")
    ]


def _grpo(s: CardSetting) -> CardQuestion:
    sizes = ("2", "2", "8", "16") if s.rehearse else ("16", "16", "256", "128")
    names = ("--prompts", "--samples", "--new", "--prompt")
    answers = [word for pair in zip(names, sizes, strict=True) for word in pair]
    return _bench(11, "grpo", 1.0, "rl", "--preset", s.preset, "--turns", "1", *answers, *s.rows)
