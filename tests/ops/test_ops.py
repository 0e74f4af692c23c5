"""The switch, and its PyTorch implementations by the numerics contract; tests/kernels has the kernels' own tests."""

import pytest
import torch
import torch.nn.functional as F

from minimind import ModelConfig, ops
from minimind.kernels.linear_cross_entropy import linear_cross_entropy_ref
from minimind.kernels.moe_experts import moe_experts_ref
from minimind.kernels.rms_norm import add_rms_norm_ref, rms_norm_ref
from minimind.kernels.rope import rope_ref
from minimind.kernels.triton_support import triton
from minimind.modeling import Model
from minimind.ops.expert_linear import expert_linear
from minimind.rope import rope_cos_sin
from tests.conftest import routing_of
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_within, moved_tensor, rand

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (63, 96), (123, 80), (2, 5, 3, 32)])
def test_rms_norm(dtype, shape):
    x, residual = rand(*shape, scale=3).to(dtype), rand(*shape, seed=2).to(dtype)
    weight = (1 + rand(shape[-1], seed=1, scale=0.1)).to(dtype)
    assert_contract(
        lambda a, w: ops.rms_norm(a, w, EPS), lambda a, w: rms_norm_ref(a, w, EPS), [x, weight], ["y", "dx", "dw"]
    )
    assert_contract(
        lambda a, r, w: ops.add_rms_norm(a, r, w, EPS),
        lambda a, r, w: add_rms_norm_ref(a, r, w, EPS),
        [x, residual, weight],
        ["y", "total", "dx", "dresidual", "dw"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_with_normed_heads(dtype):
    cos, sin = rope_cos_sin(ModelConfig(head_dim=80, hidden_size=640), torch.arange(17, device=DEVICE))
    positions = torch.arange(34, device=DEVICE).view(2, 17) % 9
    weights = [(1 + rand(80, seed=seed, scale=0.1)).to(dtype) for seed in (1, 2)]

    def fused(qkv, q_weight, k_weight):
        return ops.rope(qkv, cos, sin, positions, 4, 2, q_weight, k_weight, EPS)

    def reference(qkv, q_weight, k_weight):
        return rope_ref(qkv, cos, sin, positions, 4, 2, q_weight, k_weight, EPS)

    names = ["q", "k", "v", "dqkv", "dq_weight", "dk_weight"]
    assert_contract(fused, reference, [rand(2, 17, 8 * 80).to(dtype), *weights], names)


def test_rope_keeps_lengths_and_only_sees_distances(ops_mode):
    config = ModelConfig(head_dim=80, hidden_size=640)
    qkv = rand(1, 1, 3 * 80)

    def rotated(position):
        cos, sin = rope_cos_sin(config, torch.arange(2000, device=DEVICE))
        return ops.rope(qkv, cos, sin, torch.tensor([[position]], device=DEVICE), 1, 1)[:2]

    assert rotated(1234)[0].norm().item() == pytest.approx(qkv[..., :80].norm().item(), rel=1e-5)
    near = (rotated(7)[0] * rotated(3)[1]).sum().item()
    far = (rotated(1007)[0] * rotated(1003)[1]).sum().item()
    assert near == pytest.approx(far, abs=1e-3)


@pytest.mark.parametrize("case", ["odd", "confident"])
def test_linear_cross_entropy_as_training_calls_it(case):
    """bf16 hidden states, strided, against a float32 master weight."""
    weight = rand(211, 32, seed=1, scale=0.3).bfloat16().float()
    targets = torch.randint(0, 211, (123,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[5:9] = -100
    wide = rand(123, 64) if case == "odd" else weight[targets.clamp(min=0)].repeat(1, 2) * 32
    x = wide.bfloat16()[:, ::2] if case == "odd" else wide.bfloat16()[:, :32]
    assert not x.is_contiguous()
    assert_contract(
        lambda a, w: ops.linear_cross_entropy(a, w, targets, num_targets=119),
        lambda a, w: linear_cross_entropy_ref(a, w, targets),
        [x, weight],
        ["loss", "dx", "dw"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_experts(dtype):
    ids = torch.rand(123, 4, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :2].to(DEVICE)
    ids[ids == 2] = 3  # expert 2 gets nothing; a token may name expert 3 twice
    gates = rand(123, 2, seed=4).abs()
    x, gate_up, down = rand(123, 64), rand(4, 96, 64, seed=1, scale=0.2), rand(4, 64, 48, seed=2, scale=0.2)
    assert_contract(
        lambda x, gate_up, down: ops.moe_experts(x, gate_up, down, routing_of(ids, gates, experts=4)),
        lambda x, gate_up, down: moe_experts_ref(x, gate_up, down, gates, ids),
        [x.to(dtype), gate_up.to(dtype), down.to(dtype)],
        ["out", "dx", "dgate_up", "ddown"],
    )


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(a))
    weight = torch.randn(50, 16, requires_grad=True)
    with torch.no_grad():
        ops.linear_cross_entropy(torch.randn(70, 16), weight, torch.randint(0, 50, (70,)))
    assert not calls


def test_linear_losses_match_the_framework(ops_mode):
    x, weight, teacher = rand(70, 16), rand(50, 16, seed=1), rand(70, 16, seed=2)
    targets = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[:9] = -100
    logits = x @ weight.t()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ops.linear_cross_entropy(x, weight, targets), expected)

    log_probs, entropy = ops.linear_log_probs(x, weight, targets, temperature=2.0, entropy=True)
    distribution = torch.distributions.Categorical(logits=logits / 2)
    real = targets.ne(-100)
    torch.testing.assert_close(log_probs[real], distribution.log_prob(targets.clamp(min=0))[real])
    torch.testing.assert_close(entropy[real], distribution.entropy()[real])
    assert not log_probs[~real].any() and not entropy[~real].any()

    divergence = ops.linear_distillation(x, weight, teacher, weight)
    expected = F.kl_div(
        logits.log_softmax(-1), (teacher @ weight.t()).log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(divergence, expected)


def test_few_different_sizes_of_products(monkeypatch):
    """The head's products have few shapes, whatever the number of targets."""
    rows = []
    original = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda x, *a, **k: rows.append(len(x)) or original(x, *a, **k))
    x, weight = rand(200, 8), rand(30, 8, seed=1)
    for count in range(100, 190, 5):
        targets = torch.zeros(200, dtype=torch.int64, device=DEVICE)
        targets[count:] = -100
        loss = ops.linear_cross_entropy(x, weight, targets, num_targets=count)
        torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), targets, reduction="sum"))
    assert len(set(rows)) <= 3


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="choose 'reference', 'fused' or 'kernels'"):
        ops.set_mode("quick")


