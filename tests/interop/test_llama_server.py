"""llama.cpp's own server with GGUF files: the chat template's prompts, thoughts, tool calls, and adapters at run time.

MINIMIND_TEST_LLAMA_SERVER names the program llama-server.
"""

from __future__ import annotations

import pytest
import torch

from minimind import cli, load_tokenizer
from minimind.export.gguf import export_gguf
from minimind.inference.generate import generate
from minimind.lora import LoRAConfig
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from tests.adapted import with_adapter
from tests.export.small import CONFIGS, model_of
from tests.interop.neighbours import NEW, PROMPTS, QUESTION, TOOLED, check_chat, post, program, running, taught, write
from tests.serving.service import WEATHER

pytestmark = pytest.mark.interop
# float32 throughout, without flash attention, which computes in float16
EXACT = ("-t", "1", "-c", "1024", "--no-ui", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--port", "PORT")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """llama-server with a model that knows a few answers, and no flags about templates or thinking."""
    place = tmp_path_factory.mktemp("llama-server")
    path = export_gguf(*taught(), place / "taught.gguf", "f32")
    with running([program("LLAMA_SERVER"), "-m", str(path), *EXACT], place / "log") as address:
        yield address


def test_prompts_are_those_of_the_template(chatting):
    _, tokenizer = taught()
    for messages, tools in ((QUESTION, None), (TOOLED, [WEATHER]), (TOOLED[:1], [WEATHER])):
        for thinking in (None, True, False):
            asked = {} if thinking is None else {"open_thinking": thinking}
            wanted = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True, **asked)
            body = {"messages": messages, "chat_template_kwargs": asked, **({"tools": tools} if tools else {})}
            assert post(f"{chatting}/apply-template", body)["prompt"] == wanted


def test_chat_thoughts_and_tool_calls(chatting):
    check_chat(chatting, reasoning="reasoning_content")


def plain(model: Model) -> Model:
    """The model with logits of 0 for all tokens but ASCII text: the server refuses an answer that is no UTF-8."""
    tokenizer = load_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    with torch.no_grad():
        model.embed_tokens.weight[[not text.isascii() or "<|" in text for text in texts]] = 0
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe", "granitemoe"])
def test_an_adapter_beside_its_base(name, tmp_path):
    """Greedy in float32, with `--lora` and a scale of 0 and 1: the tokens of the base and of the adapted model."""
    server = program("LLAMA_SERVER")
    base = plain(model_of(CONFIGS[name]))
    targets = None if CONFIGS[name].num_experts == 0 else ("q_proj", "v_proj")
    config = LoRAConfig(rank=4, alpha=8.0, targets=targets, rslora=True)
    adapted = with_adapter(plain(model_of(CONFIGS[name])), config)
    write(base, tmp_path / "base")
    save_adapter(adapted, tmp_path / "lora", base_model=str(tmp_path / "base"))
    command = ["export", "--model", str(tmp_path / "lora"), "--out", str(tmp_path / "m.gguf"), "--dtype", "fp32"]
    assert cli.run(command) == 0
    files = ("-m", str(tmp_path / "m.gguf"), "--lora", str(tmp_path / "m-lora.gguf"))
    wanted = [generate(model, PROMPTS, NEW, temperature=0.0) for model in (base, adapted)]
    assert wanted[0] != wanted[1]
    with running([server, *files, *EXACT], tmp_path / "log") as address:
        for scale, rows in zip((0.0, 1.0), wanted, strict=True):
            for prompt, ids in zip(PROMPTS, rows, strict=True):
                body = {
                    "prompt": prompt, "n_predict": NEW, "temperature": 0.0, "return_tokens": True, "ignore_eos": True,
                    "lora": [{"id": 0, "scale": scale}], "cache_prompt": False,
                }  # fmt: skip
                assert post(f"{address}/completion", body)["tokens"] == ids
