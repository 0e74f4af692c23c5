"""The same run of each stage with fused and with reference operators: the losses agree within rounding."""

from __future__ import annotations

import functools
import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig, load_tokenizer, ops
from minimind.modeling import Model
from minimind.training.job import Job
from minimind.training.trainer import Trainer
from minimind.weights import save_weights
from tests.kernels.contract import EPS, move_by_rounding
from tests.training.runs import SCRIPT, reproducible

STEPS = 5
TINY = ModelConfig(64, 2, 4, 2, 16, 128, qk_norm=True)
WIDE = ModelConfig(96, 2, 4, 2, 24, 192)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with sums as conversations with and without reasoning, as pairs and as text, and two models with random
    weights."""
    folder = tmp_path_factory.mktemp("pair")
    rng = random.Random(0)
    rows: dict[str, list[dict]] = {"text": [], "chats": [], "reasoned": [], "pairs": []}
    for _ in range(400):
        a, b = rng.randrange(40), rng.randrange(40)
        asked, said = f"{a} and {b}?", f"{a + b} it is."
        question = {"role": "user", "content": asked}
        reasoned = {"role": "assistant", "content": said, "reasoning_content": f"{a}+{b}"}
        answers = [{"role": "assistant", "content": text} for text in (said, f"{a + b + 1} or so.")]
        rows["text"].append({"text": f"{asked} {said}"})
        rows["chats"].append({"conversations": [question, answers[0]]})
        rows["reasoned"].append({"conversations": [question, reasoned]})
        rows["pairs"].append({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
    for name, written in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in written)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, config in (("model", TINY), ("teacher", WIDE)):
        torch.manual_seed(0)
        save_weights(Model(config), folder / name)
        load_tokenizer().save(folder / name)
    return folder


STAGES = {
    "pretrain": ("text", {}),
    "sft": ("chats", {}),
    "lora": ("chats", {"dropout": 0.1}),
    "distill": ("chats", {"alpha": 0.3, "temperature": 2.0, "divergence": "jsd"}),
    "reason": ("reasoned", {}),
    "dpo": ("pairs", {"sft_weight": 0.5}),
    "dpo, simpo": ("pairs", {"loss": "simpo"}),
}


# sft and reason have pretraining's loss, with the weights of their masks
@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.heavy if s in ("sft", "reason") else ()) for s in STAGES]
)
def test_reference_and_fused_train_alike(stage, place, tmp_path, monkeypatch):
    """At every step, the fused run's loss is compared with a float64 run. It may differ by twice as much as the
    reference run's does, or as that of a float64 run whose initial weights were moved by the rounding of float32 sums,
    plus some units in the last place."""
    name = stage.partition(",")[0]
    data, flags = STAGES[stage]
    script = runpy.run_path(str(SCRIPT.with_name(f"{name}.py")))
    flags |= {"from_": str(place / "model"), "data": (str(place / f"{data}.jsonl"),), "cache_dir": str(place)}
    if name == "distill":
        flags |= {"teacher": str(place / "teacher")}

    def losses(out: str, fused: bool) -> torch.Tensor:
        # AdamW: Muon's bf16 Newton-Schulz turns last-digit differences into visible ones
        args = script["Args"](
            **flags, out=str(tmp_path / out), fused=fused, seq_len=64, batch_tokens=256, tokens=256 * STEPS,
            heldout=0.0, precision="fp32", optimizer="adamw", grad_clip=1e3, lr=3e-3, log_every=1, evals=1,
        )  # fmt: skip
        with ops.using(ops.get_mode()):
            assert script["main"](args, Console(quiet=True))
        rows = [row for row in reproducible(tmp_path / out) if row["kind"] == "train"]
        return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)

    monkeypatch.setattr(Trainer, "_sample", lambda self: self.run.samples.touch())  # the engine knows no float64
    reference, fused = losses("reference", False), losses("fused", True)
    monkeypatch.setattr(Job, "build_model", in_float64)
    truth = losses("truth", False)
    monkeypatch.setattr(Job, "build_model", functools.partialmethod(in_float64, move=True))
    moved = losses("moved", False)
    assert len(truth) == STEPS and truth[-1] < truth[0]
    plain, grown, ours = ((found - truth).abs().max() for found in (reference, moved, fused))
    assert ours <= 2 * max(plain, grown) + 4 * EPS * truth.max(), (ours, plain, grown)


BUILD = Job.build_model


def in_float64(job: Job, prepare: Callable[[Model], None] | None = None, move: bool = False) -> tuple[Model, Model]:
    """Job.build_model, after which the whole run computes in float64, the teacher too; random draws stay the same."""

    def place(model: Model) -> Model:
        model.double().compute_dtype = torch.float64
        return model

    model, trained = BUILD(job, prepare)
    assert trained is place(model)
    if move:  # the longest sums are those over a batch
        move_by_rounding(model, terms=256)
    job.place = place
    return model, trained
