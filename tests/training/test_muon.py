import dataclasses

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.training import muon
from minimind.training.muon import Muon, batches_of, matrices_of, newton_schulz_, share_out
from minimind.training.optim import Optimizers, build_optimizers
from minimind.weights import to_stock

SMALL = ModelConfig(64, 8, 4, 2, 16, 88, 50)
MOE = dataclasses.replace(
    SMALL, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=88
)
SHAPES = [(24, 16), (16, 16), (16, 24), (24, 16), (1, 16), (16, 1), (63, 123)]
VIEWS = ("aten::t", "aten::transpose", "aten::view", "aten::split", "aten::slice", "aten::unbind", "aten::squeeze",
         "aten::numpy_T", "aten::mT", "aten::reshape", "aten::contiguous", "aten::empty", "aten::new_empty",
         "aten::result_type", "aten::as_strided", "aten::empty_like", "aten::detach")  # fmt: skip


def gradients(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def after(make, shapes=SHAPES, steps: int = 3) -> list[torch.Tensor]:
    """The parameters after some steps of the optimizer make(parameters)."""
    parameters = [nn.Parameter(value) for value in gradients(shapes, 0)]
    optimizer = make(parameters)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(shapes, step + 1), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in parameters]


def torchs(parameters) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("elements", [None, 1, 800], ids=["batches", "one by one", "batches of two"])
def test_steps_are_those_of_torch(elements):
    ours = after(lambda p: Muon(p, lr=0.1, weight_decay=0.1, batch_elements=elements))
    for mine, theirs in zip(ours, after(torchs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)  # bf16 factors times 0.02 to 0.2


def iterated(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """Newton-Schulz in float64; the sum of the fourth powers of the singular values is the Gram matrix's square."""
    x = matrix.double()
    x = x / (x.norm() if iterations == 5 else torch.linalg.svdvals(x).pow(4).sum().pow(0.25))
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((48, 64), lambda m: m.split(16)), ((2, 64, 32), lambda m: [b for one in m for b in one.split(16, 1)]),
     ((30, 64), lambda m: [m]), ((35, 64), lambda m: [m])],
    ids=["rows", "columns of a stack", "too few rows", "no equal blocks"],
)  # fmt: skip
def test_blocks_are_orthogonalised_by_themselves(shape, parts):
    parameter = nn.Parameter(torch.zeros(shape))
    muon = Muon([parameter], lr=0.5, weight_decay=0.0, momentum=0.0, iterations=3, block=16)
    (parameter.grad,) = gradients([shape], 0)
    expected = parameter.grad.bfloat16()
    for block in parts(expected):
        factor = block.contiguous()
        newton_schulz_(factor, 3)
        block.copy_(factor)
    muon.step()
    scale = 0.5 * 0.2 * max(shape[-2:]) ** 0.5
    torch.testing.assert_close(parameter.detach(), -scale * expected.float(), rtol=0.02, atol=0.002)


def test_scaled_rows_move_alike():
    """By hand: rows of the orthogonal factor over the root of their mean squares, which begin with the first."""
    parameter = nn.Parameter(torch.zeros(2, 20, 12))  # two matrices
    muon = Muon([parameter], lr=0.5, weight_decay=0.0, momentum=0.0, row_beta=0.75, iterations=3)
    means, expected = None, torch.zeros(2, 20, 12)
    for step in range(3):
        (parameter.grad,) = gradients([(2, 20, 12)], step)
        factor = parameter.grad.bfloat16()
        newton_schulz_(factor, 3)
        squares = factor.float().square().mean(-1, keepdim=True)
        means = squares if means is None else 0.75 * means + 0.25 * squares
        expected -= 0.5 * 0.2 * factor.float() / means.sqrt()
        muon.step()
        torch.testing.assert_close(parameter.detach(), expected)
        if step == 0:
            assert parameter.detach().square().mean(-1).sqrt().flatten().tolist() == pytest.approx([0.1] * 40)
    assert muon.state[parameter]["row_squares"].shape == (2, 20, 1)


def test_cautious_decay_only_where_the_update_agrees():
    def step(decay: float, cautious: bool) -> torch.Tensor:
        (weights,) = after(lambda p: Muon(p, lr=0.1, weight_decay=decay, cautious=cautious), [(24, 16)], 1)
        return weights

    (start,) = gradients([(24, 16)], 0)
    moved, decayed = step(0.0, False), step(0.5, True)
    agrees = (moved - start) * start < 0
    assert agrees.any() and not agrees.all()
    torch.testing.assert_close(decayed, torch.where(agrees, moved - 0.1 * 0.5 * start, moved))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (1, 9), (123, 63)])
