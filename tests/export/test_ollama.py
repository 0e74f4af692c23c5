"""The Modelfile: the turns it writes are those of the tokenizer's chat template.

tests/export/Modelfile is the golden text: its template, and those made from upstream's two chat templates, were run
through Go's text/template (1.19) on 36 conversations and wrote what this project renders. ollama itself hands tools
over as compact JSON, without the spaces that training saw.
"""

import json
import re
from pathlib import Path

import pytest

from minimind import ModelConfig, load_tokenizer
from minimind.export.ollama import modelfile, read_turns
from minimind.tokenization import Tokenizer
from minimind.tokenization.tokenizer import CONFIG_FILE

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE.parent / "tokenization" / "golden_chat.json").read_text(encoding="utf-8"))
# A thought inside an answer's text is taken out and put back in by upstream's template; ollama does so by itself.
CONVERSATIONS = {name: messages for name, messages in GOLDEN["convs"].items() if name != "think"}


def with_template(folder: Path, template: str) -> Tokenizer:
    load_tokenizer().save(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return load_tokenizer(folder)


def test_the_shipped_templates_modelfile():
    text = modelfile(ModelConfig.preset("minimind3"), load_tokenizer())
    assert text == (HERE / "Modelfile").read_text(encoding="utf-8")


def test_it_follows_the_documented_grammar():
    """INSTRUCTION arguments, of which one is in triple quotes where it has lines. ollama's client has no parser.
    https://docs.ollama.com/modelfile"""
    text = modelfile(ModelConfig.preset("minimind3"), load_tokenizer())
    found, rest = {}, text
    while rest:
        match = re.match(r'(PARAMETER \w+|[A-Z]+) (?:"""(.*?)"""|([^\n]*))\n', rest, re.S)
        assert match, rest[:80]
        found[match[1]], rest = match[2] or match[3], rest[match.end() :]
    kinds = {"FROM": str, "TEMPLATE": str, "PARAMETER stop": json.loads, "PARAMETER num_ctx": int}
    kinds |= {f"PARAMETER {name}": float for name in ("temperature", "top_p")}
    assert found.keys() == kinds.keys()
    values = {name: kinds[name](value) for name, value in found.items()}
    assert values["FROM"] == "./model.gguf" and values["PARAMETER stop"] == "<|im_end|>"


@pytest.mark.parametrize("name", [None, "minimind2", "minimind3"])
def test_turns_are_the_templates(name, tmp_path):
    tokenizer = load_tokenizer() if name is None else with_template(tmp_path, GOLDEN[name]["template"])
    turns = read_turns(tokenizer)
    for messages in CONVERSATIONS.values():
        for tools in ([], GOLDEN["tools"], 2 * GOLDEN["tools"]):
            wanted = tokenizer.apply_chat_template(messages, tools or None, add_generation_prompt=True)
            assert turns.render(messages, tools) == wanted
    words = turns.go_template()
    assert turns.opening in json.loads(words[words.rindex('"<|im_start|>') : words.rindex('"') + 1])
    if name == "minimind2":
        assert "You are a helpful assistant" in words and turns.default_system.startswith("<|im_start|>system")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_without_tools(tmp_path):
    tokenizer = with_template(tmp_path, CHATML)
    turns = read_turns(tokenizer)
    assert turns.tools is None and ".Tool" not in turns.go_template()
    messages = GOLDEN["convs"]["system_multi"]
    assert turns.render(messages) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML + "{{ messages | length }}", "is not a plain sequence of turns"),
        ("{{ messages[-1].content }}", "cannot be split into turns"),
        (CHATML + "{% if tools %}{{ tools | length }}{% endif %}", "cannot be split into turns"),
    ],
)
def test_other_templates_are_refused(template, message, tmp_path):
    with pytest.raises(ValueError, match=f"--to ollama: this chat template {message}") as caught:
        read_turns(with_template(tmp_path, template))
    assert "\n" not in str(caught.value)
