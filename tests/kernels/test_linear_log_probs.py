import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.kernels.linear_cross_entropy import linear_cross_entropy
from minimind.kernels.linear_log_probs import linear_log_probs, linear_log_probs_ref
from tests.kernels.contract import DEVICE, assert_second_backward_agrees, error, rand
from tests.kernels.test_linear_cross_entropy import (
    Watch,
    as_on_a_device,
    assert_head_contract,
    both_dtypes,
    both_forms,
    head,
    small_chunks,
    small_tiles,
    some_ignored,
)

CASES = {
    "one_token": dict(tokens=1),
    "odd": dict(tokens=63),
    "ignored": dict(tokens=37, ignored=True),
    "entropy": dict(tokens=33, entropy=True),
    "entropy_ignored": dict(tokens=37, ignored=True, entropy=True),
    "temperature": dict(tokens=25, entropy=True, temperature=0.6),
    "confident": dict(tokens=25, entropy=True, confident=True),
    "confident_hot": dict(tokens=25, entropy=True, confident=True, temperature=4.0),
    "real_vocabulary": dict(tokens=3, vocab=6400, entropy=True),
    "tiny_vocabulary": dict(tokens=9, vocab=2, entropy=True),
}


def case_arguments(name, dtype):
    """(x, weight, targets, options)"""
    spec = dict(CASES[name])
    ignored = spec.pop("ignored", False)
    shape = {k: spec.pop(k) for k in ("tokens", "vocab", "confident") if k in spec}
    x, weight, targets = head(**shape, dtype=dtype)
    return x, weight, some_ignored(targets) if ignored else targets, spec


def assert_log_probs_contract(inputs, targets, kernels, options, num_targets=None):
    names = ["log_probs", *["entropy"] * options.get("entropy", False), "dx", "dw"]
    assert_head_contract(
        lambda x, w: linear_log_probs(x, w, targets, num_targets=num_targets, kernels=kernels, **options),
        lambda x, w: linear_log_probs_ref(x, w, targets, **options),
        inputs,
        names,
    )


@both_forms
@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_linear_log_probs(case, dtype, kernels):
    x, weight, targets, options = case_arguments(case, dtype)
    assert_log_probs_contract([x, weight], targets, kernels, options)


@both_dtypes
@pytest.mark.parametrize("case", ["ignored", "temperature", "confident"])
def test_rows_longer_than_a_tile(monkeypatch, case, dtype):
    small_tiles(monkeypatch)
    x, weight, targets, options = case_arguments(case, dtype)
    assert_log_probs_contract([x[:15], weight], targets[:15], True, options)


@both_forms
@both_dtypes
def test_several_chunks(monkeypatch, dtype, kernels):
    small_chunks(monkeypatch)
    x, weight, targets = head(75, dtype=dtype)
    targets = some_ignored(targets, share=0.2)
    assert_log_probs_contract([x, weight], targets, kernels, {"entropy": True})


@both_forms
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(used, kernels):
    x, weight, targets = head(17)
    assert_head_contract(
        lambda x, w: linear_log_probs(x, w, targets, entropy=True, kernels=kernels)[used],
        lambda x, w: linear_log_probs_ref(x, w, targets, entropy=True)[used],
        [x, weight],
        [("log_probs", "entropy")[used], "dx", "dw"],
    )


@both_forms
def test_large_confident_logits_keep_their_small_gradients(kernels):
    """Logits near 100: a log-sum-exp in one float32 number would be off by 4e-6, and 1 - p here is near 7e-5."""
    weight = torch.eye(8, device=DEVICE)
    targets = torch.arange(8, device=DEVICE)
    x = 88 + 11.5 * torch.eye(8, device=DEVICE) + rand(8, 8, scale=0.01)
    assert_log_probs_contract([x, weight], targets, kernels, {"entropy": True})
    a = x.clone().requires_grad_()
    linear_log_probs(a, weight, targets, kernels=kernels)[0].sum().backward()
    p = F.softmax(x.double(), dim=1)
    assert error(a.grad.diagonal(), 1 - p.diagonal()) < 4 * torch.finfo(torch.float32).eps


