"""Let a small model learn from a larger one: `python train/distill.py` takes the newest pretraining run for a teacher.

White-box distillation (docstring of minimind/objectives/distillation.py): the student learns the next token and the
teacher's whole distribution over it. A pretrained teacher teaches over packed text; one that was taught to answer, over
packed conversations, the assistant's tokens of them. Run the same command again after any interruption and it continues
where the last checkpoint was. Every run leaves a folder under runs/ with its metrics, plots, samples and weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from minimind.data import Corpus, PackedLoader, builtin_conversations, builtin_corpus
from minimind.modeling import Model
from minimind.objectives.distillation import Distillation, DivergenceName, distillation_loss
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.training.adapters import AdapterArgs, Adapting
from minimind.training.arguments import FromFlag
from minimind.training.batches import to_device
from minimind.training.compiling import compile_model
from minimind.training.heldout import describe, heldout_loss
from minimind.training.job import Job, Objective, TrainingPlan
from minimind.training.origin import InitialModel
from minimind.training.parallel import Parallel
from minimind.training.parts import DataSplit, NamedFiles, all_losses, open_parts, read_texts
from minimind.training.run_folder import newest_finished
from minimind.training.script import run_script
from minimind.training.stages.answers import continue_texts
from minimind.training.stages.chats import ChatArgs, chat_figures, chat_sample, describe_chats, open_chats
from minimind.training.stages.figures import plot_figures
from minimind.utils.display import say
from minimind.utils.files import read_json

# Peak rates of the student by preset; half of nano takes that of nano's pretraining, the others are not tuned yet.
PEAK_LR = {"half-nano": 4e-3, "nano": 2e-3, "minimind2-small": 5e-4}


@dataclass(frozen=True)
class Args(ChatArgs, AdapterArgs):
    """Distil a teacher into a student. Every default works after train/pretrain.py."""

    from_: FromFlag = None
    """The student: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer). None:
    random weights, of --preset or, without that, of half the teacher's width and depth."""
    teacher: str | None = None
    """The teacher: a run folder or a Hugging Face folder. None: the newest finished run of train/pretrain.py."""
    data: tuple[str, ...] = ()
    """Files, folders or globs. Where the teacher is a run of train/pretrain.py: text as it takes it, None for its
    built-in corpus. Else conversations as train/sft.py takes them, None for the built-in ones."""
    alpha: float = 0.2
    """Share of the data's own next token in the loss; the rest is the teacher's distribution. For nano's half on the
    built-in text 0.2 was better than 0.5, and that than 1, with each of two seeds."""
    temperature: float = 1.0
    """Softens both distributions; the loss is multiplied by its square."""
    divergence: DivergenceName = "forward_kl"
    """forward_kl: cover all the teacher may say; reverse_kl: keep to what it finds likely; jsd: between."""
    beta: float = 0.5
    """The teacher's share of the mixture of jsd."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    options = Distillation(args.alpha, args.temperature, args.divergence, args.beta)
    job = Job.begin("distill", args, console)
    origin = find_teacher(args, console)
    if args.from_ is None and args.preset is None:
        job.origin = half(origin, job.tokenizer if args.tokenizer else origin.tokenizer)
    check_same_tokens(origin, job.origin)
    assert origin.weights is not None
    job.refer("teacher", origin.weights)
    lesson = (TextData if only_pretrained(origin) else ChatData).open(args, job, console)
    args, parts = cast(Args, job.args), lesson.parts
    train, heldout = parts.train, parts.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=parts.mixture))
    adapting = Adapting.of(job, args)
    job.open_run()
    model, trained = job.build_model(adapting.prepare)
    teacher = job.place(origin.model()).requires_grad_(False).eval()
    taught = compile_model(teacher) if args.compile else teacher
    gap = TeacherGap(teacher, heldout, args, job.parallel)
    objective = Objective(
        loss=lambda batch: distillation_loss(trained, taught, batch, options),
        evaluate=lambda final: evaluate(model, gap, lesson, job, args, final),
        sample=lambda: lesson.sample(job.parallel.whole(model), job, args),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=f"{parts.fingerprint} {origin.fingerprint()}",
        others=(teacher,),
        peak_lr=adapting.rate(PEAK_LR.get(job.origin.preset, 5e-4)),
        **adapting.files(),
    )
    size = f"teacher: {origin.preset}, {teacher.num_parameters() / 1e6:.1f}M parameters, {origin.weights}"
    if not job.fit(plan, model, objective, [*lesson.lines(plan), size, *adapting.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw(job.run.path)
    return True


@dataclass(frozen=True)
class ChatData:
    """Conversations to learn from, and what is measured and shown of them."""

    parts: DataSplit

    @classmethod
    def open(cls, args: Args, job: Job, console: Console) -> ChatData:
        builtin = () if args.data else builtin_conversations(args.cache_dir, console)
        encoder = ChatEncoder(job.tokenizer)
        return cls(open_chats(job, args.data, args.heldout_data, encoder, builtin))

    def lines(self, plan: TrainingPlan) -> list[str]:
        return describe_chats(self.parts, plan)

    def figures(self, model: Model, job: Job, args: Args, final: bool) -> dict[str, Any]:
        return chat_figures(model, self.parts, job, args, final)

    def sample(self, model: Model | None, job: Job, args: Args) -> str:
        return chat_sample(model, self.parts.heldout or self.parts.train, job, args)


class TextData(ChatData):
    """The same of text."""

    @classmethod
    def open(cls, args: Args, job: Job, console: Console) -> ChatData:
        job.settle("seq_len", lambda: (512, ""))
        builtin = () if args.data else (builtin_corpus(args.cache_dir, console),)
        named = NamedFiles.of(args.data, args.heldout_data, builtin)
        return cls(open_parts(job, named, partial(read_texts, job)))

    def lines(self, plan: TrainingPlan) -> list[str]:
        parts = self.parts
        held = f"; held out {parts.heldout.num_documents:,} documents" if parts.heldout else ""
        size = f"{parts.train.num_documents:,} documents, {plan.loader.tokens_per_epoch:,} tokens to train on"
        return [f"data: {size}{held}", *parts.lines(plan)]

    def figures(self, model: Model, job: Job, args: Args, final: bool) -> dict[str, Any]:
        return all_losses(model, self.parts, job, final)

    def sample(self, model: Model | None, job: Job, args: Args) -> str:
        return continue_texts(model, job.tokenizer, self.parts.heldout or self.parts.train)


def only_pretrained(teacher: InitialModel) -> bool:
    """Whether the run folder around the weights says so."""
    assert teacher.weights is not None
    configs = (read_json(folder / "config.json") for folder in teacher.weights.parents[:2])
    return any(config.get("stage") == "pretrain" for config in configs if config)


def find_teacher(args: Args, console: Console) -> InitialModel:
    """Its weights; ValueError where there are none."""
    try:
        place = args.teacher or newest_finished("pretrain")
        if Path(place).expanduser().is_dir():
            return InitialModel.of(dataclasses.replace(args, from_=place, preset=None, tokenizer=None), console)
    except ValueError as error:
        raise ValueError(str(error).replace("--from", "--teacher", 1)) from error
    if Path(place).expanduser().is_file():
        raise ValueError(
            f"--teacher {place}: a bare weight file does not tell its shape; minimind export --model {place} "
            "--preset NAME --to hf --out teacher, and then --teacher teacher"
        )
    raise ValueError(f"--teacher {place}: no such folder; name a run folder or a Hugging Face folder")


def check_same_tokens(teacher: InitialModel, student: InitialModel) -> None:
    """ValueError unless both have one tokenizer: they are compared token by token."""
    if teacher.tokenizer.fingerprint != student.tokenizer.fingerprint:
        raise ValueError(
            f"--teacher {teacher.weights}: its tokenizer ({teacher.tokenizer.fingerprint[:8]}) is not the student's "
            f"({student.tokenizer.fingerprint[:8]}); take models of one tokenizer"
        )


def half(teacher: InitialModel, tokenizer: Tokenizer) -> InitialModel:
    """A student of half the teacher's width and depth, with random weights; ValueError where that is no shape."""
    whole = teacher.config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = {name: getattr(whole, name) // 2 for name in sizes}
    if whole.num_experts:
        shape["moe_intermediate_size"] = whole.moe_intermediate_size // 2
    if any(2 * size != getattr(whole, name) for name, size in shape.items()):
        raise ValueError(f"--teacher {teacher.weights}: its shape cannot be halved; name the student's with --preset")
    config = dataclasses.replace(whole, **shape)
    return InitialModel(tokenizer, config, f"half-{teacher.preset}")


class TeacherGap:
    """How far a student is from the teacher on held-out data; the teacher's own part is worked out once."""

    def __init__(self, teacher: Model, heldout: Corpus | None, args: Args, parallel: Parallel) -> None:
        self.teacher, self.heldout, self.args, self.parallel = teacher, heldout, args, parallel
        self.teacher_loss = cache(self._teacher_loss)

    def figures(self, student: Model, final: bool) -> dict[str, Any]:
        """teacher_loss, in nats per target as heldout_loss is; heldout_kl, the mean of KL(teacher || student)."""
        return {"teacher_loss": self.teacher_loss(final), "heldout_kl": self._divergence(student, final)}

    def _teacher_loss(self, final: bool) -> float:
        limit = None if final else self.args.eval_tokens
        found = heldout_loss(self.teacher, self.heldout, self.args.row, limit, self.parallel)
        return found["heldout_loss"]

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


def evaluate(model: Model, gap: TeacherGap, lesson: ChatData, job: Job, args: Args, final: bool) -> dict[str, Any]:
    figures = lesson.figures(model, job, args, final)
    if lesson.parts.heldout is None:
        return figures
    figures |= gap.figures(model, final)
    say(
        job.console,
        f"the teacher's held-out loss: {figures['teacher_loss']:.4f}; KL(teacher || student): "
        f"{figures['heldout_kl']:.4f} nats/token",
    )
    return figures


def draw(run: Path) -> None:
    """The student's way towards the teacher."""
    labels = {
        "heldout_loss": "student's loss",
        "teacher_loss": "teacher's loss",
        "heldout_kl": "KL(teacher || student)",
    }
    plot_figures(run / "metrics.jsonl", run / "gap.png", run.name, "nats per token, held-out", labels)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
