"""Fields of rows, flags of messages, and the formats of other programs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind import load_tokenizer
from minimind.data import Corpus, open_conversations, open_corpus
from minimind.data.cache import open_preferences
from minimind.data.encoding import NONE, class_of
from minimind.data.fields import FLAGS, HARMLESS
from minimind.data.formats import AUTO, RowFormat
from minimind.data.prompts import open_prompts
from minimind.data.reader import iter_texts
from minimind.tokenization import ChatEncoder
from minimind.tokenization.reasoning import ReasoningEncoder, ThinkingPrompts
from minimind.tokenization.tokenizer import Tokenizer
from tests.data.fake import QUIET, ByteTokenizer
from tests.data.test_cache import listening

TOKENIZER = load_tokenizer()
ENCODER = ChatEncoder(TOKENIZER)
PROMPTS = ThinkingPrompts(TOKENIZER, None)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [{"role": "user", "content": "hi"}]
SAID = {"role": "assistant", "content": "ahoy"}
CHAT = [*ASKED, SAID]
OTHER = [*ASKED, {"role": "assistant", "content": "no"}]
SYSTEM = {"role": "system", "content": "Be a pirate.", "tools": TOOLS}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(folder: Path, *rows: Any, row_format: RowFormat = AUTO, encoder: Any = ENCODER, **options) -> Corpus:
    folder.mkdir(exist_ok=True)
    path = written(folder / "a.jsonl", *rows)
    return open_conversations([path], encoder, folder / "cache", console=QUIET, row_format=row_format, **options)


def pairs(folder: Path, *rows: Any, row_format: RowFormat = AUTO) -> Corpus:
    folder.mkdir(exist_ok=True)
    return open_preferences(
        [written(folder / "a.jsonl", *rows)], ENCODER, folder / "cache", console=QUIET, row_format=row_format
    )


def same(ours: Corpus, theirs: Corpus) -> bool:
    """Whether both hold the same tokens with the same targets."""
    assert ours.num_documents == theirs.num_documents
    numbers = range(ours.num_documents)
    ids = all(ours.document(i).tolist() == theirs.document(i).tolist() for i in numbers)
    return ids and all(ours.codes(i).tolist() == theirs.codes(i).tolist() for i in numbers)


def learnt(corpus: Corpus, i: int = 0) -> str:
    return TOKENIZER.decode(corpus.document(i)[class_of(corpus.codes(i)) > NONE])


def open_kind(kind: str, path: Path, on_bad_row: str = "error", row_format: RowFormat = AUTO, console=QUIET) -> int:
    """The number of documents of a kind of row."""
    cache = path.parent / "cache"
    if kind == "text":
        return open_corpus([path], ByteTokenizer(), cache, on_bad_row, console, row_format=row_format).num_documents
    if kind == "conversation":
        return open_conversations([path], ENCODER, cache, on_bad_row, console, row_format=row_format).num_documents
    if kind == "pair":
        return open_preferences([path], ENCODER, cache, on_bad_row, console, row_format=row_format).num_documents
    return len(open_prompts([path], PROMPTS, 500, on_bad_row, console, row_format))


KINDS: dict[str, dict[str, Any]] = {
    "text": {"text": "words"},
    "conversation": {"conversations": CHAT},
    "pair": {"chosen": CHAT, "rejected": OTHER},
    "prompt": {"conversations": CHAT},
}


# --- tools and system ---


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_rows_tools_and_system_are_the_system_messages(tmp_path, tools):
    expected = conversations(tmp_path / "a", {"conversations": [SYSTEM, *CHAT]})
    plain = {"role": "system", "content": "Be a pirate."}
    for n, row in enumerate(
        [
            {"conversations": CHAT, "tools": tools, "system": "Be a pirate."},
            {"conversations": [plain, *CHAT], "tools": tools},
            {"conversations": [{**SYSTEM, "content": ""}, *CHAT], "system": "Be a pirate."},
            {"conversations": [SYSTEM, *CHAT], "system": "Be a pirate.", "tools": tools},
            {"conversations": [SYSTEM, *CHAT], "system": "", "tools": None},
        ]
    ):
        assert same(expected, conversations(tmp_path / f"b{n}", row)), row
    assert "Be a pirate.\n\n" in TOKENIZER.decode(expected.document(0))
    row = {"chosen": CHAT, "rejected": OTHER}
    inside = {name: [SYSTEM, *side] for name, side in row.items()}
    beside = {**row, "tools": tools, "system": "Be a pirate."}
    assert same(pairs(tmp_path / "c", inside), pairs(tmp_path / "d", beside))
    beside = {"conversations": CHAT, "tools": tools, "system": "Be a pirate.", "level": 3}
    (prompt,) = open_prompts([written(tmp_path / "p.jsonl", beside)], PROMPTS, 500).prompts
    assert prompt.ids == PROMPTS.prompt([SYSTEM, *ASKED]) and prompt.metadata == {"level": 3}
    assert [m["role"] for m in prompt.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"system": "Be kind."}, 'field "system" differs from the system message; keep one of them'),
        ({"tools": [{"name": "g"}]}, 'field "tools" differs from the system message; keep one of them'),
        ({"system": ["a"]}, 'field "system" is a list, not a string'),
        ({"tools": "[{"}, 'field "tools" differs from the system message'),
    ],
)
def test_a_row_that_contradicts_its_system_message(tmp_path, beside, reason):
    for kind in ("conversation", "pair", "prompt"):
        row = {name: [SYSTEM, *value] if isinstance(value, list) else value for name, value in KINDS[kind].items()}
        path = written(tmp_path / f"{kind}.jsonl", KINDS[kind], {**row, **beside})
        with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(reason)):
            open_kind(kind, path)


def test_tools_of_a_row_that_are_not_json(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl:1: message 0: tools is a string but not JSON"):
        conversations(tmp_path, {"conversations": CHAT, "tools": "[{"})


# --- training flags ---


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, False, True])
def test_flags_of_messages(tmp_path, name, value):
    last = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "learn me"}]
    corpus = conversations(tmp_path / "a", {"conversations": [*ASKED, {**SAID, name: value}, *last]})
    plain = conversations(tmp_path / "b", {"conversations": [*CHAT, *last]})
    assert corpus.document(0).tolist() == plain.document(0).tolist()
    taught = FLAGS[name] is bool(value)
    assert learnt(corpus) == ("ahoy<|im_end|>" * taught + "learn me<|im_end|>")
    assert (corpus.codes(0) == plain.codes(0)).all() == taught


def test_nothing_after_the_last_trained_answer_is_kept(tmp_path):
    more = [{"role": "user", "content": "again"}, {**SAID, "weight": 0}]
    corpus = conversations(tmp_path / "a", {"conversations": [*CHAT, *more]})
    assert same(corpus, conversations(tmp_path / "b", {"conversations": CHAT}))


def test_flags_of_rows_pairs_and_prompts(tmp_path):
    said = [*ASKED, {**SAID, "weight": 0}]
    turns = [*ASKED, {"role": "assistant", "content": "good"}]
    inside = conversations(tmp_path / "a", {"conversations": [*said, *turns]})
    beside = conversations(tmp_path / "b", {"conversations": [*CHAT, *turns], "loss_mask": [0, 0, 1, 1]})
    assert same(inside, beside) and learnt(inside) == "good<|im_end|>"
    answers = {"chosen": turns, "rejected": [*ASKED, {"role": "assistant", "content": "bad"}]}
    corpus = pairs(tmp_path / "c", {side: [*said, *turns] for side, turns in answers.items()})
    assert learnt(corpus) == "good<|im_end|>bad<|im_end|>"
    asked = {"conversations": [*said, *ASKED]}
    (prompt,) = open_prompts([written(tmp_path / "p.jsonl", asked)], PROMPTS, 500).prompts
    assert prompt.messages == [*CHAT, *ASKED] and prompt.ids == PROMPTS.prompt([*CHAT, *ASKED])


def test_flags_reach_reasoning_and_templates_that_mark_answers(tmp_path):
    turns = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "learn me"}]
    row = {"conversations": [*ASKED, {**SAID, "weight": 0}, *turns]}
    for share in (0.0, 1.0):
        corpus = conversations(tmp_path / f"r{share}", row, encoder=ReasoningEncoder(TOKENIZER, share))
        assert learnt(corpus) == "learn me<|im_end|>"
    mark = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    for extra, message in (("", None), (mark, "does not mark each message of the assistant once")):
        template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}" + mark + extra
        template += "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        encoder = ChatEncoder(Tokenizer(TOKENIZER._model, {}, template, "marked"))
        if message is None:
            assert learnt(conversations(tmp_path / "m", row, encoder=encoder)) == "learn me<|im_end|>"
            continue
        with pytest.raises(ValueError, match=message):
            conversations(tmp_path / "n", row, encoder=encoder)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*ASKED, {**SAID, "weight": 0.5}], 'message 1: "weight" is 0.5, not 0, 1, false or true'),
        ([*ASKED, {**SAID, "weight": "0"}], 'message 1: "weight" is "0", not 0, 1, false or true'),
        ([*ASKED, {**SAID, "weight": 0, "train": True}], "message 1: weight and train contradict each other"),
        ([*ASKED, {**SAID, "weight": 0}], "every message of the assistant has weight 0; none is trained on"),
        (
            [{**ASKED[0], "train": True}, SAID],
            'message 0, of the user: "train" asks to train on it, but only the assistant\'s messages are trained on',
        ),
    ],
)
def test_contradictory_and_meaningless_flags(tmp_path, messages, reason):
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl:1: {reason}")):
        conversations(tmp_path, {"conversations": messages})


def test_the_answer_of_a_pair_must_be_trained_on(tmp_path):
    row = {"chosen": CHAT, "rejected": [*ASKED, {**OTHER[1], "weight": 0}]}
    with pytest.raises(ValueError, match="rejected: a flag says not to train on its answer"):
        pairs(tmp_path, row)
    with pytest.raises(ValueError, match='field "loss_mask" is not a list of 2 numbers, one for each message'):
        conversations(tmp_path / "b", {"conversations": CHAT, "loss_mask": [1]})


# --- unknown fields ---


@pytest.mark.parametrize("kind", ["text", "conversation", "pair"])
@pytest.mark.parametrize("field", ["toolz", "images", "weight", "label", "reward"])
def test_a_field_that_would_be_lost_is_an_error(tmp_path, kind, field):
    path = written(tmp_path / "a.jsonl", KINDS[kind], {**KINDS[kind], field: 1}, KINDS[kind])
    told = f'"{field}" is unknown and would be lost; --ignore-fields {field} drops it (docs/data.md)'
    with pytest.raises(ValueError) as caught:
        open_kind(kind, path)
    assert str(caught.value) == f"{path}:2: field {told}; fix the row or pass --on-bad-row skip"
    console = listening()
    assert open_kind(kind, path, "skip", console=console) == 2
    assert f"1 bad rows left out, the first at {path}:2: field {told}" in console.export_text()
    assert open_kind(kind, path, row_format=RowFormat(ignored=(field,))) == 3
    quiet = [{**KINDS[kind], field: value} for value in (None, "", [], {})]
    assert open_kind(kind, written(tmp_path / "b.jsonl", *quiet)) == 4


@pytest.mark.parametrize("kind", ["conversation", "pair", "prompt"])
def test_a_field_of_a_message_that_would_be_lost(tmp_path, kind):
    lost = {"image": "cat.png"}
    row = {name: [{**ASKED[0], **lost}, *side[1:]] for name, side in KINDS[kind].items()}
    path = written(tmp_path / "a.jsonl", row)
    with pytest.raises(ValueError, match=r'a.jsonl:1: .*message 0: field "image" is unknown and would be lost'):
        open_kind(kind, path)
    assert open_kind(kind, path, row_format=RowFormat(ignored=("image",))) == 1
    for name, owner in (("tools", "system"), ("reasoning_content", "assistant"), ("tool_calls", "assistant")):
        row = {field: [{**ASKED[0], name: "[1]"}, *side[1:]] for field, side in KINDS[kind].items()}
        with pytest.raises(ValueError, match=f'message 0, of the user: "{name}" belongs to the {owner}'):
            open_kind(kind, written(tmp_path / "b.jsonl", row))


@pytest.mark.parametrize("kind", KINDS)
def test_harmless_fields(tmp_path, kind):
    beside = dict.fromkeys(HARMLESS, "a") | {"URL": "b"}
    assert open_kind(kind, written(tmp_path / "a.jsonl", {**KINDS[kind], **beside})) == 1


def test_docs_list_the_harmless_fields():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert {name for name in HARMLESS | FLAGS.keys() if f"`{name}`" not in page} == set()


def test_fields_for_the_rewards_are_reported(tmp_path):
    console = listening()
    row = {"conversations": CHAT, "answer": 4, "id": 1, "reference": "4"}
    (prompt,) = open_prompts([written(tmp_path / "a.jsonl", row)], PROMPTS, 500, console=console).prompts
    assert prompt.metadata == {"answer": 4, "id": 1}
    said = "further fields, for rewards of your own (Sample.metadata): answer"
    assert said in console.export_text().splitlines()


# --- formats ---

PARTS = [{"type": "text", "text": "ah"}, {"type": "text", "text": "oy"}]
CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, SAID]
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ahoy"}]
FORMS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    ("messages", {"messages": CHAT}, {"conversations": CHAT}),
    ("messages", {"messages": CHAT, "prompt": "hi"}, {"conversations": CHAT}),
    (
        "messages",
        {"messages": [{"role": "developer", "content": "Be."}, *ASKED, {**SAID, "content": PARTS}], "tools": TOOLS},
        {"conversations": [{"role": "system", "content": "Be.", "tools": TOOLS}, *CHAT]},
    ),
    (
        "messages",
        {"prompt": [*CHAT, *ASKED], "completion": [{**SAID, "content": "so"}]},
        {"conversations": [*ASKED, {**SAID, "weight": 0}, *ASKED, {**SAID, "content": "so"}]},
    ),
    ("sharegpt", {"conversations": TURNS, "system": "Be."}, {"conversations": CHAT, "system": "Be."}),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be."}, *TURNS]},
        {"conversations": CHAT, "system": "Be."},
    ),
    (
        "sharegpt",
        {"conversations": [TURNS[0], {"from": "function_call", "value": json.dumps(CALL)},
                           {"from": "observation", "value": "3"}, TURNS[1]], "tools": json.dumps(TOOLS)},
        {"conversations": CALLED, "tools": TOOLS},
    ),
    (
        "sharegpt",
        {"conversations": [*TURNS, TURNS[0], {**TURNS[1], "loss": True}], "loss_mask": [1, 0, 1, 1]},
        {"conversations": [*ASKED, {**SAID, "weight": 0}, *CHAT]},
    ),
    ("alpaca", {"instruction": "hi", "input": "", "output": "ahoy"}, {"conversations": CHAT}),
    (
        "alpaca",
        {"instruction": "add", "input": "1 2", "output": "3", "system": "Be.", "history": [["hi", "ahoy"]]},
        {"conversations": [*CHAT, {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"}],
         "system": "Be."},
    ),
]  # fmt: skip
PREFERENCES: list[tuple[Any, dict[str, Any]]] = [
    ("auto", {"chosen": CHAT, "rejected": OTHER, "prompt": "hi", "messages": CHAT, "score_chosen": 5}),
    ("messages", {"prompt": ASKED, "chosen": [SAID], "rejected": OTHER[1:]}),
    ("messages", {"prompt": "hi", "chosen": CHAT, "rejected": OTHER}),
    ("messages", {"input": {"messages": ASKED}, "preferred_output": [SAID], "non_preferred_output": OTHER[1:]}),
    ("sharegpt", {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "no"}}),
    ("sharegpt", {"chosen": TURNS, "rejected": [TURNS[0], {"from": "gpt", "value": "no"}]}),
    ("alpaca", {"instruction": "hi", "input": "", "chosen": "ahoy", "rejected": "no"}),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), FORMS)
def test_conversations_of_other_programs(tmp_path, name, theirs, ours):
    row_format = RowFormat(name)
    assert same(conversations(tmp_path / "a", ours), conversations(tmp_path / "b", theirs, row_format=row_format))
    with pytest.raises(ValueError, match=rf"a.jsonl:1: rows of this format are read with --format {name}; fix"):
        conversations(tmp_path / "c", theirs)
    if "tools" in theirs:  # a call may be JSON in a string
        return
    texts = [
        list(iter_texts(written(tmp_path / "t.jsonl", row), row_format=f))
        for row, f in ((ours, RowFormat()), (theirs, row_format))
    ]
    assert sorted(texts[0]) == sorted(texts[1])


@pytest.mark.parametrize(("name", "theirs"), PREFERENCES)
def test_preferences_of_other_programs(tmp_path, name, theirs):
    ours = pairs(tmp_path / "a", {"chosen": CHAT, "rejected": OTHER})
    assert same(ours, pairs(tmp_path / "b", theirs, row_format=RowFormat(name)))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("messages", {"messages": CHAT}),
        ("messages", {"prompt": ASKED, "completion": [SAID]}),
        ("messages", {"prompt": ASKED, "reference": "ahoy"}),
        ("sharegpt", {"conversations": TURNS}),
        ("alpaca", {"instruction": "hi", "output": "ahoy"}),
    ],
)
def test_prompts_of_other_programs(tmp_path, name, theirs):
    path = written(tmp_path / "p.jsonl", {**theirs, "level": 3})
    (prompt,) = open_prompts([path], PROMPTS, 500, row_format=RowFormat(name)).prompts
    assert prompt.messages == ASKED and prompt.reference == "ahoy" and prompt.metadata == {"level": 3}
    with pytest.raises(ValueError, match=f"p.jsonl:1: rows of this format are read with --format {name}"):
        open_prompts([path], PROMPTS, 500)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("messages", {"conversations": CHAT}, 'no field "messages" (fields: conversations)'),
        ("messages", {"prompt": "hi"}, 'field "prompt" is a string, not a list of messages'),
        ("messages", {"messages": [{**SAID, "content": [{"type": "image_url"}]}]},
         "message 0: a part of its content is image_url; only text is supported"),
        ("sharegpt", {"conversations": CHAT}, 'message 0 has "from": None; --format sharegpt reads "from" (system,'),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, 'message 0 has "from": \'alien\'; --format'),
        ("alpaca", {"output": "a"}, 'no field "instruction" (fields: output)'),
        ("alpaca", {"instruction": 4, "output": "a"}, 'field "instruction" is a number, not a string'),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]},
         'field "history" is not a list of [question, answer]'),
        ("alpaca", {"instruction": "hi", "output": "a", "extra_text": "b"}, 'field "extra_text" is unknown'),
    ],
)  # fmt: skip
def test_rows_in_another_format(tmp_path, name, row, reason):
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl:1: {reason}")):
        conversations(tmp_path, row, row_format=RowFormat(name))


def test_the_cache_keeps_formats_apart(tmp_path):
    """A file read in another format, or with other ignored fields, is not taken from the cache."""
    row = {"conversations": CHAT, "extra_text": "b"}
    ignoring = RowFormat(ignored=("extra_text",))
    first = conversations(tmp_path, row, row_format=ignoring)
    with pytest.raises(ValueError, match='"extra_text" is unknown'):
        conversations(tmp_path, row)
    with pytest.raises(ValueError, match='no field "messages"'):
        conversations(tmp_path, row, row_format=RowFormat("messages", ("extra_text",)))
    assert conversations(tmp_path, row, row_format=ignoring).identity == first.identity
    other = conversations(tmp_path, row, row_format=RowFormat(ignored=("extra_text", "more")))
    assert other.identity != first.identity and same(first, other)


def test_a_run_of_an_earlier_version_reads_as_before(tmp_path):
    """It gets the same tokens and cache keys, so that it resumes bit for bit; a new run checks the file's fields."""
    row = {"conversations": CHAT, "system": "Be a pirate.", "extra_text": "b"}
    before = conversations(tmp_path / "a", row, row_format=RowFormat(checked=False))
    assert same(before, conversations(tmp_path / "b", {"conversations": CHAT}))
    assert RowFormat(checked=False).key() == [] != RowFormat().key()
    assert np.array_equal(before.document(0), ENCODER.encode([ENCODER.pieces(CHAT)])[0].ids)


def test_texts_for_a_tokenizer(tmp_path):
    row = {"conversations": CHAT, "system": "Be a pirate.", "tools": TOOLS}
    found = list(iter_texts(written(tmp_path / "a.jsonl", row)))
    assert found == ["hi", "ahoy", "Be a pirate.", json.dumps(TOOLS)]
    path = written(tmp_path / "b.jsonl", {**row, "extra_text": "b"})
    with pytest.raises(ValueError, match=r'b.jsonl:1: field "extra_text" is unknown'):
        list(iter_texts(path))
    assert len(list(iter_texts(path, row_format=RowFormat(ignored=("extra_text",))))) == 4
