"""Teach a chat model which of two answers people prefer: `python train/dpo.py` goes on from the newest SFT run.

Direct preference optimisation and its relatives (docstring of minimind/objectives/preference.py) over packed pairs of
answers. What the model thought of each answer before is worked out once and kept, so that a step needs no second model.
--lora-rank 16 trains an adapter on the frozen model instead.
Run the same command again after any interruption and it continues where the last checkpoint was. Every run leaves a
folder under runs/ with its metrics, plots, answers and weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console

from minimind.data import Corpus
from minimind.data.pair_loader import PairLoader
from minimind.lora import adapters_off
from minimind.modeling import Model
from minimind.objectives.preference import NEED_REFERENCE, OBJECTIVES, Pairs, preference_loss, with_sft
from minimind.objectives.preference import Objective as PairObjective
from minimind.tokenization import ChatEncoder
from minimind.training.adapters import AdapterArgs, Adapting
from minimind.training.arguments import FromFlag
from minimind.training.heldout import describe, rename
from minimind.training.job import Job, Objective
from minimind.training.origin import begin_from
from minimind.training.parallel import world_size
from minimind.training.script import run_script
from minimind.training.stages.answers import HeldOutQuestion, exact_match, show
from minimind.training.stages.figures import plot_figures
from minimind.training.stages.pairs import (
    PairArgs,
    describe_pairs,
    heldout_figures,
    open_pairs,
    pair_loader,
    prompts,
    to_device,
)
from minimind.training.stages.reference import reference_log_probs
from minimind.utils.display import say

# Peak rate, and that of nano on the built-in pairs, whose answers have new words. Of 600 real pairs a nano learnt the
# training part by heart at 1e-4, while held-out loss rose.
PEAK_LR, BUILTIN_PEAK_LR = 1e-5, {"nano": 1e-3}


@dataclass(frozen=True)
class Args(PairArgs, AdapterArgs):
    """Train on preferences. Every default works after train/sft.py."""

    from_: FromFlag = None
    """The model to go on from, which is also the reference: a run folder, a Hugging Face folder, or an upstream .pth
    (with --preset and --tokenizer). None: the newest finished run of train/sft.py under runs/."""
    loss: Literal["dpo", "ipo", "simpo", "orpo"] = "dpo"
    """dpo and ipo compare with the reference; simpo and orpo need none."""
    beta: float | None = None
    """dpo, ipo: how closely the model is held to the reference; simpo: the reward's scale; orpo: the weight of the odds
    ratio beside the chosen answer's own loss. None: 2 for simpo, else 0.1."""
    label_smoothing: float = 0.0
    """dpo and simpo: the share of pairs that are taken to be labelled the wrong way round."""
    gamma: float | None = None
    """simpo: the margin of reward by which the chosen answer should win. None: 1."""
    sft_weight: float | None = None
    """dpo, ipo and simpo: how much the chosen answer's own loss per token counts beside the objective. None: 1 for the
    built-in pairs, whose answers no model would give by itself, else 0."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: of the built-in pairs, which are
    short, a row for each process; of others 65536 on a GPU for models larger than nano, else 4096."""
    eval_questions: int | None = None
    """Held-out prompts answered on the way and compared with the chosen answers to the letter; at the end all are.
    None: 64 of the built-in pairs, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | ({} if self.data else {"batch_tokens": 2048 * world_size()})


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    loss = pair_objective(args)
    args = dataclasses.replace(args, from_=begin_from(args, "sft"))
    job = Job.begin("dpo", args, console)
    parts = open_pairs(job, args, ChatEncoder(job.tokenizer))
    if not args.data:
        job.settle("batch_tokens", lambda: (job.args.row * world_size(), ""))
    args, train, heldout = cast(Args, job.args), parts.train, parts.heldout
    plan = job.plan(pair_loader(parts, args))
    adapting = Adapting.of(job, args)
    job.open_run()
    model, trained = job.build_model(adapting.prepare)
    reference = partial(find_reference, job, args, model, plan.loader.rows)
    of = partial(HeldOutPairs.of, job=job, args=args, rows=plan.loader.rows, reference=reference)
    measured = {name: (of(view.head(args.eval_tokens)), of(view)) for name, view in parts.measured.items()}
    objective = Objective(
        loss=lambda batch: preference_loss(trained, batch, loss),
        evaluate=lambda final: evaluate(model, measured, loss, job, args, final),
        sample=lambda: sample(job.parallel.whole(model), heldout or train, job),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=adapting.rate(PEAK_LR if args.data else BUILTIN_PEAK_LR.get(job.origin.preset, PEAK_LR)),
        place=partial(to_device, reference=reference(train)),
        loss_unit="per pair",
        first_passes=float(args.loss in NEED_REFERENCE),
        **adapting.files(),
    )
    if not job.fit(plan, model, objective, [*describe_pairs(parts, plan), *adapting.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw(job.run.path)
    return True


def pair_objective(args: Args) -> PairObjective:
    """The loss with its settings; ValueError for one that it does not have, or that means nothing."""
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
    objective(Pairs(*[torch.empty(0, dtype=torch.float64)] * 6))  # refuses what no pair could be trained with
    return objective


def find_reference(job: Job, args: Args, model: Model, rows: int, view: Corpus) -> np.ndarray | None:
    """float64 [pairs, 2] of `view`, where the loss needs it. `model` must be as the run began: before Job.fit; of one
    with an adapter it is the base that counts."""
    if args.loss not in NEED_REFERENCE:
        return None
    if args.plan:
        return np.zeros((view.num_documents, 2))
    weights = job.origin.fingerprint()
    where = job.parallel, job.console, args.cache_dir
    with adapters_off(model):
        return reference_log_probs(model, weights, view, args.row, rows, *where, args.share_prompts)


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs and their log-probabilities under the reference."""

    loader: PairLoader
    reference: np.ndarray | None

    @staticmethod
    def of(
        view: Corpus, job: Job, args: Args, rows: int, reference: Callable[[Corpus], np.ndarray | None]
    ) -> HeldOutPairs:
        parallel = job.parallel
        ranks = parallel.rank, parallel.world_size
        loader = PairLoader(view, args.row, rows, 0, False, *ranks, share=args.share_prompts)
        return HeldOutPairs(loader, reference(view))


