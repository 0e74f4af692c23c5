"""The whole model on the kernels: equal to the reference, without a graph break, without a host sync, and trained to
the same curve."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimind import ModelConfig, ops
from minimind.kernels import chunked_linear, moe_experts, rope
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from tests.conftest import documents_batch
from tests.kernels.contract import DEVICE, error

TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=20,
            intermediate_size=72, vocab_size=97)  # fmt: skip
MOE = dict(
    num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=40, router_aux_loss_coef=0.1
)
SHAPES = {
    "dense": TINY,
    "qk_norm": {**TINY, "qk_norm": True, "tie_word_embeddings": False},
    "moe_sequence": {**TINY, **MOE},
    "moe_batch_top1": {**TINY, **MOE, "num_experts_per_tok": 1, "router_aux_loss_level": "batch"},
}


def make(shape: str) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(**SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that mistakes show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(DEVICE)


def batch_of(lengths: list[list[int]], seed: int = 0) -> TokenBatch:
    ids, cu_seqlens = documents_batch(lengths, sum(lengths[0]), 97, seed)
    targets = torch.roll(ids, -1, dims=1)
    targets[:, -1] = -100
    targets[0, :3] = -100
    parts = (part.to(DEVICE) for part in (ids, targets, cu_seqlens))
    return TokenBatch(*parts, int(targets.ne(-100).sum()))


def results(model: Model, batch: TokenBatch, mode: str) -> dict[str, torch.Tensor]:
    with ops.using(mode):
        model.zero_grad()
        loss, aux, *_ = next_token_loss(model, batch)
        (loss / batch.num_targets + aux).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach() / batch.num_targets, "aux": aux.detach(), **gradients}


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_the_references(shape):
    """The contract for a whole step, which accumulates more roundings than one op: relative to the float64 reference,
    the kernels' error is at most four times that of the reference."""
    model, batch = make(shape), batch_of([[1, 20, 11], [32]])
    truth = results(copy.deepcopy(model).double(), batch, "reference")
    plain, mine = results(model, batch, "reference"), results(model, batch, "kernels")
    for name, value in truth.items():
        eps = 16 * torch.finfo(torch.float32).eps * value.abs().max().item()
        assert error(mine[name], value) <= 4 * error(plain[name], value) + eps, name


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *(pytest.param(s, "packed", marks=pytest.mark.heavy if s == "moe_sequence" else ()) for s in SHAPES),
        ("moe_sequence", "padded"),
    ],
)
def test_the_compiled_model_has_no_graph_break(shape, kind):
    """fullgraph=True raises at a break. On a CPU the traced graph runs the interpreted kernels, uncompiled."""
    torch.compiler.reset()
    model, batch = make(shape), batch_of([[1, 10, 5], [16]])
    how = {"cu_seqlens": batch.cu_seqlens}
    if kind == "padded":
        mask = torch.ones_like(batch.input_ids)
        mask[1, 9:] = 0
        how = {"attention_mask": mask}
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    with ops.using("kernels"):
        expected = model(batch.input_ids, **how)
        out = torch.compile(model, fullgraph=True, backend=backend)(batch.input_ids, **how)
        (out.logits.square().mean() + out.aux_loss).backward()
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters())


HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class HostReads(TorchDispatchMode):
    """Records the operators that would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.__name__ for name in HOST_READS):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["qk_norm", "moe_sequence"])
def test_a_step_never_waits_for_the_device(shape, monkeypatch):
    model, batch = make(shape), batch_of([[1, 10, 5], [16]])
    with HostReads() as control:
        assert torch.ones(3).sum().item() == 3
    assert control.seen, "the test itself must see a read"
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:  # as on a GPU, without the checks for host tensors
        for module in (chunked_linear, moe_experts, rope):
            monkeypatch.setattr(module, "on_host", lambda tensor: False)
    try:
        with HostReads() as reads:
            results(model, batch, "kernels")
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not reads.seen


def curve(model: Model, mode: str, dtype: torch.dtype, steps: int, lr: float = 3e-3) -> torch.Tensor:
    """Losses of `steps` AdamW steps over a few repeated batches."""
    model.compute_dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-6)
    batches = [batch_of([[5, 11], [16], [1, 15]], seed) for seed in range(4)]
    losses = []
    with ops.using(mode):
        for step in range(steps):
            batch = batches[step % len(batches)]
            loss, aux, *_ = next_token_loss(model, batch)
            total = loss / batch.num_targets + aux
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
    return torch.stack(losses).cpu()


def assert_same_curve(new_model: Callable[[], Model], steps: int, lr: float = 3e-3) -> None:
    """Curves agree to 1e-5 in float32. In bfloat16 the distance to that curve is at most twice that of the bfloat16
    reference."""
    truth, mine = (curve(new_model(), mode, torch.float32, steps, lr) for mode in ("reference", "kernels"))
    assert truth[-1] < 0.95 * truth[0], "a model that does not learn proves nothing"
    torch.testing.assert_close(mine, truth, rtol=1e-5, atol=0)

    plain, mine = (curve(new_model(), mode, torch.bfloat16, steps, lr) for mode in ("reference", "kernels"))
    assert (mine - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("steps", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["dense", pytest.param("moe_sequence", marks=pytest.mark.heavy)])
def test_training_follows_the_same_curve(shape, steps):
    assert_same_curve(lambda: make(shape), steps)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: a model of real size")
@pytest.mark.parametrize("preset", ["minimind2-small", "minimind2-moe"])
def test_presets_follow_the_same_curve(preset):
    def new_model() -> Model:
        torch.manual_seed(0)
        return Model(ModelConfig.preset(preset)).to(DEVICE)

    assert_same_curve(new_model, steps=100, lr=3e-4)
