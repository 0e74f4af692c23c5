"""Teach a chat model something new with a small adapter: `python train/lora.py` goes on from the newest SFT run.

The model stays frozen; low-rank matrices beside its projections learn from conversations (docstring of
minimind/lora.py). On the way it is measured what the adapter knows, and what the model still does. Run the same command
again after any interruption and it continues where the last checkpoint was. Every run leaves a folder under runs/ with
its metrics, plots, answers and the adapter, in peft's form.
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
from minimind.lora_files import adapter_config, adapter_folder, another_base, load_adapter
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder, require_same_ids, tokenizer_beside
from minimind.training.adapters import PEAK_LR, describe_adapter, reload, saver
from minimind.training.arguments import FromFlag
from minimind.training.heldout import describe
from minimind.training.job import Job, Objective
from minimind.training.optim import OptimizerName
from minimind.training.origin import begin_from
from minimind.training.parts import DataSplit
from minimind.training.script import run_script
from minimind.training.stages.chats import (
    ChatArgs,
    answered,
    chat_figures,
    chat_sample,
    describe_chats,
    open_chats,
    read_chats,
)
from minimind.training.stages.figures import plot_figures
from minimind.utils.display import say

# An adapter begins at zero and learns little from a few large steps; few rows a step leave a GPU idle.
STEPS, LEAST_BATCH = 1000, 1024


@dataclass(frozen=True)
class Args(ChatArgs):
    """Train a LoRA adapter on conversations. Every default works after train/sft.py."""

    from_: FromFlag = None
    """The model to adapt: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer).
    None: the newest finished run of train/sft.py under runs/."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows. None: a few hundred short conversations; in some of them the assistant has another name.
    FILE:2 draws twice as many of its rows as FILE:1 (docs/data.md)."""
    kept_data: tuple[str, ...] = ()
    """Conversations not trained on whose answers should stay as they are: how many still do is measured. None: with
    the built-in --data, held-out ones of train/sft.py; else nothing."""
    rank: int = 8
    """Rank of the adapter's matrices."""
    alpha: float = 16.0
    """The adapter is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Train the lengths of the adapted rows too (DoRA)."""
    lora_plus: float = 1.0
    """Rate of the adapter's B as a multiple of --lr (LoRA+, whose authors take 16)."""
    dropout: float = 0.0
    """Probability that a number does not reach the adapter, in training."""
    targets: tuple[str, ...] = ()
    """Ends of module names, such as q_proj v_proj. None: all projections but routed experts."""
    adapter: str | None = None
    """Go on training this adapter, ours or peft's, with its rank, alpha, dropout, targets, rslora and dora."""
    epochs: float | None = None
    """Passes over the training part of the data. None: 6 over the built-in conversations, 10 over others, more where
    they are few (docs/training.md)."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: as many as leave a thousand steps,
    but at least 1024, and at most 65536 on a GPU for models larger than nano, else 4096."""
    optimizer: OptimizerName = "adamw"
    """adamw alone: muon would take the matrices of q, k and v, which are stacked, for one."""
    weight_decay: float = 0.0
    """Of the adapter's matrices."""

    def lr_multiples(self) -> dict[str, float]:
        return {".B": self.lora_plus}

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 6.0, "batch_tokens": 1024}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if args.optimizer != "adamw":
        raise ValueError(f"--optimizer {args.optimizer}: adapters are trained with adamw")
    if not 0 < args.lora_plus < math.inf:
        raise ValueError(f"--lora-plus {args.lora_plus}: must be above 0")
    if args.embedding_lr != 1:
        raise ValueError(f"--embedding-lr {args.embedding_lr}: the embedding is frozen; drop the flag")
    args = dataclasses.replace(args, from_=begin_from(args, "sft"))
    config = LoRAConfig(args.rank, args.alpha, args.dropout, args.targets or None, args.rslora, args.dora)
    job = Job.begin("lora", args, console)
    if args.adapter is not None:
        check_adapter(job, args.adapter, args.new_tokenizer)
    parts, kept = open_data(job, args, ChatEncoder(job.tokenizer))
    job.settle("batch_tokens", lambda: batch_tokens(job, parts.train))
    args, train, heldout = cast(Args, job.args), parts.train, parts.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=parts.mixture))
    job.open_run()
    model, trained = job.build_model(lambda model: give_adapter(model, args, config))
    objective = Objective(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: evaluate(model, parts, kept, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=PEAK_LR,
        save_model=saver(job),
        load_model=reload,
    )
    lines = [*describe_chats(parts, plan), describe_adapter(model, adapter_config(model))]
    if not job.fit(plan, model, objective, lines):
        return False
    if job.parallel.main:
        draw(job.run.path)
    return True


def open_data(job: Job, args: Args, encoder: ChatEncoder) -> tuple[DataSplit, Corpus | None]:
    """(training and held-out, kept) conversations."""
    builtin = () if args.data else builtin_identity(args.cache_dir, job.console)
    kept_paths = list(args.kept_data) or [str(path) for path in builtin[2:]]
    job.notes += find_files(kept_paths).lines() if kept_paths else []
    return (
        open_chats(job, args.data, args.heldout_data, encoder, builtin[:2]),
        read_chats(job, encoder, kept_paths) if kept_paths else None,
    )


def batch_tokens(job: Job, train: Corpus) -> tuple[int, str]:
    """A row for each process, doubled to LEAST_BATCH and on while that leaves a run STEPS steps, up to what other
    stages take; and why, in one line."""
    args = job.args
    total = args.tokens if args.tokens is not None else round(args.passes * args.scaled(train.num_tokens))
    most, batch = job.usual_batch, args.row * job.parallel.world_size
    while batch < LEAST_BATCH or (2 * batch <= most and total >= 2 * batch * STEPS):
        batch *= 2
    reason = f"--batch-tokens {batch}: {-(-total // batch):,} steps for {total:,} tokens"
    return batch, f"{reason}; as many as leave {STEPS:,} steps, from {LEAST_BATCH} to {most}"


def check_adapter(job: Job, adapter: str, new_tokenizer: bool) -> None:
    """Its weights are part of what makes the run; ValueError where it was trained with another tokenizer."""
    folder = adapter_folder(Path(adapter))
    own = tokenizer_beside(folder)
    if own is not None:
        way_out = "take the tokenizer of the adapter with --tokenizer, or add --new-tokenizer to --tokenizer"
        require_same_ids(job.tokenizer, "the model", own, f"--adapter {adapter}", way_out, new_tokenizer)
    if folder.is_dir():  # else load_adapter says what is missing
        job.refer("adapter", folder)
        assert job.origin.weights is not None
        if other := another_base(folder, job.origin.weights):
            job.notes.append(f"--adapter {adapter}: {other}; right if that is the same model in another form")


def give_adapter(model: Model, args: Args, config: LoRAConfig) -> None:
    if args.adapter is None:
        add_adapter(model, config)
    else:
        load_adapter(model, args.adapter, trainable=True)


def evaluate(model: Model, parts: DataSplit, kept: Corpus | None, job: Job, args: Args, final: bool) -> dict[str, Any]:
    """What is learnt, and what is kept: at the end also what there was to keep."""
    figures = chat_figures(model, parts, job, args, final)
    if kept is None or parts.heldout is None or not args.questions:
        return figures
    figures |= answered(model, kept, job, args, final, "kept")
    said = f"{figures['kept_exact']:.1%} of {figures['kept_questions']} other answers to the letter"
    if final:
        with adapters_off(model):
            figures["base_exact"] = answered(model, kept, job, args, final, "kept")["kept_exact"]
        said += f", {figures['base_exact']:.1%} without the adapter"
    say(job.console, said)
    return figures


def draw(run: Path) -> None:
    """What was learnt and what was kept, over the run."""
    labels = {
        "heldout_exact": "new questions",
        "kept_exact": "other questions",
        "base_exact": "other questions, without the adapter",
    }
    plot_figures(run / "metrics.jsonl", run / "answers.png", run.name, "answered to the letter", labels)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
