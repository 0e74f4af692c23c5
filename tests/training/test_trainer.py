"""Single steps of the trainer, and short runs on a tiny model."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minimind import ModelConfig, load_model, load_tokenizer
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training import trainer as trainer_module
from minimind.training.arguments import StageArgs
from minimind.training.batches import TrainingPlan
from minimind.training.checkpoint import list_checkpoints, load_trainer_state
from minimind.training.evaluation import BestFigure, Evaluation
from minimind.training.metrics import NoTracker
from minimind.training.optim import ClipGroup, Optimizers, RateSchedule, build_optimizers
from minimind.training.run_folder import RunFolder, is_finished
from minimind.training.trainer import Stage, StageLoss, Trainer

TINY = ModelConfig(32, 1, 2, 1, 16, 48, 50)


class Same:
    """One batch again and again."""

    host = None

    def __init__(self) -> None:
        ids = torch.arange(16).view(1, 16)
        self.batch = TokenBatch(ids, ids, torch.tensor([0, 16], dtype=torch.int32), 16, 16)

    def next_batch(self) -> TokenBatch:
        return self.batch

    def fetch(self) -> None:
        pass

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


def trainer_of(
    model: Model, loss, steps: int = 1, micro_batches: int = 1, optimizer: Optimizers | None = None,
    run: RunFolder | None = None, evaluate=lambda final: {}, sample=lambda: "", clip_groups=(), **flags,
) -> Trainer:  # fmt: skip
    stage = Stage(loss, evaluate, sample, lambda batch: [], "", 1e-2, clip_groups=clip_groups)
    loader = Same()
    return Trainer(
        args=StageArgs(**flags),
        plan=TrainingPlan(loader, steps, micro_batches),
        stage=stage,
        model=model,
        tokenizer=load_tokenizer(),
        optimizer=optimizer or build_optimizers(model, "adamw", 1e-2, 0.1),
        loader=loader,
        schedule=RateSchedule("constant", steps, warmup=0),
        run=run or RunFolder(Path(), None, None),
        tracker=NoTracker(),
        console=Console(quiet=True),
    )


def step(own_gradients: bool) -> tuple[list[bool], Tensor]:
    """One step of three micro-batches -> before the second and the third, whether the gradients are still the tensors
    that the first backward gave; the step's loss, auxiliary loss and gradient norm."""
    torch.manual_seed(0)
    model = Model(TINY)
    given: dict[str, int] = {}
    kept: list[bool] = []

    def loss(batch: TokenBatch) -> StageLoss:
        gradients = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}
        if gradients:
            kept.append(gradients == given)
            assert gradients == given or not gradients.items() & given.items()
        return next_token_loss(model, batch)

    def note(parameter: Tensor, name: str) -> None:
        assert parameter.grad is not None
        given.setdefault(name, parameter.grad.data_ptr())

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(note, name=name))
    trainer = trainer_of(model, loss, micro_batches=3, cuda_graph=own_gradients)
    trainer._train_step()
    return kept, trainer.pending[0].figures


def test_gradients_of_a_cuda_graph_are_copied_before_accumulation():
    """A graph's backward writes its gradients to one place each time: a sum that lay there would be lost."""
    kept, expected = step(own_gradients=False)
    assert kept == [True, True], "autograd keeps the tensor it is given"
    kept, figures = step(own_gradients=True)
    assert kept == [False, False]
    torch.testing.assert_close(figures, expected)


def test_gradients_are_clipped_before_the_update_and_logged_as_they_were():
    torch.manual_seed(0)
    model = Model(TINY)
    optimizer = build_optimizers(model, "adamw", 1e-2, 0.1)
    norms, update = [], optimizer.step

    def note() -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        update()

    optimizer.step = note
    trainer = trainer_of(model, partial(next_token_loss, model), optimizer=optimizer, grad_clip=0.01)
    trainer._train_step()
    torch.testing.assert_close(norms[0], torch.tensor(0.01), rtol=1e-3, atol=0)
    assert trainer.pending[0].figures[-1] > 0.1


def fit(
    folder: Path,
    losses: list[float],
    patience: int | None,
    stop_after: int | None = None,
    key: str = "heldout_loss",
    sample=lambda: "",
):
    """A run of ten steps, held-out figures after each, `losses` in order; continued where `folder` has a checkpoint.
    Ctrl-C comes in step `stop_after`."""
    torch.manual_seed(0)
    model = Model(TINY)
    kept: dict[int, Tensor] = {}

    def evaluate(final: bool) -> dict[str, float]:
        if not final:
            kept[trainer.step] = model.head_weight.detach().clone()
        return {key: losses[trainer.step], "heldout_all": final}

    def loss(batch: TokenBatch) -> StageLoss:
        if trainer.step == stop_after:
            trainer.interrupted = "SIGINT"
        return next_token_loss(model, batch)

    folder.mkdir(exist_ok=True)
    newest = list_checkpoints(folder)[-1:]
    run = RunFolder(folder, newest[0] if newest else None, None)
    run.metrics.touch()
    run.samples.touch()
    trainer = trainer_of(
        model, loss, 10, run=run, evaluate=evaluate, sample=sample, evals=10, save_every=4, keep_best=True,
        patience=patience,
    )  # fmt: skip
    if newest:
        trainer.resume(load_trainer_state(newest[0]))
    trainer.fit()
    return trainer, kept


