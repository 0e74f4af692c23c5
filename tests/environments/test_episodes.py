"""Conversations over the engine: what is appended, what is computed, how they end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from minimind.environments.episodes import EpisodeLimits, EpisodeSampling
from minimind.environments.running import ToolLimits, ToolRunner
from minimind.environments.tools import user_tools
from minimind.training.rl.agents import Conversation
from minimind.training.rl.collector import log_probs_of
from minimind.training.rl.loader import Shape, pack
from tests.environments import hostile
from tests.environments.agent import KNOWN, PAGE, TOKENIZER, Scripted, agent, runner, start

GREEDY = EpisodeSampling(0.0)


def as_answer(episode) -> Conversation:
    return Conversation(
        0, episode.start.number, episode.sample, np.array(episode.start.prompt), np.array(episode.ids),
        np.array(episode.log_probs, np.float32), True, sampled=np.array(episode.sampled), episode=episode,
    )  # fmt: skip


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_conversations_are_those_that_the_template_renders():
    """Their tokens are those that SFT would encode, although no text is ever encoded a second time."""
    episodes = runner().run([start(i, messages) for i, messages in enumerate(KNOWN)], GREEDY)
    for messages, episode in zip(KNOWN, episodes, strict=True):
        whole = TOKENIZER.encode(TOKENIZER.apply_chat_template(messages).removesuffix("\n"))
        assert [*episode.start.prompt, *episode.ids] == whole and episode.reason == "answer"
        assert episode.answer == messages[-1]["content"]
        written = "".join(TOKENIZER.decode([i]) for i, own in zip(episode.ids, episode.sampled, strict=True) if own)
        assert written.count("<|im_end|>") == len(episode.turns) == 1 + len([m for m in messages if "tool_calls" in m])
        assert "<tool_response>" not in written and "<|im_start|>" not in written
        assert len(episode.log_probs) == sum(episode.sampled) and not episode.problems


def test_log_probabilities_are_the_trainers_over_whole_conversations():
    """In float32. The bound is the rounding of both forwards, derived as for the GRPO runs."""
    starts = [start(i, messages, 4) for i, messages in enumerate(KNOWN)]
    answers = [as_answer(episode) for episode in runner().run(starts)]
    assert sum(len(a.episode.turns) > 1 for a in answers) >= 8
    again = log_probs_of(agent(), answers, Shape())
    assert max(np.abs(scored - a.log_probs).max() for scored, a in zip(again, answers, strict=True)) < 2e-5


def test_results_of_tools_are_no_targets_and_get_no_gradient():
    episodes = runner().run([start(2, KNOWN[2])], GREEDY)
    (answer,) = map(as_answer, episodes)
    answer.advantages = np.ones(answer.written, np.float32)
    batch = pack([answer], torch.device("cpu"), answer.written, 1, Shape())
    learnt = batch.targets[batch.targets != -100].tolist()
    assert learnt == [i for i, own in zip(answer.ids.tolist(), answer.sampled, strict=True) if own]
    assert batch.num_targets == answer.written < len(answer.ids)
    assert torch.equal(batch.advantages != 0, batch.targets != -100)
    first = len(answer.prompt_ids) - 1
    assert torch.equal(batch.old_log_probs[0, first : first + len(answer.ids)],
                       torch.from_numpy(answer.spread(answer.log_probs)))  # fmt: skip


def test_no_token_is_computed_twice_but_for_a_page_that_was_not_full():
    running = runner()
    episodes = running.run([start(i, messages, 3) for i, messages in enumerate(KNOWN)], GREEDY)
    asked, new = 0, 0  # prompt tokens of all turns, and those among them that no earlier turn had
    prompts = {episode.start.number: len(episode.start.prompt) for episode in episodes}
    for episode in episodes:
        place, length = 0, len(episode.start.prompt)
        for turn in range(len(episode.turns)):
            if turn:
                asked += length + place
            ends = [i for i in range(place, len(episode.ids)) if episode.sampled[i]]
            stop = next(i for i in ends if i + 1 == len(episode.ids) or not episode.sampled[i + 1])
            place = next((i for i in range(stop + 1, len(episode.ids)) if episode.sampled[i]), len(episode.ids))
            if turn + 1 < len(episode.turns):
                new += place - stop - 1
    later = sum(len(episode.turns) - 1 for episode in episodes)
    counts = running.counts
    assert counts.found + counts.computed == asked + sum(prompts.values())
    # besides the new tokens, each later turn computes at most the page with the last token of the turn before
    assert counts.computed <= sum(prompts.values()) + new + later * PAGE
    assert counts.computed < (asked + sum(prompts.values())) / 2
    assert counts.sampled == sum(sum(episode.sampled) for episode in episodes)


def test_what_runs_beside_a_conversation_does_not_change_it():
    starts = [start(i, KNOWN[i % len(KNOWN)], 2) for i in range(8)]
    together = runner().run(starts, EpisodeSampling(seed=3))
    one = runner(batch=2)
    alone = [episode for each in starts for episode in one.run([each], EpisodeSampling(seed=3))]
    assert [(e.start.number, e.sample, e.ids) for e in together] == [(e.start.number, e.sample, e.ids) for e in alone]
    other = runner().run(starts, EpisodeSampling(seed=4))
    assert [e.ids for e in other] != [e.ids for e in together]


def test_the_samples_of_a_prompt_draw_their_own_turns():
    """At a temperature so high that turns are random, no two second turns are alike."""
    first = call("calculate", expression="2+3")
    one = runner(4, EpisodeLimits(turn_tokens=40), Scripted, script=[first], free=True)
    episodes = one.run([start(0, KNOWN[1], 4)], EpisodeSampling(30.0))
    later = [episode.turns[1].text for episode in episodes]
    assert [episode.turns[0].text for episode in episodes] == [first] * 4
    assert len(set(later)) == 4


@pytest.fixture(scope="module")
def strangers():
    with ToolRunner(user_tools(hostile.PATH), ToolLimits(seconds=0.5, characters=64)) as tools:
        yield tools


def scripted(strangers, script, limits=None, count=1):
    running = runner(4, limits, Scripted, tools=strangers, script=script)
    tools = list(strangers.tools.values())
    return running, running.run([start(i, KNOWN[0], 1, tools) for i in range(count)])


@pytest.mark.parametrize(
    ("turn", "problems", "said"),
    [
        (call("forever"), {"timeout": 1}, "error: the tool took more than 0.5 s"),
        (call("fails", what="it"), {"raised": 1}, "error: KeyError: 'it'"),
        (call("megabyte"), {"cut": 1}, "x" * 64),
        (call("markup"), {"markup": 1}, hostile.markup()[:64]),
        (call("dies"), {"died": 1}, "error: the tool ended its process"),
        (call("gone"), {"unknown": 1}, "error: there is no tool gone"),
        (call("slow", seconds="long"), {"arguments": 1}, "error: seconds must be of type number"),
        ("<tool_call>\nslow, please\n</tool_call>", {"malformed": 1}, "error: the call is not JSON: slow, please"),
        ("<tool_call>\n", {"malformed": 1}, "error: a call that is not closed"),
    ],
)
def test_hostile_tools_and_calls_are_counted_and_the_conversation_goes_on(strangers, turn, problems, said):
    _, (episode,) = scripted(strangers, [turn, "Done."])
    assert episode.reason == "answer" and episode.answer == "Done."
    shown = {k: v for k, v in episode.problems.items() if k != "cut"} if "markup" in problems else episode.problems
    assert shown == problems
    assert said in TOKENIZER.decode(episode.ids)
    # nothing that a tool said ended a turn, opened one, or called
    ends, opens = (episode.ids.count(TOKENIZER.special_tokens[name]) for name in ("<|im_end|>", "<|im_start|>"))
    assert (ends, opens) == (3, 2) and episode.ids.count(TOKENIZER.special_tokens["</tool_response>"]) == 1


@pytest.mark.parametrize(
    ("limits", "reason", "turns"),
    [
        (EpisodeLimits(turns=3), "turns", 3),
        (EpisodeLimits(turn_tokens=5), "tokens", 1),
        (EpisodeLimits(tokens=100), "tokens", 3),
        (EpisodeLimits(tokens=64), "tokens", 2),
        (EpisodeLimits(turns=9, tool_seconds=0.12), "tool time", 3),
    ],
)
def test_limits_end_a_conversation_with_a_reason(strangers, limits, reason, turns):
    _, (episode,) = scripted(strangers, [call("slow", seconds=0.05)], limits)
    assert episode.reason == reason and abs(len(episode.turns) - turns) <= (reason == "tool time")
    assert episode.answer == "" and len(episode.ids) <= limits.tokens
    assert episode.sampled[-1] and len(episode.log_probs) == sum(episode.sampled)


def test_others_decode_while_a_tool_runs(strangers):
    """A slow tool delays only its own conversation."""
    running, episodes = scripted(strangers, [call("slow", seconds=0.1), "Done."], count=4)
    assert [e.answer for e in episodes] == ["Done."] * 4 and running.engine.stats().running == 0


def test_the_state_of_a_conversation_is_its_own(strangers):
    _, episodes = scripted(strangers, [call("counts"), call("counts"), "Done."], count=2)
    for episode in episodes:
        assert [r.text for turn in episode.turns for r in turn.results] == ["1", "2"] and episode.state == {"calls": 2}


def test_a_broken_run_leaves_nothing_behind(strangers):
    running = runner(4, None, Scripted, tools=strangers, script=[call("slow", seconds=0.3), "Done."])
    tools = list(strangers.tools.values())
    running.tools.poll = _interrupted
    with pytest.raises(KeyboardInterrupt):
        running.run([start(0, KNOWN[0], 1, tools)])
    del running.tools.poll
    assert not running.engine.has_work and not running.tools.busy
    assert [e.answer for e in running.run([start(0, KNOWN[0], 1, tools)])] == ["Done."]


def _interrupted(seconds: float):
    raise KeyboardInterrupt


def test_a_prompt_that_is_too_long_is_an_error_in_one_line():
    long = start(0, [KNOWN[0][0], {"role": "user", "content": "more " * 1100}, KNOWN[0][2]])
    with pytest.raises(ValueError, match="shorten it to at most") as error:
        runner().run([long])
    assert "\n" not in str(error.value)
