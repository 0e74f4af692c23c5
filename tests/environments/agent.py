"""A tiny model that knows a few conversations by heart, and runners over it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import numpy as np
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.environments.builtin import builtin_tools
from minimind.environments.episodes import EpisodeLimits, EpisodeRunner, Start
from minimind.environments.running import ToolRunner
from minimind.environments.tools import ToolFunction
from minimind.environments.turns import ToolTurns
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.rewards.rules import offered_tools
from minimind.tokenization import ChatEncoder

TOKENIZER = load_tokenizer()
ENCODER = ChatEncoder(TOKENIZER)
TURNS = {None: ToolTurns(TOKENIZER)}
PAGE = 16
_TOOLS = [tool.schema for tool in builtin_tools() if tool.name in ("calculate", "look_up")]
SYSTEM = {"role": "system", "content": "", "tools": json.dumps(_TOOLS)}


def said(content: str) -> dict:
    return {"role": "assistant", "content": content}


def called(name: str, **arguments: object) -> dict:
    return said("") | {"tool_calls": [{"name": name, "arguments": arguments}]}


def answered(content: str) -> dict:
    return {"role": "tool", "content": content}


# Conversations with no call, one, two, and two calls in one turn.
KNOWN = [
    [SYSTEM, {"role": "user", "content": "Hello!"}, said("Hello.")],
    [SYSTEM, {"role": "user", "content": "2+3?"}, called("calculate", expression="2+3"), answered("5"),
     said("It is 5.")],
    [SYSTEM, {"role": "user", "content": "Three apples?"}, called("look_up", item="apple", column="price"),
     answered("4"), called("calculate", expression="3*4"), answered("12"), said("It is 12.")],
    [SYSTEM, {"role": "user", "content": "Pear, plum?"},
     said("") | {"tool_calls": [{"name": "look_up", "arguments": {"item": "pear", "column": "price"}},
                                {"name": "look_up", "arguments": {"item": "plum", "column": "price"}}]},
     answered("3"), answered("1"), said("They are 3 and 1.")],
]  # fmt: skip


# The same questions, answered without a call, and wrong.
GUESSED = [[*messages[:2], said("It is 9.")] for messages in KNOWN[1:3]]


@functools.cache
def agent() -> Model:
    """A float32 model that, sampled at temperature 1, gives a memorised answer about nine times in ten."""
    return taught(KNOWN)


@functools.cache
def doubtful_agent() -> Model:
    """A model that calls its tools half of the time and guesses otherwise."""
    return taught([*KNOWN[1:3], *GUESSED])


def taught(conversations: Sequence[Sequence[dict]]) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(64, 2, 4, 2, 16, 128, TOKENIZER.vocab_size, qk_norm=True))
    rows = [ENCODER.encode([ENCODER.pieces(messages)])[0] for messages in conversations]
    ids = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([row.trained for row in rows])).nonzero().flatten()
    bounds = torch.tensor(np.cumsum([0, *(len(row.ids) for row in rows)]), dtype=torch.int32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        states = model(ids[None], cu_seqlens=bounds, return_logits=False).hidden_states[0, trained - 1]
        torch.nn.functional.cross_entropy(states @ model.head_weight.T, ids[trained]).backward()
        optimizer.step()
    return model.eval()


def start(number: int, messages: Sequence[dict], samples: int = 1, offered: Sequence[ToolFunction] = ()) -> Start:
    """A conversation that begins as `messages` do, up to the assistant's first turn."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    schemas = {tool.name: tool.parameters for tool in offered} or offered_tools(messages[:first])
    return Start(number, ENCODER.prompt(messages[:first]), samples, schemas)


def runner(batch: int = 16, limits: EpisodeLimits | None = None, kind: type = EpisodeRunner, **more) -> EpisodeRunner:
    engine = Engine(agent(), TOKENIZER, max_batch=batch, page_size=PAGE, kv_tokens=batch * 1024, max_context=1024)
    tools = more.pop("tools", None) or ToolRunner(builtin_tools())
    return kind(engine, TURNS, tools, limits, **more)


class Forced:
    """A constraint that allows only these tokens, one after the other."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def allowed(self) -> np.ndarray:
        mask = np.zeros(TOKENIZER.vocab_size, bool)
        mask[self.ids[0]] = True
        return mask

    def advance(self, token_id: int) -> None:
        self.ids.pop(0)


class Scripted(EpisodeRunner):
    """Follows a script in every conversation, turn by turn, and then repeats the last turn; free: then lets the model
    write its own turns instead."""

    def __init__(self, *args, script: Sequence[str], free: bool = False) -> None:
        super().__init__(*args)
        self.script, self.free = [[*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for text in script], free

    def _submit(self, name, ids, samples, seed, used):
        turn = int(name.split("/")[1]) - 1
        if self.free and turn >= len(self.script):
            return super()._submit(name, ids, samples, seed, used)
        words = self.script[min(turn, len(self.script) - 1)]
        room = min(self.limits.turn_tokens, self.limits.tokens - used)
        params = SamplingParams(room, seed=seed, n=samples)
        self.engine.submit(Request(ids, params, name, lambda: Forced(words)))
