from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind.kernels import chunked_linear
from minimind.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from tests.kernels.contract import DEVICE, DTYPES, assert_second_backward_agrees, assert_within, error, rand

both_forms = pytest.mark.parametrize("kernels", [False, True], ids=["torch", "triton"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def assert_head_contract(kernel, reference, inputs, names):
    """Check the contract for float32 results of inputs in any precision, with the same output gradients for all three.
    The output gradient of a scalar loss is 1: the forward computes dx, and a factor that is no power of two would round
    it again."""
    truths, plains, mine = (
        head_results(function, inputs, dtype)
        for function, dtype in ((reference, torch.float64), (reference, None), (kernel, None))
    )
    assert len(mine) == len(truths) == len(names), f"{len(mine)} results for {names}"
    for name, value, plain, truth in zip(names, mine, plains, truths, strict=True):
        assert_within(value, plain, truth, name)


def head_results(function, inputs, dtype):
    """Outputs, then the gradients of all inputs, which are cast to `dtype` if it is given."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]
    assert all(out.dtype == (dtype or torch.float32) for out in outputs)
    seeds = [rand(*out.shape, seed=99 + i).to(out.dtype) if out.ndim else None for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs
    ]


def small_chunks(monkeypatch, rows=16):
    """Make chunks of `rows` rows, whatever the vocabulary."""
    monkeypatch.setattr(chunked_linear, "LOGITS_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(chunked_linear, "ROWS_MULTIPLE", rows)


def small_tiles(monkeypatch):
    """Make rows longer than a tile."""
    monkeypatch.setattr(chunked_linear, "CONFIGS", {80: chunked_linear.RowConfig(whole=64, part=64, per_warp=16)})


def as_on_a_device(monkeypatch):
    """Forbid reading values, as on a GPU."""
    monkeypatch.setattr(chunked_linear, "on_host", lambda tensor: False)


def head(tokens, size=32, vocab=211, dtype=torch.float32, confident=False):
    """(x, weight, targets); confident: the targets' logits stand out, p is near 1."""
    weight = rand(vocab, size, seed=1, scale=0.3).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    x = weight[targets] * 32 if confident else rand(tokens, size).to(dtype)
    return x, weight, targets


def some_ignored(targets, share=0.5):
    chosen = torch.rand(len(targets), generator=torch.Generator().manual_seed(3)) < share
    return targets.masked_fill(chosen.to(DEVICE), -100)


def mixed_weights(tokens):
    """Loss weights 0, 1 and 10."""
    return torch.tensor([0.0, 1.0, 10.0, 1.0, 0.0, 10.0], device=DEVICE).repeat(tokens // 6 + 1)[:tokens]


class Watch(TorchDispatchMode):
    """Watches every operation, also inside minimind's own: the size of the largest floating-point result, and the
    multiply-adds of the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minimind":
            key = torch._C.DispatchKey.CUDA if DEVICE.type == "cuda" else torch._C.DispatchKey.CPU
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        if func._schema.name in ("aten::mm", "aten::matmul", "aten::addmm_"):
            a, b = args[-2:]
            self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return out


CASES = {
    "one_token": dict(tokens=1),
    "odd": dict(tokens=63),
    "half_ignored": dict(tokens=41, ignored=True),
    "weights_0_1_10": dict(tokens=41, weighted=True),
    "weights_and_ignored": dict(tokens=41, weighted=True, ignored=True),
    "confident": dict(tokens=33, confident=True),
    "confident_weighted": dict(tokens=33, confident=True, weighted=True),
    "real_vocabulary": dict(tokens=3, vocab=6400),
    "tiny_vocabulary": dict(tokens=9, vocab=2),
}


def case_arguments(name, dtype):
    """(x, weight, targets, loss_weights)"""
    spec = dict(CASES[name])
    ignored, weighted = spec.pop("ignored", False), spec.pop("weighted", False)
    x, weight, targets = head(**spec, dtype=dtype)
    targets = some_ignored(targets) if ignored else targets
    return x, weight, targets, mixed_weights(len(targets)) if weighted else None


@both_forms
@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(case, dtype, kernels):
    x, weight, targets, loss_weights = case_arguments(case, dtype)
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, loss_weights, kernels=kernels),
        lambda x, w: linear_cross_entropy_ref(x, w, targets, loss_weights),
        [x, weight],
        ["loss", "dx", "dw"],
    )


@both_forms
@both_dtypes
def test_several_chunks(monkeypatch, dtype, kernels):
    small_chunks(monkeypatch)
    x, weight, targets = head(123, dtype=dtype)
    targets, loss_weights = some_ignored(targets, share=0.2), mixed_weights(123)
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, loss_weights, kernels=kernels),
        lambda x, w: linear_cross_entropy_ref(x, w, targets, loss_weights),
        [x, weight],
        ["loss", "dx", "dw"],
    )


@both_dtypes
@pytest.mark.parametrize("case", ["odd", "confident", "weights_and_ignored"])
def test_rows_longer_than_a_tile(monkeypatch, case, dtype):
    small_tiles(monkeypatch)
    x, weight, targets, loss_weights = case_arguments(case, dtype)
    x, targets = x[:25], targets[:25]
    loss_weights = None if loss_weights is None else loss_weights[:25]
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, loss_weights, kernels=True),
        lambda x, w: linear_cross_entropy_ref(x, w, targets, loss_weights),
        [x, weight],
        ["loss", "dx", "dw"],
    )


@both_forms
@pytest.mark.parametrize("confident", [False, True])
def test_as_training_calls_it(kernels, confident):
    """Strided bfloat16 hidden states, a float32 master weight, divided by a global weight sum."""
    x, weight, targets = head(43, dtype=torch.bfloat16, confident=confident)
    x, weight = x.repeat_interleave(2, dim=1)[:, ::2], weight.float()
    assert not x.is_contiguous()
    targets = some_ignored(targets)
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, kernels=kernels) / 77,
        lambda x, w: linear_cross_entropy_ref(x, w, targets) / 77,
        [x, weight],
        ["loss", "dx", "dw"],
    )


@both_forms
def test_float16_where_the_sum_over_chunks_leaves_its_range(monkeypatch, kernels):
    """The gradient of the weight is scaled before it is rounded to float16."""
    small_chunks(monkeypatch)
    x, weight, _ = head(64, vocab=5, dtype=torch.float16)
    x, targets = x.abs() * 20, torch.zeros(64, dtype=torch.int64, device=DEVICE)
    loss_weights = torch.full((64,), 100.0, device=DEVICE)
    weight_sum = loss_weights.sum()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, loss_weights, kernels=kernels) / weight_sum
    (mine,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(
        linear_cross_entropy_ref(x.double(), exact, targets, loss_weights) / weight_sum, exact
    )
    largest = truth.abs().max().item()
    assert largest * weight_sum > torch.finfo(torch.float16).max
    assert error(mine, truth) < 4 * torch.finfo(torch.float16).eps * largest


@both_forms
def test_factors_on_a_bfloat16_gradient(kernels):
    """A factor multiplies the rounded gradient, without being rounded to bfloat16 itself first."""
    x, weight, targets = head(5, dtype=torch.bfloat16)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, kernels=kernels)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (later,) = torch.autograd.grad(loss / 3, x)
    assert torch.equal(later, (once.float() / 3).bfloat16())


@both_forms
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_nothing_to_learn(monkeypatch, tokens, device, kernels):
    if device:
        as_on_a_device(monkeypatch)
    x, weight, _ = head(tokens)
    targets = torch.full((tokens,), -100, device=DEVICE)
    x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, kernels=kernels)
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


@both_forms
@both_dtypes
@pytest.mark.parametrize("slack", [0, 3, 30, 100, None])
def test_num_targets(monkeypatch, slack, dtype, kernels):
    """The result does not depend on the bound: exact, loose, above the number of rows, or None."""
    small_chunks(monkeypatch)
    as_on_a_device(monkeypatch)
    x, weight, targets = head(50, dtype=dtype)
    targets = some_ignored(targets)
    count = int((targets != -100).sum())
    num_targets = None if slack is None else count + slack
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, num_targets=num_targets, kernels=kernels),
        lambda x, w: linear_cross_entropy_ref(x, w, targets),
        [x, weight],
        ["loss", "dx", "dw"],
    )


@both_forms
@both_dtypes
def test_nearly_all_targets_are_not_gathered(monkeypatch, dtype, kernels):
    assert chunked_linear.ALL_ROWS_ABOVE["cuda"] < 0.99
    monkeypatch.setattr(chunked_linear, "ALL_ROWS_ABOVE", {DEVICE.type: 0.95, "cuda": 0.95})
    small_chunks(monkeypatch)
    as_on_a_device(monkeypatch)
    x, weight, targets = head(200, dtype=dtype)
    targets[7] = targets[100] = -100
    assert chunked_linear.select_rows(targets != -100, 198).index is None
    assert chunked_linear.select_rows(targets != -100, 190).index is not None
    assert_head_contract(
        lambda x, w: linear_cross_entropy(x, w, targets, num_targets=198, kernels=kernels),
        lambda x, w: linear_cross_entropy_ref(x, w, targets),
        [x, weight],
        ["loss", "dx", "dw"],
    )
    assert linear_cross_entropy(x, weight, targets, num_targets=197, kernels=kernels).isnan()


@both_forms
@pytest.mark.parametrize("num_targets", [0, 5])
def test_too_small_a_bound_is_nan_on_a_device(monkeypatch, num_targets, kernels):
    as_on_a_device(monkeypatch)
    x, weight, targets = head(6)
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, num_targets=num_targets, kernels=kernels)
    assert loss.isnan()
    if num_targets:
        loss.backward()
        assert weight.grad.isnan().all()


@both_forms
def test_too_small_a_bound_is_refused_where_it_can_be_seen(monkeypatch, kernels):
    monkeypatch.setenv("MINIMIND_CHECK", "1")  # also checks tensors on a GPU
    x, weight, targets = head(6)
    with pytest.raises(ValueError, match="num_targets is 5, but 6 rows count"):
        linear_cross_entropy(x, weight, targets, num_targets=5, kernels=kernels)


@both_forms
@pytest.mark.parametrize("bad", [211, -1, 10**12, -(10**12)])
def test_a_target_outside_the_vocabulary(monkeypatch, bad, kernels):
    x, weight, targets = head(6)
    targets[4] = bad
    x.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setenv("MINIMIND_CHECK", "1")
        with pytest.raises(ValueError, match=r"targets has values outside 0\.\.210"):
            linear_cross_entropy(x, weight, targets, kernels=kernels)
    as_on_a_device(monkeypatch)
    loss = linear_cross_entropy(x, weight, targets, kernels=kernels)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx[4].isnan().all() and dx[[0, 1, 2, 3, 5]].isfinite().all()


@both_forms
def test_no_gradient_where_none_is_wanted(kernels):
    x, weight, targets = head(6)
    full = 6 * 32 * 211
    for need_x, need_w in ((False, False), (True, False), (False, True), (True, True)):
        a, w = x.detach().requires_grad_(need_x), weight.detach().requires_grad_(need_w)
        with Watch() as watch:
            loss = linear_cross_entropy(a, w, targets, kernels=kernels)
        assert watch.work == full * (1 + need_x + need_w)
        if need_x or need_w:
            loss.backward()
        assert (a.grad is not None) == need_x and (w.grad is not None) == need_w
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(a, w, targets, kernels=kernels)
    assert watch.work == full


def test_full_logits_never_exist(monkeypatch):
    small_chunks(monkeypatch)
    x, weight, targets = head(50, size=8)

    def largest(function, **options):
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with Watch() as watch:
            function(a, w, targets, **options).backward()
        return watch.largest

    assert largest(linear_cross_entropy_ref) == 50 * 211, "the watch sees what is there to be seen"
    for kernels in (False, True):
        assert largest(linear_cross_entropy, kernels=kernels) <= 16 * 211


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: the peak of its memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_peak_is_a_quarter_of_eager_at_most(dtype):
    tokens, size, vocab = 16384, 512, 6400
    x, weight = rand(tokens, size).to(dtype).requires_grad_(), rand(vocab, size, seed=1).requires_grad_()
    targets = torch.arange(tokens, device=DEVICE) % vocab

    def peak(function, **options):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(x, weight, targets, **options), (x, weight))
        return torch.cuda.max_memory_allocated() - before

    peak(linear_cross_entropy, kernels=True)  # compiles
    assert 4 * peak(linear_cross_entropy, kernels=True) <= peak(linear_cross_entropy_ref)


@both_forms
def test_masked_tokens_cost_nothing(monkeypatch, kernels):
    x, weight, targets = head(12)
    x.requires_grad_(), weight.requires_grad_()
    half, loss_weights = targets.clone(), torch.ones(12, device=DEVICE)
    half[::2], loss_weights[::2] = -100, 0
    full = 3 * 12 * 32 * 211

    def work(*args, **options):
        with Watch() as watch:
            linear_cross_entropy(x, weight, *args, kernels=kernels, **options).backward()
        return watch.work

    assert work(targets, num_targets=12) == full
    assert work(half, num_targets=6) == full // 2
    assert work(targets, loss_weights, num_targets=6) == full // 2
    if DEVICE.type == "cpu":
        assert work(half) == full // 2 and work(targets, loss_weights) == full // 2
    as_on_a_device(monkeypatch)
    assert work(half, num_targets=6) == full // 2
    assert work(half) == full, "counting would wait for the device"


def test_on_a_gpu_no_part_of_dw_is_rounded_before_the_sum(monkeypatch):
    """The request to cuBLAS, on a machine that may not have it."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: options)
    assert chunked_linear._product(on_gpu, on_gpu) == {"out_dtype": torch.float32}


def test_chunks_keep_to_the_budget():
    for device, vocab, size in (("cpu", 6400, 4), ("cuda", 6400, 2), ("cuda", 6400, 4), ("cuda", 50304, 2)):
        rows = chunked_linear.chunk_rows(torch.device(device), vocab * size)
        bytes_ = rows * vocab * size
        assert rows % 64 == 0
        assert bytes_ <= chunked_linear.LOGITS_BYTES[device] < bytes_ + 64 * vocab * size
    assert chunked_linear.chunk_rows(torch.device("cpu"), 6400 * 4) == 512
    assert chunked_linear.chunk_rows(torch.device("cpu"), 10**9) == 64


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: that the host never waits for it")
@both_forms
@pytest.mark.parametrize("num_targets", [None, 40])
def test_no_host_sync(num_targets, kernels):
    x, weight, targets = head(60)
    x.requires_grad_(), weight.requires_grad_()
    targets = some_ignored(targets)

    def step():
        linear_cross_entropy(x, weight, targets, num_targets=num_targets, kernels=kernels).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_forms
@both_dtypes
def test_second_backward(dtype, kernels):
    x, weight, targets = head(20, dtype=dtype)
    targets = some_ignored(targets)
    assert_second_backward_agrees(lambda x, w: linear_cross_entropy(x, w, targets, kernels=kernels), [x, weight])


@both_forms
def test_twice_the_same_bits(monkeypatch, kernels):
    small_chunks(monkeypatch)
    x, weight, targets = head(40)
    results = []
    for _ in range(2):
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = linear_cross_entropy(a, w, some_ignored(targets), kernels=kernels)
        results.append((loss, *torch.autograd.grad(loss, (a, w))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_are_left_as_they_were():
    x, weight, targets = head(20)
    targets, loss_weights = some_ignored(targets), mixed_weights(20)
    before = [t.clone() for t in (x, weight, targets, loss_weights)]
    for kernels in (False, True):
        a, w = x.requires_grad_(), weight.requires_grad_()
        linear_cross_entropy(a, w, targets, loss_weights, kernels=kernels).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, weight, targets, loss_weights), before, strict=True))


def test_reference_is_the_framework_s_loss():
    x, weight, targets = head(30)
    targets = some_ignored(targets)
    logits = F.linear(x, weight)
    expected = F.cross_entropy(logits, targets, reduction="none").sum()
    assert torch.equal(linear_cross_entropy_ref(x, weight, targets), expected)


def test_reference_by_finite_differences():
    x, weight, targets = head(5, size=4, vocab=7)
    targets = some_ignored(targets)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy_ref(x, w, targets, mixed_weights(5)), (x, weight))


@both_forms
def test_opcheck(kernels):
    x, weight, targets = head(9, size=16, vocab=37)
    op, a, w = torch.ops.minimind.linear_cross_entropy, x.requires_grad_(), weight.requires_grad_()
    targets = some_ignored(targets)
    torch.library.opcheck(op, (a, w, targets, None, None, kernels, True, True))
    torch.library.opcheck(op, (a, w, targets, mixed_weights(9), 9, kernels, True, False))
    plain = a.detach(), w.detach()
    torch.library.opcheck(op, (*plain, targets, None, 8, kernels, False, False))


def test_a_bound_that_changes_does_not_break_the_graph():
    x, weight, targets = head(9, size=16, vocab=37)
    x.requires_grad_(), weight.requires_grad_()

    def loss(num_targets):
        return linear_cross_entropy(x, weight, targets, num_targets=num_targets, kernels=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for num_targets in (9, 10, 12):
        mine, expected = (torch.autograd.grad(f(num_targets), (x, weight)) for f in (compiled, loss))
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


BAD = {
    r"x is torch.float64": lambda x, w, t: ((x.double(), w, t), {}),
    r"x is \[2, 2, 16\]": lambda x, w, t: ((x[:4].view(2, 2, 16), w, t), {}),
    r"weight is \[37, 15\]; for x \[5, 16\] it must be \[vocabulary, 16\]": lambda x, w, t: ((x, w[:, :15], t), {}),
    r"weight is \[0, 16\]": lambda x, w, t: ((x, w[:0], t), {}),
    r"weight is on meta": lambda x, w, t: ((x, w.to("meta"), t), {}),
    r"targets is torch.int64 \[4\]": lambda x, w, t: ((x, w, t[:4]), {}),
    r"targets is torch.int32": lambda x, w, t: ((x, w, t.int()), {}),
    r"loss_weights is torch.float32 \[4\]": lambda x, w, t: ((x, w, t, torch.ones(4)), {}),
    r"loss_weights is torch.bool": lambda x, w, t: ((x, w, t, t > 0), {}),
    r"num_targets is -1": lambda x, w, t: ((x, w, t), {"num_targets": -1}),
}


@both_forms
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message, kernels):
    args, options = BAD[message](*head(5, size=16, vocab=37))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args, **options, kernels=kernels)


@pytest.mark.slow
@both_forms
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_mask_and_bound(kernels, data):
    tokens, vocab = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 300))
    x, weight, targets = head(tokens, size=data.draw(st.integers(1, 40)), vocab=vocab)
    targets = some_ignored(targets, share=data.draw(st.floats(0, 1)))
    count = int((targets != -100).sum())
    bound = data.draw(st.one_of(st.none(), st.integers(count, count + 50)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_chunks(monkeypatch, rows=data.draw(st.integers(1, 50)))
        small_tiles(monkeypatch)
        assert_head_contract(
            lambda x, w: linear_cross_entropy(x, w, targets, num_targets=bound, kernels=kernels),
            lambda x, w: linear_cross_entropy_ref(x, w, targets),
            [x, weight],
            ["loss", "dx", "dw"],
        )