@both_forms
def test_as_training_calls_it(kernels):
    """Strided bfloat16 hidden states, a float32 master weight."""
    x, weight, targets = head(33, dtype=torch.bfloat16)
    x, weight = x.repeat_interleave(2, dim=1)[:, ::2], weight.float()
    assert not x.is_contiguous()
    assert_log_probs_contract([x, weight], some_ignored(targets), kernels, {"entropy": True})


@both_forms
def test_is_the_cross_entropy_s_other_half(kernels):
    x, weight, targets = head(21)
    targets = some_ignored(targets)
    log_probs, entropy = linear_log_probs(x, weight, targets, kernels=kernels)
    assert entropy is None and log_probs.dtype == torch.float32 and log_probs.shape == (21,)
    torch.testing.assert_close(-log_probs.sum(), linear_cross_entropy(x, weight, targets, kernels=kernels))


@both_forms
def test_entropy_of_even_logits_is_log_v(kernels):
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    entropy = linear_log_probs(
        torch.zeros(3, 16, device=DEVICE), rand(211, 16), targets, entropy=True, kernels=kernels
    )[1]
    torch.testing.assert_close(entropy, torch.full_like(entropy, 211.0).log())


@both_forms
@pytest.mark.parametrize("device", [False, True])
def test_ignored_rows_are_zero_whatever_is_done_with_them(monkeypatch, device, kernels):
    """Outputs are 0, and even a NaN output gradient gives no gradient."""
    if device:
        as_on_a_device(monkeypatch)
    x, weight, targets = head(20)
    targets[::2] = -100
    x.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = linear_log_probs(x, weight, targets, entropy=True, kernels=kernels)
    assert not log_probs[::2].any() and not entropy[::2].any() and log_probs[1::2].all()
    factor = torch.ones(20, device=DEVICE)
    factor[::2] = float("nan")
    dx, dw = torch.autograd.grad((log_probs + entropy) @ factor, (x, weight))
    assert not dx[::2].any() and dx[1::2].all() and dw.isfinite().all()


@both_forms
def test_rows_whose_gradients_are_zero(kernels):
    x, weight, targets = head(20)
    keep = torch.arange(20, device=DEVICE) % 3
    assert_head_contract(
        lambda x, w: linear_log_probs(x, w, targets, kernels=kernels)[0] * keep,
        lambda x, w: linear_log_probs_ref(x, w, targets)[0] * keep,
        [x, weight],
        ["log_probs", "dx", "dw"],
    )


@both_forms
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_all_ignored(monkeypatch, tokens, device, kernels):
    if device:
        as_on_a_device(monkeypatch)
    x, weight, _ = head(tokens)
    targets = torch.full((tokens,), -100, device=DEVICE)
    x.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = linear_log_probs(x, weight, targets, entropy=True, kernels=kernels)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (tokens,) and not log_probs.any() and not entropy.any()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


@both_forms
@pytest.mark.parametrize("slack", [0, 3, 30, None])
def test_num_targets(monkeypatch, slack, kernels):
    small_chunks(monkeypatch)
    as_on_a_device(monkeypatch)
    x, weight, targets = head(40)
    targets = some_ignored(targets)
    num_targets = None if slack is None else int((targets != -100).sum()) + slack
    assert_log_probs_contract([x, weight], targets, kernels, {"entropy": True}, num_targets)


@both_forms
@pytest.mark.parametrize("num_targets", [0, 5])
def test_too_small_a_bound(monkeypatch, num_targets, kernels):
    x, weight, targets = head(6)
    weight.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setenv("MINIMIND_CHECK", "1")
        with pytest.raises(ValueError, match=f"num_targets is {num_targets}, but 6 rows count"):
            linear_log_probs(x, weight, targets, num_targets=num_targets, kernels=kernels)
    as_on_a_device(monkeypatch)
    log_probs, entropy = linear_log_probs(x, weight, targets, entropy=True, num_targets=num_targets, kernels=kernels)
    assert log_probs.isnan().all() and entropy.isnan().all()


