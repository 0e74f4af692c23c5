"""Decoding speed of the engine beside its peers', taking turns in one run, checked before it is timed.

    python bench/decode.py [--preset minimind2-small | --model FOLDER] [--batch 1 16 64] [--peer ours naive ...]

Each decoder (bench/decoding/implementations.py) lives in a process of its own; they take turns, one batch of prompts each, so that
a machine whose speed drifts slows all of them alike. What a decoder wrote in its warm-up turn must be the greedy
continuation (bench/decoding/judge.py), or it is not timed. Speed does not depend on the weights: a preset's are random,
of a scale that lets every layer change the next token.

Rows are added to decode.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console
from torch import Tensor

from bench.common.bandwidth import read_bandwidth
from bench.decoding.implementations import PEERS, DecodeSetting, Generation, why_not
from bench.decoding.judge import Judge, Verdict
from bench.decoding.report import COLUMNS, DecodeRow, plot, show
from bench.decoding.worker import DecoderError, DecodeWorker
from bench.operators.report import append, check_columns, slug
from minimind.config import PRESETS, ModelConfig
from minimind.export.gguf import export_gguf
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device
from minimind.utils.display import duration
from minimind.utils.stdio import command_line
from minimind.weights import load_model, save_weights

BYTES: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Args:
    """Measure decoding against its peers."""

    preset: str = "minimind2-small"
    """Shape of the model, with random weights."""
    model: str | None = None
    """A run folder or checkpoint instead of --preset."""
    peer: tuple[str, ...] = tuple(name for name in PEERS if name not in ("ours-reference", "ours-fp8"))
    """Who takes part; ratios are against the last."""
    batch: tuple[int, ...] = (1, 16, 64)
    """Rows decoded together."""
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 128
    """Tokens to decode after it."""
    max_context: int | None = None
    """Of our engine: the longest sequence that it is ready for. None: --prompt and --new tokens. A longer one should
    cost nothing; its rows name it beside the model."""
    turns: int = 3
    """Timed batches of each."""
    threads: int | None = None
    """Of every decoder; None: as many as PyTorch takes."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    device = _check(args)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model = _model(args)
    found = versions(describe_device(device))
    stamp = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": found["commit"], "device": found["device"], "threads": threads, "torch": found["torch"],
        "transformers": _version("transformers"), "llama_cpp": _version("llama_cpp_python"),
        "model": _title(args),
        "weights": "trained" if args.model else "random weights", "prompt": args.prompt, "new": args.new,
    }  # fmt: skip
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(str(found["device"]))
    table = folder / "decode.csv"
    check_columns(table, COLUMNS)
    names = []
    for name in args.peer:
        reason = why_not(name, model.config, device)
        if reason is None:
            names.append(name)
        else:
            console.print(f"without {name}: {reason}", highlight=False)
    if not names:
        raise ValueError("--peer: none of them can run here")
    rows: list[DecodeRow] = []
    with tempfile.TemporaryDirectory(prefix="minimind-decode-") as place:
        _prepare(model, Path(place), names)
        judge = Judge(model.float())
        bandwidths: dict[str, float] = {
            width: read_bandwidth(int(model.num_parameters() * BYTES[width]), device, 0.5)
            for width in dict.fromkeys(PEERS[name].width for name in names)
        }
        for batch in args.batch:
            setting = DecodeSetting(Path(place), batch, args.prompt, args.new, threads, device, args.max_context)
            new = measure(args, setting, names, judge, bandwidths, stamp, console)
            append(table, new)
            show(new, Console(width=None if sys.stdout.isatty() else 150))
            rows += new
    what = f"-batch-{args.batch[0]}" if len(args.batch) == 1 else ""
    picture = folder / f"decode{what}-{found['commit'] or 'unknown'}.png"
    plot(rows, picture)
    result: dict[str, Any] = {"csv": str(table), "png": str(picture), "bandwidth": bandwidths}
    return result | {"rows": [dataclasses.asdict(row) for row in rows]}


