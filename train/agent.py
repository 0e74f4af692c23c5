"""Teach a chat model to use tools, from rewards: `python train/agent.py` works as it is, on built-in tasks.

Each task is answered in a conversation: the model calls tools, reads their results, calls others, and answers. Several
conversations are sampled for each task, and training makes the better ones likelier, by GRPO, CISPO and their relatives
as in train/grpo.py. The loss covers all tokens that the model wrote in all turns, and none of the tools' results. After
an interruption the same command continues from the last checkpoint. A run leaves its metrics, curves, conversations and
weights in a folder under runs/.

    python train/agent.py                                         built-in tools and tasks (docs/agents.md)
    python train/agent.py --data agent_rl.jsonl --tools upstream  upstream's rows: messages, tools, gt
    python train/agent.py --data mine.jsonl --tools my.module:TOOLS

Departures from upstream's train_agent.py:

- All conversations advance together in one engine, and each turn reuses the cached beginning of its conversation.
  Upstream runs one conversation at a time and computes all of it again at every turn.
- Tokens are only appended. Upstream renders the conversation anew after each turn, cuts it to a length, and removes the
  tokens that end a turn; so it trains on other tokens than it sampled wherever the text is encoded differently the
  second time. Here a model also learns to end its turns.
- A tool's output cannot contain special tokens. Upstream renders it into the text that it encodes.
- Tools are functions. Those of the user run in separate processes, with a time limit. Upstream has a table of lambdas,
  and evaluates arithmetic with eval.
- A malformed, unknown or ill-typed call is counted, and its result names the mistake. Upstream skips calls that are not
  JSON.
- The parts of the reward (answer, calls, frugal) are between 0 and 1, are weighted by --reward and logged separately.
  Upstream has one number between -3 and 3 with bonuses for length, and uses a reward model where no tool was called
  (here: --reward model=FOLDER).
- Sampling is at temperature 1 from the distribution that is trained. Upstream samples at 0.8 and trains as if at 1.
- A conversation that reaches a limit ends there, with the limit as its reason, and costs --truncation-penalty;
  --mask-truncated leaves it out.
- The default is dr_grpo, in which a token counts the same in a short wrong answer as in a long row of needless calls
  (docs/agents.md describes runs with other losses).

trl's GRPOTrainer leaves tool results out by its tool_mask; its losses and gradients on fixed conversations equal ours
(tests/objectives/test_surrogates.py).
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
from minimind.training.optim import Legs, RateSchedule
from minimind.training.rl.agents import (
    ConversationSampler,
    conversation_figures,
    conversation_rewards,
    draw_conversations,
)
from minimind.training.rl.arguments import GroupArgs, chosen_algorithm, default_minibatches, describe_algorithm
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import BuiltinTask, RolloutStage

NANO_LR = 1e-4  # peak rate of nano; rl.stage.peak_lr derives that of other models
TASK = BuiltinTask(
    NAME,
    agent_prompts,
    ("--epochs", "2", "--seq-len", "1280", "--batch-tokens", "2560", "--optimizer", "muon", "--evals", "2"),
)


@dataclass(frozen=True)
class Args(GroupArgs):
    """Learn from conversations with tools. Every default works."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [..., {"role": "assistant",
    "content": ""}]} rows whose system message lists the tools on offer. "reference" is the right answer, or "gt" a list
    of values that the answer must contain; "calls" is the number of calls needed, "state" the tools' memory at the
    start. Empty: built-in tasks."""
    tools: tuple[str, ...] = ("builtin",)
    """Functions that implement the tools on offer: builtin; upstream, for its agent_rl.jsonl; package.module:NAME of a
    function or a list of functions; or mcp:COMMAND or mcp:http://... of an MCP server."""
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dr_grpo"
    """The algorithm; the flags below replace parts of it. dr_grpo gives every token the same weight, whatever the
    length of its conversation and the spread of its group's rewards (docs/agents.md)."""
    rollouts: int = 60
    """Number of rollouts, each sampled from the current model. 60 is made for the built-in tasks and nano."""
    prompts: int = 32
    """Tasks in a rollout."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """Learning rate after the warm-up: cosine, wsd (flat, then a cooldown) or constant."""
    cooldown: float | None = None
    """With --schedule wsd: share of the steps over which the rate falls. None: 0.5."""
    final_lr: float | None = None
    """With cosine and wsd: final learning rate as a share of the peak. None: 0."""
    refills: int | None = 1
    """Replace tasks whose conversations all have the same reward by other tasks, at most this many times --prompts.
    Nothing is learnt from them, and late in a run they are half of all; sampling costs less than training."""
    minibatches: int | None = 2
    """Optimizer steps in each pass over a rollout, each on a part of its conversations. None: the algorithm's
    number."""
    truncation_penalty: float = 0.2
    """Subtracted from the reward of a conversation that reached a limit."""
    reward: tuple[str, ...] = ()
    """Rewards to sum, each NAME[:WEIGHT]: answer, whether the final answer is right (weight 1); calls, the share of
    well-formed calls that fit their schemas (0.2); frugal, whether a right answer took no needless calls (0.3); and
    those of train/grpo.py, which see the final answer. Empty: the first three."""
    max_new_tokens: int | None = None
    """Most tokens of a conversation after its prompt, tool results included. None: 224 for the built-in tasks, else
    1024."""
    turn_tokens: int = 128
    """Most tokens of one turn of the model."""
    turns: int = 6
    """Most turns of the model in a conversation; if the last one still calls a tool, there is no answer."""
    tool_seconds: float = 5.0
    """Seconds for one call of your tools, after which it is stopped."""
    all_tool_seconds: float = 20.0
    """Seconds for all calls of a conversation together."""
    tool_characters: int = 2048
    """Most characters of a tool's result; the rest is cut off."""
    tool_workers: int = 2
    """Number of processes that run your tools."""

    @property
    def shared_rewards(self) -> tuple[str, ...]:
        return tuple(word for word in self.reward if word.partition(":")[0] not in WEIGHTS)

    @property
    def longest_answer(self) -> int:
        return self.max_new_tokens or (1024 if self.data else 224)

    def rate_schedule(self, steps: int, legs: Legs = ()) -> RateSchedule:
        schedule = super().rate_schedule(steps, legs)
        cooldown = 0.5 if self.cooldown is None else self.cooldown
        return dataclasses.replace(schedule, final=self.final_lr or 0.0, cooldown=cooldown)

    def check(self) -> None:
        super().check()
        for name in ("turn_tokens", "turns", "tool_seconds", "all_tool_seconds", "tool_characters", "tool_workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")


def main(args: Args, console: Console) -> bool:
    """Run the stage; returns False if it was interrupted. Raises ValueError, in one line, for bad input."""
    args.check()
    if args.minibatches is None:
        args = dataclasses.replace(args, minibatches=default_minibatches(args))
    algorithm, beta = chosen_algorithm(args)
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
        return run.fit(loss, NANO_LR, [describe_algorithm(args, algorithm, beta), _described(args, tools)])


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
