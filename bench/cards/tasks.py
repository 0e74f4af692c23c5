"""The tasks of bench/card.py in order of value: first those for a quarter of an hour, then, with --all, the others.

The estimates in minutes are for an H200, compilation included; nobody has run these commands on a GPU yet. In a
rehearsal, the same commands run on a CPU with the smallest sizes; a task that has no such form needs a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.operators.cases import BUILDERS

TESTS = Path(__file__).parents[2] / "tests"
DECODE_TESTS = ("inference/decode/test_ops", "inference/decode/test_sampling", "inference/test_prefill",
                "inference/test_engine", "ops/test_attention")  # fmt: skip
KERNEL_TESTS = {  # task -> files of tests/kernels; "model" has the others
    "kernels": ("rms_norm", "rope", "swiglu", "moe_routing", "moe_experts"),
    "losses": ("linear_cross_entropy", "linear_log_probs", "linear_distillation"),
}
NOT_ON_A_GPU = ("bench_kernels", "interpreter", "large_offsets", "resources")  # files of tests/kernels
# For a first look, fixed lists of shapes (bench/kernel_check.py): hypothesis would compile a kernel for every shape.
FIRST_OPS = ("rms_norm", "add_rms_norm", "rope", "rope_qk_norm", "swiglu", "linear_cross_entropy")
OTHER_OPS = ("linear_log_probs", "linear_distillation", "moe")
PEER_OPS = {  # task -> ops, preset
    "elementwise": (("rms_norm", "add_rms_norm", "rope", "swiglu"), "minimind2-small"),
    "losses": (("linear_cross_entropy", "linear_log_probs"), "minimind2-small"),
    "moe": (("moe",), "minimind2-moe"),
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
# One cudaMalloc for each tensor: in PyTorch's pool, an access outside a tensor may stay unnoticed.
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MODULES = ("transformers", "llguidance", "fastapi", "pytest", "xdist")  # imported late, or by tests
GPU_MODULES = ("liger_kernel",)
PRESETS = ("minimind2-small", "minimind2", "minimind2-moe", "minimind3")
TRAINING_PEERS = ("ours", "ours-eager", "compile", "hf", "liger", "upstream-style")
SEQ_LENS = {"sft": 340, "dpo": 1024, "lora": 340, "distill": 340, "reason": 720}


@dataclass(frozen=True)
class BenchmarkTask:
    """A command and its estimated minutes.

    needs: a program that must be on PATH. environment: additional variables. part: the group of the task, counted from
    1. gpu: whether it needs a GPU even in a rehearsal. telling: the last lines with these words are the result, instead
    of the last line of the output.
    """

    name: str
    command: Sequence[str]
    minutes: float = 1.0
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    part: int = 0
    gpu: bool = False
    telling: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardSetting:
    """work: folder of everything that tasks write. data, chats: files to train on; none for the built-in data. large:
    whether the GPU has more than 40 GiB, shared by up to six processes."""

    rehearse: bool
    work: Path
    data: Sequence[str] = ()
    chats: Sequence[str] = ()
    large: bool = True

    @property
    def preset(self) -> str:
        return "nano" if self.rehearse else "minimind2-small"

    @property
    def rows(self) -> tuple[str, ...]:
        """The flags for the folder of a benchmark's rows."""
        return "--out", str(self.work / "rows")

    @property
    def text(self) -> tuple[str, ...]:
        return ("--data", *self.data) if self.data else ()


def tasks(setting: CardSetting, everything: bool = False) -> list[BenchmarkTask]:
    """All tasks; the first imports every module that a later one needs."""
    later = [*_quick(setting), *(_others(setting) if everything else [])]
    scripts = sorted({name for task in later for name in _modules(task.command)})
    modules = MODULES if setting.rehearse else MODULES + GPU_MODULES
    command = (sys.executable, "bench/cards/imports.py", *scripts, *modules)
    return [BenchmarkTask("imports", command, 0.7, part=1), *later]


def run_folder(work: Path, name: str) -> Path:
    """The run folder of a task that trains."""
    return work / "runs" / name.replace(" ", "-")


