"""Teach a chat model something new with a small adapter: `python train/lora.py` continues from the newest SFT run.

The model stays frozen; low-rank matrices beside its projections learn from conversations (minimind/lora.py). The run
measures both what the adapter has learnt and what the model has kept. After an interruption the same command continues
from the last checkpoint. A run leaves its metrics, plots, answers and the adapter, in peft's format, in a folder under
runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from minimind.data import Corpus, PackedLoader
from minimind.data.builtin.chat import builtin_identity
from minimind.data.paths import find_files
from minimind.lora import LoRAConfig, adapters_off, add_adapter
from minimind.lora_files import adapter_config, adapter_folder, base_mismatch, load_adapter
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder, require_same_ids, tokenizer_beside
from minimind.training.adapters import PEAK_LR, adapter_saver, describe_adapter, load_adapter_weights
from minimind.training.arguments import FromFlag
from minimind.training.batches import usual_batch
from minimind.training.data_split import DataSplit
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import from_newest
from minimind.training.job import Job, run_script
from minimind.training.metrics import plot_figures
from minimind.training.optim import OptimizerName
from minimind.training.stages.chats import (
    ChatArgs,
    chat_figures,
    chat_questions,
    chat_sample,
    describe_chats,
    exact_figures,
    open_chats,
    read_chats,
)
from minimind.training.trainer import Stage
from minimind.utils.display import say

# An adapter starts at zero and learns little from a few large steps; steps of few rows leave a GPU idle.
STEPS, LEAST_BATCH = 1000, 1024


@dataclass(frozen=True)
class Args(ChatArgs):
    """Train a LoRA adapter on conversations. All defaults work after train/sft.py."""

    from_: FromFlag = None
    """The model to adapt: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer).
    None: the newest finished run of train/sft.py under runs/."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows. Empty: a few hundred built-in short conversations, in some of which the assistant has another name.
    FILE:2 draws rows of this file twice as often as FILE:1 (docs/data.md)."""
    kept_data: tuple[str, ...] = ()
    """Conversations that are not trained on and whose answers should not change; the share of unchanged answers is
    measured. Empty: with the built-in --data, held-out ones of train/sft.py; else nothing."""
    rank: int = 8
    """Rank of the adapter's matrices."""
    alpha: float = 16.0
    """The adapter is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Also train the lengths of the adapted rows (DoRA)."""
    lora_plus: float = 1.0
    """Learning rate of the adapter's B as a multiple of --lr (LoRA+, whose authors use 16)."""
    dropout: float = 0.0
    """Dropout of the adapter's inputs."""
    targets: tuple[str, ...] = ()
    """Ends of the names of modules to adapt, such as q_proj v_proj. Empty: all projections except routed experts."""
    adapter: str | None = None
    """Continue training this adapter, ours or peft's, with its rank, alpha, dropout, targets, rslora and dora."""
    epochs: float | None = None
    """Passes over the training data. None: 6 over the built-in conversations, 10 over others, more where they are few
    (docs/training.md)."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: as many as leave a thousand steps,
    but at least 1024, and at most 65536 on a GPU for models larger than nano, else 4096."""
    optimizer: OptimizerName = "adamw"
    """Only adamw: muon would treat the stacked matrices of q, k and v as one."""
    weight_decay: float = 0.0
    """Weight decay of the adapter's matrices."""

    def lr_multiples(self) -> dict[str, float]:
        return {".B": self.lora_plus}

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 6.0, "batch_tokens": 1024}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    if args.optimizer != "adamw":
        raise ValueError(f"--optimizer {args.optimizer}: adapters are trained with adamw")
    if not 0 < args.lora_plus < math.inf:
        raise ValueError(f"--lora-plus {args.lora_plus}: must be above 0")
    if args.embedding_lr != 1:
        raise ValueError(f"--embedding-lr {args.embedding_lr}: the embedding is frozen; drop the flag")
    args = dataclasses.replace(args, from_=from_newest(args, "sft"))
    config = LoRAConfig(args.rank, args.alpha, args.dropout, args.targets or None, args.rslora, args.dora)
    job = Job.begin("lora", args, console)
    if args.adapter is not None:
        check_adapter(job, args.adapter, args.new_tokenizer)
    split, kept = open_data(job, args, ChatEncoder(job.tokenizer))
    job.settle("batch_tokens", lambda: batch_tokens(job, split.train))
    args, train, heldout = cast(Args, job.args), split.train, split.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=split.mixture))
    job.open_run()
    model, trained = job.build_model(lambda model: make_adapter(model, args, config))
    stage = Stage(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: evaluate(model, split, kept, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=split.fingerprint,
        peak_lr=PEAK_LR,
        save_model=adapter_saver(job),
        load_model=load_adapter_weights,
    )
    lines = [*describe_chats(split, plan), describe_adapter(model, adapter_config(model))]
    if not job.fit(plan, model, stage, lines):
        return False
    if job.parallel.main:
        draw(job.run.path)
    return True


def open_data(job: Job, args: Args, encoder: ChatEncoder) -> tuple[DataSplit, Corpus | None]:
    """(the conversations to train and evaluate on, those of --kept-data)."""
    builtin = () if args.data else builtin_identity(args.cache_dir, job.console)
    kept_paths = list(args.kept_data) or [str(path) for path in builtin[2:]]
    job.notes += find_files(kept_paths).lines() if kept_paths else []
    return (
        open_chats(job, args.data, args.heldout_data, encoder, builtin[:2]),
        read_chats(job, encoder, kept_paths) if kept_paths else None,
    )


def batch_tokens(job: Job, train: Corpus) -> tuple[int, str]:
    """(tokens of a step, the reason in one line): a row for each process, doubled up to LEAST_BATCH and further while
    the run keeps STEPS steps, at most as many as in other stages."""
    args = job.args
    total = args.tokens if args.tokens is not None else round(args.passes * args.scaled(train.num_tokens))
    most, batch = usual_batch(job), args.row * job.parallel.world_size
    while batch < LEAST_BATCH or (2 * batch <= most and total >= 2 * batch * STEPS):
        batch *= 2
    reason = f"--batch-tokens {batch}: {-(-total // batch):,} steps for {total:,} tokens"
    return batch, f"{reason}; as many as leave {STEPS:,} steps, from {LEAST_BATCH} to {most}"


def check_adapter(job: Job, adapter: str, new_tokenizer: bool) -> None:
    """Make the adapter's weights part of the run's identity. Raises ValueError if another tokenizer trained it."""
    folder = adapter_folder(Path(adapter))
    tokenizer = tokenizer_beside(folder)
    if tokenizer is not None:
        way_out = "take the tokenizer of the adapter with --tokenizer, or add --new-tokenizer to --tokenizer"
        require_same_ids(job.tokenizer, "the model", tokenizer, f"--adapter {adapter}", way_out, new_tokenizer)
    if folder.is_dir():  # otherwise load_adapter reports what is missing
        job.add_reference("adapter", folder)
        assert job.initial.weights is not None
        if other := base_mismatch(folder, job.initial.weights):
            job.notes.append(f"--adapter {adapter}: {other}; right if that is the same model in another form")


def make_adapter(model: Model, args: Args, config: LoRAConfig) -> None:
    if args.adapter is None:
        add_adapter(model, config)
    else:
        load_adapter(model, args.adapter, trainable=True)


def evaluate(model: Model, split: DataSplit, kept: Corpus | None, job: Job, args: Args, final: bool) -> dict[str, Any]:
    """Figures of the new data and of the kept answers; the final ones also without the adapter."""
    figures = chat_figures(model, split, job, args, final)
    if kept is None or split.heldout is None or not args.questions:
        return figures
    questions = chat_questions(kept, args, final)
    figures |= exact_figures(model, questions, job, "kept")
    line = f"{figures['kept_exact']:.1%} of {figures['kept_questions']} other answers exact"
    if final:
        with adapters_off(model):
            figures["base_exact"] = exact_figures(model, questions, job, "base")["base_exact"]
        line += f", {figures['base_exact']:.1%} without the adapter"
    say(job.console, line)
    return figures


def draw(run: Path) -> None:
    """Draw the exact answers to new and to kept questions over the run."""
    labels = {
        "heldout_exact": "new questions",
        "kept_exact": "other questions",
        "base_exact": "other questions, without the adapter",
    }
    plot_figures(run / "metrics.jsonl", run / "answers.png", run.name, "exact answers", labels)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
