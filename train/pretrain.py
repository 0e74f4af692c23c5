"""Pretrain a model from nothing: `python train/pretrain.py` works as it is, on text found on this machine.

Next-token prediction over packed documents. Run the same command again after any interruption and it continues
where the last checkpoint was. Every run leaves a folder under runs/ with its metrics, plot, samples and weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from rich.console import Console

from minimind import ops
from minimind.config import ModelConfig
from minimind.data import Batch, Corpus, PackedLoader, builtin_corpus, open_corpus
from minimind.data.progress import say
from minimind.inference.generate import generate
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss, next_token_nats
from minimind.tokenization import Tokenizer, load_tokenizer
from minimind.training.batches import DeviceBatches, to_device
from minimind.training.checkpoint import share_trainer_state
from minimind.training.compiling import compile_model
from minimind.training.device import PrecisionName, choose_precision, describe_device
from minimind.training.loop import LoopOptions, Stage, Trainer
from minimind.training.optim import OptimizerName, ScheduleName, build_optimizers, lr_factor
from minimind.training.parallel import Parallel, ParallelName, leave, rank
from minimind.training.profiling import StepProfiler, mark_blocks, nvtx_mode
from minimind.training.run_folder import ResumeMode, open_run, record_versions
from minimind.training.tracking import TrackerName, make_tracker


@dataclass(frozen=True)
class Args:
    """Pretrain a language model. Every default works."""

    preset: Literal["nano", "minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"] = (
        "nano"
    )
    """Model shape. nano is made for a CPU."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl ({"text": ...} rows) and .txt, plain, .gz or .zst. None: the docstrings of
    the installed Python packages."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; None takes the one shipped."""
    tokens: int | None = None
    """How many tokens to train on, padding (about 1%) included; overrides --epochs."""
    epochs: float = 1.0
    """Passes over the training part of the data."""
    seq_len: int = 512
    """Tokens in a row; longer documents are cut."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: 65536 on a GPU for models larger
    than nano, else 4096."""
    micro_tokens: int | None = None
    """Tokens per forward and backward, of all processes together; a step accumulates batch_tokens / micro_tokens of
    them. None: all at once, but no more than 65536."""
    optimizer: OptimizerName = "muon"
    """muon: Muon for the matrices and AdamW for the rest; adamw: AdamW for all."""
    lr: float | None = None
    """Peak learning rate. None takes the preset's."""
    schedule: ScheduleName = "cosine"
    """How the rate falls after the warm-up."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises."""
    weight_decay: float = 0.1
    """For matrices; norm gains never decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    heldout: float = 0.05
    """Share of every file, its last documents, that is never trained on; at most a million tokens in all."""
    eval_tokens: int = 65536
    """Held-out tokens used for the figures on the way; the last figure uses all."""
    evals: int = 10
    """How often to measure held-out loss and print samples."""
    save_every: int | None = None
    """Steps between checkpoints. None: twenty in a run."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 10
    """Steps between reads of the loss from the device."""
    compile: bool = False
    """Compile the model with torch.compile: up to a minute at the start of the first run."""
    cuda_graph: bool = False
    """With --compile on a GPU: replay forward and backward as CUDA graphs, which saves what launches cost."""
    recompute: bool = False
    """Keep only the blocks' inputs and run each again in the backward: a third more compute for far less memory."""
    profile: bool = False
    """Record three steps: a table, a trace and a timeline in the run folder's profile/."""
    fused: bool = True
    """Use the fastest form of every op this device has; --no-fused takes the plain reference."""
    precision: PrecisionName = "auto"
    """What matrix products run in; weights are float32 always."""
    resume: ResumeMode = "auto"
    """auto continues an unfinished run of this very configuration; never starts a new folder."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a malformed row: stop and name it, or count it and go on."""
    cache_dir: str | None = None
    """Where tokenized data is kept. None: $MINIMIND_CACHE or ~/.cache/minimind."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    parallel: ParallelName = "auto"
    """How the processes of torchrun share the work: ddp (a model each) or fsdp (a shard of it each). auto: ddp where
    there are several. A run may continue with other numbers of processes."""
    replicas: int = 1
    """With fsdp: groups of processes that each hold the whole model in shards; several nodes: one group per node."""
    seed: int = 42
    """Decides initial weights and data order."""
    track: TrackerName = "none"
    """Also send the metrics to an experiment tracker."""
    out: str | None = None
    """Run folder. None: runs/pretrain-PRESET-DATA, numbered when taken."""


# Flags that say nothing about the run itself.
NOT_SAVED = {"resume", "out", "track", "profile"}
# Peak rates by preset; nano was tuned (docs/LOG.md), the others are not yet.
PEAK_LR = {"nano": 4e-3, "minimind2-small": 2e-3}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    check(args)
    parallel = Parallel.from_env(args.parallel, args.replicas)
    device = parallel.choose_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph: there is none on {device}; drop the flag")
    precision = choose_precision(device, args.precision)
    ops.set_mode("fused" if args.fused else "reference")
    tokenizer = load_tokenizer(args.tokenizer)
    config = ModelConfig.preset(args.preset)
    if tokenizer.vocab_size != config.vocab_size:
        say(
            console,
            f"the tokenizer has {tokenizer.vocab_size} entries: so does the model, instead of {config.vocab_size}",
        )
        config = ModelConfig.preset(args.preset, vocab_size=tokenizer.vocab_size)
    corpus = _open_data(args, tokenizer, console)
    train, heldout = corpus.split(args.heldout) if args.heldout != 0 else (corpus, None)

    rows, micro_batches = _batch_shape(args, device, parallel.world_size)
    loader = PackedLoader(
        train, args.seq_len, rows, args.seed, rank=parallel.rank, world_size=parallel.world_size
    )
    step_tokens = rows * args.seq_len * micro_batches
    budget = args.tokens if args.tokens is not None else args.epochs * loader.tokens_per_epoch / loader.fill
    steps = max(1, math.ceil(budget / step_tokens))

    saved_args = {k: v for k, v in dataclasses.asdict(args).items() if k not in NOT_SAVED}
    identity = {"stage": "pretrain", "args": saved_args, "model": config.to_dict()}
    name = f"pretrain-{args.preset}-{_data_name(args)}"
    parallel.join(device)
    run = parallel.share(functools.partial(open_run, args.out, name, identity, args.resume))
    if parallel.main:
        record_versions(run.path, f"{describe_device(device)}; {parallel}")
    state: dict[str, Any] = {"step": 0, "tracker": {}}
    if run.checkpoint is not None:
        state = share_trainer_state(run.checkpoint, parallel)
    start = state["step"]

    torch.manual_seed(args.seed)
    model = Model(config).to(device)
    model.compute_dtype, model.recompute = precision.compute_dtype, args.recompute
    if args.profile or nvtx_mode():
        mark_blocks(model)
    trained = cast(Model, parallel.wrap(model))
    if args.compile:  # sampling and evaluation stay eager: their shapes differ from step to step
        trained = compile_model(trained, args.cuda_graph, whole=parallel.strategy == "none")
    batches = DeviceBatches(loader, device)
    peak = args.lr if args.lr is not None else PEAK_LR.get(args.preset, 1e-3)
    warmup = max(1, round(args.warmup * steps))
    stage = Stage(
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizers(model, args.optimizer, peak, args.weight_decay),
        loader=batches,
        loss=lambda batch: next_token_loss(trained, batch),
        peak_lr=peak,
        lr_factor=lambda step: lr_factor(args.schedule, step, steps, warmup),
        evaluate=lambda final: evaluate(model, heldout, args, device, final, parallel),
        sample=lambda: sample(parallel.whole(model), tokenizer, heldout or corpus),
        describe=lambda batch: describe(batch, train, tokenizer),
        title=f"{run.path.name}: {model.num_parameters() / 1e6:.1f}M parameters",
        data_fingerprint=f"{corpus.identity:016x}",
    )
    options = LoopOptions(
        steps=steps,
        micro_batches=micro_batches,
        tokens_per_step=step_tokens,
        grad_clip=args.grad_clip,
        log_every=args.log_every,
        eval_every=math.ceil(steps / max(1, args.evals)),
        save_every=args.save_every or max(1, steps // 20),
        keep_checkpoints=args.keep_checkpoints,
    )
    for line in (
        f"device: {describe_device(device)}; {parallel}",
        f"precision: {precision}",
        ops.describe(device),
        f"model: {args.preset}, {model.num_parameters() / 1e6:.1f}M parameters "
        f"({model.num_parameters(active=True) / 1e6:.1f}M active), "
        f"{model.flops_per_token(args.seq_len) / 1e6:.0f} MFLOP per token trained, "
        f"{model.kv_bytes_per_token() / 1024:.1f} KiB of bf16 KV per token",
        f"data: {train.num_documents:,} documents, {loader.tokens_per_epoch:,} tokens to train on"
        + (f"; held out {heldout.num_documents:,} documents" if heldout else ""),
        f"run: {run.path}, {steps} steps of {step_tokens:,} tokens"
        + (f", continuing after step {start}" if run.checkpoint else ""),
    ):
        say(console, line)
    track = args.track if parallel.main else "none"
    tracker = make_tracker(track, run.path, saved_args, state["tracker"], start)
    profiler = StepProfiler(run.path / "profile", console) if args.profile and parallel.main else None
    trainer = Trainer(stage, options, run, tracker, console, parallel, profiler)
    if run.checkpoint is not None:
        trainer.resume(state)
    del state  # a copy of the optimizer's
    if not trainer.fit():
        return False
    say(console, f"finished in {run.path}: see loss.png and samples.txt")
    return True


def evaluate(
    model: Model, heldout: Corpus | None, args: Args, device: torch.device, final: bool, parallel: Parallel
) -> dict[str, Any]:
    """Held-out loss in nats per token and bits per UTF-8 byte, over the first --eval-tokens or over all; every rank
    takes its share of the rows."""
    if heldout is None:
        return {}
    model.eval()
    if not final:
        # whole documents: with a part of the packed rows instead, bytes and tokens would not belong together
        heldout = heldout.head(args.eval_tokens)
    ranks = parallel.world_size
    rows = ranks * max(1, 4096 // args.seq_len)
    loader = PackedLoader(heldout, args.seq_len, rows, args.seed, False, parallel.rank, ranks)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, targets, bytes
    for batch in loader.epoch_batches():
        nats = next_token_nats(model, to_device(batch, device))
        sums[0] += nats.double()
        sums[1:] += sums.new_tensor([batch.num_targets, batch.num_bytes])
    total, targets, text_bytes = parallel.sum(sums).tolist()
    return {
        "heldout_loss": total / targets,
        "heldout_bpb": total / math.log(2) / max(1, text_bytes),
        "heldout_tokens": int(targets),
        "heldout_all": final,
    }


def sample(
    model: Model | None, tokenizer: Tokenizer, source: Corpus, count: int = 3, new_tokens: int = 64
) -> str:
    """Continuations of the first tokens of `count` held-out documents, prompt and continuation divided by ' | '.
    Nothing where there is no model: on all ranks but the first."""
    if model is None:
        return ""
    indices = [i * source.num_documents // count for i in range(min(count, source.num_documents))]
    documents = [source.document(i) for i in indices]
    prompts = [[int(t) for t in d[: min(17, 1 + len(d) // 2)]] for d in documents]
    answers = generate(model, prompts, new_tokens, stop_ids=(tokenizer.eos_token_id,))
    return "\n".join(
        f"{tokenizer.decode(prompt[1:])} | {tokenizer.decode(answer)}".replace("\n", "\\n")
        for prompt, answer in zip(prompts, answers, strict=True)
    )


def describe(batch: Batch, corpus: Corpus, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Which documents are in a batch, where they stand and how they begin, for a post-mortem."""
    found = []
    for i in sorted({int(i) for row in batch.documents for i in row}):
        path, number = corpus.locate(i)
        text = tokenizer.decode(corpus.document(i)[:48].tolist())
        found.append({"file": str(path), "document": number, "begins": text})
    return found


