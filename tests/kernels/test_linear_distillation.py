import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.linear_distillation import linear_distillation, linear_distillation_ref
from tests.kernels.contract import DEVICE, assert_second_backward_agrees, rand
from tests.kernels.test_linear_cross_entropy import (
    Watch,
    as_on_a_device,
    assert_head_contract,
    both_dtypes,
    both_forms,
    mixed_weights,
    small_chunks,
    small_tiles,
)

NAMES = ["loss", "dx", "dw", "dteacher_x", "dteacher_weight"]
betas = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])


def heads(tokens, size=32, teacher_size=48, vocab=211, dtype=torch.float32, scale=0.3):
    """(x, weight, teacher_x, teacher_weight)"""
    return [
        rand(*shape, seed=i, scale=factor).to(dtype)
        for i, (shape, factor) in enumerate(
            [
                ((tokens, size), 1.0),
                ((vocab, size), scale),
                ((tokens, teacher_size), 1.0),
                ((vocab, teacher_size), scale),
            ]
        )
    ]


def assert_distillation_contract(inputs, kernels, loss_weights=None, num_targets=None, **options):
    assert_head_contract(
        lambda *t: linear_distillation(*t, loss_weights, num_targets=num_targets, kernels=kernels, **options),
        lambda *t: linear_distillation_ref(*t, loss_weights, **options),
        inputs,
        NAMES,
    )


CASES = {
    "one_token": dict(tokens=1),
    "odd": dict(tokens=33),
    "weights_0_1_10": dict(tokens=19, weighted=True),
    "cold": dict(tokens=13, temperature=0.5),
    "hot": dict(tokens=13, weighted=True, temperature=4.0),
    "sharp": dict(tokens=13, scale=4.0),
    "real_vocabulary": dict(tokens=3, vocab=6400),
    "tiny_vocabulary": dict(tokens=9, vocab=2),
}


@both_forms
@both_dtypes
@betas
@pytest.mark.parametrize("case", CASES)
def test_linear_distillation(case, beta, dtype, kernels):
    spec = dict(CASES[case])
    options = {k: spec.pop(k) for k in ("temperature",) if k in spec}
    loss_weights = mixed_weights(spec["tokens"]) if spec.pop("weighted", False) else None
    inputs = heads(**spec, dtype=dtype)
    assert_distillation_contract(inputs, kernels, loss_weights, beta=beta, **options)


@both_dtypes
@betas
def test_rows_longer_than_a_tile(monkeypatch, beta, dtype):
    small_tiles(monkeypatch)
    assert_distillation_contract(heads(5, dtype=dtype), True, mixed_weights(5), beta=beta, temperature=1.5)


@both_forms
@both_dtypes
@betas
def test_several_chunks(monkeypatch, beta, dtype, kernels):
    small_chunks(monkeypatch)
    assert_distillation_contract(heads(25, dtype=dtype), kernels, mixed_weights(25), beta=beta)


@both_forms
@betas
def test_a_probability_that_underflows(beta, kernels):
    """With logits hundreds apart, p, q or both are 0 in float32, but their logarithms are finite."""
    x, teacher_x = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    x[:, 0] = torch.tensor([300.0, 0.0, 300.0, 300.0])
    teacher_x[:, 0] = torch.tensor([0.0, 300.0, 300.0, 0.0])
    teacher_x[3, 1] = 300.0  # each is certain of another token
    weight = torch.eye(9, 8, device=DEVICE)
    assert_distillation_contract([x, weight, teacher_x, weight], kernels, beta=beta)
    small = [x + rand(4, 8, scale=1e-3), weight, teacher_x, weight]
    assert_distillation_contract(small, kernels, beta=beta, temperature=0.9)


@both_forms
@betas
def test_equal_models_have_no_divergence(beta, kernels):
    x, weight, _, _ = heads(9)
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_distillation(a, w, x, weight, beta=beta, kernels=kernels)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and a.grad.abs().max() < 1e-6 and w.grad.abs().max() < 1e-5


@both_forms
@betas
def test_every_divergence_is_positive_and_falls(beta, kernels):
    x, weight, teacher_x, teacher_weight = heads(9)
    x.requires_grad_()

    def loss(x):
        return linear_distillation(x, weight, teacher_x, teacher_weight, beta=beta, kernels=kernels)

    before = loss(x)
    (dx,) = torch.autograd.grad(before, x)
    assert 0 < loss(x - 0.1 * dx) < before


