"""The fused forms against float64 truth, by the numerics contract: an error at most twice that of plain PyTorch in
the same dtype, for the output and for every gradient."""

import pytest
import torch
import torch.nn.functional as F

from minimind import ops

DTYPES = [torch.float32, torch.bfloat16]


def error(value, truth):
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def check(fused, reference, inputs, dtype):
    """inputs: float64 tensors, all differentiable."""
    results = {}
    for name, function, cast in (
        ("truth", reference, torch.float64), ("torch", reference, dtype), ("fused", fused, dtype)
    ):  # fmt: skip
        args = [t.detach().to(cast).clone().requires_grad_() for t in inputs]
        out = function(*args)
        out.backward(torch.ones_like(out))
        results[name] = [out.detach(), *(a.grad for a in args)]
    for truth, plain, mine in zip(*results.values(), strict=True):
        scale = truth.abs().max().item() if truth.numel() else 0.0
        eps = 4 * torch.finfo(torch.float32).eps * (1 + scale)
        assert mine.isfinite().all()
        assert error(mine, truth) <= 2 * error(plain, truth) + eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (63, 96), (123, 80), (507, 192), (2, 5, 3, 32)])
def test_rms_norm(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    weight = 1 + torch.randn(shape[-1], generator=generator, dtype=torch.float64) / 10
    # truth sees the very values the low-precision forms see
    x, weight = x.to(dtype).double(), weight.to(dtype).double()
    check(
        lambda a, w: ops.rms_norm(a, w, 1e-5), lambda a, w: ops.rms_norm_ref(a, w, 1e-5), [x, weight], dtype
    )


LOSS_CASES = {
    "odd": dict(tokens=123),
    "several_chunks": dict(tokens=2500),
    "one_token": dict(tokens=1),
    "all_masked": dict(tokens=63, masked=1.0),
    "half_masked": dict(tokens=507, masked=0.5),
    "weighted": dict(tokens=507, weighted=True),
    "confident": dict(tokens=123, scale=8.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_linear_cross_entropy(dtype, case):
    spec = {"masked": 0.0, "weighted": False, "scale": 1.0, **LOSS_CASES[case]}
    generator = torch.Generator().manual_seed(0)
    tokens, size, vocab = spec["tokens"], 32, 211
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64) * 0.3
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    if case == "confident":
        x = weight[targets] * spec["scale"] * 4  # the target's logit stands out: p is near 1
    targets[torch.rand(tokens, generator=generator) < spec["masked"]] = -100
    loss_weights = torch.rand(tokens, generator=generator) * 10 if spec["weighted"] else None
    x, weight = x.to(dtype).double(), weight.to(dtype).double()
    check(
        lambda a, w: ops.linear_cross_entropy(a, w, targets, loss_weights),
        lambda a, w: ops.linear_cross_entropy_ref(a, w, targets, loss_weights),
        [x, weight], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["odd", "confident"])
def test_linear_cross_entropy_as_training_calls_it(case):
    """bf16 hidden states, strided, against a float32 master weight."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(211, 32, generator=generator) * 0.3).bfloat16().float()
    targets = torch.randint(0, 211, (123,), generator=generator)
    wide = torch.randn(123, 64, generator=generator) if case == "odd" else weight[targets].repeat(1, 2) * 32
    x = wide.bfloat16()[:, ::2] if case == "odd" else wide.bfloat16()[:, :32]
    assert not x.is_contiguous()
    results = []
    for function, cast in (
        (ops.linear_cross_entropy_ref, torch.float64),
        (ops.linear_cross_entropy_ref, None),
        (ops.linear_cross_entropy, None),
    ):
        a = x.detach().to(cast or x.dtype).requires_grad_()
        w = weight.detach().to(cast or weight.dtype).requires_grad_()
        loss = function(a, w, targets, None)
        loss.backward()
        assert a.grad is not None and w.grad is not None
        results.append((loss.detach(), a.grad, w.grad))
    for truth, plain, mine in zip(*results, strict=True):
        eps = 4 * torch.finfo(torch.float32).eps * (1 + truth.abs().max().item())
        assert error(mine, truth) <= 2 * error(plain, truth) + eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_experts_by_the_contract(dtype):
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator).mul(scale).to(dtype).double()
        for shape, scale in (((123, 64), 1.0), ((4, 96, 64), 0.2), ((4, 64, 48), 0.2))
    )
    ids = torch.rand(123, 4, generator=generator).argsort(dim=1)[:, :2]
    ids[ids == 2] = 3  # expert 2 gets nothing; a token may name expert 3 twice
    gates = torch.rand(123, 2, generator=generator)

    def loop(x, gate_up, down):
        out = torch.zeros_like(x)
        for e in range(4):
            gate, up = (x @ gate_up[e].t()).chunk(2, dim=1)
            weight = (gates * (ids == e)).sum(dim=1, keepdim=True).to(x.dtype)
            out = out + weight * ((F.silu(gate) * up) @ down[e].t())
        return out

    def fused(x, gate_up, down):
        return ops.moe_experts(x, gate_up, down, ids, gates, ops.expert_counts(ids, 4))

    check(fused, loop, [x, gate_up, down], dtype)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(a))
    weight = torch.randn(50, 16, requires_grad=True)
    with torch.no_grad():
        ops.linear_cross_entropy(torch.randn(70, 16), weight, torch.randint(0, 50, (70,)))
    assert not calls


def test_linear_cross_entropy_survives_a_second_backward():
    x = torch.randn(70, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (70,))
    loss = ops.linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(x.grad, 4 * first)


def test_linear_cross_entropy_matches_the_framework():
    x, weight = torch.randn(70, 16), torch.randn(50, 16)
    targets = torch.randint(0, 50, (70,))
    targets[:9] = -100
    expected = F.cross_entropy(x @ weight.t(), targets, reduction="sum")
    for mode in ("reference", "fused"):
        with ops.using(mode):
            torch.testing.assert_close(ops.linear_cross_entropy(x, weight, targets), expected)


def test_rope_keeps_lengths_and_only_sees_distances():
    from minimind import ModelConfig
    from minimind.rope import rope_cos_sin

    config = ModelConfig(head_dim=80, hidden_size=640)
    q, k = torch.randn(1, 1, 1, 80), torch.randn(1, 1, 1, 80)

    def rotated(x, position):
        cos, sin = rope_cos_sin(config, torch.tensor([[position]]))
        return ops.rope(x, cos, sin)

    assert rotated(q, 1234).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    near = (rotated(q, 7) * rotated(k, 3)).sum().item()
    far = (rotated(q, 1007) * rotated(k, 1003)).sum().item()
    assert near == pytest.approx(far, abs=1e-3)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="choose 'reference' or 'fused'"):
        ops.set_mode("quick")
