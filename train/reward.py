"""Train a model that scores answers: `python train/reward.py` continues from the newest SFT run.

The score is read off the last token of an answer (minimind/value_head.py) and learnt from pairs of a preferred and a
rejected answer (minimind/objectives/preference.py). The run's folder can then be a reward of train/grpo.py, ppo.py and
spo.py: --reward model=runs/reward-...:1. transformers opens the checkpoints of dense models as sequence classifiers.
After an interruption the same command continues from the last checkpoint. A run leaves its metrics, plots, scored
samples and weights in a folder under runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.console import Console

from minimind.data import Corpus
from minimind.objectives.preference import bradley_terry, reward_loss
from minimind.tokenization import ChatEncoder
from minimind.training.adapters import AdapterArgs, AdapterSetup
from minimind.training.arguments import FromFlag
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import from_newest
from minimind.training.job import Job, run_script
from minimind.training.stages.pairs import PairArgs, describe_pairs, open_pairs, pair_loader
from minimind.training.stages.reward_model import (
    InitialValueModel,
    checkpoint_functions,
    draw_scores,
    evaluate_scores,
    show_scores,
    to_device,
)
from minimind.training.trainer import Stage
from minimind.utils.display import say
from minimind.value_head import ValueModel

# Peak rates by preset. At nano's rate, nano ranks all built-in held-out pairs right; the others are not tuned yet.
PEAK_LR = {"nano": 1e-3}


@dataclass(frozen=True)
class Args(PairArgs, AdapterArgs):
    """Train a reward model. All defaults work after train/sft.py."""

    from_: FromFlag = None
    """The initial model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/sft.py under runs/."""
    centering: float = 0.01
    """Weight of the squared sum of both scores, which keeps scores around 0; 0 turns it off."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"share_prompts": False}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    if args.parallel == "fsdp":
        raise ValueError("--parallel fsdp: a reward model is trained with ddp")
    none = torch.empty(0, dtype=torch.float64)
    bradley_terry(none, none, args.centering)  # raises for values out of range
    args = dataclasses.replace(args, from_=from_newest(args, "sft"))
    job = Job.begin("reward", args, console)
    job.initial = InitialValueModel(**vars(job.initial))
    split = open_pairs(job, args, ChatEncoder(job.tokenizer))
    args, train, heldout = cast(Args, job.args), split.train, split.heldout
    plan = job.plan(pair_loader(split, args))
    adapter = AdapterSetup.from_args(job, args)
    job.open_run()
    model, trained = job.build_model(adapter.prepare)
    stage = Stage(
        loss=lambda batch: reward_loss(cast(ValueModel, trained), batch, args.centering),
        evaluate=lambda final: evaluate_scores(
            cast(ValueModel, model), split, job, args, args.centering, plan.loader.rows, final
        ),
        sample=lambda: sample(cast(ValueModel, model), heldout or train, job),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=split.fingerprint,
        peak_lr=adapter.peak_lr(PEAK_LR.get(job.initial.preset, 1e-5)),
        place=to_device,
        loss_unit="per pair",
        **checkpoint_functions(adapter),
    )
    if not job.fit(plan, model, stage, [*describe_pairs(split, plan), *adapter.lines(model)]):
        return False
    if job.parallel.main and heldout is not None:
        draw_scores(job.run.path)
    say(console, f"a reward for reinforcement learning: --reward model={job.run.path}:1")
    return True


def sample(model: ValueModel, source: Corpus, job: Job) -> str:
    """Scored pairs; empty on ranks other than 0."""
    return show_scores(model, job.tokenizer, source, 5) if job.parallel.main else ""


if __name__ == "__main__":
    run_script(main, Args, __doc__)
