"""Train a model that tells good answers from bad ones: `python train/reward.py` goes on from the newest SFT run.

The score is a number read off the last token of an answer (minimind/value_head.py), taught by pairs of answers of which
one is preferred (docstring of minimind/objectives/reward_model.py). The run's folder is a reward for reinforcement
learning: --reward model=runs/reward-...:1 of train/grpo.py and its like; transformers opens the checkpoints of dense
models as sequence classifiers. Run the same command again after any interruption and it continues where the last
checkpoint was. Every run leaves a folder under runs/ with its metrics, plots, scored samples and weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from minimind.data import Corpus
from minimind.data.pair_loader import PairLoader
from minimind.objectives.reward_model import bradley_terry, reward_loss
from minimind.tokenization import ChatEncoder
from minimind.training.adapters import AdapterArgs, Adapting
from minimind.training.arguments import FromFlag
from minimind.training.heldout import describe, rename
from minimind.training.job import Job, Objective
from minimind.training.origin import begin_from
from minimind.training.parts import DataSplit
from minimind.training.script import run_script
from minimind.training.stages.figures import plot_figures
from minimind.training.stages.pairs import PairArgs, describe_pairs, open_pairs, pair_loader
from minimind.training.stages.scores import InitialValueModel, files, heldout_scores, show_scores, to_device
from minimind.utils.display import say
from minimind.value_head import ValueModel

# Peak rates by preset. With nano's all built-in held-out pairs are told apart; the others are not tuned yet.
PEAK_LR = {"nano": 1e-3}


@dataclass(frozen=True)
class Args(PairArgs, AdapterArgs):
    """Train a reward model. Every default works after train/sft.py."""

    from_: FromFlag = None
    """The model to go on from: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/sft.py under runs/."""
    centering: float = 0.01
    """Weight of the squared sum of both scores, which keeps scores around 0; 0 for none."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"share_prompts": False}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if args.parallel == "fsdp":
        raise ValueError("--parallel fsdp: a reward model is trained with ddp")
    none = torch.empty(0, dtype=torch.float64)
    bradley_terry(none, none, args.centering)  # refuses what no pair could be trained with
    args = dataclasses.replace(args, from_=begin_from(args, "sft"))
    job = Job.begin("reward", args, console)
    job.origin = InitialValueModel(**vars(job.origin))
    parts = open_pairs(job, args, ChatEncoder(job.tokenizer))
    args, train, heldout = cast(Args, job.args), parts.train, parts.heldout
    plan = job.plan(pair_loader(parts, args))
    adapting = Adapting.of(job, args)
    job.open_run()
    model, trained = job.build_model(adapting.prepare)
    objective = Objective(
        loss=lambda batch: reward_loss(cast(ValueModel, trained), batch, args.centering),
        evaluate=lambda final: evaluate(cast(ValueModel, model), parts, job, args, plan.loader.rows, final),
        sample=lambda: sample(cast(ValueModel, model), heldout or train, job),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=adapting.rate(PEAK_LR.get(job.origin.preset, 1e-5)),
        place=to_device,
        loss_unit="per pair",
        **files(adapting),
    )
    if not job.fit(plan, model, objective, [*describe_pairs(parts, plan), *adapting.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw(job.run.path)
    say(console, f"a reward for reinforcement learning: --reward model={job.run.path}:1")
    return True


def evaluate(model: ValueModel, parts: DataSplit, job: Job, args: Args, rows: int, final: bool) -> dict[str, Any]:
    """How well held-out pairs are told apart, of every named set too; at the end all of them."""
    found: dict[str, Any] = {}
    ranks = job.parallel.rank, job.parallel.world_size
    for name, whole in parts.measured.items():
        view = whole if final else whole.head(args.eval_tokens)
        loader = PairLoader(view, args.row, rows, 0, False, *ranks, share=args.share_prompts)
        figures = heldout_scores(model, loader, args.centering, job.parallel)
        say(
            job.console,
            f"of {figures['heldout_pairs']:,} held-out pairs{f' of {name}' if name else ''} "
            f"{figures['heldout_accuracy']:.1%} have the chosen answer score higher; margin "
            f"{figures['heldout_margin']:.3f}",
        )
        found |= (rename(name, figures) if name else figures) | {"heldout_all": final}
    return found


def sample(model: ValueModel, source: Corpus, job: Job) -> str:
    """Scored pairs, of rank 0."""
    return show_scores(model, job.tokenizer, source, 5) if job.parallel.main else ""


def draw(run: Path) -> None:
    """What became of the held-out pairs."""
    accuracy = {"heldout_accuracy": "chosen answer scores higher"}
    scores = {"heldout_chosen_score": "chosen", "heldout_rejected_score": "rejected", "heldout_margin": "margin"}
    plot_figures(run / "metrics.jsonl", run / "accuracy.png", run.name, "share of held-out pairs", accuracy)
    plot_figures(run / "metrics.jsonl", run / "scores.png", run.name, "score, held-out pairs", scores)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