def measure(
    args: Args, setting: DecodeSetting, names: list[str], judge: Judge, bandwidths: dict[str, float],
    stamp: dict[str, Any], console: Console,
) -> list[DecodeRow]:  # fmt: skip
    """One batch size: every decoder started, warmed up and judged, then timed in turns, then ended."""
    results: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in names}
    verdicts: dict[str, Verdict] = {}
    workers: dict[str, DecodeWorker] = {}

    def say(text: str) -> None:
        console.print(f"batch {setting.batch}: {text}", highlight=False)

    def drop(name: str, status: str, reason: str) -> None:
        results[name] = {"status": status, "reason": reason}
        workers.pop(name).process.terminate()
        say(f"{name} {status}: {reason}")

    vocab = judge.model.config.vocab_size
    for name in names:
        worker = workers[name] = DecodeWorker(name, setting)
        try:
            worker.ready()
            start = time.perf_counter()
            prompts = _prompts(setting, vocab, seed=0)
            peer = PEERS[name]
            tokens = worker.run(prompts).tokens
            verdict = verdicts[name] = judge.judge(prompts, tokens, peer.width, float8_cache=peer.kv_bytes == 1)
        except (DecoderError, ValueError) as problem:
            drop(name, "failed", str(problem))
            continue
        say(f"{name} warmed up in {time.perf_counter() - start:.1f} s, error ratio {verdict.ratio:.2g}")
        if not verdict.passed:
            drop(name, "refused", f"not the greedy continuation: error ratio {verdict.ratio:.3g}, above 2")
    start = time.perf_counter()
    for turn in range(args.turns):
        prompts = _prompts(setting, vocab, seed=turn + 1)
        order = list(workers)
        for name in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
            try:
                workers[name].turns.append(workers[name].run(prompts))
            except DecoderError as problem:
                drop(name, "failed", str(problem))
        left = (time.perf_counter() - start) / (turn + 1) * (args.turns - turn - 1)
        say(f"{turn + 1}/{args.turns} turns of each, ETA {duration(left)}")
    for name, worker in workers.items():
        try:
            worker.finish()
            results[name] |= {"peak_mib": worker.peak_mib, **summary(worker.turns, setting)}
        except (DecoderError, ValueError) as problem:
            results[name] = {"status": "failed", "reason": str(problem)}
    rows = []
    for name in names:
        fields = results[name]
        if name in verdicts:
            fields |= {"error_ratio": verdicts[name].ratio, "equal": verdicts[name].equal}
        peer = PEERS[name]
        kv = int(judge.model.kv_bytes_per_token(torch.int8) * peer.kv_bytes)
        read = step_bytes(judge.model, setting, BYTES[peer.width], kv)
        fields |= {"step_bytes": read, "kv_bytes_per_token": kv, "bandwidth": bandwidths[peer.width]}
        if fields.get("tpot"):
            fields["share"] = read / bandwidths[peer.width] / fields["tpot"]
        rows.append(DecodeRow(**stamp, peer=name, width=peer.width, batch=setting.batch, **fields))
    return rows


def summary(turns: list[Generation], setting: DecodeSetting) -> dict[str, Any]:
    """What the turns of one decoder come to. Only steps that gave every row a token count as steps: a continuous batch
    has some before and after in which rows begin and end. ValueError where there is none."""
    steps: list[float] = []
    for turn in turns:
        started = max(turn.first)
        for (before, _), (now, count) in zip(turn.stamps, turn.stamps[1:], strict=False):
            if before >= started and count == setting.batch:
                steps.append(now - before)
    if not steps:
        raise ValueError(f"no step gave all {setting.batch} rows a token")
    quintiles = statistics.quantiles(steps, n=5) if len(steps) > 1 else steps * 4
    tpot = statistics.median(steps)
    seconds = sum(turn.stamps[-1][0] for turn in turns)
    return {
        "turns": len(turns),
        "ttft": statistics.median(statistics.mean(turn.first) for turn in turns),
        "tpot": tpot,
        "p20": quintiles[0],
        "p80": quintiles[-1],
        "tokens_per_second": setting.batch / tpot,
        "overall_per_second": len(turns) * setting.batch * setting.new / seconds,
    }


def step_bytes(model: Model, setting: DecodeSetting, per_weight: float, kv_bytes_per_token: int) -> int:
    """Bytes that one step reads: every matrix once, of the experts as many as the batch may choose, and the keys and
    values of every row at half of the continuation."""
    c = model.config
    weights = model.num_parameters() - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    idle = max(0, c.num_experts - setting.batch * c.num_experts_per_tok)
    weights -= idle * c.num_hidden_layers * 3 * c.hidden_size * c.moe_intermediate_size
    context = setting.prompt + setting.new // 2
    return int(weights * per_weight) + setting.batch * context * kv_bytes_per_token


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Matrices N(0, 1 / columns): every block's output is of the residual stream's own size. With the small values of
    training's start the model repeats its last token, which a broken decoder would do as well."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _prepare(model: Model, folder: Path, names: list[str]) -> None:
    save_weights(model, folder)
    tokenizer = load_tokenizer()
    for name in names:
        if name.startswith("llama.cpp"):
            kind: Any = name.removeprefix("llama.cpp-")
            export_gguf(model, tokenizer, folder / f"model-{kind}.gguf", kind)


def _prompts(setting: DecodeSetting, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, vocab, (setting.batch, setting.prompt), generator=generator)


def _model(args: Args) -> Model:
    if args.model is not None:
        return load_model(args.model)
    return random_model(ModelConfig.preset(args.preset))


def _title(args: Args) -> str:
    name = Path(args.model).name if args.model else args.preset
    return name if args.max_context is None else f"{name}, context up to {args.max_context}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check(args: Args) -> torch.device:
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    for name in args.peer:
        if name not in PEERS:
            raise ValueError(f"--peer {name}: unknown; choose from {', '.join(PEERS)}")
    for flag, values in (
        ("batch", args.batch),
        ("prompt", (args.prompt,)),
        ("turns", (args.turns,)),
        ("threads", (args.threads or 1,)),
    ):
        for value in values or (0,):
            if value < 1:
                raise ValueError(f"--{flag} {value}: counts from 1")
    if args.new < 2:
        raise ValueError(f"--new {args.new}: at least 2, since time between tokens is measured")
    if args.max_context is not None and args.max_context < args.prompt + args.new:
        raise ValueError(f"--max-context {args.max_context}: --prompt and --new need {args.prompt + args.new}")
    return choose_device(args.device)


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
