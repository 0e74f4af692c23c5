"""Actor and critic losses on packed rows against one answer at a time with whole logits, in float64, and by hand."""

import dataclasses
import math
from functools import lru_cache, partial
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.objectives.policy import (
    PolicyBatch,
    actor_critic_loss,
    explained_variance,
    policy_loss,
    token_log_probs,
    value_loss,
    value_losses,
    value_room,
)
from minimind.objectives.surrogates import (
    ALGORITHMS,
    PolicyObjective,
    PolicyTokens,
    SampledTokens,
    clip,
    with_entropy,
    with_kl,
)
from minimind.value_head import ValueModel
from tests.conftest import documents_batch
from tests.kernels.contract import assert_within, versions

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, router_aux_loss_coef=0.1)
DOCUMENTS = [[1, 99, 28], [63, 65], [128], [17, 1, 1, 50, 59]]
SAMPLES = 8  # with a target, of 11 documents
TEMPERATURE = 0.8


def make(kind: type[Model] = Model, **changes) -> Model:
    torch.manual_seed(0)
    model = kind(ModelConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(name: str = "grpo", **changes) -> PolicyBatch:
    """Rows with a prompt and an answer each; documents of one token, one without targets, empty ones at the end.
    Numbers away from the targets are NaN, since none of them may be read."""
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 97, ids.shape, generator=generator)
    targets.masked_fill_(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    targets[3, :17] = -100  # a sample without a token
    targets[3, 17], targets[3, 18] = 5, -100  # samples of one token, and another without
    behaviour = token_log_probs(make(), ids, targets, cu, temperature=TEMPERATURE)
    columns = {}
    for i, (column, spread) in enumerate((("old_log_probs", 0.3), ("reference_log_probs", 0.3))):
        noise = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2 + i))
        columns[column] = behaviour + spread * noise
    for i, column in enumerate(("advantages", "old_values", "returns")):
        columns[column] = torch.randn(ids.shape, generator=torch.Generator().manual_seed(5 + i))
    columns = {k: v.masked_fill(targets == -100, float("nan")) for k, v in columns.items()}
    count = int(targets.ne(-100).sum())
    cu = torch.cat((cu, cu[-1:].expand(3)))
    given = PolicyBatch(ids, targets, cu, num_targets=count, global_num_targets=count, global_num_samples=SAMPLES,
                        aggregation=ALGORITHMS[name].aggregation, max_new_tokens=60, temperature=TEMPERATURE,
                        **columns)  # fmt: skip
    return dataclasses.replace(given, **changes)


def objective(name: str) -> PolicyObjective:
    return with_entropy(with_kl(ALGORITHMS[name].objective, 0.1), 0.05)


@lru_cache(maxsize=3)
def by_whole_logits(version: str) -> tuple[list[torch.nn.Parameter], list[tuple[torch.Tensor, ...]]]:
    """(parameters, per sample with targets: places, log-probabilities, entropies), one document at a time."""
    given, model = batch(), versions(make(), terms=256)[version]
    ids, targets = given.input_ids.flatten(), given.targets.flatten()
    found = []
    with ops.using("reference"):
        for start, end in pairwise(given.cu_seqlens.tolist()):
            kept = (targets[start:end] != -100).nonzero()[:, 0]
            if len(kept):
                log_p = (model(ids[start:end][None]).logits[0][kept] / TEMPERATURE).log_softmax(-1)
                said = log_p.gather(1, targets[start:end][kept][:, None])[:, 0]
                found.append((start + kept, said, -(log_p.exp() * log_p).sum(-1)))
    assert len(found) == SAMPLES
    return list(model.parameters()), found


