"""Measure a model: `minimind evaluate`.

    minimind evaluate --ppl book.txt --context 512,...,8192 --yarn 16     perplexity by context length
    minimind evaluate --tasks ceval,cmmlu                                 benchmarks (harness.py)
    minimind evaluate --agent                                             tasks with tools (agents.py)

The text of --ppl is one stream of tokens, cut into windows of each length. Every length scores the same tokens, each
once, with the tokens before it in its window as context. Perplexity is exp of the mean of -log p; bits per byte do not
depend on the tokenizer. The second half of every window is also reported alone, since only there the context is long.
Every curve is measured again with keys and values rounded as in an fp8 cache if --kv-dtype is fp8, and with matrices,
on a CPU activations too, rounded as in decoding with 8-bit weights if --weights-dtype is int8.

Memory grows with the longest window, not with the text. The command prints a table and writes perplexity.json and
perplexity.png to the run folder or --out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minimind import ops
from minimind.config import ModelConfig
from minimind.data import expand_paths, read_documents
from minimind.data.formats import RowFormat
from minimind.data.paths import find_files
from minimind.data.reader import BadRows, Document
from minimind.inference.decode.int8 import rounded_weights
from minimind.inference.decode.kv_cache import rounded_cache
from minimind.inference.loading import LoadedModel, ModelArgs, open_model, stretched
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.utils.display import Display, caption, decoration, duration, pyplot, say

_COLOURS = ("#1b6ca8", "#d98324", "#5a9e6f", "#9467bd", "#c44e52", "#7f7f7f")
_MOST_NATS = 700.0  # exp of more is beyond float64
BATCH_TOKENS = 8192  # tokens of windows that are scored together; a longer window is scored alone


@dataclass(frozen=True)
class Args(ModelArgs):
    """Measure perplexity by context length, run benchmarks, or test the use of tools."""

    tasks: tuple[str, ...] = ()
    """Run these benchmarks of lm-evaluation-harness instead; names separated by commas or spaces: ceval,cmmlu,mmlu."""
    few_shot: int | None = None
    """With --tasks: examples before each question. None: the task's own number."""
    limit: int | None = None
    """With --tasks: at most this many questions of each task; with --agent: of all tasks."""
    include: str | None = None
    """With --tasks: a folder with your own tasks, .yaml files and data."""
    chat: bool = False
    """With --tasks: put the questions into the chat template."""
    agent: bool = False
    """Evaluate on tasks that need tool calls instead; reports success by kind of task and number of calls. --model may
    be the address of a server with OpenAI's API, http://HOST/v1 or http://HOST/v1#NAME."""
    agent_data: tuple[str, ...] = ()
    """With --agent: tasks as train/agent.py reads them. Empty: the held-out built-in ones."""
    tools: tuple[str, ...] = ("builtin",)
    """With --agent: functions that implement the tools: builtin, upstream, package.module:NAME of your own, or
    mcp:COMMAND or mcp:http://... of an MCP server."""
    ppl: tuple[str, ...] = ()
    """Text that the model was not trained on: files, folders or globs of .txt and .jsonl, plain, .gz or .zst."""
    on_bad_row: Literal["error", "skip"] = "error"
    """With --ppl: stop at a row that cannot be used, or skip it."""
    ignore_fields: tuple[str, ...] = ()
    """With --ppl: fields of rows to ignore; other unknown fields are errors."""
    context: tuple[str, ...] = ("512,1024,2048",)
    """Window lengths in tokens, separated by commas or spaces; "512,...,8192" doubles from 512 to 8192."""
    tokens: int = 65536
    """At most this many tokens are scored, from the beginning of the text."""
    out: str | None = None
    """Folder for perplexity.json and perplexity.png, tasks.json or agent.json. None: the run folder, or the current
    folder."""


@dataclass(frozen=True)
class Score:
    """One point of a curve. perplexity and bits_per_byte: of all tokens. second_half: perplexity of the tokens in the
    second halves of the windows. seconds: time of the measurement."""

    curve: str
    context: int
    tokens: int
    perplexity: float
    bits_per_byte: float
    second_half: float
    seconds: float


