"""Properties that all ops share: autocast, deterministic mode, second derivatives, one compilation for all sizes."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from minimind import ops
from minimind.kernels.linear_cross_entropy import linear_cross_entropy
from minimind.kernels.linear_distillation import linear_distillation
from minimind.kernels.linear_log_probs import linear_log_probs
from minimind.kernels.moe_experts import moe_experts
from minimind.kernels.moe_routing import route
from minimind.kernels.rms_norm import add_rms_norm, rms_norm
from minimind.kernels.rope import rope
from minimind.kernels.swiglu import swiglu
from tests.kernels.contract import DEVICE, rand, run

WEIGHT, HEAD, TEACHER = (1 + rand(16, seed=1, scale=0.1), rand(37, 16, seed=2), rand(37, 8, seed=3))
GATE_UP, DOWN, TABLE = rand(4, 12, 16, seed=4), rand(4, 16, 6, seed=5), rand(64, 8, seed=6)
Case = tuple[Callable[..., "Tensor | tuple[Tensor, ...]"], Callable[[int], list[Tensor]]]


def hidden(rows: int) -> list[Tensor]:
    return [rand(rows, 16, seed=7)]


def targets(x: Tensor) -> Tensor:
    """Targets with every third one ignored, so that the ops must select rows."""
    numbers = torch.arange(x.shape[0], device=x.device) % 37
    return numbers.masked_fill(numbers % 3 == 0, -100)


def routed_experts(x: Tensor, logits: Tensor) -> Tensor:
    routing = route(logits, 2, True)
    return moe_experts(x, GATE_UP, DOWN, routing.gates, routing.order, routing.offsets)


def gates_and_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    routing = route(logits, 2, True)
    return routing.gates, routing.scores


def rotated(qkv: Tensor) -> tuple[Tensor, ...]:
    return rope(qkv, TABLE, TABLE, torch.arange(qkv.shape[0], device=qkv.device), 2, 1)


def losses(kernels: bool) -> dict[str, Case]:
    """The three losses of the head, whose weight also gets a gradient."""
    return {
        "linear_cross_entropy": (
            lambda x, w: linear_cross_entropy(x, w, targets(x), kernels=kernels),
            lambda n: [*hidden(n), HEAD],
        ),
        "linear_log_probs": (
            lambda x, w: linear_log_probs(x, w, targets(x), entropy=True, kernels=kernels),
            lambda n: [*hidden(n), HEAD],
        ),
        "linear_distillation": (
            lambda x, w: linear_distillation(x, w, x.detach()[:, :8], TEACHER, kernels=kernels),
            lambda n: [*hidden(n), HEAD],
        ),
    }


KERNELS: dict[str, Case] = {
    "rms_norm": (lambda x: rms_norm(x, WEIGHT, 1e-5), hidden),
    "add_rms_norm": (lambda x, y: add_rms_norm(x, y, WEIGHT, 1e-5), lambda n: [*hidden(n), rand(n, 16, seed=8)]),
    "swiglu": (swiglu, hidden),
    "rope": (rotated, lambda n: [rand(n, 64, seed=9)]),
    "route": (gates_and_scores, lambda n: [rand(n, 4, seed=10)]),
    "moe_experts": (routed_experts, lambda n: [*hidden(n), rand(n, 4, seed=10)]),
    **losses(kernels=True),
}
EVERY = KERNELS | {f"{name}, PyTorch": case for name, case in losses(kernels=False).items()}


@pytest.mark.parametrize("op", EVERY)
def test_autocast_changes_nothing(op):
    """An op's products are in the dtype of its inputs; autocast would round only some steps."""
    function, inputs = EVERY[op]
    plain = run(function, inputs(20), None, grads=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mine = run(function, inputs(20), None, grads=True)
    for a, b in zip(mine, plain, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("op", EVERY)
def test_deterministic_mode_changes_nothing(op):
    """In this mode PyTorch refuses operations that sum in no fixed order on a GPU."""
    function, inputs = EVERY[op]
    plain = run(function, inputs(20), None, grads=True)
    torch.use_deterministic_algorithms(True)
    try:
        mine = run(function, inputs(20), None, grads=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@pytest.mark.parametrize("op", EVERY)
def test_a_second_derivative_is_refused(op):
    """Treating the gradient as a constant would give a silently wrong result."""
    function, inputs = EVERY[op]
    leaves = [t.clone().requires_grad_() for t in inputs(5)]
    result = function(*leaves)
    total = sum(t.square().sum() for t in ((result,) if isinstance(result, Tensor) else result))
    with pytest.raises(RuntimeError, match=r"no autograd formula|don't support automatic differentiation"):
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        sum(g.sum() for g in gradients).backward()


@pytest.mark.parametrize("op", KERNELS)
def test_compiled_once_for_every_number_of_rows(op):
    function, inputs = KERNELS[op]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for rows in (5, 7, 30):
        mine, plain = (run(f, inputs(rows), None, grads=True) for f in (compiled, function))
        frames.add(counter.frame_count)
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
    assert len(frames) == 1


@pytest.mark.parametrize("mode", ["fused", "kernels"])
def test_the_sum_of_two_dtypes_has_pytorchs_dtype(mode):
    """Under autocast a layer's output is bfloat16 and the residual stream float32."""
    x, delta = rand(5, 16), rand(5, 16, seed=1).bfloat16()
    with ops.using(mode):
        mine = ops.add_rms_norm(x, delta, WEIGHT, 1e-5)
        expected = ops.rms_norm(x + delta, WEIGHT, 1e-5), x + delta
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("kernels", [False, True])
def test_a_small_probability_keeps_its_gradient(kernels):
    """A filter that drops small p would ignore the token's weight: p is 1e-12 here, and the weight 1e12."""
    logits = rand(1, 37, seed=11)
    logits[0, 5] += 27.6
    weight = torch.full((1,), 1e12, device=DEVICE)
    target = torch.tensor([5], device=DEVICE)
    x, eye = logits.clone().requires_grad_(), torch.eye(37, device=DEVICE)
    loss = linear_cross_entropy(x, eye, target, weight, kernels=kernels)
    log_probs, _ = linear_log_probs(x, eye, target, kernels=kernels)
    p = logits.double().softmax(1)
    others = torch.arange(37, device=DEVICE) != 5
    for (dx,) in (torch.autograd.grad(loss, x), torch.autograd.grad(log_probs, x, -weight)):
        wrong = (dx / (1e12 * p) - 1)[0, others].abs().max()
        assert wrong < 64 * torch.finfo(torch.float32).eps  # log p is near -28 and rounded
