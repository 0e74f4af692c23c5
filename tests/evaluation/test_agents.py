"""`minimind evaluate --agent`: tasks done by calling tools."""

from __future__ import annotations

import json

import pytest

from minimind.evaluation.perplexity import Args, main
from minimind.weights import save_weights
from tests.environments.agent import KNOWN, SYSTEM, TOKENIZER, agent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent")
    save_weights(agent(), path)
    TOKENIZER.save(path)
    return path


@pytest.fixture
def tasks(tmp_path):
    """Of each length, and one that the model does not know."""
    rows = []
    for known, answer, calls in zip(KNOWN[:3], ("Hello", "5", "12"), (0, 1, 2), strict=True):
        rows.append({"conversations": known[:2], "reference": answer, "calls": calls, "kind": f"kind {calls}"})
    rows.append({"conversations": KNOWN[1][:2], "reference": "6", "calls": 1, "kind": "kind 1"})
    for row in rows:
        row["conversations"] = [*row["conversations"], {"role": "assistant", "content": ""}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_success_is_told_by_kind_and_calls_with_what_failed(folder, tasks, tmp_path, capsys):
    assert main(Args(model=str(folder), agent=True, agent_data=(str(tasks),), out=str(tmp_path), dtype="fp32")) == 0
    told = json.loads((tmp_path / "agent.json").read_text())
    assert told["success"] == 0.75 and (told["success_0"], told["success_1"], told["success_2"]) == (1, 0.5, 1)
    assert told["kinds"]["kind 1"] == {"tasks": 2, "success": 0.5} and told["tasks"] == 4 and told["calls"] == 1
    (failure,) = told["failures"]
    assert failure.startswith("2+3? | <tool_call>") and failure.endswith("ended by answer, 1 calls needed, expected 6")
    assert "kind 2" in capsys.readouterr().out


def test_builtin_tasks_and_a_limit(folder, tmp_path):
    arguments = Args(model=str(folder), agent=True, limit=3, out=str(tmp_path), dtype="fp32")
    assert main(arguments) == 0
    told = json.loads((tmp_path / "agent.json").read_text())
    assert told["tasks"] == 3 and len(told["failures"]) == round(3 * (1 - told["success"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": ("mmlu",)}, "--agent: goes with neither --ppl nor --tasks"),
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"tools": ("upstream",)}, "--tools: a prompt of --data offers calculate, which no function implements"),
        ({"tools": ("no.such:tool",)}, "--tools no.such:tool: cannot import no.such"),
    ],
)
def test_errors_are_one_line(flags, message, folder, tasks, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        main(Args(**{"model": str(folder), "agent": True, "agent_data": (str(tasks),), "out": str(tmp_path), **flags}))
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_checked_are_an_error(folder, tmp_path):
    path = tmp_path / "tasks.jsonl"
    messages = [SYSTEM, {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": ""}]
    path.write_text(json.dumps({"conversations": messages}) + "\n")
    with pytest.raises(ValueError, match='--agent-data: no row has a "reference" or a list "gt"'):
        main(Args(model=str(folder), agent=True, agent_data=(str(path),), out=str(tmp_path)))