LOSSES = [5.0, 4.0, 3.0, 2.0, 2.5, 1.5, 1.6, 1.7, float("nan"), 1.0, 1.1]


@pytest.mark.parametrize(("patience", "best", "last"), [(None, 9, 10), (1, 3, 4), (3, 5, 8), (4, 9, 10)])
def test_the_best_weights_are_kept_and_a_run_without_better_ones_ends(patience, best, last, tmp_path):
    trainer, kept = fit(tmp_path, LOSSES, patience)
    assert trainer.step == last and is_finished(trainer.run.path)
    assert [folder.name for folder in tmp_path.glob("checkpoints/best-*")] == [f"best-{best:08d}"]
    assert torch.equal(load_model(tmp_path).head_weight, kept[best])


def test_the_highest_reward_is_best(tmp_path):
    trainer, _ = fit(tmp_path, LOSSES, 2, key="heldout_reward")
    assert (trainer.step, trainer.evaluation.best.step) == (2, 0)


@pytest.mark.parametrize(
    ("cost", "flags", "saved"),
    [(0.01, {}, [2, 4, 6, 8, 10, 12]), (0.19, {}, [2, 6, 10, 12]), (9.0, {}, [2, 12]),
     (9.0, {"save_every": 3}, [3, 6, 9, 12])],
)  # fmt: skip
def test_checkpoints_take_a_twentieth_of_the_time(cost, flags, saved, tmp_path, monkeypatch):
    """Steps of a second, and checkpoints that take `cost` seconds."""
    clock, steps = SimpleNamespace(now=0.0), list[int]()
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(trainer_module, "SAVES", 6)
    run = RunFolder(tmp_path, None, None)
    run.metrics.touch()
    run.samples.touch()
    model = Model(TINY)

    def loss(batch: TokenBatch) -> StageLoss:
        clock.now += 1.0
        return next_token_loss(model, batch)

    def write(*_: object) -> None:
        clock.now += cost
        steps.append(trainer.step)

    trainer = trainer_of(model, loss, 12, run=run, evals=0, **flags)
    monkeypatch.setattr(trainer, "_write", write)
    trainer.fit()
    assert steps == saved


@pytest.mark.parametrize("stop_after", [3, 5, 6])
def test_an_interrupted_run_knows_its_best(stop_after, tmp_path):
    whole, _ = fit(tmp_path / "whole", LOSSES, 3)
    cut, _ = fit(tmp_path / "cut", LOSSES, 3, stop_after)
    assert cut.step == stop_after + 1 and not is_finished(cut.run.path)
    continued, _ = fit(tmp_path / "cut", LOSSES, 3)
    assert (
        (continued.step, continued.evaluation.best) == (whole.step, whole.evaluation.best) == (8, BestFigure(5, 1.5, 3))
    )
    a, b = (load_model(tmp_path / name) for name in ("whole", "cut"))
    assert torch.equal(a.head_weight, b.head_weight)


def test_without_held_out_data_nothing_is_best(tmp_path):
    with pytest.raises(ValueError, match="--keep-best and --patience need held-out data"):
        Evaluation(lambda final: {}, keeps_best=True).is_best(1, {})


def test_a_sample_that_fails_ends_no_run(tmp_path):
    def no_sample():
        raise RuntimeError("out of memory")

    trainer, _ = fit(tmp_path, LOSSES, None, sample=no_sample)
    assert is_finished(trainer.run.path)
    assert "none (RuntimeError: out of memory)" in (tmp_path / "samples.txt").read_text()


def test_clip_groups_are_clipped_by_their_own_norm():
    """Gradients a thousand times as large in one part leave the other's as they are."""
    torch.manual_seed(0)
    model = Model(TINY)
    mine = list(model.layers[0].parameters())
    own = {id(p) for p in mine}
    rest = [p for p in model.parameters() if id(p) not in own]
    trainer = trainer_of(model, partial(next_token_loss, model), clip_groups=[ClipGroup("critic", mine)], grad_clip=2.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3 if id(p) in own else 1e-4)
    norm, other = trainer._clip()
    assert all((p.grad == 1e-4).all() for p in rest) and norm < 2
    total = torch.nn.utils.get_total_norm([p.grad for p in mine])
    torch.testing.assert_close(total, torch.tensor(2.0), rtol=1e-3, atol=0)
    assert other > 1e3
    trainer._train_step()
    row = trainer.pending[0]
    assert row.names[-1] == "critic_grad_norm" and len(row.figures) == 3 + len(row.names)
