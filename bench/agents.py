"""Compare conversations with tools: ours, all together from cached pages, and one at a time as upstream holds them.

    python bench/agents.py --model runs/agent-nano-builtin [--tasks 48 --rounds 3]

Upstream's train_agent.py holds each conversation alone: before every turn it renders the chat template anew, encodes
the text, computes all of it and decodes token by token, with a cache that torch.cat makes longer. Both do the same
held-out built-in tasks, greedily, and take turns, a round each. `same` is the share of the conversations whose text is
the same in both; greedy choices between nearly equal logits differ by rounding, in bf16 more than in fp32.

Rows are added to agents.csv in --out. The last line of stdout is JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.table import Table

from bench.common.command import check_at_least, run, table_console
from bench.common.record import Row, append, as_dicts, check_columns, results_folder, stamp
from bench.common.timing import spread
from bench.decoding.implementations import naive_forward
from minimind import ops
from minimind.data.prompts import Prompt, open_prompts
from minimind.environments.builtin import builtin_tools
from minimind.environments.builtin.tasks import agent_prompts
from minimind.environments.episodes import EpisodeLimits, EpisodeRunner, EpisodeSampling
from minimind.environments.rewards import start_of
from minimind.environments.running import ToolRunner
from minimind.environments.turns import ToolTurns, read_calls
from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel, ModelArgs, open_model
from minimind.rewards.rules import offered_tools
from minimind.rope import rope_cos_sin
from minimind.tokenization.reasoning import ThinkingPrompts

UPSTREAM = "upstream's way"
LIMITS = EpisodeLimits(turns=6, turn_tokens=128, tokens=224)


@dataclass(frozen=True)
class Args:
    """Compare conversations with tools."""

    model: str
    """A model that does the built-in tasks, as train/agent.py leaves it."""
    tasks: int = 48
    """Tasks of a round of ours."""
    alone: int = 12
    """Tasks of a round of upstream's way, the first ones of ours; rates are compared."""
    rounds: int = 3
    """Timed rounds of each implementation, after one that is not timed."""
    threads: int | None = None
    """Threads of each implementation; None: PyTorch's default."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class AgentRow(Row):
    """One implementation.

    seconds: of a round, with the 20th and 80th percentile. conversations_per_second, written_per_second: conversations,
    and tokens that the model wrote, per second: their number divided by the median of the seconds.
    computed_per_written: tokens that went through the model for each that it wrote. same: the share of conversations
    whose text is that of the other implementation.
    """

    threads: int
    torch: str | None
    model: str
    peer: str
    conversations: int
    rounds: int
    seconds: float
    p20: float
    p80: float
    conversations_per_second: float
    written_per_second: float
    computed_per_written: float
    same: float


@dataclass
class Round:
    """One round: each conversation's text, tokens written and computed."""

    texts: list[str]
    written: int
    computed: int
    seconds: float = 0.0


def main(args: Args) -> dict[str, Any]:
    check_at_least(1, tasks=args.tasks, alone=args.alone, rounds=args.rounds, threads=args.threads)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    loaded = open_model(ModelArgs(model=args.model))
    paths = [str(agent_prompts()[1])]
    prompts = open_prompts(paths, ThinkingPrompts(loaded.tokenizer, None), 1024).prompts[: args.tasks]
    device = loaded.model.device
    columns = stamp(device, "torch") | {"threads": torch.get_num_threads(), "model": Path(args.model).name}
    folder = results_folder(args.out, columns["device"])
    check_columns(folder / "agents.csv", AgentRow)
    with ToolRunner(builtin_tools()) as tools:
        peers: dict[str, Callable[[], Round]] = {
            "ours": together(loaded, prompts, tools, loaded.dtype),
            "ours-fp32": together(loaded, prompts, tools, torch.float32),
            UPSTREAM: alone(loaded, prompts[: args.alone], tools),
        }
        rounds = measure(peers, args.rounds)
    rows = [AgentRow(**columns, peer=name, **_summary(each, rounds)) for name, each in rounds.items()]
    append(folder / "agents.csv", rows)
    show(rows)
    return {"csv": str(folder / "agents.csv"), "rows": as_dicts(rows)}


def measure(peers: dict[str, Callable[[], Round]], count: int) -> dict[str, list[Round]]:
    """`count` rounds of each, in turns, after one of each that is thrown away."""
    rounds: dict[str, list[Round]] = {name: [] for name in peers}
    for turn in range(count + 1):
        for name, hold in peers.items():
            began = time.perf_counter()
            held = hold()
            held.seconds = time.perf_counter() - began
            if turn:
                rounds[name].append(held)
    return rounds


