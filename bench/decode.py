"""Compare the decoding speed of the engine with other decoders, after checking their tokens.

    python bench/decode.py [--preset minimind2-small | --model FOLDER] [--batch 1 16 64] [--peer ours naive ...]

Each decoder (bench/decoding/implementations.py) runs in a process of its own; they take turns, one batch of prompts
each. The tokens of a decoder's warm-up turn must be the greedy continuation (bench/decoding/judge.py), or it is not
timed. Speed does not depend on the weights: those of a preset are random, of a scale at which every layer changes the
next token.

Rows are added to decode.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console
from torch import Tensor

from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.models import random_model
from bench.common.record import append, as_dicts, check_columns, package_version, results_folder, stamp
from bench.common.timing import busy_programs, read_bandwidth, spread
from bench.common.worker import ImplementationError, Worker, take_turn
from bench.decoding.implementations import IMPLEMENTATIONS, DecodeSetting, Generation, Width, start, why_not
from bench.decoding.judge import Judge, Verdict
from bench.decoding.report import DecodeRow, plot, show
from bench.decoding.vllm_peer import version as vllm_version
from minimind.config import PRESETS, ModelConfig
from minimind.export.gguf import export_gguf
from minimind.export.hf import export_hf
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer
from minimind.utils.device import choose_device
from minimind.utils.display import duration
from minimind.weights import load_model, save_weights

BYTES: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32, "int8": 1.0}


@dataclass(frozen=True)
class Args:
    """Compare decoders."""

    preset: str = "minimind2-small"
    """Shape of the model, with random weights."""
    model: str | None = None
    """A run folder or checkpoint instead of --preset."""
    peer: tuple[str, ...] = tuple(name for name in IMPLEMENTATIONS if name not in ("ours-reference", "ours-fp8"))
    """Decoders to compare; ratios are against the last."""
    batch: tuple[int, ...] = (1, 16, 64)
    """Sequences decoded together."""
    prompt: int = 128
    """Tokens of each prompt; the rows of another number than this, or of another --new, are marked."""
    new: int = 128
    """Tokens to decode after it."""
    max_context: int | None = None
    """Longest sequence that our engine is prepared for; None: --prompt plus --new. A longer one should cost nothing;
    its rows are marked."""
    busy: int = 0
    """Other programs that keep a processor busy each, as on a machine in use; their rows are marked."""
    turns: int = 3
    """Timed batches of each decoder."""
    threads: int | None = None
    """Threads of each decoder; None: PyTorch's default."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    device = _check(args)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model = load_model(args.model) if args.model else random_model(ModelConfig.preset(args.preset))
    columns = stamp(device, "torch") | {
        "threads": threads, "transformers": package_version("transformers"),
        "llama_cpp": package_version("llama_cpp_python"),
        "vllm": vllm_version() if "vllm" in args.peer else None, "model": _title(args),
        "weights": "trained" if args.model else "random weights", "prompt": args.prompt, "new": args.new,
    }  # fmt: skip
    folder = results_folder(args.out, columns["device"])
    check_columns(folder / "decode.csv", DecodeRow)
    names = _runnable(args.peer, model.config, device, console)
    rows: list[DecodeRow] = []
    with tempfile.TemporaryDirectory(prefix="minimind-decode-") as place:
        _save(model, Path(place), names)
        judge = Judge(model.float())
        bandwidths: dict[str, float] = {
            width: read_bandwidth(int(model.num_parameters() * BYTES[width]), device, 0.5)
            for width in dict.fromkeys(IMPLEMENTATIONS[name].width for name in names)
        }
        for batch in args.batch:
            setting = DecodeSetting(Path(place), batch, args.prompt, args.new, threads, device, args.max_context)
            comparison = DecodeComparison(setting, judge, console)
            with busy_programs(args.busy):
                comparison.run(names, args.turns)
            new = comparison.rows(names, bandwidths, columns)
            append(folder / "decode.csv", new)
            show(new, table_console(150))
            rows += new
    suffix = (f"-batch-{args.batch[0]}" if len(args.batch) == 1 else "") + ("-busy" if args.busy else "")
    picture = folder / f"decode{suffix}-{columns['commit'] or 'unknown'}.png"
    plot(rows, picture)
    return {"csv": str(folder / "decode.csv"), "png": str(picture), "bandwidth": bandwidths, "rows": as_dicts(rows)}


