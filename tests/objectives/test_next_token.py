"""The load of the experts by hand; distillation against torch.distributions over whole logits in float64, and trl."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from minimind import ModelConfig, ops
from minimind.modeling import Model, ModelOutput
from minimind.objectives.next_token import Distillation, TokenBatch, distillation_loss, expert_load, next_token_loss
from tests.conftest import documents_batch
from tests.kernels.contract import EPS, assert_within, versions

CONFIG = ModelConfig(
    32, 2, 2, 1, 16, 48, 50, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=24
)


def output(counts: list[list[int]]) -> ModelOutput:
    return ModelOutput(torch.empty(0), None, torch.empty(0), torch.tensor(counts))


@pytest.mark.parametrize(
    "counts, most, least",
    [
        ([[5, 5, 5, 5]], 0.0, 1.0),
        ([[10, 0, 5, 5]], 1.0, 0.0),
        ([[10, 10, 0, 0], [5, 5, 5, 5]], 0.5, 0.0),  # the mean over layers; the worst layer
        ([[8, 4, 4, 4], [7, 5, 5, 3]], 0.5, 0.6),
    ],
)
def test_load_by_hand(counts, most, least):
    found = expert_load(output(counts))
    assert float(found["max_violation"]) == pytest.approx(most)
    assert float(found["min_load"]) == pytest.approx(least)


def rows_of_a_rank(rows: slice, weights: bool) -> TokenBatch:
    """Some of four rows, with ever fewer targets, as the batch of one rank."""
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row in range(4):
        targets[row, 16 - 4 * row :] = -100
    total = int(targets.ne(-100).sum())
    inputs, targets = ids[rows, :-1].contiguous(), targets[rows].contiguous()
    cu = torch.arange(0, inputs.numel() + 1, 16, dtype=torch.int32)
    made = TokenBatch(inputs, targets, cu, int(targets.ne(-100).sum()), total)
    if not weights:
        return made
    return dataclasses.replace(made, loss_weights=2.0 * targets.ne(-100), weight_sum=2.0 * total)


@pytest.mark.parametrize("weights", [False, True])
def test_parts_add_up_to_a_mean(weights):
    torch.manual_seed(0)
    model = Model(CONFIG)
    parts = [rows_of_a_rank(rows, weights) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    metrics = [next_token_loss(model, part)[2] for part in parts]
    alone = [expert_load(model(p.input_ids, cu_seqlens=p.cu_seqlens, return_logits=False)) for p in parts]
    share = [p.num_targets / 40 for p in parts]
    assert sum(share) == 1
    for name in ("max_violation", "min_load"):
        assert not metrics[0][name].requires_grad
        mean = sum(s * float(figures[name]) for s, figures in zip(share, alone, strict=True))
        logged = sum(float(figures[name]) for figures in metrics) / parts[0].global_weight
        assert logged == pytest.approx(mean, rel=1e-5) and logged > 0


def test_a_dense_model_has_no_metrics():
    dense = Model(dataclasses.replace(CONFIG, num_experts=0, num_shared_experts=0))
    assert len(next_token_loss(dense, rows_of_a_rank(slice(0, 4), False))) == 2


TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
WIDE = {**TINY, "hidden_size": 96, "num_hidden_layers": 3, "qk_norm": True}
DOCUMENTS = [[1, 99, 28], [63, 65], [128]]


def make(shape: dict, seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model(ModelConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(weighted: bool = False) -> TokenBatch:
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 97, ids.shape, generator=generator)
    targets.masked_fill_(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    weights = torch.rand(ids.shape, generator=generator).masked_fill(targets == -100, 0) if weighted else None
    return TokenBatch(ids, targets, cu, int(targets.ne(-100).sum()), loss_weights=weights)


def by_distributions(student: Model, teacher: Model, given: TokenBatch, options: Distillation) -> torch.Tensor:
    """The same sum from the full distributions, row by row."""
    kept = given.targets != -100
    z, z_teacher = (m(given.input_ids, cu_seqlens=given.cu_seqlens).logits[kept] for m in (student, teacher))
    temperature, beta = options.temperature, options.beta
    q = Categorical(logits=z / temperature)
    p = Categorical(logits=z_teacher.detach() / temperature)
    if options.divergence == "forward_kl":
        divergence = kl_divergence(p, q)
    elif options.divergence == "reverse_kl":
        divergence = kl_divergence(q, p)
    else:
        m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        divergence = beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
    hard = F.cross_entropy(z, given.targets[kept], reduction="none")
    per_token = options.alpha * hard + (1 - options.alpha) * temperature**2 * divergence
    return (per_token if given.loss_weights is None else per_token * given.loss_weights[kept]).sum()


CASES = [
    Distillation(),
    Distillation(alpha=0.0, temperature=2.0),
    Distillation(alpha=0.3, temperature=1.5, divergence="reverse_kl"),
    Distillation(alpha=0.3, temperature=1.5, divergence="jsd", beta=0.3),
    Distillation(alpha=0.0, divergence="jsd", beta=0.9),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_loss_and_gradients_are_those_of_whole_distributions(case, ops_mode):
    options, given, found = CASES[case], batch(weighted=case % 2 == 1), []
    students, teachers = (versions(make(shape, seed), terms=256) for shape, seed in ((TINY, 0), (WIDE, 1)))
    with ops.using("reference"):
        for version in ("plain", "truth", "moved"):
            student, teacher = students[version], teachers[version]
            loss = by_distributions(student, teacher, given, options)
            found.append([loss, *torch.autograd.grad(loss, list(student.parameters()))])
    student, teacher = make(TINY, 0), make(WIDE, 1)
    loss, aux = distillation_loss(student, teacher, given, options)
    assert loss.dtype == aux.dtype == torch.float32 and aux == 0
    loss.backward()
    mine = [loss, *(p.grad for p in student.parameters())]
    for value, plain, truth, moved in zip(mine, *found, strict=True):
        assert_within(value, plain, truth, moved=moved)
    assert all(p.grad is None for p in teacher.parameters())


def test_cross_entropy_alone_needs_no_teacher():
    given, student = batch(), make(TINY, 0)

    def teacher():
        raise AssertionError("was called")

    teacher.head_weight = student.head_weight
    loss, _ = distillation_loss(student, teacher, given, Distillation(alpha=1.0))
    assert torch.equal(loss, next_token_loss(student, given)[0])


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    given, student = batch(), make(TINY, 0)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        options = Distillation(alpha=0.0, temperature=2.0, divergence=name)
        loss, _ = distillation_loss(student, student, given, options)
        assert abs(loss.item()) < given.num_targets * 4 * EPS


def test_the_auxiliary_loss_is_the_students():
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, router_aux_loss_coef=0.1)
    given, student, teacher = batch(), make({**TINY, **moe}, 0), make({**TINY, **moe}, 1)
    _, aux = distillation_loss(student, teacher, given, Distillation())
    torch.testing.assert_close(aux, next_token_loss(student, given)[1])
    aux.backward()
    assert student.layers[0].mlp.router.weight.grad.any() and teacher.layers[0].mlp.router.weight.grad is None


# GKDTrainer.generalized_jsd_loss of trl 1.16.0, summed, for the logits below at temperatures 1 and 2.
TRL = {
    "forward_kl": [1.3289472955959711, 0.5508026158856862],
    "reverse_kl": [1.9753861719468664, 0.70959988989804],
    "jsd": [0.27363212917698987, 0.11873144720360837],  # beta 0.3
}


@pytest.mark.parametrize("name", TRL)
def test_divergences_are_trls(name):
    """Models whose hidden states are the logits."""
    logits = torch.tensor([[[0.5, -1.0, 2.0, 0.0], [3.0, 0.0, -2.0, 1.0]]])
    teacher_logits = torch.tensor([[[1.5, 0.0, -1.0, 0.5], [2.5, 1.0, 0.0, -3.0]]])

    class Fixed:
        head_weight = torch.eye(4)

        def __init__(self, logits):
            self.logits = logits

        def __call__(self, *_, **__):
            return SimpleNamespace(hidden_states=self.logits, aux_loss=torch.zeros(()))

    ids = torch.zeros(1, 2, dtype=torch.int64)
    given = TokenBatch(ids, ids, torch.tensor([0, 2], dtype=torch.int32), 2)
    for temperature, expected in zip((1.0, 2.0), TRL[name], strict=True):
        options = Distillation(alpha=0.0, temperature=temperature, divergence=name, beta=0.3)
        loss, _ = distillation_loss(Fixed(logits), Fixed(teacher_logits), given, options)
        assert loss.item() == pytest.approx(temperature**2 * expected, rel=4 * EPS)


def test_bad_settings_are_refused():
    small = make({**TINY, "vocab_size": 96}, 0)
    with pytest.raises(ValueError, match="student has a vocabulary of 96 and the teacher one of 97"):
        distillation_loss(small, make(TINY, 0), batch(), Distillation())
    for settings, message in (
        (dict(alpha=1.5), "alpha=1.5: must lie in 0..1"),
        (dict(temperature=0), "temperature=0: must be above 0"),
        (dict(divergence="tv"), "divergence='tv': choose forward_kl"),
        (dict(divergence="jsd", beta=1.0), "for the ends use forward_kl or reverse_kl"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(**settings)
