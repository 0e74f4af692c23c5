"""Pairs on the device: a model's scores of the answers do not depend on the layout of the batch."""

from __future__ import annotations

import json

import pytest
import torch

from minimind import ModelConfig, load_tokenizer, ops
from minimind.data.cache import open_preferences
from minimind.data.pair_loader import PairLoader
from minimind.modeling import Model
from minimind.objectives.preference import pair_log_probs
from minimind.objectives.reward_model import RewardBatch, bradley_terry, reward_loss
from minimind.tokenization import ChatEncoder
from minimind.training.stages import reward_model
from minimind.training.stages.dpo import to_device
from minimind.value_head import ValueModel
from tests.data.test_preferences import ROWS
from tests.kernels.contract import assert_within, versions
from tests.training.runs import TINY

MOE = ModelConfig(64, 2, 4, 2, 16, 96, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)


def one_by_one(model: Model, encoder: ChatEncoder) -> list[torch.Tensor]:
    """[log-probabilities [pairs, 2], gradients of their weighted sum]: every side alone, all its logits."""
    found = []
    for row in ROWS:
        for side in encoder.encode([encoder.pieces(row[name]) for name in ("chosen", "rejected")]):
            ids, trained = torch.tensor(side.ids.astype("int64")), torch.tensor(side.trained)[1:]
            log_p = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(log_p[trained].sum())
    return with_gradients(model, torch.stack(found).view(-1, 2))


def with_gradients(model: Model, log_probs: torch.Tensor) -> list[torch.Tensor]:
    total = (log_probs * log_probs.new_tensor([1.0, -2.0])).sum()
    return [log_probs.detach(), *torch.autograd.grad(total, list(model.parameters()))]


@pytest.fixture(scope="module", params=[TINY, MOE], ids=["dense", "moe"])
def sides(request) -> tuple[ModelConfig, dict[str, list[torch.Tensor]]]:
    """Scores of every side alone, by float64, float32 and a moved float64 model."""
    encoder, model = ChatEncoder(load_tokenizer()), make(request.param)
    with ops.using("reference"):
        answers = {name: one_by_one(m, encoder) for name, m in versions(model, terms=256).items()}
    return request.param, answers


def make(config: ModelConfig) -> Model:
    torch.manual_seed(0)
    return Model(config)


@pytest.mark.parametrize(("share", "boundaries"), [(False, None), (True, None), (True, 256)])
def test_log_probabilities_are_those_of_each_side_alone(sides, share, boundaries, ops_mode, tmp_path):
    path, encoder = tmp_path / "pairs.jsonl", ChatEncoder(load_tokenizer())
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = open_preferences([path], encoder, tmp_path / "cache")
    config, others = sides
    model = make(config)

    loader = PairLoader(corpus, 192, 40, share=share)
    (host,) = loader.epoch_batches()
    batch = to_device(host, torch.device("cpu"), boundaries)
    assert (batch.unfolding is not None) == share
    pairs, _ = pair_log_probs(model, batch)
    log_probs = torch.stack((pairs.chosen, pairs.rejected), 1)[torch.from_numpy(host.pairs).argsort()]
    for i, value in enumerate(with_gradients(model, log_probs)):
        assert_within(value.to(torch.float32), **{version: tensors[i] for version, tensors in others.items()})
    answers = [[m["content"] for m in row["rejected"] if m["role"] == "assistant"] for row in ROWS]
    assert pairs.rejected_tokens.sum() >= sum(map(len, answers))
    if share:
        assert 0.2 < loader.saved < 0.5


def test_scores_are_those_of_each_side_alone(ops_mode, tmp_path):
    """A reward model, with the prompt once or twice in a row."""
    path, encoder = tmp_path / "pairs.jsonl", ChatEncoder(load_tokenizer())
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = open_preferences([path], encoder, tmp_path / "cache")
    model = ValueModel.of(make(TINY))
    torch.nn.init.normal_(model.value_head.weight)
    with ops.using("reference"):
        alone = {name: scores_one_by_one(m, encoder) for name, m in versions(model, terms=256).items()}
    for share in (False, True):
        (host,) = PairLoader(corpus, 192, 40, share=share).epoch_batches()
        batch = reward_model.to_device(host, torch.device("cpu"), 256)
        assert (batch.unfolding is not None) == share
        figures = [values_of(model, batch)[ends] for ends in (batch.chosen, batch.rejected)]
        found = torch.stack(figures, 1)[torch.from_numpy(host.pairs).argsort()]
        assert_within(found.float(), **alone)
        loss = bradley_terry(*found.double().T, 0.1).sum()
        assert reward_loss(model, batch, 0.1)[0].item() == pytest.approx(loss.item(), rel=1e-6)


@torch.no_grad()
def scores_one_by_one(model: ValueModel, encoder: ChatEncoder) -> torch.Tensor:
    """[pairs, 2]: of every side alone, at the last token before the one that ends its last turn."""
    found = []
    for row in ROWS:
        for side in encoder.encode([encoder.pieces(row[name]) for name in ("chosen", "rejected")]):
            ids = torch.tensor(side.ids[: side.ends.nonzero()[0][-1]].astype("int64"))
            found.append(model(ids[None]).values[0, -1])
    return torch.stack(found).view(-1, 2)


@torch.no_grad()
def values_of(model: ValueModel, batch: RewardBatch) -> torch.Tensor:
    options = {"position_ids": batch.position_ids, "unfolding": batch.unfolding}
    return model(batch.input_ids, cu_seqlens=batch.cu_seqlens, **options).values.flatten()


def test_a_compiled_step_meets_one_shape(tmp_path):
    path, encoder = tmp_path / "pairs.jsonl", ChatEncoder(load_tokenizer())
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    loader = PairLoader(open_preferences([path], encoder, tmp_path / "cache"), 192, 1, share=True)
    batches = [to_device(host, torch.device("cpu"), boundaries=64) for host in loader.epoch_batches()]
    read = {int(batch.unfolding.cu_seqlens.unique().numel()) for batch in batches}
    shapes = {tuple(tensor.shape for tensor in batch.unfolding) for batch in batches}
    assert len(batches) > 1 and len(read) > 1 and len(shapes) == 1
