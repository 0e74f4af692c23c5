"""What bench/campaign.py runs: every question to a card as a command of its own, the most telling first.

Minutes are estimates for an H100, whose compilations count as well; nobody has run these commands on a card yet. They
decide what is still begun before a deadline, and nothing else.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.operators.cases import BUILDERS

LIMIT = 480.0  # seconds of a slice
TESTS = Path(__file__).parents[2] / "tests"
PARITY = {  # slice -> files of tests/kernels; "model" takes the others, but for what asks no card
    "kernels": ("rms_norm", "rope", "swiglu", "moe_routing", "moe_experts"),
    "losses": ("linear_cross_entropy", "linear_log_probs", "linear_distillation"),
}
NOT_OF_A_CARD = ("bench_kernels", "interpreter", "large_offsets", "resources")
DECODE_TESTS = ("inference/decode/test_ops", "inference/decode/test_sampling", "inference/test_prefill",
                "inference/test_engine", "ops/test_attention")  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
# One cudaMalloc a tensor: within PyTorch's own pool a kernel may leave its tensor unseen.
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ATTENTION = {  # slice -> batches, contexts; the float64 truth of the longest takes 13 GB
    "attention": (("1", "16", "64"), ("512", "4096")),
    "attention long": (("1", "16"), ("32768",)),
}
PRESETS = ("minimind2-small", "minimind2", "minimind2-moe", "minimind3")
STAGES = ("sft", "dpo", "lora", "distill", "reason")
FIRST = (  # what half an hour of a card goes to, where that is all there is
    "parity kernels", "parity losses", "parity model", "parity decoding", "sanitizer native memcheck",
    "sanitizer native racecheck", "sanitizer native initcheck", "throughput minimind2-small", "decode batch 1",
    "end to end", "rl minimind2-small",
)  # fmt: skip
PEERS = ("ours", "ours-eager", "compile", "hf", "liger", "upstream-style")


@dataclass(frozen=True)
class Slice:
    """needs: a program that must be on PATH; environment: on top of this process's own."""

    name: str
    command: Sequence[str]
    minutes: float = 1.0
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """rows: of a training batch of pretraining's 512 tokens; the others' rows have as many tokens in all. steps: timed
    steps. rl: prompts, answers to each and their tokens. end_to_end: tokens of pretraining and of SFT on the built-in
    data; files are read once."""

    rows: int
    steps: int
    warmup: int
    decode_turns: int
    batches: tuple[int, ...]
    rl: tuple[int, int, int]
    serving_seconds: int
    end_to_end: tuple[int, int]
    flags: tuple[str, ...] = ()  # of bench/kernels.py


def sizes_of(cuda: bool, memory: float, smoke: bool) -> Sizes:
    """memory: the card's, in bytes. Up to six contenders share it: below 40 GiB a batch is a quarter as large."""
    if smoke:
        small = ("--tokens", "64", "--repeat", "1", "--presets", "minimind2-small", "minimind3-moe")
        return Sizes(2, 1, 1, 1, (1,), (2, 2, 8), 2, (4096, 4096), small)
    if not cuda:
        return Sizes(8, 5, 2, 2, (1, 16), (8, 8, 128), 30, (400_000, 400_000))
    large = memory > 40 * 2**30
    rl = (16, 16, 256) if large else (8, 8, 256)
    return Sizes(64 if large else 16, 30, 10, 5, (1, 16, 64), rl, 30, (40_000_000, 6_000_000))


def slices(
    cuda: bool,
    memory: float = 80 * 2**30,
    data: Sequence[str] = (),
    chats: Sequence[str] = (),
    smoke: bool = False,
    out: Sequence[str] = (),
) -> list[Slice]:
    """In the order in which they are worth a card's time. data, chats: of pretraining and SFT, the built-in ones where
    there are none; smoke: the same commands as small as they go; out: flags that say where rows go."""
    sizes = sizes_of(cuda, memory, smoke)
    preset = "nano" if smoke else "minimind2-small"
    found = _parity(smoke)
    if cuda and not smoke:
        found += _sanitized()
    found += _training(sizes, preset, data, chats, smoke, out)
    wanted = {"attention": (("1",), ("64",))} if smoke else ATTENTION
    found += [
        _bench(name, 1.5, "decode_attention", "--batch", *batches, "--context", *contexts, *out)
        for name, (batches, contexts) in wanted.items()
        if cuda or name == "attention"
    ]
    turns = ("--turns", str(sizes.decode_turns), *(("--preset", preset, "--new", "4") if smoke else ()))
    found += [
        _bench(f"decode batch {batch}", 3.5, "decode", "--batch", str(batch), *turns, *out) for batch in sizes.batches
    ]
    found += [_bench(f"kernels {op}", 2.5, "kernels", "--ops", op, *sizes.flags, *out) for op in BUILDERS]
    found += _whole_runs(sizes, preset, data, chats, smoke, out)
    if cuda and not smoke:
        found += [_bench(f"tune {op}", 3, "kernels", "--tune", op, *out) for op in BUILDERS]
    if smoke:
        return [replace(piece, minutes=0.5) for piece in found]
    return sorted(found, key=lambda piece: FIRST.index(piece.name) if piece.name in FIRST else len(FIRST))


