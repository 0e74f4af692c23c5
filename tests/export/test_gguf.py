"""GGUF files: every tensor and field as llama.cpp expects it, read back by the gguf package."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.export.gguf import architecture_of, chat_template_of, export_gguf, permute_pairs, pre_tokenizer_of
from minimind.tokenization.chat_template import render_chat
from minimind.tokenization.tokenizer import DEFAULT_FOLDER
from minimind.weights import to_stock
from tests.export.small import CONFIGS, EXPERTS, SMALL, model_of
from tests.inference.padded import padded

gguf = pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")


def pairs_in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i of a head goes to i, row 2 i + 1 to i + D / 2: written out, to undo permute_pairs."""
    dim = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + i] = weight[head * dim + 2 * i]
            out[head * dim + dim // 2 + i] = weight[head * dim + 2 * i + 1]
    return out


def stock_tensors(path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The file's float32 tensors under upstream's names: llama.cpp's names and order undone by hand."""
    reader = gguf.GGUFReader(path)
    found = {t.name.removesuffix(".weight"): np.array(t.data).reshape(t.shape[::-1]) for t in reader.tensors}
    rotated = reader.fields["general.architecture"].contents() in ("llama", "granitemoe")
    out = {"model.embed_tokens": found.pop("token_embd"), "model.norm": found.pop("output_norm")}
    if "output" in found:
        out["lm_head"] = found.pop("output")
    attention = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
                 "attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}  # fmt: skip
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for name, array in found.items():
        _, layer, leaf = name.split(".")
        if leaf in ("attn_q", "attn_k") and rotated:
            heads = config.num_attention_heads if leaf == "attn_q" else config.num_key_value_heads
            array = pairs_in_halves(array, heads)
        prefix = f"model.layers.{layer}"
        if leaf in norms:
            out[f"{prefix}.{norms[leaf]}"] = array
        elif leaf in attention:
            out[f"{prefix}.self_attn.{attention[leaf]}"] = array
        elif leaf == "ffn_gate_inp":
            out[f"{prefix}.mlp.gate"] = array
        else:
            kind = leaf.removeprefix("ffn_").removesuffix("_exps").removesuffix("_shexp") + "_proj"
            if leaf.endswith("_exps"):
                for e, expert in enumerate(array):
                    out[f"{prefix}.mlp.experts.{e}.{kind}"] = expert
            elif leaf.endswith("_shexp"):
                parts = np.split(array, config.num_shared_experts, axis=1 if kind == "down_proj" else 0)
                for s, part in enumerate(parts):
                    out[f"{prefix}.mlp.shared_experts.{s}.{kind}"] = part
            else:
                out[f"{prefix}.mlp.{kind}"] = array
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_there_and_equal(name, tmp_path):
    config = CONFIGS[name]
    model = model_of(config)
    path = export_gguf(model, load_tokenizer(), tmp_path / "m.gguf", "f32")
    found = stock_tensors(path, config)
    expected = {k.removesuffix(".weight"): v for k, v in to_stock(model.state_dict(), config).items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert np.array_equal(found[key], tensor.numpy()), key


def test_the_shape_is_written_under_the_keys_of_each_architecture(tmp_path):
    for name, config in CONFIGS.items():
        path = export_gguf(model_of(config), load_tokenizer(), tmp_path / "m.gguf", "f32", "Name")
        read = gguf.GGUFReader(path).fields
        fields = {k: v.contents() for k, v in read.items() if not k.startswith("tokenizer.")}  # its lists are long
        kind = name.split(",")[0]
        assert fields["general.architecture"] == kind and fields["general.name"] == "Name"
        here = {k.removeprefix(f"{kind}."): v for k, v in fields.items() if k.startswith(f"{kind}.")}
        wanted = {
            "block_count": 2, "context_length": 512, "embedding_length": 64, "attention.head_count": 4,
            "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32,
            "rope.dimension_count": 32, "rope.freq_base": 1e6, "vocab_size": 6400,
            "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
            "feed_forward_length": 64 if config.num_experts else 96,
        }  # fmt: skip
        if config.num_experts:
            wanted |= {
                "expert_count": 4,
                "expert_used_count": config.num_experts_per_tok,
                "expert_feed_forward_length": 64,
            }
        if kind == "granitemoe":
            wanted |= {
                "logit_scale": 1.0,
                "residual_scale": 1.0,
                "embedding_scale": 1.0,
                "attention.scale": pytest.approx(32**-0.5),
                "expert_shared_feed_forward_length": 96 * config.num_shared_experts,
            }
        if config.rope_scaling is not None:
            # llama.cpp multiplies cos and sin by 0.1 ln(factor) + 1 by itself
            undo = 1.0 if "paper" in name else 1 / (0.1 * math.log(4.0) + 1)
            wanted |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor":
                       pytest.approx(undo), "rope.scaling.original_context_length": 64,
                       "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}  # fmt: skip
        assert here == wanted


def test_narrow_types_hold_the_rounded_matrices(tmp_path):
    model = model_of(CONFIGS["qwen3moe"])
    for dtype, torch_dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        path = export_gguf(model, load_tokenizer(), tmp_path / "m.gguf", dtype)
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        embedding = tensors["token_embd.weight"]
        found = gguf.quants.dequantize(embedding.data, embedding.tensor_type).reshape(6400, 64)
        assert np.array_equal(found, model.embed_tokens.weight.detach().to(torch_dtype).float().numpy())
        kinds = {t.name.split(".")[-2]: t.tensor_type.name for t in tensors.values()}
        assert kinds["attn_q"] == kinds["ffn_up_exps"] == dtype.upper()
        assert kinds["attn_norm"] == kinds["attn_q_norm"] == kinds["ffn_gate_inp"] == "F32"


def test_q8_0_is_within_half_a_step_of_each_block(tmp_path):
    model = model_of(CONFIGS["llama"])
    path = export_gguf(model, load_tokenizer(), tmp_path / "m.gguf", "q8_0")
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(-1, 32)
    truth = to_stock(model.state_dict(), model.config)["model.layers.1.mlp.down_proj.weight"].reshape(-1, 32)
    step = truth.abs().amax(dim=1, keepdim=True) / 127
    # half a step by rounding, and the scale itself in float16: 2^-11 of up to 127 steps
    assert ((found - truth).abs() <= step * (0.5 + 127 * 2**-11)).all() and not torch.equal(found, truth)


def test_the_vocabulary(tmp_path):
    tokenizer = load_tokenizer()
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=6404)
    path = export_gguf(model_of(config), tokenizer, tmp_path / "m.gguf")
    fields = {k: v.contents() for k, v in gguf.GGUFReader(path).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 6404 and tokens[6400:] == [f"[PAD{i}]" for i in range(6400, 6404)]
    assert all(tokenizer.token_to_id(token) == i for i, token in enumerate(tokens[:6400]))
    kinds = fields["tokenizer.ggml.token_type"]
    control, mine, normal, unused = 3, 4, 1, 5  # gguf's TokenType
    assert [kinds[i] for i in (0, 1, 2, 3, 10, 11, 16, 6399, 6403)] == [
        control, control, control, mine, mine, control, normal, normal, unused,
    ]  # fmt: skip
    content = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in content["model"]["merges"]]
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.model"] == "gpt2"
    ids = [fields[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding")]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == chat_template_of(tokenizer.chat_template)


def test_llama_cpp_does_not_open_thoughts_by_itself():
    """Its programs set enable_thinking, to true unless told otherwise; in GGUF files only open_thinking counts."""
    template, question = load_tokenizer().require_chat_template(), [{"role": "user", "content": "?"}]
    written = chat_template_of(template)
    for thinking in (None, True, False):
        asked = {} if thinking is None else {"open_thinking": thinking}
        wanted = render_chat(template, question, None, True, **asked)
        assert wanted.endswith(("<think>\n", "<think>\n\n</think>\n\n")) == (thinking is not None)
        for default in (True, False):
            assert render_chat(written, question, None, True, enable_thinking=default, **asked) == wanted
    for other in ("{{ messages }}", "{% if enable_thinking %}", "{% if open_thinking %}"):
        assert chat_template_of(other) == other  # models of others were trained with these


@pytest.mark.parametrize("variant", ["llama", "llama, untied"])
def test_padding_is_never_sampled(variant, tmp_path):
    """llama.cpp samples from all rows, and a surplus row of these models would nearly always win."""
    model = model_of(CONFIGS[variant])
    wide = padded(model, known=False)
    path = export_gguf(wide, load_tokenizer(), tmp_path / "m.gguf", "f32")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}
    head = tensors["output.weight" if variant == "llama, untied" else "token_embd.weight"]
    assert len(tensors["token_embd.weight"]) == len(head) == 6464 and torch.equal(head[:6400], model.head_weight)
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3 @ head.T
    assert (logits.argmax(-1) < 6400).all() and (logits.softmax(-1)[:, 6400:] < 1 / 6400).all()


def test_pre_tokenizers_that_llama_cpp_knows():
    content = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # upstream's tokenizers
    assert pre_tokenizer_of(content) == "qwen2"
    assert pre_tokenizer_of({"pre_tokenizer": byte_level}) == "gpt-2"
    other = json.loads(json.dumps(content))
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    spaced = {"pre_tokenizer": {**byte_level, "add_prefix_space": True}}
    for wrong in (other, spaced, {"pre_tokenizer": None}):
        with pytest.raises(ValueError, match="this pre-tokenizer"):
            pre_tokenizer_of(wrong)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": True, "num_shared_experts": 1}, "both QK-norm and shared experts"),
        ({"norm_topk_prob": False}, "normalises the gates"),
    ],
)
def test_architectures_that_llama_cpp_lacks(changes, message):
    with pytest.raises(ValueError, match=message):
        architecture_of(ModelConfig(**EXPERTS, **changes))


def test_errors_leave_no_file(tmp_path):
    narrow = ModelConfig(**{**SMALL, "intermediate_size": 100})
    small = dataclasses.replace(CONFIGS["llama"], vocab_size=100)
    for config, message in (
        (narrow, "multiple of 32, .*down_proj has 100"),
        (small, "GGUF: the tokenizer has 6400 ids, the model 100 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gguf(model_of(config), load_tokenizer(), tmp_path / "m.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_permute_pairs_by_hand():
    rows = torch.arange(8.0).unsqueeze(1)  # two heads of four
    assert permute_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