@both_forms
def test_the_middle_is_symmetric(kernels):
    a, wa, b, wb = heads(9)
    there = linear_distillation(a, wa, b, wb, beta=0.5, kernels=kernels)
    back = linear_distillation(b, wb, a, wa, beta=0.5, kernels=kernels)
    torch.testing.assert_close(there, back)
    assert there < 9 * torch.tensor(2.0).log(), "the Jensen-Shannon divergence is below log 2"
    forward = linear_distillation(a, wa, b, wb, beta=0.0, kernels=kernels)
    reverse = linear_distillation(b, wb, a, wa, beta=1.0, kernels=kernels)
    torch.testing.assert_close(forward, reverse)


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_as_training_calls_it(kernels, beta):
    """Strided bfloat16 hidden states, float32 master weights, a float32 teacher."""
    x, weight, teacher_x, teacher_weight = heads(15)
    x, weight = x.bfloat16().repeat_interleave(2, dim=1)[:, ::2], weight.bfloat16().float()
    inputs = [x, weight, teacher_x, teacher_weight]
    assert_distillation_contract(inputs, kernels, mixed_weights(15), beta=beta)
    leaves = [t.detach().requires_grad_() for t in inputs]
    linear_distillation(*leaves, beta=beta, kernels=kernels).backward()
    assert leaves[2].grad is None and leaves[3].grad is None


@both_forms
def test_no_weights_are_ones_and_zero_weights_give_zero(kernels):
    inputs, ones = heads(9), torch.ones(9, device=DEVICE)
    loss = linear_distillation(*inputs, ones, kernels=kernels)
    torch.testing.assert_close(loss, linear_distillation(*inputs, kernels=kernels))
    assert linear_distillation(*inputs, 0 * ones, kernels=kernels) == 0


@both_forms
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_nothing_to_learn(monkeypatch, tokens, device, kernels):
    if device:
        as_on_a_device(monkeypatch)
    x, weight, *teacher = heads(tokens)
    x.requires_grad_(), weight.requires_grad_()
    loss = linear_distillation(x, weight, *teacher, torch.zeros(tokens, device=DEVICE), kernels=kernels)
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


@both_forms
@pytest.mark.parametrize("slack", [0, 3, 30, None])
def test_num_targets(monkeypatch, slack, kernels):
    small_chunks(monkeypatch)
    as_on_a_device(monkeypatch)
    loss_weights = mixed_weights(30)
    num_targets = None if slack is None else 20 + slack
    assert_distillation_contract(heads(30), kernels, loss_weights, num_targets, beta=0.5)


@both_forms
@pytest.mark.parametrize("num_targets", [0, 5])
def test_too_small_a_bound(monkeypatch, num_targets, kernels):
    x, weight, *teacher = heads(6)
    weight.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setenv("MINIMIND_CHECK", "1")
        with pytest.raises(ValueError, match=f"num_targets is {num_targets}, but 6 rows count"):
            linear_distillation(x, weight, *teacher, num_targets=num_targets, kernels=kernels)
    as_on_a_device(monkeypatch)
    loss = linear_distillation(x, weight, *teacher, num_targets=num_targets, kernels=kernels)
    assert loss.isnan()
    if num_targets:
        loss.backward()
        assert weight.grad.isnan().all()


@both_forms
@betas
def test_no_gradient_where_none_is_wanted(beta, kernels):
    x, weight, *teacher = heads(5)
    forward, more = 5 * 211 * (32 + 48), 5 * 211 * 32
    losses = []
    for need_x, need_w in ((False, False), (True, False), (False, True), (True, True)):
        a, w = x.detach().requires_grad_(need_x), weight.detach().requires_grad_(need_w)
        with Watch() as watch:
            losses.append(linear_distillation(a, w, *teacher, beta=beta, kernels=kernels))
        assert watch.work == forward + more * (need_x + need_w)
        if need_x or need_w:
            losses[-1].backward()
        assert (a.grad is not None) == need_x and (w.grad is not None) == need_w
    with torch.no_grad(), Watch() as watch:
        losses.append(linear_distillation(a, w, *teacher, beta=beta, kernels=kernels))
    assert watch.work == forward and all(torch.equal(loss, losses[0]) for loss in losses)


def test_full_logits_never_exist(monkeypatch):
    small_chunks(monkeypatch)
    x, weight, *teacher = heads(50, size=8, teacher_size=8)

    def largest(function, **options):
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with Watch() as watch:
            function(a, w, *teacher, beta=0.5, **options).backward()
        return watch.largest

    assert largest(linear_distillation_ref) == 50 * 211, "the watch sees what is there to be seen"
    for kernels in (False, True):
        assert largest(linear_distillation, kernels=kernels) <= 16 * 211