def check(args: Args) -> None:
    """Refuse numbers that no run can use, in one line."""
    for name in ("tokens", "epochs", "seq_len", "batch_tokens", "micro_tokens", "lr", "grad_clip", "eval_tokens",
                 "evals", "save_every", "keep_checkpoints", "log_every"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.cuda_graph and not args.compile:
        raise ValueError("--cuda-graph: goes with --compile")


def _open_data(args: Args, tokenizer: Tokenizer, console: Console) -> Corpus:
    cache_dir = Path(args.cache_dir) if args.cache_dir else None
    paths = list(args.data) or [str(builtin_corpus(cache_dir, console))]
    return open_corpus(paths, tokenizer, cache_dir, args.on_bad_row, console)


def _data_name(args: Args) -> str:
    if not args.data:
        return "builtin"
    name = Path(args.data[0]).name.split(".")[0].strip("*") or "data"
    return name + (f"+{len(args.data) - 1}" if len(args.data) > 1 else "")


def _batch_shape(args: Args, device: torch.device, ranks: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step)."""
    batch_tokens = args.batch_tokens or (65536 if device.type == "cuda" and args.preset != "nano" else 4096)
    micro_tokens = args.micro_tokens or min(batch_tokens, 65536)
    if batch_tokens % micro_tokens or micro_tokens % args.seq_len:
        raise ValueError(
            f"--batch-tokens {batch_tokens} must be a multiple of --micro-tokens {micro_tokens}, "
            f"and that of --seq-len {args.seq_len}"
        )
    if micro_tokens < ranks * args.seq_len:
        raise ValueError(
            f"--micro-tokens {micro_tokens}: fewer than a row of --seq-len {args.seq_len} for each of {ranks} "
            f"processes; use {ranks * args.seq_len} or more, or fewer processes"
        )
    return micro_tokens // args.seq_len, batch_tokens // micro_tokens


if __name__ == "__main__":
    parsed = tyro.cli(Args, description=__doc__)
    output = Console(quiet=rank() > 0)
    try:
        done = main(parsed, output)
    except (ValueError, OSError) as problem:  # OSError: a full disk, a folder that is not ours
        say(output, f"error: {problem}")
        if rank() > 0:  # what went wrong here need not have gone wrong on rank 0
            print(f"rank {rank()}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    leave()
    sys.exit(0 if done else 130)
