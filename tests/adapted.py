"""Small models with non-zero adapters, and the equivalent dense weights."""

import torch

from minimind import ModelConfig
from minimind.lora import LoRAConfig, add_adapter, lora_linears
from minimind.lora_files import adapter_state
from minimind.modeling import Model
from minimind.weights import from_stock, to_stock
from tests.conftest import documents_batch

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
SHAPES = {"dense": TINY, "qk_norm": {**TINY, "qk_norm": True}, "moe": {**TINY, **MOE, "num_shared_experts": 2}}
DOCUMENTS = [[1, 99, 28], [63, 65]]


def make(shape: str = "dense", **changes) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(**{**SHAPES[shape], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def with_adapter(model: Model, config: LoRAConfig, name: str = "default", seed: int = 1) -> Model:
    """Add an adapter with non-zero B, so that it has an effect."""
    add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, linear in lora_linears(model):
            if name in linear.adapters:
                adapter = linear.adapter(name)
                adapter.B.copy_(torch.randn(adapter.B.shape, generator=generator) * 0.1)
                if adapter.M is not None:
                    adapter.M.mul_(1 + 0.3 * torch.randn(adapter.M.shape, generator=generator))
    return model


def batch():
    return documents_batch(DOCUMENTS, 128, 97)


def logits_of(model: Model) -> torch.Tensor:
    ids, cu = batch()
    return model(ids, cu_seqlens=cu).logits


def matrices(model: Model, name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) by upstream's module name."""
    state = adapter_state(model, name)
    modules = [k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")]
    return {
        m.removeprefix("base_model.model."): (state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"]) for m in modules
    }


def dense(model: Model, scale: float, *names: str) -> Model:
    """The equivalent plain float64 model, with W + scale * B A computed module by module under upstream's names."""
    state = {k: v.detach().double() for k, v in model.state_dict().items() if ".adapters." not in k}
    stock = to_stock(state, model.config)
    for name in names or ("default",):
        for module, (a, b) in matrices(model, name).items():
            stock[f"{module}.weight"] = stock[f"{module}.weight"] + scale * (b.double() @ a.double())
    plain = Model(model.config).double().eval()
    plain.load_state_dict(from_stock(stock, model.config))
    return plain
