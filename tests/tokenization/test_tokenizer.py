"""Loading, ids, round trips, special tokens as text, and folders that are broken."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.tokenization import Tokenizer, load_tokenizer
from minimind.tokenization.tokenizer import DEFAULT_FOLDER

SHIPPED = load_tokenizer()
SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<tools>", "</tools>", *(f"<|reserved_{i}|>" for i in range(5))),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(alphabet="\r\n\t\0 a1'。你😀\u200d\ufeff<|>")


def test_ids_of_special_tokens() -> None:
    assert SHIPPED.vocab_size == len(SHIPPED) == 6400
    assert (SHIPPED.pad_token_id, SHIPPED.bos_token_id, SHIPPED.eos_token_id) == (0, 1, 2)
    assert list(SHIPPED.special_tokens.items()) == [(token, i) for i, token in enumerate(SPECIALS)]
    assert SHIPPED.encode("".join(SPECIALS)) == list(range(len(SPECIALS)))
    assert SHIPPED.token_to_id("<think>") == 3 and SHIPPED.token_to_id("<nonsense>") is None


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_round_trip(text: str) -> None:
    for allow_special in (True, False):
        ids = SHIPPED.encode(text, allow_special)
        assert SHIPPED.decode(ids) == text
        assert max(ids, default=0) < SHIPPED.vocab_size


@pytest.mark.parametrize(
    "text", ["", "a\r\nb\rc", "\x00\x1b\x7f", "👩‍👩‍👧‍👦🇨🇳", " \t\n ", "e\u0301 é", "𠮷龘", "123456"]
)
def test_round_trip_of_awkward_texts(text: str) -> None:
    assert SHIPPED.decode(SHIPPED.encode(text)) == text


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXT | st.sampled_from(SPECIALS), max_size=8), st.booleans())
def test_batch_equals_single(texts: list[str], allow_special: bool) -> None:
    batch = SHIPPED.encode_batch(texts, allow_special)
    assert [array.dtype for array in batch] == [np.uint16] * len(texts)
    assert [array.tolist() for array in batch] == [SHIPPED.encode(text, allow_special) for text in texts]


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXT | st.sampled_from(SPECIALS), max_size=6).map("".join))
def test_special_tokens_as_plain_text(text: str) -> None:
    ids = SHIPPED.encode(text, allow_special=False)
    assert not set(ids) & set(SHIPPED.special_tokens.values())
    assert SHIPPED.decode(ids, skip_special_tokens=True) == text


def test_both_readings_of_a_special_token_coexist() -> None:
    text = "a<|im_end|>b<think>"
    marked = SHIPPED.encode(text)
    plain = SHIPPED.encode(text, allow_special=False)
    assert 2 in marked and 3 in marked and len(plain) > len(marked)
    assert SHIPPED.encode(text) == marked
    assert SHIPPED.decode(plain) == SHIPPED.decode(marked) == text


def test_surrogates() -> None:
    assert SHIPPED.decode(SHIPPED.encode("a\ud83d\ude00b")) == "a😀b"
    assert SHIPPED.decode(SHIPPED.encode("a\ud83db")) == "a\ufffdb"
    batch = SHIPPED.encode_batch(["ok", "\udc00"])
    assert [SHIPPED.decode(ids) for ids in batch] == ["ok", "\ufffd"]
    with pytest.raises(TypeError, match="a str, not int"):
        SHIPPED.encode(5)  # type: ignore[arg-type]


def test_decode() -> None:
    assert SHIPPED.decode([1, *SHIPPED.encode("<think>x"), 2], skip_special_tokens=True) == "<think>x"
    assert SHIPPED.decode(np.array(SHIPPED.encode("你好"), dtype=np.uint16)) == "你好"
    assert SHIPPED.decode(SHIPPED.encode("\U0001f9ff")[:-1]).endswith("\ufffd")
    for wrong in (6400, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of 6400"):
            SHIPPED.decode([5, wrong])


def test_compression_does_not_regress() -> None:
    english = "The old bridge was closed last winter, so we walked along the river until the next village."
    chinese = "昨天我们一起去公园散步，天气很好，很多人在湖边拍照。学习需要时间，也需要方法。"
    code = 'def total(items):\n    return sum(item["price"] * item["count"] for item in items)\n'
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    for text, least in ((english, 3.5), (chinese, 3.5), (code, 2.55), (schema, 2.5)):
        assert len(text.encode()) / len(SHIPPED.encode(text)) >= least


def test_the_fingerprint_follows_the_ids(tmp_path: Path) -> None:
    code = "from minimind.tokenization import load_tokenizer; print(load_tokenizer().fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == SHIPPED.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", SHIPPED.fingerprint)

    config = json.loads((DEFAULT_FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    same = _folder(tmp_path / "same", config={**config, "chat_template": "x"})
    assert load_tokenizer(same).fingerprint == SHIPPED.fingerprint
    model = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    model["model"]["merges"].pop()
    assert load_tokenizer(_folder(tmp_path / "less", model=model)).fingerprint != SHIPPED.fingerprint


def test_save_and_load(tmp_path: Path) -> None:
    SHIPPED.save(tmp_path / "a" / "b")
    loaded = load_tokenizer(tmp_path / "a" / "b")
    assert loaded.fingerprint == SHIPPED.fingerprint and loaded.chat_template == SHIPPED.chat_template
    assert loaded.eos_token_id == 2 and loaded.special_tokens == SHIPPED.special_tokens


def test_copies_travel_to_worker_processes() -> None:
    copy = pickle.loads(pickle.dumps(SHIPPED))
    text = "<|im_end|>你好"
    assert copy.encode(text) == SHIPPED.encode(text)
    assert copy.encode(text, allow_special=False) == SHIPPED.encode(text, allow_special=False)


def test_transformers_reads_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="install minimind[export] to load it in transformers")
    SHIPPED.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(SPECIALS) + "Hello 世界\r\n 12345 don't\t😀 def f(x):\n    return x"
    assert theirs(text)["input_ids"] == SHIPPED.encode(text)
    assert theirs.decode(SHIPPED.encode(text)) == text
    for ids in (SHIPPED.encode(text), range(6400)):
        shown = theirs.decode(ids, skip_special_tokens=True)
        assert SHIPPED.decode(ids, skip_special_tokens=True) == shown
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert len(theirs) == 6400
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "21"},
    ]
    for variables in ({}, {"enable_thinking": False}, {"open_thinking": True}, {"tools": [{"name": "f"}]}):
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        assert rendered == SHIPPED.apply_chat_template(messages, add_generation_prompt=True, **variables)


def test_loading_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from minimind.tokenization import load_tokenizer as l;"
        "l().apply_chat_template([]); print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_single_file_loads_with_the_usual_names(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    shutil.copy(DEFAULT_FOLDER / "tokenizer.json", file)
    loaded = load_tokenizer(file)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    with pytest.raises(ValueError, match="no chat template"):
        loaded.apply_chat_template([])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</think>"}', encoding="utf-8")
    assert load_tokenizer(file).eos_token_id == 4


def test_layouts_of_hugging_face_folders(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"eos_token": {"content": "<|reserved_0|>"}, "pad_token": None, "chat_template": listed}
    folder = _folder(tmp_path, config=config)
    loaded = load_tokenizer(folder)
    assert loaded.eos_token_id == 11 and loaded.pad_token_id == 0
    assert loaded.apply_chat_template([]) == "<|reserved_0|>"
    (folder / "chat_template.jinja").write_text("from a file", encoding="utf-8")
    assert load_tokenizer(folder).apply_chat_template([]) == "from a file"


def test_truncation_and_padding_of_a_file_are_ignored(tmp_path: Path) -> None:
    model = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    model["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    loaded = load_tokenizer(_folder(tmp_path, model=model))
    for allow_special in (True, False):
        assert loaded.encode("one two three", allow_special) == SHIPPED.encode("one two three")


BROKEN = {
    "missing folder": (lambda folder: shutil.rmtree(folder), "no tokenizer here"),
    "missing file": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: no tokenizer here"),
    "cut file": (lambda folder: _cut(folder / "tokenizer.json"), "tokenizer.json: not a tokenizer file"),
    "not text": (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "cut config": (lambda folder: _cut(folder / "tokenizer_config.json"), "tokenizer_config.json: malformed JSON"),
    "list config": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
    "unknown eos": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
        "eos_token '</s>' of tokenizer_config.json is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    damage, words = BROKEN[name]
    folder = _folder(tmp_path / "tok")
    load_tokenizer(folder)
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_vocabulary_without_end_token_is_refused(tmp_path: Path) -> None:
    model = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(_folder(tmp_path, model=model, config={}))


def test_repr_names_the_source() -> None:
    assert "tokenizer.json" in repr(SHIPPED) and isinstance(SHIPPED, Tokenizer)


def _folder(folder: Path, model: object = None, config: object = None) -> Path:
    """A copy of the shipped folder with other contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", model), ("tokenizer_config.json", config)):
        if content is None:
            shutil.copy(DEFAULT_FOLDER / name, folder / name)
        else:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])
