import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.config import ModelConfig, YarnScaling
from minimind.kernels.rms_norm import rms_norm_ref
from minimind.kernels.rope import rope, rope_ref
from minimind.rope import rope_cos_sin
from tests.kernels.contract import DEVICE, DTYPES, assert_contract, assert_second_backward_agrees, rand

EPS = 0.01  # large enough to show in every dtype
NAMES = ["q", "k", "v", "dqkv"]
NORM_NAMES = [*NAMES, "dq_weight", "dk_weight"]


def tables_for(size, positions=128):
    """Tables with YaRN and its attention factor, 1.28: the rotation is not orthogonal, so its gradient is not its
    inverse."""
    scaling = YarnScaling(factor=16.0, original_max_position_embeddings=32, attention_factor=None)
    config = ModelConfig(head_dim=size, rope_scaling=scaling, rope_theta=1e4)
    return rope_cos_sin(config, torch.arange(positions, device=DEVICE))


def ids_for(*shape, positions=128):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, positions, shape, generator=generator).to(DEVICE)


def weights_for(size, dtype):
    return [(1 + rand(size, seed=seed, scale=0.3)).to(dtype) for seed in (11, 12)]


def projection(*shape, heads, kv_heads, size, dtype=torch.float32):
    return rand(*shape, (heads + 2 * kv_heads) * size, scale=2).to(dtype)