def main(args: Args) -> int:
    """Measure and report; returns the exit status. ValueError, one line, for bad input."""
    console = Console()
    if args.agent:
        return _agent(args, console)
    if args.tasks:
        return _tasks(args, console)
    lengths = parse_contexts(args.context)
    if not args.ppl:
        raise ValueError("--ppl: name the text to measure on, or name benchmarks with --tasks")
    if args.tokens < lengths[-1]:
        raise ValueError(f"--tokens {args.tokens}: must be at least {lengths[-1]}, the longest --context")
    loaded = open_model(dataclasses.replace(args, yarn=None, yarn_original=None))
    for note in loaded.notes:
        say(console, note)
    curves = curves_of(loaded.model.config, args)
    loaded.model.compute_dtype = loaded.dtype
    for line in find_files(args.ppl).lines():
        say(console, line)
    bad = BadRows()
    read = partial(
        read_documents, on_bad_row=args.on_bad_row, bad=bad, row_format=RowFormat(ignored=args.ignore_fields)
    )
    ids = read_stream(args.ppl, loaded.tokenizer, args.tokens // lengths[-1] * lengths[-1] + 1, read)
    if bad.count:
        say(console, f"--ppl: {bad}")
    scored = (len(ids) - 1) // lengths[-1] * lengths[-1]
    if scored == 0:
        raise ValueError(
            f"--ppl: the text has {len(ids):,} tokens, the longest --context needs {lengths[-1] + 1:,}; give more text "
            "or a shorter --context"
        )
    folder = _folder(args, loaded)
    scores = measure(loaded.model, loaded.tokenizer, ids[: scored + 1], lengths, curves, console)
    if loaded.kv_dtype not in (None, loaded.dtype):
        with rounded_cache(loaded.model, loaded.kv_dtype):
            rounded = {f"{name}, cache in {args.kv_dtype}": config for name, config in curves.items()}
            scores += measure(loaded.model, loaded.tokenizer, ids[: scored + 1], lengths, rounded, console)
    if loaded.weights_dtype is not None:
        with rounded_cache(loaded.model, loaded.kv_dtype or loaded.dtype), rounded_weights(loaded.model):
            rounded = {f"{name}, weights in {args.weights_dtype}": config for name, config in curves.items()}
            scores += measure(loaded.model, loaded.tokenizer, ids[: scored + 1], lengths, rounded, console)
    show(scores, console)
    results = {"text": list(args.ppl), "scores": [dataclasses.asdict(score) for score in scores]}
    (folder / "perplexity.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(scores, folder / "perplexity.png", ", ".join(Path(p).name for p in args.ppl))
    say(console, f"{folder / 'perplexity.png'}, {folder / 'perplexity.json'}")
    return 0


def _agent(args: Args, console: Console) -> int:
    if args.ppl or args.tasks:
        raise ValueError("--agent: goes with neither --ppl nor --tasks")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    from minimind.evaluation.agents import RemoteModel, evaluate_agent, is_address, report_agent

    model: LoadedModel | RemoteModel
    if is_address(args.model):
        model, folder = RemoteModel.open(str(args.model)), _writable(Path(args.out or "."))
    else:
        model = open_model(args)
        folder = _folder(args, model)
        for note in model.notes:
            say(console, note)
    report_agent(evaluate_agent(model, args.agent_data, args.tools, args.limit, console), folder, console)
    return 0


def _tasks(args: Args, console: Console) -> int:
    if args.ppl:
        raise ValueError("--ppl and --tasks: give one of them")
    if args.weights_dtype != "auto":
        raise ValueError(f"--weights-dtype {args.weights_dtype}: --tasks does not use it; --ppl measures the effect")
    if args.kv_dtype != "auto":
        raise ValueError(f"--kv-dtype {args.kv_dtype}: --tasks scores without a cache; --ppl measures the effect")
    for name, value, least in (("few-shot", args.few_shot, 0), ("limit", args.limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install lm-eval")
    from minimind.evaluation.harness import evaluate_tasks, report

    loaded = open_model(args)
    folder = _folder(args, loaded)
    for note in loaded.notes:
        say(console, note)
    evaluation = evaluate_tasks(
        loaded, args.tasks, few_shot=args.few_shot, limit=args.limit, include=args.include, chat=args.chat
    )
    report(evaluation, folder, console)
    return 0


def _folder(args: Args, loaded: LoadedModel) -> Path:
    """The folder for the results, made before the measurement. ValueError if it cannot be written to."""
    in_run = loaded.folder if loaded.stage is not None else None
    return _writable(Path(args.out) if args.out else in_run or Path())


def _writable(folder: Path) -> Path:
    """The folder, made if it does not exist. ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be created ({error.strerror}); name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder.resolve()}: cannot be written to; name another folder with --out")
    return folder


def parse_contexts(texts: Sequence[str]) -> list[int]:
    """Ascending lengths of "512,1024" or "512,...,4096" (doubling). ValueError for anything else."""
    parts = [part for text in texts for part in text.replace(",", " ").split()]
    lengths: list[int] = []
    doubling = False
    for part in parts:
        if part in ("...", "…"):
            doubling = bool(lengths)
            if not doubling:
                raise ValueError("--context: '...' doubles the length before it; begin with a length")
            continue
        if not part.isascii() or not part.isdigit() or int(part) < 2:
            raise ValueError(f"--context {part}: must be a whole number of at least 2")
        while doubling and 2 * lengths[-1] < int(part):
            lengths.append(2 * lengths[-1])
        lengths, doubling = [*lengths, int(part)], False
    if not lengths or doubling:
        raise ValueError("--context: give lengths such as 512,1024 or 512,...,8192")
    lengths = sorted(set(lengths))
    wrong = next((n for n in lengths if lengths[-1] % n), None)
    if wrong is not None:
        raise ValueError(f"--context {wrong}: must divide the longest, so that all lengths score the same tokens")
    return lengths


def curves_of(config: ModelConfig, args: ModelArgs) -> dict[str, ModelConfig]:
    """Configs to compare, by name: the model's own and, with --yarn, the stretched one."""
    own = config.rope_scaling
    curves = {"as it is" if own is None else f"its own YaRN, factor {own.factor:g}": config}
    if args.yarn is not None or args.yarn_original is not None:
        changed = stretched(config, args)
        curves[f"YaRN, factor {args.yarn:g}"] = changed
    return curves


def read_stream(
    paths: Sequence[str], tokenizer: Tokenizer, count: int, read: Callable[[Path], Iterator[Document]] = read_documents
) -> Tensor:
    """The first `count` tokens of the text, or all if there are fewer: int64. Rows of a .jsonl file are documents
    between bos and eos; a .txt file is one document."""
    ids: list[int] = []
    for part in _documents(paths, tokenizer, read):
        ids += part
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def _documents(
    paths: Sequence[str], tokenizer: Tokenizer, read: Callable[[Path], Iterator[Document]]
) -> Iterator[list[int]]:
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for path in expand_paths(list(paths)):
        texts = (tokenizer.encode(d.text, allow_special=False) for d in read(path))
        if ".jsonl" in path.name:
            yield from (bos + text + eos for text in texts)
        else:  # read in pieces, which together are one document
            yield bos
            yield from texts
            yield eos


@torch.no_grad()
def measure(
    model: Model,
    tokenizer: Tokenizer,
    ids: Tensor,
    lengths: Sequence[int],
    curves: dict[str, ModelConfig],
    console: Console,
) -> list[Score]:
    """Score the tokens once for every length and curve. ids: int64 [N + 1], N a multiple of the longest length. curves:
    configs that differ from the model's own only in positions. ValueError if the model's logits are not finite."""
    total = len(ids) - 1
    sizes = tokenizer.token_bytes()
    num_bytes = sum(len(sizes[i]) for i in ids[1:].tolist())
    cost = {length: model.flops_per_token(length, training=False) for length in lengths}
    whole, done = len(curves) * total * sum(cost.values()), 0.0
    display = Display(console, len(curves) * len(lengths) * total, 0)
    own, began, step = model.config, time.monotonic(), 0
    scores = []
    try:
        for name, config in curves.items():
            model.config = config
            for length in lengths:
                start, sums = time.monotonic(), torch.zeros(2, dtype=torch.float64)
                for part, tokens in _windows(model, ids, length):
                    sums += part
                    step += tokens
                    done += tokens * cost[length]
                    left = duration((time.monotonic() - began) / done * (whole - done))
                    display.update(step, f"{name}, {length} tokens, ETA {left}")
                nats = float(sums.sum())
                if not nats / total < _MOST_NATS:
                    raise ValueError(
                        f"a loss of {nats / total:g} nats per token gives no perplexity; do the weights contain NaN?"
                    )
                half = total // length * (length - length // 2)
                scores.append(
                    Score(
                        name, length, total, math.exp(nats / total), nats / math.log(2) / num_bytes,
                        math.exp(float(sums[1]) / half), time.monotonic() - start,
                    )
                )  # fmt: skip
    finally:
        model.config = own
        display.close()
    return scores


def _windows(model: Model, ids: Tensor, length: int) -> Iterator[tuple[Tensor, int]]:
    """For a few windows at a time: nats of their first and second halves, float64 [2], and their number of tokens."""
    device = model.device
    inputs, targets = ids[:-1].view(-1, length), ids[1:].view(-1, length)
    rows = max(1, BATCH_TOKENS // length)
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        hidden = model(x.to(device), return_logits=False).hidden_states.flatten(0, 1)
        log_probs, _ = ops.linear_log_probs(hidden, model.head_weight, y.to(device).flatten())
        nats = -log_probs.double().view(-1, length).sum(dim=0).cpu()
        yield torch.stack((nats[: length // 2].sum(), nats[length // 2 :].sum())), x.numel()


def show(scores: Sequence[Score], console: Console) -> None:
    table = Table(title=f"perplexity of the same {scores[0].tokens:,} tokens")
    for column in ("", "context", "perplexity", "bits/byte", "2nd half of window", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for score in scores:
        table.add_row(
            score.curve,
            f"{score.context:,}",
            f"{score.perplexity:.5g}",
            f"{score.bits_per_byte:.4f}",
            f"{score.second_half:.5g}",
            f"{score.tokens / score.seconds:,.0f}",
        )
    console.print(table)


@decoration
def plot(scores: Sequence[Score], path: Path, title: str) -> None:
    """Perplexity over context length, one line per curve; dashed: the second halves of the windows."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, name in zip(_COLOURS, dict.fromkeys(s.curve for s in scores), strict=False):
        here = [score for score in scores if score.curve == name]
        lengths = [score.context for score in here]
        axis.plot(lengths, [s.perplexity for s in here], "o-", color=colour, label=caption(name))
        axis.plot(lengths, [s.second_half for s in here], "o--", color=colour, alpha=0.5, markersize=3)
    ticks = sorted({score.context for score in scores})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xlabel("context, tokens; dashed: second halves of the windows alone")
    axis.set_ylabel("perplexity")
    axis.set_title(f"{caption(title)}, {scores[0].tokens:,} tokens", fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