def test_rounding_is_no_larger_than_torchs(shape):
    """Nor with three iterations, which round less often."""
    given = torch.stack(gradients([shape] * 8, 0))
    truth, after_three = (torch.stack([iterated(matrix, k) for matrix in given]) for k in (5, 3))
    batch, three = given.bfloat16(), given.bfloat16()
    newton_schulz_(batch, 5)
    newton_schulz_(three, 3)
    alone = [nn.Parameter(torch.zeros(shape)) for _ in given]
    for parameter, gradient in zip(alone, given, strict=True):
        parameter.grad = gradient
    torch.optim.Muon(alone, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    scale = 0.2 * max(shape) ** 0.5
    theirs = torch.stack([-p.detach() / scale for p in alone])
    assert (batch - truth).norm() <= 2 * (theirs - truth).norm()
    assert (three - after_three).norm() <= 2 * (theirs - truth).norm()
    zero = torch.zeros(shape, dtype=torch.bfloat16)
    newton_schulz_(zero, 3)
    assert not zero.any()


def launches(step) -> int:
    """Operators that a step calls itself, views left out: on a GPU at least a kernel each."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    ours = [e for e in recorded.events() if e.name.startswith("aten::") and not e.name.startswith(VIEWS)]
    return sum(not (e.cpu_parent and e.cpu_parent.name.startswith("aten::")) for e in ours)


def test_gpus_without_bf16_take_float32(monkeypatch):
    """Not fp16: the norm of a small momentum would be 0 in it, and the update lost."""
    for number, (capability, dtype) in enumerate((((7, 5), torch.float32), ((8, 0), torch.bfloat16))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert muon._working_dtype.__wrapped__(torch.device("cuda", number)) == dtype
    assert muon._working_dtype(torch.device("cpu")) == torch.bfloat16
    small = [1e-6 * g for g in gradients([(16, 24)], 0)]
    expected = [1e-3 * g for g in gradients([(16, 24)], 0)]
    for matrices in (small, expected):
        newton_schulz_(matrices[0], 5)
    torch.testing.assert_close(small[0], expected[0], rtol=1e-3, atol=1e-3)


def test_an_eighth_of_the_launches_for_eight_blocks():
    model = Model(SMALL)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon = build_optimizers(model, "muon", 1e-3, 0.1).parts[1]
    matrices = [p for group in muon.param_groups for p in group["params"]]
    assert len(matrices) == 32
    assert launches(muon.step) <= launches(torchs(matrices).step) / 8


def test_parts_are_orthogonalised_apart():
    """Packed q, k and v, and stacked experts of packed gate and up, as if each had been a parameter of its own."""
    whole = [(20, 12), (3, 16, 12)]

    def together(parameters):
        return Muon(parameters, lr=0.1, rows={parameters[0]: (12, 4, 4), parameters[1]: (8, 8)})

    def apart(parameters):
        """The parts of a tensor as separate parameters, which share its storage."""
        views = [*parameters[0].data.split((12, 4, 4)), *parameters[1].data.view(-1, 12).split(8)]
        parts = [nn.Parameter(view) for view in views]
        optimizer = Muon(parts, lr=0.1, batch_elements=1)
        step = optimizer.step

        def with_gradients():
            grads = [*parameters[0].grad.split((12, 4, 4)), *parameters[1].grad.view(-1, 12).split(8)]
            for part, gradient in zip(parts, grads, strict=True):
                part.grad = gradient
            step()

        optimizer.step = with_gradients
        return optimizer

    for a, b in zip(after(together, whole), after(apart, whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01)


@pytest.mark.parametrize("config", [SMALL, MOE], ids=["dense", "moe"])
def test_every_stored_matrix_is_orthogonalised_by_itself(config):
    """q, k, v, gate, up and each expert are separate matrices, as in torch's Muon on the tensors of a file. AdamW
    updates the router."""
    torch.manual_seed(0)
    model = Model(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: weight.clone() for name, weight in to_stock(model.state_dict(), config).items()}
    grads = to_stock({name: p.grad for name, p in model.named_parameters()}, config)
    matrices = {n: nn.Parameter(w.clone()) for n, w in before.items() if "layers" in n and w.ndim == 2}
    routers = [matrices.pop(name) for name in list(matrices) if name.endswith("mlp.gate.weight")]
    assert len(routers) == (config.num_hidden_layers if config.num_experts else 0)
    for name, matrix in matrices.items():
        matrix.grad = grads[name]
    torchs(matrices.values()).step()
    build_optimizers(model, "muon", 0.1, 0.1).step()
    after_ours = to_stock(model.state_dict(), config)
    for name, theirs in matrices.items():
        truth = 0.99 * before[name] - 0.1 * 0.2 * max(theirs.shape) ** 0.5 * iterated(grads[name], 5)
        assert (after_ours[name] - truth).norm() <= 2 * (theirs - truth).norm(), name


def test_experts_that_adamw_updated_resume_with_muon():
    def state_of(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        muon = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n and "router" not in n]
        adamw = [p for p in model.parameters() if all(p is not other for other in muon)]
        old = Optimizers([torch.optim.AdamW(adamw, lr=0.1), Muon(muon, lr=0.1)])
        old.step()
        old.zero_grad()
        return old.state_dict(model)

    model = Model(MOE)
    optimizers = build_optimizers(model, "muon", 0.1, 0.1)
    assert "4 stacks of experts were AdamW's" in optimizers.load_state_dict(model, state_of(model))
    momentum = optimizers.parts[1].state[model.layers[0].mlp.gate_up_proj]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.full_like(momentum, 0.1))
    assert optimizers.load_state_dict(model, optimizers.state_dict(model)) is None


def test_matrices_of_one_shape_share_a_batch():
    matrices = matrices_of(0, (3, 16, 12), (8, 8)) + matrices_of(1, (8, 12)) + matrices_of(2, (4, 12))
    ordered = share_out(matrices, 1)[0]
    assert batches_of(ordered, 1 << 20) == [(1, 4, 12), (7, 8, 12)]
    assert batches_of(ordered, 3 * 96) == [(1, 4, 12), (3, 8, 12), (3, 8, 12), (1, 8, 12)]
    assert batches_of(ordered, 1) == [(1, 4, 12)] + [(1, 8, 12)] * 7


def test_ranks_share_the_work():
    matrices = [m for i in range(9) for m in matrices_of(i, (512, 1408) if i % 2 else (512, 512))]
    shares = share_out(matrices, 4)
    assert sorted(m.parameter for share in shares for m in share) == list(range(9))
    costs = [sum(m.cost for m in share) for share in shares]
    assert max(costs) < 2 * sum(costs) / 4
    assert share_out(matrices[:1], 2) == [[matrices[0]], []]


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [((4,), None, r"not a tensor of shape \(4,\)"), ((5, 4), (3, 3), r"do not make up one of shape \(5, 4\)")],
)
def test_a_vector_is_refused(shape, rows, message):
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        Muon([parameter], rows={parameter: rows} if rows else None).step()


def test_checkpoints_of_torchs_muon_load():
    """bf16 iterations differ between the forms and between processors, but missing momentum would make a far larger
    difference."""

    def take_steps(steps, theirs, state=None, weights=None):
        torch.manual_seed(0)
        model = Model(dataclasses.replace(SMALL, num_hidden_layers=2))
        optimizers = build_optimizers(model, "muon", 1e-2, 0.1)
        optimizers.parts[1].rows = {}  # torch's takes packed matrices whole
        if theirs:
            groups = optimizers.parts[1].param_groups
            optimizers = Optimizers([optimizers.parts[0], torchs([p for g in groups for p in g["params"]])])
        if weights is not None:
            model.load_state_dict(weights)
            if state is not None:
                optimizers.load_state_dict(model, state)
        for step in steps:
            ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(step))
            model(ids).logits.square().mean().backward()
            optimizers.step()
            optimizers.zero_grad()
        return {k: v.clone() for k, v in model.state_dict().items()}, optimizers.state_dict(model)

    half, state = take_steps(range(3), theirs=True)
    resumed, ours = take_steps(range(3, 5), False, state, half)
    whole, theirs = take_steps(range(5), theirs=True)
    forgetful, _ = take_steps(range(3, 5), False, None, half)
    assert ours["state"].keys() == theirs["state"].keys()
    for name, value in whole.items():
        assert (resumed[name] - value).norm() < 0.5 * (forgetful[name] - value).norm(), name
