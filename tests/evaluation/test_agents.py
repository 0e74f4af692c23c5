"""`minimind evaluate --agent`: tasks done by calling tools."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from minimind.environments.builtin import named_tools
from minimind.environments.episodes import EpisodeLimits, Start
from minimind.environments.remote import RemoteRunner
from minimind.environments.running import ToolRunner
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
    """A task of each length, and one that the model does not know."""
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


@pytest.fixture(scope="module")
def server():
    """Ours, in this process, with the same model."""
    for name in ("fastapi", "uvicorn", "openai", "llguidance", "prometheus_client"):
        pytest.importorskip(name, reason="needs the server: pip install 'minimind[web]'")
    from tests.serving.service import serving

    with serving(agent(), TOKENIZER, kv_tokens=16384, max_context=1024) as running:
        yield f"{running.root}/v1"


def test_a_model_at_an_address_does_what_it_does_here(server, folder, tasks, tmp_path):
    told = {}
    for name, model in (("here", str(folder)), ("there", server)):
        assert main(Args(model=model, agent=True, agent_data=(str(tasks),), out=str(tmp_path), dtype="fp32")) == 0
        told[name] = json.loads((tmp_path / "agent.json").read_text())
    (here,), (there,) = told["here"].pop("failures"), told["there"].pop("failures")
    assert told["here"] == told["there"] and told["here"]["success"] == 0.75
    assert here == there and "| [5] |" in there


def test_an_address_that_is_none_of_a_model_is_one_line(server, tmp_path):
    for address, message in (
        ("http://127.0.0.1:9/v1", "--model http://127.0.0.1:9/v1: Connection error"),
        (f"{server}#gone", f"--model {server}#gone: write {server}#NAME with one of its models: tiny"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main(Args(model=address, agent=True, limit=1, out=str(tmp_path)))
        assert "\n" not in str(error.value)


class Answers:
    """A client of a server that says these messages, one after the other, to every conversation."""

    def __init__(self, *messages: dict) -> None:
        self.messages, self.asked = messages, []
        self.base_url, self.chat, self.completions = "http://there", self, self

    def create(self, messages, **_):
        self.asked.append(json.loads(json.dumps(messages)))
        turn = sum(message["role"] == "assistant" for message in messages)
        given = dict(self.messages[min(turn, len(self.messages) - 1)])
        reason = given.pop("reason", "stop")
        calls = [SimpleNamespace(id=f"call-{turn}", function=SimpleNamespace(name=name, arguments=arguments))
                 for name, arguments in given.pop("calls", ())]  # fmt: skip
        message = SimpleNamespace(content=given.get("content"), tool_calls=calls)
        usage = SimpleNamespace(completion_tokens=10)
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=reason)], usage=usage)


def conversation(*messages, **limits):
    """(the episode of a conversation with that server, the last request that the server got)."""
    client, offered = Answers(*messages), {"calculate": {"type": "object", "properties": {"expression": {}}}}
    with ToolRunner(named_tools(["builtin"])) as tools:
        runner = RemoteRunner(client, "m", tools, EpisodeLimits(**limits))
        (episode,) = runner.run([Start(0, (), offered=offered)], [[{"role": "user", "content": "2+3?"}]])
    return episode, client.asked[-1]


def test_wrong_calls_at_a_server_are_answered_and_counted():
    episode, asked = conversation(
        {"calls": [("calculate", '{"expression": "2+3"}'), ("gone", "{}")]},
        {"calls": [("calculate", "{2+3")]},
        {"content": "<tool_call>calculate 2+3</tool_call>"},
        {"content": "It is 5."},
    )
    assert (episode.answer, episode.reason, len(episode.calls)) == ("It is 5.", "answer", 4)
    assert episode.problems == {"unknown": 1, "malformed": 2}
    assert [message["role"] for message in asked[1:]] == ["assistant", "tool", "tool", "assistant", "tool", "assistant",
                                                          "user"]  # fmt: skip
    assert asked[2]["content"] == "5" and asked[3]["content"].startswith("error: there is no tool gone")
    assert asked[4]["tool_calls"][0]["function"]["arguments"] == "{}", "a server refuses what is not JSON"


def test_limits_of_a_conversation_at_a_server():
    call = {"calls": [("calculate", '{"expression": "2+3"}')]}
    assert conversation(call, turns=3)[0].reason == "turns"
    assert conversation(call, tokens=15)[0].reason == "tokens"
    assert conversation({"content": "It is", "reason": "length"})[0].answer == ""


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