def together(
    loaded: LoadedModel, prompts: Sequence[Prompt], tools: ToolRunner, dtype: torch.dtype
) -> Callable[[], Round]:
    """Ours. A new engine for each round, so that no page is left of the last one; making it is part of the time."""
    context = max(len(prompt.ids) for prompt in prompts) + LIMITS.tokens

    def hold() -> Round:
        engine = Engine(loaded.model, loaded.tokenizer, dtype=dtype, max_batch=64, max_context=context)
        runner = EpisodeRunner(engine, {None: ToolTurns(loaded.tokenizer)}, tools, LIMITS)
        starts = [start_of(prompt, number) for number, prompt in enumerate(prompts)]
        episodes = runner.run(starts, EpisodeSampling(0.0))
        texts = ["|".join(turn.text for turn in episode.turns) for episode in episodes]
        written = sum(map(sum, (episode.sampled for episode in episodes)))
        return Round(texts, written, runner.counts.computed + runner.counts.sampled)

    return hold


def alone(loaded: LoadedModel, prompts: Sequence[Prompt], tools: ToolRunner) -> Callable[[], Round]:
    """As upstream, in float32 plain PyTorch."""
    model, tokenizer = loaded.model, loaded.tokenizer
    table = rope_cos_sin(model.config, torch.arange(model.config.positions))

    @torch.no_grad()
    def turn(ids: list[int], room: int) -> list[int]:
        past: Any = [None] * len(model.layers)
        inputs, drawn = torch.tensor([ids]), list[int]()
        while len(drawn) < room and tokenizer.eos_token_id not in drawn[-1:]:
            inputs = naive_forward(model, inputs, past, table)[:, -1].argmax(dim=-1, keepdim=True)
            drawn.append(int(inputs))
        return drawn

    def converse(prompt: Prompt, held: Round) -> None:
        messages, offered, texts = [*prompt.messages], offered_tools(prompt.messages), []
        state = dict(prompt.metadata.get("state") or {})
        used = 0
        for _ in range(LIMITS.turns):
            ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
            used = used or len(ids)
            drawn = turn(ids, min(LIMITS.turn_tokens, used + LIMITS.tokens - len(ids)))
            held.written, held.computed = held.written + len(drawn), held.computed + len(ids) + len(drawn)
            texts.append(tokenizer.decode(drawn, skip_special_tokens=True))
            calls = read_calls(texts[-1], offered) if drawn and drawn[-1] == tokenizer.eos_token_id else []
            if not calls:
                break
            messages.append({"role": "assistant", "content": texts[-1]})
            messages += [{"role": "tool", "content": tools.run(call, state).text} for call in calls]
        held.texts.append("|".join(texts))

    def hold() -> Round:
        held = Round([], 0, 0)
        model.compute_dtype = None
        with ops.using("reference"):
            for prompt in prompts:
                converse(prompt, held)
        return held

    return hold


def _summary(rounds: Sequence[Round], all_rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Columns of AgentRow; rounds are alike, so that the last one's texts and counts stand for all."""
    median, p20, p80 = spread([each.seconds for each in rounds])
    last, other = rounds[-1], all_rounds["ours-fp32" if rounds is all_rounds[UPSTREAM] else UPSTREAM][-1]
    pairs = list(zip(last.texts, other.texts, strict=False))
    return {
        "conversations": len(last.texts),
        "rounds": len(rounds),
        "seconds": median,
        "p20": p20,
        "p80": p80,
        "conversations_per_second": len(last.texts) / median,
        "written_per_second": last.written / median,
        "computed_per_written": last.computed / max(1, last.written),
        "same": sum(a == b for a, b in pairs) / len(pairs),
    }


def show(rows: Sequence[AgentRow]) -> None:
    """A table; ratios are against the last row."""
    table = Table(title=f"conversations with tools, {rows[0].model}; {rows[0].device}")
    for column in ("", "conversations/s", "ratio", "tokens written/s", "computed per written", "same"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        ratio = row.conversations_per_second / rows[-1].conversations_per_second
        table.add_row(
            row.peer, f"{row.conversations_per_second:.2f}", f"{ratio:.1f}", f"{row.written_per_second:.0f}",
            f"{row.computed_per_written:.1f}", f"{row.same:.2f}",
        )  # fmt: skip
    table_console().print(table)


if __name__ == "__main__":
    run(main, Args, __doc__)