def loss_of_whole_logits(version: str, name: str) -> list[torch.Tensor]:
    """[normalised loss, its gradients], sample by sample."""
    parameters, found = by_whole_logits(version)
    dtype = parameters[0].dtype
    given, aggregation = batch(name), ALGORITHMS[name].aggregation
    total: torch.Tensor | float = 0.0
    for places, said, entropy in found:
        one = SampledTokens(places, torch.zeros_like(places), 1)
        columns = [
            getattr(given, c).flatten()[places].to(dtype)
            for c in ("old_log_probs", "advantages", "reference_log_probs")
        ]
        losses = objective(name)(PolicyTokens(one, said, *columns, entropy)).losses
        total = total + (losses.mean() if aggregation == "sample" else losses.sum())
    divisor = {"token": given.num_targets, "sample": SAMPLES, "constant": SAMPLES * 60}[aggregation]
    loss = total / divisor
    return [loss, *torch.autograd.grad(loss, parameters, retain_graph=True)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_rows_give_the_loss_and_gradients_of_whole_logits(name, ops_mode):
    others = [loss_of_whole_logits(version, name) for version in ("plain", "truth", "moved")]
    model, given = make(), batch(name)
    total, aux, _ = policy_loss(model, given, objective(name), entropy=True)
    assert total.dtype == aux.dtype == torch.float32 and aux == 0
    loss = total / given.global_weight
    mine = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for value, plain, truth, moved in zip(mine, *others, strict=True):
        assert_within(value, plain.to(value.dtype), truth, moved=moved)  # gspo's is float64 there


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_figures_become_means_over_tokens(name):
    given, (_, found) = batch(name), by_whole_logits("truth")
    _, _, figures = policy_loss(make(), given, clip, entropy=True)
    mean = {k: v.item() / given.global_weight for k, v in figures.items()}
    log_p = torch.cat([said for _, said, _ in found]).detach()
    places = torch.cat([where for where, _, _ in found])
    behaviour, reference, advantages = (
        getattr(given, c).flatten()[places].double() for c in ("old_log_probs", "reference_log_probs", "advantages")
    )
    log_r, x = log_p - behaviour, reference - log_p
    clipped = ((advantages > 0) & (log_r.exp() > 1.2)) | ((advantages < 0) & (log_r.exp() < 0.8))
    expected = {
        "ratio": log_r.exp().mean(),
        "ratio_drift": log_r.abs().mean(),
        "clipped": clipped.double().mean(),
        "behaviour_kl": (log_r.exp() - 1 - log_r).mean(),
        "advantage": advantages.mean(),
        "kl": (x.exp() - 1 - x).mean(),
        "entropy": torch.cat([h for _, _, h in found]).mean(),
    }
    assert mean.keys() == expected.keys()
    for key, value in expected.items():
        assert mean[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    plain = policy_loss(make(), given, clip)[2]
    assert "entropy" not in plain
    assert plain["sampled_entropy"].item() / given.global_weight == pytest.approx(-log_p.mean().item(), rel=1e-5)
    assert not any(v.requires_grad for v in figures.values())


def test_on_policy_the_ratio_is_one_and_nothing_drifts():
    given, model = batch(), make()
    now = token_log_probs(model, given.input_ids, given.targets, given.cu_seqlens, given.num_targets, TEMPERATURE)
    assert now.dtype == torch.float32 and not now[given.targets == -100].any()
    figures = policy_loss(model, dataclasses.replace(given, old_log_probs=now), clip)[2]
    assert figures["ratio"].item() / given.global_weight == pytest.approx(1, rel=1e-6)
    assert figures["ratio_drift"] == figures["clipped"] == figures["behaviour_kl"] == 0


def halves(given: PolicyBatch) -> list[PolicyBatch]:
    """The same rows as two batches with the global numbers of the whole."""
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        columns = {k: v[rows] for k, v in vars(given).items() if isinstance(v, torch.Tensor) and v.ndim == 2}
        cu = given.cu_seqlens.clamp(0 if rows.start == 0 else 256, 256 if rows.start == 0 else 512)
        columns["cu_seqlens"] = (cu - cu[0]).unique()
        parts.append(dataclasses.replace(given, **columns, num_targets=int(columns["targets"].ne(-100).sum())))
    return parts


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_add_up(name):
    given, gradients = batch(name), []
    for parts in ([given], halves(given)):
        model = make()
        for part in parts:
            loss, _, _ = policy_loss(model, part, objective(name), entropy=True)
            (loss / part.global_weight).backward()
        gradients.append([p.grad for p in model.parameters()])
    for whole, sums in zip(*gradients, strict=True):
        torch.testing.assert_close(sums, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rank_without_sampled_tokens_takes_part(name, ops_mode):
    given = batch(name)
    none = dataclasses.replace(given, targets=torch.full_like(given.targets, -100), num_targets=0)
    model = make()
    loss, _, figures = policy_loss(model, none, objective(name), entropy=True)
    loss.backward()
    assert loss == 0 and all(v == 0 for v in figures.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_broken_ratio_makes_the_loss_infinite_and_never_nan(advantage):
    given = batch("dapo")
    broken = given.old_log_probs.clone()
    place = given.targets.ne(-100).nonzero()[0]
    broken[tuple(place)] = -2000
    given = dataclasses.replace(given, old_log_probs=broken, advantages=torch.full_like(broken, advantage))
    model = make()
    loss, _, figures = policy_loss(model, given, clip)
    value = loss.item()
    assert math.isinf(value) if advantage < 0 else math.isfinite(value)  # the bound holds what would be gained
    assert all(v.isfinite() for v in figures.values()) and figures["ratio"] > 1e8  # e^20, which shows
    if advantage > 0:
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_auxiliary_loss_comes_along():
    model = make(**MOE)
    loss, aux, _ = policy_loss(model, batch(), clip)
    (loss + aux).backward()
    assert aux > 0 and all(layer.mlp.router.weight.grad.any() for layer in model.layers)


def test_nothing_waits_for_the_device_and_no_logits_are_kept():
    """Fake tensors have no values, so that reading one fails."""
    with FakeTensorMode():
        model = ValueModel(ModelConfig(**TINY))
        ids, column = torch.zeros(4, 128, dtype=torch.int64), torch.zeros(4, 128)
        bounds = torch.zeros(15, dtype=torch.int32)
        given = PolicyBatch(ids, ids, bounds, column, column, 512, 512, 14, "sample", reference_log_probs=column,
                            old_values=column, returns=column)  # fmt: skip
        calls = [lambda name=name: policy_loss(model, given, objective(name), entropy=True) for name in ALGORITHMS]
        calls += [lambda: value_loss(model, given), lambda: actor_critic_loss(model, given, clip)]
        for call in calls:
            kept: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
                loss, _, _ = call()
            loss.backward()
            assert kept and 512 * 97 not in kept


def test_bad_aggregations_are_refused():
    with pytest.raises(ValueError, match=r"aggregation='mean': choose one of token, sample, constant"):
        batch(aggregation="mean")
    with pytest.raises(ValueError, match="max_new_tokens=0: aggregation 'constant' divides by it"):
        batch(aggregation="constant", max_new_tokens=0)


EPS = torch.finfo(torch.float32).eps


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_losses_and_gradients_by_hand():
    """(V, V old, return): within the bound; beyond it and past the return; beyond it but short of the return."""
    values, old, returns = column([0.1, 0.9, 0.9, -0.9]), column([0.0] * 4), column([1.0, 0.0, 2.0, -2.0])
    values.requires_grad_()
    losses, clipped = value_losses(values, old, returns, column([0.2] * 4))
    expected = [0.9**2 / 2, 0.9**2 / 2, 1.8**2 / 2, 1.8**2 / 2]
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-14, atol=0)
    (slopes,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(slopes.tolist(), [-0.9, 0.9, 0.0, 0.0], rtol=1e-14, atol=0)
    assert clipped.tolist() == [False, False, True, True]
    plain, _ = value_losses(values, None, returns, None)
    torch.testing.assert_close(plain.tolist(), [0.9**2 / 2, 0.9**2 / 2, 1.1**2 / 2, 1.1**2 / 2])


@pytest.mark.parametrize("aggregation", ["token", "sample", "constant"])
def test_a_critic_on_packed_rows(aggregation):
    given, critic = batch(aggregation=aggregation), make(ValueModel)
    given = dataclasses.replace(given, value_room=torch.full_like(given.returns, 0.2))
    loss, aux, figures = value_loss(critic, given)
    assert aux == 0 and loss.dtype == torch.float32
    at = given.sampled()
    values = critic(given.input_ids, cu_seqlens=given.cu_seqlens).values
    losses, clipped = value_losses(
        at.take(values), at.take(given.old_values), at.take(given.returns), at.take(given.value_room)
    )
    if aggregation == "sample":
        losses = losses / at.lengths()[at.samples]
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    means = {k: v.item() / given.global_weight for k, v in figures.items()}
    assert means["value"] == pytest.approx(at.take(values).mean().item(), rel=1e-5)
    assert means["return"] == pytest.approx(at.take(given.returns).mean().item(), rel=1e-5)
    assert means["value_clipped"] == pytest.approx(clipped.double().mean().item(), rel=1e-5)
    loss.backward()
    assert critic.value_head.weight.grad.any()


def test_a_shared_trunk_learns_from_both():
    given, model = batch(), make(ValueModel)
    total, _, figures = actor_critic_loss(model, given, clip, value_weight=0.3, entropy=True)
    policy, _, policy_figures = policy_loss(model, given, clip, entropy=True)
    value, _, value_figures = value_loss(model, given)
    assert total.item() == pytest.approx((policy + 0.3 * value).item(), rel=1e-5)
    assert figures.keys() == policy_figures.keys() | value_figures.keys()
    whole = torch.autograd.grad(total, list(model.parameters()))
    parts = torch.autograd.grad(policy + 0.3 * value, list(model.parameters()))
    for mine, truth in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_the_room_of_values_is_in_units_of_what_they_are_off_by():
    """Rewards ten times as large allow values to move ten times as far; a fixed clip would not."""
    values, returns = column([0.0, 1.0, 0.0]), column([3.0, 1.0, -4.0])
    room = value_room(values, returns, 0.2)
    assert room.item() == pytest.approx(0.2 * (25 / 3) ** 0.5, rel=1e-14)
    assert value_room(10 * values, 10 * returns, 0.2) == pytest.approx(10 * room.item(), rel=1e-14)
    assert value_room(values + 7, returns + 7, 0.2) == pytest.approx(room.item(), rel=1e-14)


def test_explained_variance():
    returns = column([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(column([0.0, 0.0, 0.0]), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, column([2.0, 2.0, 2.0])) == 0


def test_bad_values_are_refused():
    given, model = batch(), make(ValueModel)
    given = dataclasses.replace(given, value_room=torch.full_like(given.returns, 0.2))
    for change, message in (
        ({"returns": None}, "needs the batch's returns"),
        ({"old_values": None}, "needs the batch's old_values"),
    ):
        with pytest.raises(ValueError, match=message):
            value_loss(model, dataclasses.replace(given, **change))
    with pytest.raises(ValueError, match=r"--value-clip 0: must be above 0"):
        value_room(column([1.0]), column([2.0]), 0)
    with pytest.raises(ValueError, match="value_weight=0"):
        actor_critic_loss(model, given, partial(clip, low=0.1), value_weight=0)