def evaluate(
    model: Model,
    measured: dict[str, tuple[HeldOutPairs, HeldOutPairs]],
    loss: PairObjective,
    job: Job,
    args: Args,
    final: bool,
) -> dict[str, Any]:
    """What the objective and its figures are on held-out pairs, of every named set too, and the share of prompts
    answered as chosen. measured: by name, "" for the main one, what is measured on the way and at the end."""
    found: dict[str, Any] = {}
    for name, views in measured.items():
        held = views[final]
        figures = heldout_figures(model, held.loader, held.reference, loss, job.parallel)
        say(
            job.console,
            f"of {figures['heldout_pairs']:,} held-out pairs{f' of {name}' if name else ''} "
            f"{figures['heldout_ranking']:.1%} have the chosen answer likelier, {figures['heldout_accuracy']:.1%} the "
            f"higher reward for it; margin {figures['heldout_margin']:.3f}",
        )
        if args.questions and not name:
            asked = prompts(held.loader.view, figures["heldout_pairs"] if final else args.questions)
            figures |= answered(model, asked, job)
        found |= (rename(name, figures) if name else figures) | {"heldout_all": final}
    return found


def answered(model: Model, asked: list[HeldOutQuestion], job: Job) -> dict[str, Any]:
    """The share of prompts answered as chosen, to the letter."""
    whole = job.parallel.whole(model)
    share = job.parallel.share(lambda: exact_match(cast(Model, whole), job.tokenizer, asked))
    return {"heldout_exact": share, "heldout_questions": len(asked)}


def sample(model: Model | None, source: Corpus, job: Job) -> str:
    """Answers to prompts from all over `source`; nothing where there is no model: on all ranks but the first."""
    return "" if model is None else show(model, job.tokenizer, prompts(source, 5))


def draw(run: Path) -> None:
    """What became of the held-out pairs."""
    shares = {
        "heldout_ranking": "chosen answer likelier",
        "heldout_accuracy": "chosen answer's reward higher",
        "heldout_exact": "chosen answer given, to the letter",
    }
    rewards = {"heldout_chosen_reward": "chosen", "heldout_rejected_reward": "rejected", "heldout_margin": "margin"}
    plot_figures(run / "metrics.jsonl", run / "accuracy.png", run.name, "share of held-out pairs", shares)
    plot_figures(run / "metrics.jsonl", run / "rewards.png", run.name, "reward, held-out pairs", rewards)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