@both_forms
def test_masked_tokens_cost_nothing(monkeypatch, kernels):
    x, weight, *teacher = heads(12)
    x.requires_grad_(), weight.requires_grad_()
    ones, half = torch.ones(12, device=DEVICE), torch.ones(12, device=DEVICE)
    half[::2] = 0
    full = 12 * 211 * (3 * 32 + 48)

    def work(loss_weights, num_targets):
        with Watch() as watch:
            linear_distillation(x, weight, *teacher, loss_weights, num_targets=num_targets, kernels=kernels).backward()
        return watch.work

    assert work(ones, 12) == full and work(half, 6) == full // 2
    if DEVICE.type == "cpu":
        assert work(half, None) == full // 2
    as_on_a_device(monkeypatch)
    assert work(half, 6) == full // 2 and work(half, None) == full


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: that the host never waits for it")
@both_forms
@betas
@pytest.mark.parametrize("num_targets", [None, 40])
def test_no_host_sync(num_targets, beta, kernels):
    x, weight, *teacher = heads(60)
    x.requires_grad_(), weight.requires_grad_()
    loss_weights = mixed_weights(60)

    def step():
        linear_distillation(
            x, weight, *teacher, loss_weights, num_targets=num_targets,
            beta=beta, kernels=kernels,
        ).backward()  # fmt: skip

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_forms
@betas
def test_second_backward(beta, kernels):
    teacher = heads(6)[2:]
    assert_second_backward_agrees(
        lambda x, w: linear_distillation(x, w, *teacher, mixed_weights(6), beta=beta, kernels=kernels), heads(6)[:2]
    )


def test_reference_is_the_framework_s():
    x, weight, teacher_x, teacher_weight = heads(9)
    student = torch.distributions.Categorical(logits=F.linear(x, weight) / 2)
    teacher = torch.distributions.Categorical(logits=F.linear(teacher_x, teacher_weight) / 2)
    middle = torch.distributions.Categorical(probs=0.3 * teacher.probs + 0.7 * student.probs)
    kl = torch.distributions.kl_divergence
    mixed = 0.3 * kl(teacher, middle) + 0.7 * kl(student, middle)
    for beta, expected in ((0.0, kl(teacher, student)), (1.0, kl(student, teacher)), (0.3, mixed)):
        loss = linear_distillation_ref(x, weight, teacher_x, teacher_weight, temperature=2.0, beta=beta)
        torch.testing.assert_close(loss, expected.sum())


@betas
def test_reference_by_finite_differences(beta):
    x, weight, *teacher = (t.double() for t in heads(5, size=4, teacher_size=6, vocab=7))
    assert torch.autograd.gradcheck(
        lambda x, w: linear_distillation_ref(x, w, *teacher, mixed_weights(5), temperature=0.7, beta=beta),
        (x.requires_grad_(), weight.requires_grad_()),
    )


@both_forms
def test_opcheck(kernels):
    x, weight, *teacher = heads(9, size=16, teacher_size=12, vocab=37)
    op, a, w = torch.ops.minimind.linear_distillation, x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(op, (a, w, *teacher, None, None, 1.0, 0.0, kernels, True, True))
    torch.library.opcheck(op, (a, w, *teacher, mixed_weights(9), 9, 2.0, 0.3, kernels, False, True))


BAD = {
    r"x is torch.float64": lambda x, w, tx, tw: ((x.double(), w, tx, tw), {}),
    r"teacher_x is torch.float64": lambda x, w, tx, tw: ((x, w, tx.double(), tw), {}),
    r"teacher_weight is \[37, 11\]; for teacher_x": lambda x, w, tx, tw: ((x, w, tx, tw[:, :11]), {}),
    r"teacher_weight has 36 rows and weight 37; .* the same vocabulary": lambda x, w, tx, tw: ((x, w, tx, tw[:36]), {}),
    r"teacher_x has 4 rows": lambda x, w, tx, tw: ((x, w, tx[:4], tw), {}),
    r"loss_weights is torch.float32 \[4\]": lambda *t: ((*t, torch.ones(4)), {}),
    r"num_targets is -1": lambda *t: (t, {"num_targets": -1}),
    r"temperature is -1": lambda *t: (t, {"temperature": -1.0}),
    r"beta is 1.5": lambda *t: (t, {"beta": 1.5}),
}


@both_forms
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message, kernels):
    args, options = BAD[message](*heads(5, size=16, teacher_size=12, vocab=37))
    with pytest.raises(ValueError, match=message):
        linear_distillation(*args, **options, kernels=kernels)


@pytest.mark.slow
@both_forms
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_mask_and_bound(kernels, data):
    tokens, vocab = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 200))
    inputs = heads(
        tokens, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), vocab, scale=data.draw(st.floats(0, 3))
    )
    loss_weights = mixed_weights(tokens)
    count = int((loss_weights != 0).sum())
    bound = data.draw(st.one_of(st.none(), st.integers(count, count + 50)))
    beta = data.draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99)))
    temperature = data.draw(st.floats(0.3, 3))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_chunks(monkeypatch, rows=data.draw(st.integers(1, 50)))
        small_tiles(monkeypatch)
        assert_distillation_contract(inputs, kernels, loss_weights, bound, beta=beta, temperature=temperature)