def assert_rope(qkv, ids, heads, kv_heads, size, weights=(), of=lambda outputs: outputs, names=None):
    """Check the contract for of(q, k, v) as a function of qkv and the weights."""
    cos, sin = tables_for(size)
    assert_contract(
        lambda x, *w: of(rope(x, cos, sin, ids, heads, kv_heads, *w, eps=EPS)),
        lambda x, *w: of(rope_ref(x, cos, sin, ids, heads, kv_heads, *w, eps=EPS)),
        [qkv, *weights],
        names or (NORM_NAMES if weights else NAMES),
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, heads, kv_heads, size",
    [
        ((63,), 8, 2, 64), ((2, 17), 8, 2, 80), ((2, 19), 8, 4, 96), ((33,), 8, 2, 128), ((123,), 3, 3, 32),
        ((507,), 1, 1, 2), ((1,), 4, 2, 96), ((), 4, 2, 6), ((2, 3, 1, 5), 2, 1, 10), ((5,), 3, 1, 256),
    ],
)  # fmt: skip
def test_rope(shape, heads, kv_heads, size, dtype, norm):
    qkv = projection(*shape, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    assert_rope(qkv, ids_for(*shape), heads, kv_heads, size, weights_for(size, dtype) if norm else ())


def test_float16():
    qkv = projection(21, heads=4, kv_heads=2, size=80, dtype=torch.float16)
    assert_rope(qkv, ids_for(21), 4, 2, 80, weights_for(80, torch.float16))


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_packed_documents_rotate_as_documents_alone(size):
    qkv = projection(1, 123, heads=4, kv_heads=2, size=size)
    cos, sin = tables_for(size)
    lengths = (1, 99, 23)
    ids = torch.cat([torch.arange(n, device=DEVICE) for n in lengths]).unsqueeze(0)
    packed = rope(qkv, cos, sin, ids, 4, 2)
    alone = [
        rope(part, cos, sin, torch.arange(part.shape[1], device=DEVICE).unsqueeze(0), 4, 2)
        for part in qkv.split(lengths, dim=1)
    ]
    for mine, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_any_strides(dtype, norm):
    width = 6 * 16
    wide = rand(2, 9, width + 24, scale=2).to(dtype)
    weights = weights_for(16, dtype) if norm else ()
    parts = (
        wide[..., 24:],
        wide[..., 8 : width + 8].transpose(0, 1),
        wide[:, ::2, :width],
        wide[:, :, None, :width].expand(-1, -1, 1, -1),
        rand(2, 9, 2 * width).to(dtype)[..., ::2],
    )
    for part in parts:
        assert not part.is_contiguous()
        assert_rope(part, ids_for(*part.shape[:-1]), 4, 1, 16, weights)
    assert all(out.is_contiguous() for out in rope(parts[1], *tables_for(16), ids_for(9, 2), 4, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_broadcast_to_the_tokens(dtype):
    qkv = projection(3, 7, heads=4, kv_heads=2, size=16)
    tables, weights = tables_for(16), weights_for(16, torch.float32)
    for ids in (ids_for(1, 7), ids_for(7), ids_for(3, 1), ids_for(1, 1), ids_for(7, 3).t(), ids_for(7).expand(3, 7)):
        ids = ids.to(dtype)
        whole = ids.expand(3, 7).contiguous()
        for mine, same in zip(rope(qkv, *tables, ids, 4, 2), rope(qkv, *tables, whole, 4, 2), strict=True):
            assert torch.equal(mine, same)
        assert_rope(qkv, ids, 4, 2, 16, weights)


def test_float32_weights_of_a_bfloat16_model_keep_float32_gradients():
    qkv = projection(37, heads=4, kv_heads=2, size=96, dtype=torch.bfloat16)
    assert_rope(qkv, ids_for(37), 4, 2, 96, weights_for(96, torch.float32))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone_has_its_gradient(used, norm):
    qkv, weights = projection(13, heads=4, kv_heads=2, size=20), weights_for(20, torch.float32) if norm else ()
    names = ["qkv"[used], *(NORM_NAMES if norm else NAMES)[3:]]
    assert_rope(qkv, ids_for(13), 4, 2, 20, weights, of=lambda outputs: outputs[used], names=names)


def test_strided_gradients():
    qkv, weights = projection(2, 9, heads=4, kv_heads=2, size=20), weights_for(20, torch.float32)
    assert_rope(qkv, ids_for(2, 9), 4, 2, 20, weights, of=lambda outputs: tuple(t.transpose(1, 2) for t in outputs))


@pytest.mark.parametrize("size", [64, 96])
def test_the_opposite_angle_turns_back(size):
    qkv = projection(31, heads=4, kv_heads=2, size=size)
    cos, sin = rope_cos_sin(ModelConfig(head_dim=size), torch.arange(128, device=DEVICE))
    ids = ids_for(31)
    q, k, v = rope(qkv, cos, sin, ids, 4, 2)
    turned = rope(torch.cat([t.flatten(1) for t in (q, k, v)], dim=1), cos, -sin, ids, 4, 2)
    back = torch.cat([t.flatten(1) for t in turned], dim=1)
    bound = 8 * torch.finfo(torch.float32).eps * qkv.abs().max()
    assert (back - qkv).abs().max() <= bound
    assert (q.norm(dim=-1) - qkv.unflatten(-1, (8, size))[:, :4].norm(dim=-1)).abs().max() <= bound * size**0.5
    assert not torch.equal(q[1:], qkv.unflatten(-1, (8, size))[1:, :4])


def test_the_reference_multiplies_complex_numbers():
    qkv = projection(2, 11, heads=4, kv_heads=2, size=10).double()
    ids, weights = ids_for(2, 11), [w.double() for w in weights_for(10, torch.float32)]
    cos, sin = (t.double() for t in tables_for(10))
    heads = qkv.unflatten(-1, (8, 10))
    turn = torch.complex(cos, sin)[ids].unsqueeze(2)
    for used in ((), weights):
        q, k, v = rope_ref(qkv, cos, sin, ids, 4, 2, *used, eps=EPS)
        for mine, x, weight in ((q, heads[:, :, :4], 0), (k, heads[:, :, 4:6], 1)):
            x = rms_norm_ref(x, used[weight], EPS) if used else x
            turned = torch.complex(*x.chunk(2, dim=-1)) * turn
            torch.testing.assert_close(mine, torch.cat((turned.real, turned.imag), dim=-1))
        assert torch.equal(v, heads[:, :, 6:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_outside_the_tables_take_the_nearest_row(dtype):
    big = torch.iinfo(dtype)
    ids = torch.tensor([0, -1, 4, 5, 1000, big.max, big.min, 2], dtype=dtype, device=DEVICE)
    whole = rand(9, 8, seed=5)
    cos = whole[2:7]  # values next to the tables would show
    qkv, weights = projection(8, heads=2, kv_heads=1, size=16), weights_for(16, torch.float32)
    for used in ([None, None], weights):
        outputs = torch.ops.minimind.rope(qkv, cos, cos * 2, ids, 2, 1, *used, EPS)
        expected = torch.ops.minimind.rope(qkv, cos, cos * 2, ids.clamp(0, 4), 2, 1, *used, EPS)
        saved = (None, None, *used) if used[0] is None else (qkv, outputs[3], *used)
        gradients = torch.ops.minimind.rope_backward(*outputs[:3], cos, cos * 2, ids, *saved)
        wanted = torch.ops.minimind.rope_backward(*outputs[:3], cos, cos * 2, ids.clamp(0, 4), *saved)
        for mine, same in zip((*outputs, *gradients), (*expected, *wanted), strict=True):
            assert torch.equal(mine, same) and mine.isfinite().all()


def test_no_tokens():
    qkv = projection(0, 5, heads=4, kv_heads=2, size=16).requires_grad_()
    weights = [w.requires_grad_() for w in weights_for(16, torch.float32)]
    outputs = rope(qkv, *tables_for(16), ids_for(0, 5), 4, 2, *weights)
    sum(t.sum() for t in outputs).backward()
    assert outputs[0].shape == (0, 5, 4, 16) and qkv.grad.shape == qkv.shape
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)


@pytest.mark.parametrize("norm", [False, True])
def test_second_backward(norm):
    tables, ids = tables_for(20), ids_for(63)
    weights = weights_for(20, torch.float32) if norm else ()
    assert_second_backward_agrees(
        lambda x, *w: rope(x, *tables, ids, 4, 2, *w), [projection(63, heads=4, kv_heads=2, size=20), *weights]
    )


@pytest.mark.parametrize("norm", [False, True])
def test_tensors_saved_for_the_backward(norm):
    """Without the norm nothing of qkv's size is saved; with it qkv itself and one number per head."""
    qkv, tables, ids = projection(9, heads=4, kv_heads=2, size=16).requires_grad_(), tables_for(16), ids_for(9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(qkv, *tables, ids, 4, 2, *(weights_for(16, torch.float32) if norm else ()))
    kept = {t.data_ptr(): t for t in saved}
    for known in (*tables, ids):
        kept.pop(known.data_ptr())
    if norm:
        assert kept.pop(qkv.data_ptr()).shape == qkv.shape
        assert sorted(t.numel() for t in kept.values()) == [16, 16, 9 * 6]
    else:
        assert not kept


def test_references_by_finite_differences():
    qkv = projection(5, heads=2, kv_heads=1, size=6).double().requires_grad_()
    weights = [w.double().requires_grad_() for w in weights_for(6, torch.float32)]
    cos, sin = (t.double() for t in tables_for(6))
    ids = ids_for(5)
    assert torch.autograd.gradcheck(lambda x: rope_ref(x, cos, sin, ids, 2, 1), (qkv,))
    assert torch.autograd.gradcheck(lambda x, *w: rope_ref(x, cos, sin, ids, 2, 1, *w, EPS), (qkv, *weights))


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm):
    tables, ids, qkv = tables_for(12), ids_for(2, 5), projection(2, 5, heads=4, kv_heads=2, size=12)
    weights = weights_for(12, torch.bfloat16) if norm else [None, None]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (qkv, *weights)]
    torch.library.opcheck(torch.ops.minimind.rope, (leaves[0], *tables, ids, 4, 2, *leaves[1:], EPS))
    saved = (qkv, torch.ones(2, 5, 6, device=DEVICE)) if norm else (None, None)
    gradients = rope(qkv, *tables, ids, 4, 2)
    torch.library.opcheck(torch.ops.minimind.rope_backward, (*gradients, *tables, ids, *saved, *weights))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(qkv=lambda t: t.double()), "qkv is torch.float64"),
        (dict(qkv=lambda t: t[:, :-1]), r"qkv is \[5, 127\]; 4 \+ 2 x 2 heads of size 16 need a last dimension of 128"),
        (dict(heads=lambda n: 3), "need a last dimension of 112"),
        (dict(kv_heads=lambda n: 0), "kv_heads 0"),
        (dict(cos=lambda t: t.bfloat16()), r"cos is torch.bfloat16 .* must be float32"),
        (dict(cos=lambda t: t[:-1]), r"cos is torch.float32 \[127, 8\] and sin torch.float32 \[128, 8\]"),
        (dict(cos=lambda t: t[:0], sin=lambda t: t[:0]), r"cos is torch.float32 \[0, 8\]"),
        (dict(cos=lambda t: t.repeat(1, 17), sin=lambda t: t.repeat(1, 17)), "heads of 272; .* 2 to 256"),
        (dict(sin=lambda t: t.to("meta")), "sin is on meta"),
        (dict(position_ids=lambda t: t.float()), "position_ids is torch.float32"),
        (dict(position_ids=lambda t: t[:3]), r"position_ids is \[3\], which does not broadcast to qkv's \[5\]"),
        (dict(position_ids=lambda t: t.expand(2, 5)), r"position_ids is \[2, 5\]"),
        (dict(k_weight=lambda t: None), "give both q_weight and k_weight, or neither"),
        (dict(q_weight=lambda t: t[1:]), r"q_weight is \[15\], and qkv needs \[16\]"),
        (dict(k_weight=lambda t: t.to("meta")), "k_weight is on meta"),
    ],
)
def test_bad_input_is_refused(bad, message):
    cos, sin = tables_for(16)
    q_weight, k_weight = weights_for(16, torch.float32)
    arguments = dict(
        qkv=rand(5, 128), cos=cos, sin=sin, position_ids=ids_for(5), heads=4, kv_heads=2,
        q_weight=q_weight, k_weight=k_weight,
    )  # fmt: skip
    arguments |= {name: change(arguments[name]) for name, change in bad.items()}
    with pytest.raises(ValueError, match=message):
        rope(**arguments)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the check would wait for the device")
@pytest.mark.parametrize("position", [-1, 128])
def test_positions_outside_the_tables_are_refused_on_a_cpu(position):
    ids = torch.tensor([0, position, 1])
    with pytest.raises(ValueError, match=r"position_ids go from .* rows 0 to 127; make longer tables"):
        rope(rand(3, 128), *tables_for(16), ids, 4, 2)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(),
)
def test_any_sizes(tokens, heads, kv_heads, half, dtype, norm):
    qkv = projection(tokens, heads=heads, kv_heads=kv_heads, size=2 * half, dtype=dtype)
    assert_rope(qkv, ids_for(tokens), heads, kv_heads, 2 * half, weights_for(2 * half, dtype) if norm else ())
