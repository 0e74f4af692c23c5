"""Teach a chat model which of two answers people prefer: `python train/dpo.py` continues from the newest SFT run.

Direct preference optimisation and its relatives (minimind/objectives/preference.py) over packed pairs of answers. The
initial model's log-probabilities are computed once and kept, so that a step needs no second model. --lora-rank 16
trains an adapter on the frozen model instead. After an interruption the same command continues from the last
checkpoint. A run leaves its metrics, plots, answers and weights in a folder under runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console

from minimind.data import Corpus
from minimind.modeling import Model
from minimind.objectives.preference import NEED_REFERENCE, OBJECTIVES, PairObjective, Pairs, preference_loss, with_sft
from minimind.tokenization import ChatEncoder
from minimind.training.adapters import AdapterArgs, AdapterSetup
from minimind.training.arguments import FromFlag
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import from_newest
from minimind.training.job import Job, run_script
from minimind.training.parallel import world_size
from minimind.training.stages.chats import show_answers
from minimind.training.stages.dpo import draw_pairs, evaluate_pairs, find_reference, open_heldout, prompts, to_device
from minimind.training.stages.pairs import PairArgs, describe_pairs, open_pairs, pair_loader
from minimind.training.trainer import Stage

# Peak rate, and that of nano on the built-in pairs, whose answers have new words. On 600 real pairs a nano memorised
# the training part at 1e-4, while held-out loss rose.
PEAK_LR, BUILTIN_PEAK_LR = 1e-5, {"nano": 1e-3}


@dataclass(frozen=True)
class Args(PairArgs, AdapterArgs):
    """Train on preferences. All defaults work after train/sft.py."""

    from_: FromFlag = None
    """The initial model, which is also the reference: a run folder, a Hugging Face folder, or an upstream .pth (with
    --preset and --tokenizer). None: the newest finished run of train/sft.py under runs/."""
    loss: Literal["dpo", "ipo", "simpo", "orpo"] = "dpo"
    """dpo and ipo compare with the reference; simpo and orpo need none."""
    beta: float | None = None
    """dpo, ipo: how closely the model is kept to the reference; simpo: scale of the reward; orpo: weight of the odds
    ratio beside the chosen answer's own loss. None: 2 for simpo, else 0.1."""
    label_smoothing: float = 0.0
    """dpo and simpo: the assumed share of pairs with swapped labels."""
    gamma: float | None = None
    """simpo: the margin of reward by which the chosen answer should win. None: 1."""
    sft_weight: float | None = None
    """dpo, ipo and simpo: weight of the chosen answer's own loss per token, beside the objective. None: 1 for the
    built-in pairs, whose answers no model would give by itself, else 0."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: for the built-in pairs, which are
    short, one row per process; for others 65536 on a GPU for models larger than nano, else 4096."""
    eval_questions: int | None = None
    """Held-out prompts that are answered during training and compared exactly with the chosen answers; at the end
    all are. None: 64 of the built-in pairs, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | ({} if self.data else {"batch_tokens": 2048 * world_size()})


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    loss = pair_objective(args)
    args = dataclasses.replace(args, from_=from_newest(args, "sft"))
    job = Job.begin("dpo", args, console)
    split = open_pairs(job, args, ChatEncoder(job.tokenizer))
    if not args.data:
        job.settle("batch_tokens", lambda: (job.args.row * world_size(), ""))
    args, train, heldout = cast(Args, job.args), split.train, split.heldout
    plan = job.plan(pair_loader(split, args))
    adapter = AdapterSetup.from_args(job, args)
    job.open_run()
    model, trained = job.build_model(adapter.prepare)
    needs_reference, rows = args.loss in NEED_REFERENCE, plan.loader.rows

    def reference(view: Corpus) -> np.ndarray | None:
        return find_reference(job, args, model, rows, view) if needs_reference else None

    heldout_pairs = open_heldout(split, job, args, rows, reference)
    stage = Stage(
        loss=lambda batch: preference_loss(trained, batch, loss),
        evaluate=lambda final: evaluate_pairs(model, heldout_pairs, loss, job, args.questions, final),
        sample=lambda: sample(job.parallel.whole(model), heldout or train, job),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=split.fingerprint,
        peak_lr=adapter.peak_lr(PEAK_LR if args.data else BUILTIN_PEAK_LR.get(job.initial.preset, PEAK_LR)),
        place=partial(to_device, reference=reference(train)),
        loss_unit="per pair",
        first_passes=float(needs_reference),
        **adapter.checkpoint_functions(),
    )
    if not job.fit(plan, model, stage, [*describe_pairs(split, plan), *adapter.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw_pairs(job.run.path)
    return True


def pair_objective(args: Args) -> PairObjective:
    """The objective that the flags describe. Raises ValueError, naming the flag, for settings it does not have and
    values that no pair can be trained with."""
    settings: dict[str, float] = {} if args.beta is None else {"beta": args.beta}
    if args.label_smoothing:
        if args.loss not in ("dpo", "simpo"):
            raise ValueError(f"--label-smoothing: --loss {args.loss} has none; drop the flag")
        settings["label_smoothing"] = args.label_smoothing
    if args.gamma is not None:
        if args.loss != "simpo":
            raise ValueError(f"--gamma: --loss {args.loss} has none; drop the flag")
        settings["gamma"] = args.gamma
    objective: PairObjective = partial(OBJECTIVES[args.loss], **settings)
    sft_weight = 0.0 if args.data or args.loss == "orpo" else 1.0
    if args.sft_weight is not None:
        if args.loss == "orpo":
            raise ValueError("--sft-weight: --loss orpo has the chosen answer's own loss; set --beta beside it")
        sft_weight = args.sft_weight
    if sft_weight:
        objective = with_sft(objective, sft_weight)
    objective(Pairs(*[torch.empty(0, dtype=torch.float64)] * 6))  # raises for values out of range
    return objective


def sample(model: Model | None, source: Corpus, job: Job) -> str:
    """Answers to prompts spread over `source`. Empty without a model, as on ranks other than 0."""
    return "" if model is None else show_answers(model, job.tokenizer, prompts(source, 5))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