@dataclass
class DecodeComparison:
    """The decoders at one batch size: started and checked one after another, then timed in turns."""

    setting: DecodeSetting
    judge: Judge
    console: Console
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    turns: dict[str, list[Generation]] = field(default_factory=dict)

    def run(self, names: Sequence[str], turns: int) -> None:
        for name in names:
            self._start(name)
        began = time.perf_counter()
        for turn in range(turns):
            prompts = self._prompts(turn + 1).tolist()
            take_turn(self.workers, turn, partial(self._step, prompts), self._fail)
            left = (time.perf_counter() - began) / (turn + 1) * (turns - turn - 1)
            self._say(f"{turn + 1}/{turns} turns of each, ETA {duration(left)}")
        for name in list(self.workers):
            try:
                self.results[name] |= summary(self.turns[name], self.setting)
                self.results[name]["peak_mib"] = self.workers[name].ask(None)
            except (ImplementationError, ValueError) as problem:
                self._fail(name, str(problem))
            else:
                self.workers.pop(name).close()

    def rows(self, names: Sequence[str], bandwidths: dict[str, float], columns: dict[str, Any]) -> list[DecodeRow]:
        rows = []
        for name in names:
            fields, implementation = self.results[name], IMPLEMENTATIONS[name]
            if name in self.verdicts:
                fields |= {"error_ratio": self.verdicts[name].ratio, "equal": self.verdicts[name].equal}
            bandwidth = bandwidths[implementation.width]
            kv_bytes = int(self.judge.model.kv_bytes_per_token(torch.int8) * implementation.kv_bytes)
            per_weight = bytes_per_weight(implementation.width, self.judge.model, self.setting)
            read = step_bytes(self.judge.model, self.setting, per_weight, kv_bytes)
            fields |= {"step_bytes": read, "kv_bytes_per_token": kv_bytes, "bandwidth": bandwidth}
            if fields.get("tpot"):
                fields["share"] = read / bandwidth / fields["tpot"]
            rows.append(DecodeRow(**columns, peer=name, width=implementation.width, batch=self.setting.batch, **fields))
        return rows

    def _step(self, prompts: list[list[int]], name: str) -> None:
        self.turns[name].append(self.workers[name].ask(prompts))

    def _start(self, name: str) -> None:
        self.results[name], self.turns[name] = {"status": "ok"}, []
        implementation, prompts = IMPLEMENTATIONS[name], self._prompts(0)
        worker = self.workers[name] = Worker(start, name, self.setting)
        try:
            worker.wait_until_ready()
            began = time.perf_counter()
            tokens = worker.ask(prompts.tolist()).tokens
            is_float8 = implementation.kv_bytes == 1
            verdict = self.judge.judge(prompts, tokens, implementation.width, float8_cache=is_float8)
        except (ImplementationError, ValueError) as problem:
            self._fail(name, str(problem))
            return
        self.verdicts[name] = verdict
        self._say(f"{name} warmed up in {time.perf_counter() - began:.1f} s, error ratio {verdict.ratio:.2g}")
        if not verdict.passed:
            self._drop(name, "refused", f"not the greedy continuation: error ratio {verdict.ratio:.3g}, above 2")

    def _fail(self, name: str, reason: str) -> None:
        self._drop(name, "failed", reason)

    def _drop(self, name: str, status: str, reason: str) -> None:
        self.results[name] = {"status": status, "reason": reason}
        self.workers.pop(name).close()
        self._say(f"{name} {status}: {reason}")

    def _prompts(self, seed: int) -> Tensor:
        """int64 [batch, prompt], random tokens."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.judge.model.config.vocab_size
        return torch.randint(16, vocabulary, (self.setting.batch, self.setting.prompt), generator=generator)

    def _say(self, text: str) -> None:
        self.console.print(f"batch {self.setting.batch}: {text}", highlight=False)


def summary(turns: Sequence[Generation], setting: DecodeSetting) -> dict[str, Any]:
    """Columns of DecodeRow for one decoder's turns. Only steps that gave every sequence a token count: in a continuous
    batch, some steps before and after do not. ValueError if there is none."""
    steps: list[float] = []
    for turn in turns:
        all_started = max(turn.first)
        for (before, _), (now, count) in zip(turn.stamps, turn.stamps[1:], strict=False):
            if before >= all_started and count == setting.batch:
                steps.append(now - before)
    if not steps:
        raise ValueError(f"no step gave all {setting.batch} rows a token")
    tpot, p20, p80 = spread(steps)
    seconds = sum(turn.stamps[-1][0] for turn in turns)
    return {
        "turns": len(turns),
        "ttft": statistics.median(statistics.mean(turn.first) for turn in turns),
        "tpot": tpot,
        "p20": p20,
        "p80": p80,
        "tokens_per_second": setting.batch / tpot,
        "overall_per_second": len(turns) * setting.batch * setting.new / seconds,
    }


def bytes_per_weight(width: Width, model: Model, setting: DecodeSetting) -> float:
    """Of a step. On a GPU the layers read weights rounded to 8 bits in bf16: those of mixtures of experts, and of more
    than eight sequences."""
    by_layers = setting.device.type == "cuda" and (model.config.num_experts > 0 or setting.batch > 8)
    return BYTES["bf16" if width == "int8" and by_layers else width]


def step_bytes(model: Model, setting: DecodeSetting, per_weight: float, kv_bytes_per_token: int) -> int:
    """Bytes that one step reads: every matrix once (as many experts as the batch can choose), and the keys and values
    of every sequence in the middle of its continuation."""
    c = model.config
    weights = model.num_parameters() - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    idle = max(0, c.num_experts - setting.batch * c.num_experts_per_tok)
    weights -= idle * c.num_hidden_layers * 3 * c.hidden_size * c.moe_intermediate_size
    context = setting.prompt + setting.new // 2
    return int(weights * per_weight) + setting.batch * context * kv_bytes_per_token


def _save(model: Model, folder: Path, names: Sequence[str]) -> None:
    """The model in the formats that these decoders load."""
    save_weights(model, folder)
    tokenizer = load_tokenizer()
    for name in names:
        if name.startswith("llama.cpp"):
            kind: Any = name.removeprefix("llama.cpp-")
            export_gguf(model, tokenizer, folder / f"model-{kind}.gguf", kind)
        elif name == "vllm":
            export_hf(model, tokenizer, folder / "hf", torch.bfloat16)


def _title(args: Args) -> str:
    name = Path(args.model).name if args.model else args.preset
    tokens = "" if (args.prompt, args.new) == (Args.prompt, Args.new) else f", {args.prompt} + {args.new} tokens"
    context = "" if args.max_context is None else f", context up to {args.max_context}"
    return f"{name}{tokens}{context}{f', beside {args.busy} busy' if args.busy else ''}"


def _runnable(names: Sequence[str], config: ModelConfig, device: torch.device, console: Console) -> list[str]:
    """The decoders that can run here; a line for each that cannot. ValueError if none can."""
    runnable = []
    for name in names:
        reason = why_not(name, config, device)
        if reason is None:
            runnable.append(name)
        else:
            console.print(f"without {name}: {reason}", highlight=False)
    if not runnable:
        raise ValueError("--peer: none of them can run here")
    return runnable


def _check(args: Args) -> torch.device:
    check_choices("preset", [args.preset], PRESETS)
    check_choices("peer", args.peer, IMPLEMENTATIONS)
    check_at_least(1, batch=args.batch, prompt=args.prompt, turns=args.turns, threads=args.threads)
    check_at_least(0, busy=args.busy)
    if args.new < 2:
        raise ValueError(f"--new {args.new}: must be at least 2, since the time between tokens is measured")
    if args.max_context is not None and args.max_context < args.prompt + args.new:
        raise ValueError(f"--max-context {args.max_context}: --prompt and --new need {args.prompt + args.new}")
    return choose_device(args.device)


if __name__ == "__main__":
    run(main, Args, __doc__)
