"""Train a small model with a larger one as its teacher: `python train/distill.py` uses the newest pretraining run.

White-box distillation (minimind/objectives/next_token.py): the student learns the next token and the teacher's whole
distribution over it. A pretrained teacher teaches packed text; a chat model teaches packed conversations, of which the
assistant's tokens are learnt. After an interruption the same command continues from the last checkpoint. A run leaves
its metrics, plots, samples and weights in a folder under runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rich.console import Console

from minimind.data import PackedLoader
from minimind.modeling import Model
from minimind.objectives.next_token import Distillation, DivergenceName, distillation_loss
from minimind.training.adapters import AdapterArgs, AdapterSetup
from minimind.training.arguments import FromFlag
from minimind.training.evaluation import describe_batch
from minimind.training.job import Job, compile_model, run_script
from minimind.training.stages.chats import ChatArgs
from minimind.training.stages.distillation import (
    ChatData,
    TeacherGap,
    check_same_tokens,
    draw_gap,
    find_teacher,
    half,
    open_data,
)
from minimind.training.trainer import Stage

# Peak rates of the student by preset; half of nano takes that of nano's pretraining, the others are not tuned yet.
PEAK_LR = {"half-nano": 4e-3, "nano": 2e-3, "minimind2-small": 5e-4}


@dataclass(frozen=True)
class Args(ChatArgs, AdapterArgs):
    """Distil a teacher into a student. All defaults work after train/pretrain.py."""

    from_: FromFlag = None
    """The student: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer). None:
    random weights in the shape of --preset or, without that, of half the teacher's width and depth."""
    teacher: str | None = None
    """The teacher: a run folder or a Hugging Face folder. None: the newest finished run of train/pretrain.py."""
    data: tuple[str, ...] = ()
    """Files, folders or globs. With a teacher from train/pretrain.py: text as that script takes it, or empty for its
    built-in corpus. Otherwise conversations as train/sft.py takes them, or empty for the built-in ones."""
    alpha: float = 0.2
    """Share of the data's own next token in the loss; the rest is the teacher's distribution. For half of nano on the
    built-in text, 0.2 was better than 0.5 and 0.5 better than 1, for both seeds tried."""
    temperature: float = 1.0
    """Divisor of the logits of teacher and student: above 1 it softens both distributions. The loss is multiplied by
    its square."""
    divergence: DivergenceName = "forward_kl"
    """forward_kl: cover everything the teacher may say; reverse_kl: keep to what it finds likely; jsd: in between."""
    beta: float = 0.5
    """With --divergence jsd: the teacher's share of the mixture."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    options = Distillation(args.alpha, args.temperature, args.divergence, args.beta)
    job = Job.begin("distill", args, console)
    initial_teacher = find_teacher(args.teacher, args, console)
    if args.from_ is None and args.preset is None:
        job.initial = half(initial_teacher, job.tokenizer if args.tokenizer else initial_teacher.tokenizer)
    check_same_tokens(initial_teacher, job.initial)
    assert initial_teacher.weights is not None
    job.add_reference("teacher", initial_teacher.weights)
    data = open_data(initial_teacher, args, job, console)
    args, train, heldout = cast(Args, job.args), data.split.train, data.split.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=data.split.mixture))
    adapter = AdapterSetup.from_args(job, args)
    job.open_run()
    model, trained = job.build_model(adapter.prepare)
    teacher = job.place(initial_teacher.load()).requires_grad_(False).eval()
    compiled_teacher = compile_model(teacher) if args.compile else teacher
    gap = TeacherGap(teacher, heldout, job)
    stage = Stage(
        loss=lambda batch: distillation_loss(trained, compiled_teacher, batch, options),
        evaluate=lambda final: evaluate(model, data, gap, job, args, final),
        sample=lambda: data.sample(job.parallel.whole(model), job, args),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=f"{data.split.fingerprint} {initial_teacher.fingerprint()}",
        frozen_models=(teacher,),
        peak_lr=adapter.peak_lr(PEAK_LR.get(job.initial.preset, 5e-4)),
        **adapter.checkpoint_functions(),
    )
    millions = teacher.num_parameters() / 1e6
    size = f"teacher: {initial_teacher.preset}, {millions:.1f}M parameters, {initial_teacher.weights}"
    if not job.fit(plan, model, stage, [*data.lines(plan), size, *adapter.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw_gap(job.run.path)
    return True


def evaluate(model: Model, data: ChatData, gap: TeacherGap, job: Job, args: Args, final: bool) -> dict[str, Any]:
    """The student's held-out figures, and how far it is from the teacher."""
    return data.figures(model, job, args, final) | gap.figures(model, final)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