@both_forms
@pytest.mark.parametrize("bad", [211, -1, 10**12])
def test_a_target_outside_the_vocabulary(monkeypatch, bad, kernels):
    x, weight, targets = head(6)
    targets[4] = bad
    x.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setenv("MINIMIND_CHECK", "1")
        with pytest.raises(ValueError, match="targets has values outside"):
            linear_log_probs(x, weight, targets, kernels=kernels)
    as_on_a_device(monkeypatch)
    log_probs, _ = linear_log_probs(x, weight, targets, kernels=kernels)
    (dx,) = torch.autograd.grad(log_probs.sum(), x)
    good = [0, 1, 2, 3, 5]
    assert log_probs[4].isnan() and log_probs[good].isfinite().all()
    assert dx[4].isnan().all() and dx[good].isfinite().all()


@both_forms
def test_no_gradient_where_none_is_wanted(kernels):
    x, weight, targets = head(6)
    full = 6 * 32 * 211
    for need_x, need_w in ((True, False), (False, True), (True, True)):
        a, w = x.detach().requires_grad_(need_x), weight.detach().requires_grad_(need_w)
        with Watch() as watch:
            log_probs, _ = linear_log_probs(a, w, targets, kernels=kernels)
            assert watch.work == full
            log_probs.sum().backward()
        assert watch.work == full * (2 + need_x + need_w)
        assert (a.grad is not None) == need_x and (w.grad is not None) == need_w


@both_forms
def test_little_is_kept_for_the_backward(kernels):
    x, weight, targets = head(20)
    x.requires_grad_(), weight.requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_log_probs(x, weight, targets, entropy=True, kernels=kernels)
    for tensor in (x, weight, targets):
        kept.pop(tensor.data_ptr())
    assert list(kept.values()) == [3 * 20]


def test_full_logits_never_exist(monkeypatch):
    small_chunks(monkeypatch)
    x, weight, targets = head(50, size=8)

    def largest(function, **options):
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with Watch() as watch:
            log_probs, entropy = function(a, w, targets, entropy=True, **options)
            (log_probs + entropy).sum().backward()
        return watch.largest

    assert largest(linear_log_probs_ref) == 50 * 211, "the watch sees what is there to be seen"
    for kernels in (False, True):
        assert largest(linear_log_probs, kernels=kernels) <= 16 * 211


@both_forms
def test_masked_tokens_cost_nothing(monkeypatch, kernels):
    x, weight, targets = head(12)
    x.requires_grad_(), weight.requires_grad_()
    half = targets.clone()
    half[::2] = -100
    full = 4 * 12 * 32 * 211

    def work(targets, num_targets):
        with Watch() as watch:
            log_probs, _ = linear_log_probs(x, weight, targets, num_targets=num_targets, kernels=kernels)
            log_probs.sum().backward()
        return watch.work

    assert work(targets, 12) == full and work(half, 6) == full // 2
    if DEVICE.type == "cpu":
        assert work(half, None) == full // 2
    as_on_a_device(monkeypatch)
    assert work(half, 6) == full // 2 and work(half, None) == full


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: that the host never waits for it")
@both_forms
@pytest.mark.parametrize("num_targets", [None, 40])
def test_no_host_sync(num_targets, kernels):
    x, weight, targets = head(60)
    x.requires_grad_(), weight.requires_grad_()
    targets = some_ignored(targets)

    def step():
        log_probs, entropy = linear_log_probs(
            x, weight, targets, entropy=True, num_targets=num_targets, kernels=kernels
        )
        (log_probs + entropy).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_forms