def test_kernels_that_cannot_run_are_an_error_not_a_fallback(monkeypatch):
    monkeypatch.setattr(ops, "why_no_triton", lambda device: "triton is not installed")
    with pytest.raises(ValueError, match="cannot run here: triton is not installed"):
        ops.set_mode("kernels")
    assert ops.get_mode() == "fused"


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_the_switch_says_what_it_resolves_to():
    cpu = torch.device("cpu")
    with ops.using("reference"):
        assert "plain PyTorch" in ops.describe(cpu)
    assert "PyTorch's fastest forms" in ops.describe(cpu)
    with ops.using("kernels"):
        assert "kernels = Triton kernels" in ops.describe(cpu)


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_an_old_gpu_takes_the_kernels_but_not_the_products_of_experts(monkeypatch):
    gpu = torch.device("cuda")
    described = []
    for capability in ((6, 1), (7, 5), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        described.append(ops.describe(gpu))
    assert "the kernels need compute capability 7.0, and this device has 6.1" in described[0]
    assert described[1:] == [
        "ops: fused = Triton kernels, but grouped_mm for experts, which need compute capability 8.0",
        "ops: fused = Triton kernels",
    ]
    x = rand(6, 8)
    gate_up, down = rand(2, 32, 8, seed=1), rand(2, 8, 16, seed=2)
    routing = ops.route(rand(6, 2, seed=3), 1, False)
    expected = ops.moe_experts(x, gate_up, down, routing)
    monkeypatch.setattr(ops, "_kernels", lambda x: True)
    monkeypatch.setattr(ops._experts, "moe_experts", lambda *_: "kernels")
    monkeypatch.setattr(ops, "swiglu", ops._swiglu.swiglu_ref)
    for old, found in ((True, expected), (False, "kernels")):
        monkeypatch.setattr(ops, "before_sm_80", lambda old=old: old)
        out = ops.moe_experts(x, gate_up, down, routing)
        assert out == found if isinstance(found, str) else torch.equal(out, found)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="this operator is the CPU's")