def _modules(command: Sequence[str]) -> list[str]:
    """The Python files of a command, as names to import."""
    return [part.removesuffix(".py").replace("/", ".") for part in command if part.endswith(".py")]


def _bench(part: int, name: str, minutes: float, script: str, *flags: str) -> BenchmarkTask:
    return BenchmarkTask(name, (sys.executable, f"bench/{script}.py", *flags), minutes, part=part)


def _quick(s: CardSetting) -> list[BenchmarkTask]:
    """Does it import, is it right, does it train and how fast, does it decode and how fast, how fast are others?"""
    decoding = _bench(6, "timeline of decoding", 0.5, "timelines", "--what", "decode", "--preset", s.preset, *s.rows)
    graph = _pretrain(s, 6, "pretrain, CUDA graph", 1.0, 2_000_000, "--cuda-graph")
    larger = "nano" if s.rehearse else "minimind2"
    return [
        _bench(1, "parity of native operators", 0.5, "native_check"),
        _check(s, 1, "kernels", FIRST_OPS, 1.0),
        _pretrain(s, 2, "pretrain", 1.5, 4_000_000, "--profile"),
        _throughput(s, 3, "throughput small", 1.2, s.preset, ("ours", "upstream-style")),
        *_decoding(s),
        _throughput(s, 5, "throughput minimind2", 1.2, larger, ("ours", "upstream-style")),
        _throughput(s, 5, "throughput minimind2, Muon", 0.8, larger, ("ours",), "--optimizer", "muon"),
        decoding,
        replace(graph, gpu=True),
        _check(s, 7, "kernels, the rest", OTHER_OPS, 1.0),
        *_peers(s),
        _decode_tests(s),
        *_sanitized(10, "native operators", 0.7, SANITIZERS[:2], "native_check"),
        *_sanitized(10, "kernels", 1.5, SANITIZERS[:2], "kernel_check", "--ops", "rms_norm", "swiglu", "moe"),
        _grpo(s, 11, "grpo", s.preset, "1"),
    ]


def _check(s: CardSetting, part: int, name: str, ops: Sequence[str], minutes: float) -> BenchmarkTask:
    """Ops against plain PyTorch; on a CPU only one, in Triton's interpreter."""
    flags = ("--ops", ops[0], "--device", "cpu") if s.rehearse else ("--ops", *ops)
    command = (sys.executable, "bench/kernel_check.py", *flags)
    environment = {"TRITON_INTERPRET": "1"} if s.rehearse else {}
    return BenchmarkTask(f"parity of {name}", command, minutes, environment=environment, part=part)


def _pretrain(s: CardSetting, part: int, name: str, minutes: float, tokens: int, *flags: str) -> BenchmarkTask:
    """Pretraining with only the last checkpoint, since writing them is not measured. A rehearsal trains as few steps as
    are profiled."""
    size = ("--seq-len", "64", "--batch-tokens", "256") if s.rehearse else ()
    tokens = 256 * 6 if s.rehearse else tokens
    command = (
        sys.executable, "train/pretrain.py", "--compile", *flags, "--preset", s.preset, "--tokens", str(tokens), *size,
        "--evals", "2", "--eval-tokens", "16384", "--save-every", "100000", *s.text,
        "--out", str(run_folder(s.work, name)),
    )  # fmt: skip
    return BenchmarkTask(name, command, minutes, part=part, telling=("tokens/s", "held-out loss"))


def _throughput(
    s: CardSetting, part: int, name: str, minutes: float, preset: str, peers: Sequence[str], *flags: str
) -> BenchmarkTask:
    small = ("--rows", "2", "--seq-len", "64", "--steps", "1", "--warmup", "1")
    size = small if s.rehearse else ("--rows", "64" if s.large else "16", "--steps", "20", "--warmup", "5")
    return _bench(
        part, name, minutes, "throughput", "--preset", preset, "--peer", *peers, *size, *flags, *s.text, *s.rows
    )