def test_second_backward(kernels):
    x, weight, targets = head(20)
    targets = some_ignored(targets)
    assert_second_backward_agrees(
        lambda x, w: linear_log_probs(x, w, targets, entropy=True, kernels=kernels), [x, weight]
    )


@both_forms
def test_outputs_may_be_overwritten(kernels):
    """The backward does not read the outputs."""
    x, weight, targets = head(9)
    x.requires_grad_()
    log_probs, entropy = linear_log_probs(x, weight, targets, entropy=True, kernels=kernels)
    (expected,) = torch.autograd.grad((2 * log_probs + 3 * entropy).sum(), x, retain_graph=True)
    (mine,) = torch.autograd.grad((log_probs.mul_(2) + entropy.mul_(3)).sum(), x)
    assert torch.equal(mine, expected)


def test_reference_is_the_framework_s():
    x, weight, targets = head(30)
    targets[3] = -100
    logits = F.linear(x, weight) / 0.7
    log_probs, entropy = linear_log_probs_ref(x, weight, targets, 0.7, True)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(log_probs, expected)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    expected[3] = 0
    torch.testing.assert_close(entropy, expected)


def test_reference_by_finite_differences():
    x, weight, targets = head(5, size=4, vocab=7)
    targets = some_ignored(targets)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    for options in ({}, {"entropy": True, "temperature": 0.7}):
        assert torch.autograd.gradcheck(
            lambda x, w, options=options: tuple(
                t for t in linear_log_probs_ref(x, w, targets, **options) if t is not None
            ),
            (x, weight),
        )


@both_forms
def test_opcheck(kernels):
    x, weight, targets = head(9, size=16, vocab=37)
    targets = some_ignored(targets)
    op, a, w = torch.ops.minimind.linear_log_probs, x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(op, (a, w, targets, 0.7, True, None, kernels))
    torch.library.opcheck(op, (a, w, targets, 1.0, False, 8, kernels))
    backward, plain = torch.ops.minimind.linear_log_probs_backward, (x.detach(), weight.detach())
    stats = linear_log_probs_stats(*plain, targets)
    for dl, dh, need in ((rand(9), rand(9, seed=5), (True, True)), (None, rand(9), (True, False))):
        torch.library.opcheck(backward, (dl, dh, *plain, targets, stats, 1.0, None, kernels, *need))


def linear_log_probs_stats(x, weight, targets):
    return torch.ops.minimind.linear_log_probs(x, weight, targets, 1.0, True, None, False)[2]


BAD = {
    r"x is torch.float64": lambda x, w, t: ((x.double(), w, t), {}),
    r"weight is \[37, 15\]": lambda x, w, t: ((x, w[:, :15], t), {}),
    r"targets is torch.int64 \[4\]": lambda x, w, t: ((x, w, t[:4]), {}),
    r"num_targets is -1": lambda x, w, t: ((x, w, t), {"num_targets": -1}),
    r"temperature is 0": lambda x, w, t: ((x, w, t), {"temperature": 0.0}),
}


@both_forms
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message, kernels):
    args, options = BAD[message](*head(5, size=16, vocab=37))
    with pytest.raises(ValueError, match=message):
        linear_log_probs(*args, **options, kernels=kernels)


@pytest.mark.slow
@both_forms
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_mask_and_bound(kernels, data):
    tokens, vocab = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 300))
    x, weight, targets = head(tokens, size=data.draw(st.integers(1, 40)), vocab=vocab)
    targets = some_ignored(targets, share=data.draw(st.floats(0, 1)))
    count = int((targets != -100).sum())
    options = dict(entropy=data.draw(st.booleans()), temperature=data.draw(st.floats(0.3, 3)))
    bound = data.draw(st.one_of(st.none(), st.integers(count, count + 50)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_chunks(monkeypatch, rows=data.draw(st.integers(1, 50)))
        small_tiles(monkeypatch)
        assert_log_probs_contract([x, weight], targets, kernels, options, bound)
