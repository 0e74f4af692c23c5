"""Distillation: the teacher, a student of half its size, the data to learn from, and how close the student comes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minimind.data import Corpus, PackedLoader, builtin_conversations, builtin_corpus
from minimind.modeling import Model
from minimind.objectives.next_token import Distillation, distillation_loss
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.training.batches import TrainingPlan, to_device
from minimind.training.data_split import DataSplit, NamedFiles, all_losses, open_split, read_texts
from minimind.training.evaluation import heldout_loss
from minimind.training.initial_model import InitialModel
from minimind.training.job import Job
from minimind.training.metrics import plot_figures
from minimind.training.run_folder import newest_finished
from minimind.training.stages.chats import (
    ChatArgs,
    chat_figures,
    chat_sample,
    continue_texts,
    describe_chats,
    open_chats,
)
from minimind.utils.display import say
from minimind.utils.files import read_json


@dataclass(frozen=True)
class ChatData:
    """Conversations to learn from, with their figures and samples."""

    split: DataSplit

    @classmethod
    def open(cls, args: ChatArgs, job: Job, console: Console) -> ChatData:
        builtin = () if args.data else builtin_conversations(args.cache_dir, console)
        encoder = ChatEncoder(job.tokenizer)
        return cls(open_chats(job, args.data, args.heldout_data, encoder, builtin))

    def lines(self, plan: TrainingPlan) -> list[str]:
        return describe_chats(self.split, plan)

    def figures(self, model: Model, job: Job, args: ChatArgs, final: bool) -> dict[str, Any]:
        return chat_figures(model, self.split, job, args, final)

    def sample(self, model: Model | None, job: Job, args: ChatArgs) -> str:
        return chat_sample(model, self.split.heldout or self.split.train, job, args)


class TextData(ChatData):
    """Plain text to learn from, with its figures and samples."""

    @classmethod
    def open(cls, args: ChatArgs, job: Job, console: Console) -> ChatData:
        job.settle("seq_len", lambda: (512, ""))
        builtin = () if args.data else (builtin_corpus(args.cache_dir, console),)
        files = NamedFiles.from_flags(args.data, args.heldout_data, builtin)
        return cls(open_split(job, files, partial(read_texts, job)))

    def lines(self, plan: TrainingPlan) -> list[str]:
        split = self.split
        held = f"; held out {split.heldout.num_documents:,} documents" if split.heldout else ""
        size = f"{split.train.num_documents:,} documents, {plan.loader.tokens_per_epoch:,} tokens to train on"
        return [f"data: {size}{held}", *split.lines(plan)]

    def figures(self, model: Model, job: Job, args: ChatArgs, final: bool) -> dict[str, Any]:
        return all_losses(model, self.split, job, final)

    def sample(self, model: Model | None, job: Job, args: ChatArgs) -> str:
        return continue_texts(model, job.tokenizer, self.split.heldout or self.split.train)


def open_data(teacher: InitialModel, args: ChatArgs, job: Job, console: Console) -> ChatData:
    """Text for a teacher from a pretraining run, conversations for others."""
    assert teacher.weights is not None
    configs = (read_json(folder / "config.json") for folder in teacher.weights.parents[:2])
    pretrained = any(config.get("stage") == "pretrain" for config in configs if config)
    return (TextData if pretrained else ChatData).open(args, job, console)


def find_teacher(place: str | None, args: ChatArgs, console: Console) -> InitialModel:
    """The model in the folder `place`, or of the newest finished pretraining run. Raises ValueError, naming
    --teacher."""
    try:
        place = place or newest_finished("pretrain")
        if Path(place).expanduser().is_dir():
            named = dataclasses.replace(args, from_=place, preset=None, tokenizer=None)
            return InitialModel.from_args(named, console)
    except ValueError as error:
        raise ValueError(str(error).replace("--from", "--teacher", 1)) from error
    if Path(place).expanduser().is_file():
        raise ValueError(
            f"--teacher {place}: a bare weight file has no shape; run minimind export --model {place} --preset NAME "
            "--to hf --out teacher, then use --teacher teacher"
        )
    raise ValueError(f"--teacher {place}: no such folder; name a run folder or a Hugging Face folder")


def check_same_tokens(teacher: InitialModel, student: InitialModel) -> None:
    """Raise ValueError unless both have the same tokenizer: they are compared token by token."""
    if teacher.tokenizer.fingerprint != student.tokenizer.fingerprint:
        raise ValueError(
            f"--teacher {teacher.weights}: its tokenizer ({teacher.tokenizer.fingerprint[:8]}) is not the student's "
            f"({student.tokenizer.fingerprint[:8]}); take models of one tokenizer"
        )


def half(teacher: InitialModel, tokenizer: Tokenizer) -> InitialModel:
    """A student with random weights and half the teacher's width and depth. Raises ValueError if the teacher's sizes
    are odd."""
    whole = teacher.config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = {name: getattr(whole, name) // 2 for name in sizes}
    if whole.num_experts:
        shape["moe_intermediate_size"] = whole.moe_intermediate_size // 2
    if any(2 * size != getattr(whole, name) for name, size in shape.items()):
        raise ValueError(f"--teacher {teacher.weights}: its shape cannot be halved; name the student's with --preset")
    return InitialModel(tokenizer, dataclasses.replace(whole, **shape), f"half-{teacher.preset}")


class TeacherGap:
    """Measures how far a student is from the teacher on held-out data; the teacher's own loss is computed once."""

    def __init__(self, teacher: Model, heldout: Corpus | None, job: Job) -> None:
        self.teacher, self.heldout = teacher, heldout
        self.args, self.parallel, self.console = job.args, job.parallel, job.console
        self.teacher_loss = cache(self._teacher_loss)

    def figures(self, student: Model, final: bool) -> dict[str, Any]:
        """teacher_loss, in nats per target like heldout_loss, and heldout_kl, the mean of KL(teacher || student). Empty
        without held-out data."""
        if self.heldout is None:
            return {}
        loss, divergence = self.teacher_loss(final), self._divergence(student, final)
        say(
            self.console,
            f"the teacher's held-out loss: {loss:.4f}; KL(teacher || student): {divergence:.4f} nats/token",
        )
        return {"teacher_loss": loss, "heldout_kl": divergence}

    def _teacher_loss(self, final: bool) -> float:
        limit = None if final else self.args.eval_tokens
        return heldout_loss(self.teacher, self.heldout, self.args.row, limit, self.parallel)["heldout_loss"]

    @torch.no_grad()
    def _divergence(self, student: Model, final: bool) -> float:
        assert self.heldout is not None
        corpus = self.heldout if final else self.heldout.head(self.args.eval_tokens)
        ranks, seq_len = self.parallel.world_size, self.args.row
        rows = ranks * max(1, 4096 // seq_len)
        loader = PackedLoader(corpus, seq_len, rows, 0, False, self.parallel.rank, ranks)
        sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        student.eval()
        for host in loader.epoch_batches():
            batch = to_device(host, sums.device)
            loss, _ = distillation_loss(student, self.teacher, batch, Distillation(alpha=0.0))
            sums += torch.stack((loss.double(), sums.new_tensor(batch.num_targets)))
        total, targets = self.parallel.sum(sums).tolist()
        return total / targets


def draw_gap(run: Path) -> None:
    """Draw how the student approached the teacher."""
    labels = {
        "heldout_loss": "student's loss",
        "teacher_loss": "teacher's loss",
        "heldout_kl": "KL(teacher || student)",
    }
    plot_figures(run / "metrics.jsonl", run / "gap.png", run.name, "nats per token, held-out", labels)