def test_a_device_that_nobody_has_tried_runs_the_reference(monkeypatch):
    model = Model(ModelConfig(32, 1, 2, 1, 16, 48, 50, num_experts=2, num_experts_per_tok=1, num_shared_experts=1,
                              moe_intermediate_size=16))  # fmt: skip
    ids, targets = torch.arange(16).view(1, 16), torch.arange(16)

    def loss() -> torch.Tensor:
        hidden = model(ids, return_logits=False).hidden_states.flatten(0, 1)
        return ops.linear_cross_entropy(hidden, model.head_weight, targets)

    with ops.using("reference"):
        expected = loss()
    monkeypatch.setattr(ops, "_PLAIN_DEVICES", ("cpu",))
    for fast in (ops._ce, ops._experts):
        name = "linear_cross_entropy" if fast is ops._ce else "moe_experts"
        monkeypatch.setattr(fast, name, None)
    monkeypatch.setattr(ops, "_moe_experts_grouped", None)
    assert torch.equal(loss(), expected)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="this operator is the CPU's")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bounds", [(0, 5, 5, 63, 64), (0, 0, 1, 130, 139), (0, 70, 75, 203, 300), (0, 64, 192, 192, 192)]
)
def test_expert_linear(dtype, bounds):
    offsets, tokens = torch.tensor(bounds, dtype=torch.int32), bounds[-1]

    def split(x):
        return x.tensor_split(offsets[1:-1].tolist())

    def loop(x, weight):
        parts = zip(split(x), weight, strict=True)
        return torch.cat([F.linear(rows, w) for rows, w in parts])

    inputs = [rand(tokens, 24).to(dtype), rand(4, 40, 24, seed=1, scale=0.2).to(dtype)]
    assert_contract(lambda x, w: expert_linear(x, w, offsets), loop, inputs, ["y", "dx", "dweight"])
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.minimind.expert_linear, (*leaves, offsets))
    dout, x = rand(tokens, 40, seed=2).to(dtype), leaves[0].detach()
    torch.library.opcheck(torch.ops.minimind.expert_linear_dweight, (dout, x, offsets))

    def by_expert(a, b):
        return torch.stack([d.T @ x for d, x in zip(*map(split, (a, b)), strict=True)])

    narrow, wide = rand(tokens, 24, seed=3).to(dtype), rand(tokens, 40, seed=4).to(dtype)
    for a, b in ((narrow, wide), (wide, narrow)):  # either may be the one that is filled with zeros
        found = torch.ops.minimind.expert_linear_dweight(a, b, offsets)
        x, y = a.double(), b.double()
        assert_within(found, by_expert(a, b), by_expert(x, y), moved=by_expert(moved_tensor(x, tokens), y))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="this operator is the CPU's")
def test_expert_linear_uses_few_numbers_of_rows():
    from minimind.ops.expert_linear import _parts

    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(50):
        cuts = torch.randint(0, 1001, (7,), generator=generator).sort().values
        for part in _parts(torch.cat((torch.tensor([0]), cuts, torch.tensor([1000])))):
            assert 0 <= part.window.start <= part.rows.start < part.rows.stop <= part.window.stop <= 1000
            sizes.add(part.window.stop - part.window.start)
    assert sizes <= {*range(64, 1000, 64), 1000}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="this operator is the CPU's")
def test_expert_linear_with_frozen_weights_keeps_no_input():
    x, weight = rand(64, 24).requires_grad_(), rand(4, 40, 24, seed=1)
    offsets, kept = torch.tensor([0, 5, 5, 63, 64], dtype=torch.int32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = expert_linear(x, weight, offsets)
    assert set(kept) == {weight.data_ptr(), offsets.data_ptr()}
    (dx,) = torch.autograd.grad(out.sum(), x)
    expected = torch.cat([w.sum(0).expand(n, -1) for w, n in zip(weight, [5, 0, 58, 1], strict=True)])
    torch.testing.assert_close(dx, expected)
