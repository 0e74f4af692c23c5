"""Generated tasks: their solutions are right, held-out tasks differ from training tasks, and later calls need the
results of earlier ones."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher

import pytest

from minimind import load_tokenizer
from minimind.environments.builtin import builtin_tools
from minimind.environments.builtin.kinds import KINDS, SHARED, Kind
from minimind.environments.builtin.tasks import SLIPS, agent_prompts, tasks, weak_agent
from minimind.environments.builtin.tools import ELEMENTS, ELEMENTS_ZH, facts, search
from minimind.environments.running import ToolRunner
from minimind.environments.tools import by_name
from minimind.environments.turns import read_calls
from minimind.tokenization import ChatEncoder

TRAIN, HELDOUT = tasks()
TOOLS = by_name(builtin_tools())


def test_tasks_of_every_kind_length_and_language():
    for part, least in ((TRAIN, 12), (HELDOUT, 1)):
        counts = Counter((task.kind, task.chinese) for task in part)
        assert all(counts[kind.name, chinese] >= least for kind in KINDS for chinese in (False, True)), counts
        lengths = Counter(len(task.case.steps) for task in part)
        assert set(lengths) == {1, 2, 3} and min(lengths.values()) > len(part) / 8
    assert len(HELDOUT) > 600 and len(TRAIN) > 6000


def test_held_out_values_and_wordings_are_apart():
    seen = {(task.kind, task.chinese, tuple(map(str, task.case.words)), task.case.answer) for task in TRAIN}
    held = {(task.kind, task.chinese, tuple(map(str, task.case.words)), task.case.answer) for task in HELDOUT}
    assert not seen & held
    asked = [{task.question for task in part if not task.case.state} for part in (TRAIN, HELDOUT)]
    assert not asked[0] & asked[1]
    assert not any(task.new_wording for task in TRAIN)
    assert 0.3 < sum(task.new_wording for task in HELDOUT) / len(HELDOUT) < 0.7
    kinds = {kind.name: kind for kind in KINDS}
    for task in (*TRAIN, *HELDOUT):
        wordings = kinds[task.kind].chinese if task.chinese else kinds[task.kind].english
        assert (task.question == wordings[-1].format(*task.case.words)) == task.new_wording


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_wordings_and_none_near_the_held_out_one(kind: Kind):
    """Of the training wordings, the nearest to the held-out one are among those that held-out tasks have as well: the
    held-out wording cannot be learnt from the others."""
    for wordings in (kind.english, kind.chinese):
        assert len(set(wordings)) == len(wordings) >= 10
        *known, held_out = (re.findall(r"\{\d\}|[a-z']+|[\u4e00-\u9fff]", wording.lower()) for wording in wordings)
        likeness = [SequenceMatcher(None, words, held_out, autojunk=False).ratio() for words in known]
        assert max(likeness) in likeness[:SHARED], wordings[likeness.index(max(likeness))]


def test_held_out_tasks_have_shared_wordings_or_the_new_one():
    for task in HELDOUT:
        (kind,) = (kind for kind in KINDS if kind.name == task.kind)
        wordings = kind.chinese if task.chinese else kind.english
        assert task.question in {wording.format(*task.case.words) for wording in (*wordings[:SHARED], wordings[-1])}
    everything = [wording for kind in KINDS for wording in (*kind.english, *kind.chinese)]
    assert len(set(everything)) == len(everything)  # no question is of two kinds


def test_solutions_are_right_calls_that_lead_to_the_answer():
    """The calls are read from the text that a model would write, and run from the task's initial state."""
    runner = ToolRunner(builtin_tools())
    for task in (*TRAIN[::9], *HELDOUT):
        offered = {name: TOOLS[name].parameters for name in task.tools}
        state, said = json.loads(json.dumps(task.case.state)), ""
        for step in task.case.steps:
            text = f"<tool_call>\n{json.dumps(step.call, ensure_ascii=False)}\n</tool_call>"
            (call,) = read_calls(text, offered)
            said = runner.run(call, state).text
            assert call.problem is None and said == step.result, task
        assert task.case.answer in said
        assert len(offered) == len({step.tool for step in task.case.steps}) + 1


def test_later_calls_need_what_earlier_ones_gave():
    """No later call of a task can be written from the question alone."""
    for task in TRAIN:
        if len(task.case.steps) > 1:
            last, before = task.case.steps[-1], task.case.steps[:-1]
            known = "".join(str(value) for value in last.arguments.values())
            assert any(part in known for step in before for part in (step.result, *_numbers(step.result))), task


def _numbers(text: str) -> list[str]:
    return ["".join(c for c in word if c.isdigit()) for word in text.split() if any(map(str.isdigit, word))]


def test_weak_conversations_do_a_third_of_their_tasks():
    rows = [json.loads(line)["conversations"] for line in weak_agent()[0].read_text(encoding="utf-8").splitlines()]
    tasks_of = defaultdict(list)  # one question has several answers where the memory holds others
    known, heldout = tasks(few_wordings=True)
    assert heldout == HELDOUT
    for task in known:
        tasks_of[task.question].append(task)
    right = done = 0
    for row in rows:
        if row[0]["role"] != "system":
            continue
        offered, used = {tool["name"] for tool in row[0]["tools"]}, set()
        starts = [i for i, message in enumerate(row) if message["role"] == "user"]
        for first, end in zip(starts, [*starts[1:], None], strict=True):
            alike = tasks_of[row[first]["content"]]
            done, used = done + 1, used | set(alike[0].used)
            right += any(task.case.answer in row[first:end][-1]["content"] for task in alike)
        assert used < offered and len(offered) <= 4
    assert done == len(known)
    assert right / done == pytest.approx(SLIPS.count(None) / len(SLIPS), abs=0.02)


def test_weak_conversations_train_the_assistants_words():
    encoder = ChatEncoder(load_tokenizer())
    for line in weak_agent()[0].read_text(encoding="utf-8").splitlines()[:200]:
        row = json.loads(line)["conversations"]
        trained = "".join(piece.text for piece in encoder.pieces(row) if piece.trained)
        assert trained.count("<|im_end|>") == sum(message["role"] == "assistant" for message in row)
        assert "<tool_response>" not in trained
        if row[0]["role"] == "user":
            for asked, said in zip(row[::2], row[1::2], strict=True):
                assert asked["content"].endswith(tuple(_copies(said)))


def _copies(said: dict) -> list[str]:
    """What the user may have given to copy: the items of a list, or a call's tool and arguments."""
    if not said.get("tool_calls"):
        items = said["content"].strip("[]").replace('"', "")
        return [items, items.replace(", ", "、")]
    (call,) = said["tool_calls"]
    assert call["name"] not in TOOLS
    words = [f"{name} {value}" for name, value in call["arguments"].items()]
    return [f"Call {call['name']}: {', '.join(words)}", f"调用{call['name']}：{'，'.join(words)}"]


def test_prompts_hold_what_rewards_need():
    _, heldout = agent_prompts()
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(HELDOUT)
    assert rows[0]["conversations"][-1] == {"role": "assistant", "content": ""}
    assert {"reference", "calls", "kind", "state", "new_wording"} <= rows[0].keys()


def test_every_fact_is_found_by_its_subject():
    assert len(facts()) > 250 and len(set(facts())) == len(facts())
    for number, (name, chinese) in enumerate(zip(ELEMENTS, ELEMENTS_ZH, strict=True), 1):
        assert search(f"atomic number of {name}").startswith(f"The atomic number of {name} is {number}.")
        assert search(f"{chinese}的原子序数").startswith(f"{chinese}的原子序数是{number}。")
