"""Models with a value head: their values, their trunk, and their files in transformers."""

import json

import pytest
import torch

from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.value_head import ValueModel, load_value_model, save_value_model
from minimind.weights import save_weights
from tests.conftest import documents_batch
from tests.kernels.contract import assert_within

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, num_shared_experts=1)


def make(**changes) -> ValueModel:
    torch.manual_seed(0)
    model = ValueModel(ModelConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_values_of_packed_documents_are_those_of_each_alone(ops_mode):
    ids, cu = documents_batch([[1, 40, 22], [63]], 63, 97)
    model, truth = make(), make().double()
    values = model(ids, cu_seqlens=cu).values
    assert values.shape == (2, 63) and values.dtype == torch.float32
    with ops.using("reference"):
        exact, plain = (
            torch.cat([m(d[None]).values[0] for d in ids.flatten().split([1, 40, 22, 63])]) for m in (truth, model)
        )
    assert exact.dtype == torch.float64
    assert_within(values.flatten(), plain, exact)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, MOE], ids=["tied", "untied", "moe"])
@pytest.mark.parametrize("keep_head", [False, True])
def test_a_copy_keeps_the_trunk_and_begins_at_zero(changes, keep_head):
    torch.manual_seed(0)
    model = Model(ModelConfig(**SMALL, **changes)).eval()
    value_model = ValueModel.from_model(model, keep_head)
    ids = torch.arange(20)[None]
    out, mine = model(ids), value_model(ids, return_logits=True)
    assert torch.equal(mine.hidden_states, out.hidden_states) and not mine.values.any()
    if keep_head or model.lm_head is None:
        assert torch.equal(mine.logits, out.logits)
    else:
        assert value_model.lm_head is None
    assert not value_model.training
    with torch.no_grad():
        next(value_model.parameters()).zero_()
    assert next(model.parameters()).any()  # a copy, not the same tensors


def test_every_parameter_of_a_critic_has_a_gradient():
    """DDP fails on parameters without a gradient."""
    critic = ValueModel.from_model(make(tie_word_embeddings=False))
    torch.nn.init.ones_(critic.value_head.weight)
    critic(torch.arange(20)[None]).values.sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_in_bfloat16_the_value_is_still_float32():
    model = make()
    model.compute_dtype = torch.bfloat16
    assert model(torch.arange(20)[None]).values.dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, MOE], ids=["llama", "qwen3", "moe"])
def test_saved_and_opened_it_is_the_same(changes, tmp_path):
    model = make(**changes)
    save_value_model(model, tmp_path)
    again = load_value_model(tmp_path)
    assert again.config == model.config and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_transformers_reads_it_as_a_classifier(qk_norm, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")
    model = make(qk_norm=qk_norm)
    save_value_model(model, tmp_path)
    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert type(theirs).__name__ == ("Qwen3" if qk_norm else "Llama") + "ForSequenceClassification"
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        logits, values = theirs(ids).logits, model(ids).values
        exact = make(qk_norm=qk_norm).double()(ids).values
    assert logits.shape == (1, 1)
    assert_within(logits[0], values[0, -1:], exact[0, -1:])


def test_a_folder_without_a_value_head_is_refused(tmp_path):
    save_weights(Model(ModelConfig(**SMALL)), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain: it has no value head \(score.weight\); name a run of"):
        load_value_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="empty: neither a checkpoint"):
        load_value_model(tmp_path / "empty")
    save_value_model(make(), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(ValueError, match=r"score.weight is \[1, 64\], the config needs \[1, 128\]"):
        load_value_model(tmp_path / "other")