def _decoding(s: CardSetting) -> list[BenchmarkTask]:
    """The last task shows the cost of being prepared for a long context."""
    size = ("--preset", s.preset, *(("--turns", "1", "--prompt", "8", "--new", "4") if s.rehearse else ()))
    large, long = ("4", "2048") if s.rehearse else ("64", "32768")
    return [
        _bench(4, name, 0.7, "decode", "--batch", *batches, "--peer", *peers, *flags, *size, *s.rows)
        for name, batches, peers, flags in (
            ("decode batch 1", ("1",), ("ours", "naive"), ()),
            ("decode batch 64", (large,), ("ours", "naive"), ()),
            ("decode, context 32768", ("1", large), ("ours",), ("--max-context", long)),
        )
    ]


def _peers(s: CardSetting) -> list[BenchmarkTask]:
    tokens, repeat = ("64", "1") if s.rehearse else ("16384", "30")
    kernels = [
        _bench(8, f"peers of kernels, {name}", 1.0, "kernels", "--ops", *ops, "--presets", preset,
               "--tokens", tokens, "--repeat", repeat, *s.rows)
        for name, (ops, preset) in PEER_OPS.items()
    ]  # fmt: skip
    others = ("ours-eager", "hf") if s.rehearse else ("ours", "compile", "hf", "liger")
    # not nano: LlamaForCausalLM cannot have its shape
    return [*kernels, _throughput(s, 8, "peers of training", 2.0, "minimind2-small", others)]


def _pytest(s: CardSetting, part: int, name: str, files: Sequence[str], minutes: float) -> BenchmarkTask:
    """Tests, in several processes since compiling takes most of the time; a rehearsal only collects them."""
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    how = ("--collect-only",) if s.rehearse else (*parallel, "-p", "no:benchmark")
    return BenchmarkTask(name, (sys.executable, "-m", "pytest", "-q", *how, *files), minutes, part=part)


def _decode_tests(s: CardSetting) -> BenchmarkTask:
    return _pytest(s, 9, "parity of decoding", [f"tests/{name}.py" for name in DECODE_TESTS], 1.0)


def _sanitized(
    part: int, name: str, minutes: float, tools: Sequence[str], script: str, *flags: str
) -> list[BenchmarkTask]:
    python = (sys.executable, f"bench/{script}.py", *flags)
    return [
        BenchmarkTask(
            f"{tool} of {name}", ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *python), minutes,
            needs="compute-sanitizer", environment=UNPOOLED, part=part, gpu=True,
        )
        for tool in tools
    ]  # fmt: skip


def _grpo(s: CardSetting, part: int, name: str, preset: str, turns: str) -> BenchmarkTask:
    sizes = ("2", "2", "8", "16") if s.rehearse else (*(("16", "16") if s.large else ("8", "8")), "256", "128")
    flags = ("--prompts", "--samples", "--new", "--prompt")
    answers = [word for pair in zip(flags, sizes, strict=True) for word in pair]
    return _bench(part, name, 1.0 * int(turns), "rl", "--preset", preset, "--turns", turns, *answers, *s.rows)


def _others(s: CardSetting) -> list[BenchmarkTask]:
    """Every test of kernels and every sanitizer, then every preset, stage, decoder and op, whole runs, and tuning."""
    presets = ("minimind2-small", "minimind3-moe")
    small = ("--tokens", "64", "--repeat", "1", "--presets", *presets) if s.rehearse else ()
    turns = ("--turns", "1", "--preset", "nano", "--prompt", "8", "--new", "4") if s.rehearse else ("--turns", "5")
    return [
        *_kernel_tests(s),
        *_sanitized(13, "native operators", 1.0, SANITIZERS[2:], "native_check"),
        *_sanitized(13, "all kernels", 4.0, SANITIZERS, "kernel_check"),
        *_training(s),
        *_attention(s),
        *(
            _bench(15, f"all decoders, batch {batch}", 3.5, "decode", "--batch", batch, *turns, *s.rows)
            for batch in (("1",) if s.rehearse else ("1", "16", "64"))
        ),
        *(_bench(16, f"all peers of {op}", 2.5, "kernels", "--ops", op, *small, *s.rows) for op in BUILDERS),
        *_whole_runs(s),
        *(replace(_bench(18, f"tuning of {op}", 3, "kernels", "--tune", op, *s.rows), gpu=True) for op in BUILDERS),
    ]


