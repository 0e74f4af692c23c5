"""One step of the optimizers of a run."""

from __future__ import annotations

import dataclasses

import torch

from bench.regression.ratios import Against
from minimind import ModelConfig
from minimind.modeling import Model
from minimind.training.optim import build_optimizers


def test_muon_step(against: Against) -> None:
    """One block of the nano preset: Muon for its matrices, AdamW for the rest."""
    ours = build_optimizers(with_gradients(), "muon", lr=1e-6, weight_decay=0.1)
    parameters = dict(with_gradients().named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=1e-6, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in parameters.values() if id(p) not in chosen], lr=1e-6, fused=True),
    ]
    against("torch.optim.Muon and AdamW", ours.step, lambda: [part.step() for part in parts])


def with_gradients() -> Model:
    torch.manual_seed(0)
    model = Model(dataclasses.replace(ModelConfig.preset("nano"), num_hidden_layers=1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model
