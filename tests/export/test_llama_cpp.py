"""What llama.cpp does with the GGUF files: the same greedy tokens, ids of texts, chats; its own 4-bit weights."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.decode_check import Judge
from minimind import ModelConfig, load_tokenizer
from minimind.export.gguf import export_gguf
from minimind.export.quantize import quantize
from minimind.inference.generate import generate
from minimind.weights import to_stock
from tests.export.small import CONFIGS, model_of

pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_writes_the_same_tokens(name, tmp_path):
    """Greedy in float32: every token is the float64 model's own choice but for ties of float32's last digits."""
    from bench.llama_cpp_decoder import LlamaCpp

    model = model_of(CONFIGS[name])
    path = export_gguf(model, load_tokenizer(), tmp_path / "m.gguf", "f32")
    prompts = torch.randint(16, 6400, (2, 100), generator=torch.Generator().manual_seed(1))
    decoder = LlamaCpp(path, 2, 148, 1, True)
    tokens = [decoder.prefill(prompts.numpy())]
    for _ in range(47):
        tokens.append(decoder.step(tokens[-1]))
    decoder.close()
    written = np.stack(tokens, axis=1).tolist()
    verdict = Judge(model).judge(prompts, written, "fp32")
    assert verdict.passed and verdict.equal > 0.99
    assert written == generate(model, prompts.tolist(), 48, temperature=0.0)


def test_llama_cpp_reads_text_as_this_project_does(tmp_path):
    tokenizer = load_tokenizer()
    path = export_gguf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "m.gguf")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = [
        "Hello, world's 12345!",
        "床前明月光，疑是地上霜。\n\n  two  spaces",
        "emoji 🙂 and\ttabs\r\n",
        "I'LL don't",
    ]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    for text in [*texts, chat, "<think>\nno\n</think>"]:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)
    assert theirs.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "granitemoe"])
def test_llama_cpp_chats_with_the_files_own_template(name, tmp_path):
    model, tokenizer = model_of(CONFIGS[name]), load_tokenizer()
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    theirs = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好, who are you?"},
        {"role": "assistant", "content": "MiniMind."},
        {"role": "user", "content": "2+2?"},
    ]
    answer = theirs.create_chat_completion(messages, temperature=0.0, max_tokens=12, repeat_penalty=1.0)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    (ids,) = generate(model, [prompt], 12, temperature=0.0)
    read = theirs.input_ids[: len(prompt) + 11].tolist()  # all but the newest token were read
    assert read[: len(prompt)] == prompt and answer["usage"]["prompt_tokens"] == len(prompt)
    assert read[len(prompt) :] == ids[:11]
    assert answer["choices"][0]["message"]["content"].startswith(tokenizer.decode(ids).split("\ufffd")[0])


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
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    assert len(theirs.create_completion("hi", max_tokens=4)["choices"]) == 1


def test_a_failing_quantizer_says_why(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="quantizer failed") as caught:
        quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