def _kernel_tests(s: CardSetting) -> list[BenchmarkTask]:
    groups = {kind: [f"tests/kernels/test_{name}.py" for name in names] for kind, names in KERNEL_TESTS.items()}
    elsewhere = {*NOT_ON_A_GPU, *(name for names in KERNEL_TESTS.values() for name in names)}
    files = sorted(path.name for path in (TESTS / "kernels").glob("test_*.py"))
    groups["model"] = [f"tests/kernels/{name}" for name in files if name[5:-3] not in elsewhere]
    return [_pytest(s, 12, f"parity tests of {kind}", files, 2.5) for kind, files in groups.items()]


def _training(s: CardSetting) -> list[BenchmarkTask]:
    presets = (s.preset,) if s.rehearse else PRESETS
    models = [_throughput(s, 14, f"all peers of {name}", 4, name, TRAINING_PEERS) for name in presets]
    text_rows = 64 if s.large else 16
    stages = []
    for stage, seq_len in SEQ_LENS.items():
        peers = ("ours", "hf", "liger", "upstream-style") if stage == "sft" else ("ours", "upstream-style")
        data = ("--data", *s.chats) if s.chats and stage in ("sft", "distill") else ()
        # as many positions as the text rows of 512, in an even number of rows
        rows = str(2 * max(1, round(text_rows * 512 / seq_len / 2)))
        size: tuple[str, ...] = ("--rows", rows, "--steps", "30", "--warmup", "10")
        if s.rehearse:
            size = ("--rows", "2", "--seq-len", "256", "--steps", "1", "--warmup", "1")
        flags = ("--stage", stage, "--preset", s.preset, "--peer", *peers, *size, *data, *s.rows)
        stages.append(_bench(14, f"throughput of {stage}", 3, "throughput", *flags))
    return [*models, *stages]


def _attention(s: CardSetting) -> list[BenchmarkTask]:
    """The float64 reference of the longest takes 13 GB."""
    sizes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "attention of decoding": (("1",), ("64",)) if s.rehearse else (("1", "16", "64"), ("512", "4096"))
    }
    if not s.rehearse:
        sizes["attention of decoding, long"] = (("1", "16"), ("32768",))
    return [
        _bench(15, name, 1.5, "decode_attention", "--batch", *batches, "--context", *contexts, *s.rows)
        for name, (batches, contexts) in sizes.items()
    ]


def _whole_runs(s: CardSetting) -> list[BenchmarkTask]:
    """Reinforcement learning, the server, pretraining and SFT from beginning to end, a timeline, the loader."""
    chats = ("--chats", *s.chats) if s.chats else ()
    tokens, chat_tokens = ("4096", "4096") if s.rehearse else ("40000000", "6000000")
    limits = (*(() if s.data else ("--tokens", tokens)), *(() if s.chats else ("--chat-tokens", chat_tokens)))
    load = ("--seconds", "2", "--clients", "4", "--new", "16") if s.rehearse else ("--seconds", "30")
    models = ("nano",) if s.rehearse else ("nano", "minimind2-small")
    to_loss = ["upstream-style", "hf", "ours", "--hf-lr", "2e-3", "--minutes", "0.7", "--shares", "1", "0.2"]
    if s.rehearse:
        to_loss = ["upstream-style", "ours-eager", "--minutes", "0.02", "--shares", "1", "--evals", "1"]
    runs = str(s.work / "time-to-loss")
    one_seed = ("--seeds", "1", "--sft-minutes", "0", "--work", runs)
    return [
        *(_grpo(s, 17, f"grpo of {name}", name, "1" if s.rehearse else "3") for name in models),
        _bench(17, "serving", 2, "serving", "--preset", s.preset, *load, *s.rows),
        _bench(17, "end to end", 5, "end_to_end", "--preset", s.preset, *limits, *s.text, *chats, *s.rows),
        _bench(
            17, "time to loss", 5, "time_to_loss", "--preset", s.preset, *one_seed, *s.text, *s.rows, "--only", *to_loss
        ),
        _bench(17, "timeline of training", 1, "timelines", "--what", "train", "--preset", s.preset, *s.rows),
        _bench(17, "loader", 1, "loader", "--seconds", "0.1" if s.rehearse else "3", *s.rows),
    ]