def _bench(name: str, minutes: float, script: str, *flags: str) -> Slice:
    return Slice(name, (sys.executable, f"bench/{script}.py", *flags), minutes)


def _parity(smoke: bool) -> list[Slice]:
    """In several processes where pytest-xdist is at hand: compiling the kernels is most of the time."""
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    pytest = (sys.executable, "-m", "pytest", "-q", *(("--collect-only",) if smoke else parallel))
    kinds = {kind: [f"tests/kernels/test_{name}.py" for name in names] for kind, names in PARITY.items()}
    elsewhere = {*NOT_OF_A_CARD, *(name for names in PARITY.values() for name in names)}
    rest = sorted(path.name for path in (TESTS / "kernels").glob("test_*.py"))
    kinds["model"] = [f"tests/kernels/{name}" for name in rest if name[5:-3] not in elsewhere]
    kinds["decoding"] = [f"tests/{name}.py" for name in DECODE_TESTS]
    return [Slice(f"parity {kind}", (*pytest, *files), 2.5) for kind, files in kinds.items()]


def _sanitized() -> list[Slice]:
    return [
        Slice(
            f"sanitizer {what} {tool}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, f"bench/{script}.py"),
            minutes,
            "compute-sanitizer",
            UNPOOLED,
        )
        for what, script, minutes in (("native", "native_check", 1.0), ("kernels", "kernel_check", 4.0))
        for tool in SANITIZERS
    ]


def _training(
    sizes: Sizes, preset: str, data: Sequence[str], chats: Sequence[str], smoke: bool, out: Sequence[str]
) -> list[Slice]:
    steps = ("--steps", str(sizes.steps), "--warmup", str(sizes.warmup))
    short = ("--seq-len", "256") if smoke else ()
    found = []
    for name in (preset,) if smoke else PRESETS:
        flags = ("--preset", name, "--peer", *PEERS, "--rows", str(sizes.rows), *steps, *short, *out)
        found.append(_bench(f"throughput {name}", 4, "throughput", *flags, *(("--data", *data) if data else ())))
    for stage in STAGES:
        peers = ("ours", "hf", "liger", "upstream-style") if stage == "sft" else ("ours", "upstream-style")
        files = ("--data", *chats) if chats and stage in ("sft", "distill") else ()
        flags = ("--stage", stage, "--preset", preset, "--peer", *peers, *steps, *short, *out, *files)
        rows = ("--rows", "2" if smoke else str(_rows_like(stage, sizes.rows)))
        found.append(_bench(f"throughput {stage}", 3, "throughput", *flags, *rows))
    return found


def _rows_like(stage: str, rows: int) -> int:
    """As many positions as `rows` of 512, in an even number of rows of the stage's own length."""
    lengths = {"sft": 340, "lora": 340, "distill": 340, "reason": 720, "dpo": 1024}
    return 2 * max(1, round(rows * 512 / lengths[stage] / 2))


def _whole_runs(
    sizes: Sizes, preset: str, data: Sequence[str], chats: Sequence[str], smoke: bool, out: Sequence[str]
) -> list[Slice]:
    """What takes a whole program: reinforcement learning, the server, pretraining and SFT to their end, timelines."""
    prompts, samples, new = map(str, sizes.rl)
    answers = ("--prompts", prompts, "--samples", samples, "--new", new, "--prompt", "16" if smoke else "128")
    turns = ("--turns", "1") if smoke else ()
    models = ("nano",) if smoke else ("nano", "minimind2-small")
    found = [_bench(f"rl {name}", 2, "rl", "--preset", name, *answers, *turns, *out) for name in models]
    clients = ("--clients", "4", "--new", "16") if smoke else ()
    seconds = ("--seconds", str(sizes.serving_seconds))
    found.append(_bench("serving", 2, "serving", "--preset", preset, *seconds, *clients, *out))
    given = (*(("--data", *data) if data else ()), *(("--chats", *chats) if chats else ()))
    tokens, taught = map(str, sizes.end_to_end)
    limits = (*(() if data else ("--tokens", tokens)), *(() if chats else ("--chat-tokens", taught)))
    found.append(_bench("end to end", 5, "end_to_end", "--preset", preset, *limits, *given, *out))
    for what in ("train", "decode"):
        found.append(_bench(f"timeline {what}", 1, "timelines", "--what", what, "--preset", preset, *out))
    found.append(_bench("loader", 1, "loader", "--seconds", "0.1" if smoke else "3", *out))
    return found
