"""llama.cpp with the GGUF files: the same greedy tokens, token ids and chats; its own 4-bit weights."""

import dataclasses
import importlib.util

import pytest
import torch

from bench.decoding.judge import Judge
from minimind import ModelConfig, load_tokenizer
from minimind.export.gguf import chat_template_of, export_gguf, quantize
from minimind.inference.generate import generate
from minimind.weights import to_stock
from tests import foreign
from tests.export.small import CONFIGS, model_of

pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
if importlib.util.find_spec("llama_cpp") is None:  # looked for, not loaded: it may crash
    pytest.skip("needs llama.cpp: pip install llama-cpp-python", allow_module_level=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_writes_the_same_tokens(name, tmp_path):
    """Greedy in float32: every token is the float64 model's own choice but for ties of float32's last digits."""
    model = model_of(CONFIGS[name])
    path = export_gguf(model, load_tokenizer(), tmp_path / "m.gguf", "f32")
    prompts = torch.randint(16, 6400, (2, 100), generator=torch.Generator().manual_seed(1))
    written = foreign.call("llama.cpp", foreign.greedy, str(path), prompts.tolist(), 48)
    verdict = Judge(model).judge(prompts, written, "fp32")
    assert verdict.passed and verdict.equal > 0.99
    assert written == generate(model, prompts.tolist(), 48, temperature=0.0)


def test_llama_cpp_reads_text_as_this_project_does(tmp_path):
    tokenizer = load_tokenizer()
    path = export_gguf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "m.gguf")
    texts = [
        "Hello, world's 12345!",
        "床前明月光，疑是地上霜。\n\n  two  spaces",
        "emoji 🙂 and\ttabs\r\n",
        "I'LL don't",
    ]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    texts += [chat, "<think>\nno\n</think>"]
    theirs = foreign.call("llama.cpp", foreign.tokenize, str(path), texts)
    assert len(theirs["ids"]) == len(texts)
    for text, ids in zip(texts, theirs["ids"], strict=True):
        assert ids == tokenizer.encode(text)
    assert theirs["chat_template"] == chat_template_of(tokenizer.chat_template)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "granitemoe"])
def test_llama_cpp_chats_with_the_files_own_template(name, tmp_path):
    model, tokenizer = model_of(CONFIGS[name]), load_tokenizer()
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好, who are you?"},
        {"role": "assistant", "content": "MiniMind."},
        {"role": "user", "content": "2+2?"},
    ]
    answer = foreign.call("llama.cpp", foreign.chat, str(path), messages, 12)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    (ids,) = generate(model, [prompt], 12, temperature=0.0)
    read = answer["read"]
    assert read[: len(prompt)] == prompt and answer["prompt"] == len(prompt)
    assert read[len(prompt) :] == ids[:11]
    assert answer["text"].startswith(tokenizer.decode(ids).split("\ufffd")[0])


def test_q4_k_m_is_llama_cpps(tmp_path):
    import gguf

    config = dataclasses.replace(ModelConfig(), num_hidden_layers=1, intermediate_size=512)
    model = model_of(config)
    source = export_gguf(model, load_tokenizer(), tmp_path / "m.f32", "f32")
    quantize(source, tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {t.tensor_type.name for t in tensors.values()} == {"F32", "Q4_K", "Q6_K"}
    up = tensors["blk.0.ffn_up.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type)).reshape(-1, 32)
    truth = to_stock(model.state_dict(), config)["model.layers.0.mlp.up_proj.weight"].reshape(-1, 32)
    step = (truth.amax(dim=1) - truth.amin(dim=1)) / 15  # 16 levels over the range of 32 numbers
    error = (found - truth).abs().amax(dim=1)
    assert up.tensor_type.name == "Q4_K" and (error <= 1.5 * step).all() and error.max() > 0
    assert len(foreign.call("llama.cpp", foreign.complete, str(tmp_path / "m.gguf"), "hi", 4)) == 1


def test_a_failing_quantizer_says_why(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="quantizer failed") as caught:
        quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
