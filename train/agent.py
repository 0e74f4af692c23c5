"""Teach a chat model to use tools by rewards: `python train/agent.py` works as it is, on tasks made by the program.

A task is answered in a conversation: the model calls tools, reads what they say, calls others, and answers. Several
conversations begin with each task, and the better ones become likelier: GRPO, CISPO and their relatives, as
train/grpo.py has them, over all that the model wrote in all turns. What tools said has no weight. Run the same command
again after any interruption and it continues where the last checkpoint was. Every run leaves a folder under runs/ with
its metrics, curves, conversations and weights.

    python train/agent.py                                         built-in tools and tasks (docs/agents.md)
    python train/agent.py --data agent_rl.jsonl --tools upstream  upstream's rows: messages, tools, gt
    python train/agent.py --data mine.jsonl --tools my.module:TOOLS

Departures from upstream's train_agent.py:

- All conversations advance together in one engine and a turn goes on from the cached beginning of its conversation;
  there each conversation is held alone, and every turn computes all of it again.
- Tokens are appended. There the conversation is rendered anew after each turn and cut by its length, and the tokens
  that end a turn are taken out, so that what is trained on is not what was sampled where the text, encoded again, gives
  other tokens. Here a model also learns to end its turns.
- A tool's words cannot spell special tokens; there they are rendered into the text that is encoded.
- Tools are functions that run, in processes of their own where they are a user's, with a time limit; there a table of
  lambdas, arithmetic by eval.
- A malformed, unknown or ill-typed call is answered with what is wrong and counted; there a call that is no JSON is
  passed over.
- The reward's parts (answer, calls, frugal) lie in 0..1, are weighted by --reward and logged apart; there one number
  between -3 and 3 with bonuses for length, and a reward model where no tool was called (here --reward model=FOLDER).
- Sampling is at temperature 1 from the distribution that is trained; there at 0.8, trained as if at 1.
- A conversation that reaches a limit ends with that reason and is learnt from as it stands; --mask-truncated leaves it
  out.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rich.console import Console

from minimind.data.prompts import PromptSet
from minimind.environments.builtin import named_tools
from minimind.environments.builtin.tasks import NAME, agent_prompts
from minimind.environments.episodes import EpisodeLimits
from minimind.environments.rewards import WEIGHTS, check_tools
from minimind.environments.running import ToolLimits, ToolRunner
from minimind.modeling import Model
from minimind.objectives.policy import policy_loss
from minimind.training.job import run_script
from minimind.training.rl.agents import (
    ConversationSampler,
    conversation_figures,
    conversation_rewards,
    draw_conversations,
)
from minimind.training.rl.arguments import GroupArgs, bundle, describe, steps
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import BuiltinTask, RolloutStage

NANO_LR = 1e-4  # peak rate of nano; others' by rl.stage.peak_lr
TASK = BuiltinTask(NAME, agent_prompts, ("--epochs", "2", "--seq-len", "640", "--batch-tokens", "5120"))


@dataclass(frozen=True)
class Args(GroupArgs):
    """Learn from conversations with tools. Every default works."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [..., {"role": "assistant",
    "content": ""}]} rows whose system message carries the tools on offer. What is right is in "reference", or in "gt",
    a list of values that the answer is to hold; "calls" is how many calls it takes, "state" what the tools' memory
    begins with. None: tasks that come with the program."""
    tools: tuple[str, ...] = ("builtin",)
    """Functions behind the tools on offer: builtin; upstream, for its agent_rl.jsonl; or package.module:NAME of one
    function or a list of them."""
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "cispo"
    """Which algorithm; the flags below replace parts of it."""
    reward: tuple[str, ...] = ()
    """Rewards to add up, each NAME[:WEIGHT]: answer, that the final answer is right (1); calls, that calls are
    well-formed and fit their schemas (0.2); frugal, that right answers make no needless calls (0.1); and those of
    train/grpo.py, which see the final answer. None: these three."""
    max_new_tokens: int | None = None
    """Tokens of the longest conversation behind its prompt, tools' results included. None: 224 for the built-in tasks,
    else 1024."""
    turn_tokens: int = 128
    """Tokens of the longest turn of the model."""
    turns: int = 6
    """Turns of the model in a conversation; one that then still calls ends without an answer."""
    tool_seconds: float = 5.0
    """Of one call of a tool of yours, which is then ended."""
    all_tool_seconds: float = 20.0
    """Of all calls of a conversation together."""
    tool_characters: int = 2048
    """Of a tool's result; the rest is cut off."""
    tool_workers: int = 2
    """Processes that run tools of yours."""

    @property
    def shared_rewards(self) -> tuple[str, ...]:
        return tuple(word for word in self.reward if word.partition(":")[0] not in WEIGHTS)

    @property
    def longest_answer(self) -> int:
        return self.max_new_tokens or (1024 if self.data else 224)

    def check(self) -> None:
        super().check()
        for name in ("turn_tokens", "turns", "tool_seconds", "all_tool_seconds", "tool_characters", "tool_workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    args.check()
    if args.minibatches is None:
        args = dataclasses.replace(args, minibatches=steps(args))
    algorithm, beta = bundle(args)
    bounds = ToolLimits(args.tool_seconds, args.tool_characters, args.tool_workers)
    with ToolRunner(named_tools(args.tools), bounds) as tools:
        run = RolloutStage.begin("agent", args, algorithm.aggregation, console, TASK, conversation_rewards)
        check_tools([*run.train.prompts, *(run.heldout.prompts if run.heldout else ())], tools)
        limits = EpisodeLimits(args.turns, args.turn_tokens, args.longest_answer, args.all_tool_seconds)

        def sampler(model: Model, *size: Any) -> ConversationSampler:
            return ConversationSampler(model, run.job.tokenizer, *size, tools=tools, limits=limits)

        run.build(**args.parts, make_sampler=sampler)
        run.figures_of, run.draw = partial(_figures, run), draw_conversations
        loss = partial(policy_loss, run.trained, objective=algorithm.objective, entropy=args.entropy != 0)
        return run.fit(loss, NANO_LR, [describe(args, algorithm, beta), _described(args, tools)])


def _figures(run: RolloutStage, answers: Sequence[Answer], prompts: PromptSet) -> dict[str, float]:
    figures = conversation_figures(answers, prompts)
    sampler = run.collector.sampler
    assert isinstance(sampler, ConversationSampler)
    return figures | (sampler.figures() if prompts is run.train else {})


def _described(args: Args, tools: ToolRunner) -> str:
    return (
        f"tools: {', '.join(tools.tools)}; at most {args.turns} turns of {args.turn_tokens} tokens, "
        f"{args.longest_answer} in all, {args.all_tool_seconds:g} s of tools"
    )


if __name__ == "__main__":
    run_script(main, Args, __doc__)
