"""What became of the stages in a few lines, and the commands to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimind.apps.zero.results import Results, is_share, share_name
from minimind.apps.zero.stages import script, shown
from minimind.apps.zero.state import State
from minimind.utils.display import duration


def closing_lines(state: State, page: Path | None, status: int) -> list[str]:
    """What is printed at the end."""
    assert state.plan is not None
    lines = []
    for stage in state.plan.stages:
        found = Results.of(state.folder / stage.name)
        if found is not None and found.finished:
            told = "; ".join(f"{name_of(key)} {spell(key, *values)}" for key, values in found.figures().items())
            lines.append(f"{stage.name}: {duration(state.seconds.get(stage.name, 0.0))}; {told}")
    if status == 2:
        lines.append(f"stopped by the error above; {state.folder / 'zero.log'} has all lines. Mend it, and the same "
                     "command goes on")  # fmt: skip
    elif status:
        lines.append("interrupted; the same command goes on")
    if page is not None:
        lines.append(f"report: {page}")
    if status == 0:
        lines.append(f"talk to it: minimind chat --model {model_folder(state)}")
    return lines


def name_of(key: str) -> str:
    """A held-out figure in words."""
    return share_name(key) if is_share(key) else key.replace("heldout", "held-out").replace("_", " ")


def spell(key: str, before: float, after: float) -> str:
    """A held-out figure before and after a stage."""
    return f"{before:.1%} → {after:.1%}" if is_share(key) else f"{before:.3f} → {after:.3f}"


def model_folder(state: State) -> Path:
    """The run to talk to, or until there is one the newest that began."""
    assert state.chain is not None
    return state.folder / state.chain.answers()


def commands(state: State) -> list[tuple[str, str]]:
    """(a command, what it does), to go on with."""
    model = model_folder(state)
    return [
        (f"minimind chat --model {model}", "talk to the model in the terminal"),
        (f"minimind web --model {model}", "talk to it in the browser"),
        (f"minimind serve --model {model}", "serve it as OpenAI's API does"),
        (f"minimind export --model {model} --to gguf --out model.gguf", "for llama.cpp, LM Studio, ollama"),
        (f"minimind export --model {model} --to hf --out model", "for transformers, vLLM, trl"),
        (f"{shown([str(script('dpo'))])} --from {model} --data pairs.jsonl", "teach it your preferences"),
        (
            f"{shown([str(script('grpo'))])} --from {model} --data prompts.jsonl --reward exact",
            "reinforcement learning",
        ),
    ]


def figures(state: State) -> dict[str, Any]:
    """Of every stage that began, as plain values: what results.json holds."""
    assert state.plan is not None
    found: dict[str, Any] = {}
    for stage in state.plan.stages:
        results = Results.of(state.folder / stage.name)
        if results is None:
            continue
        found[stage.name] = {
            "finished": results.finished,
            "seconds": round(state.seconds.get(stage.name, 0.0), 1),
            "tokens": results.tokens,
            "tokens_per_second": round(results.rate, 1),
            "before": {key: values[0] for key, values in results.figures().items()},
            "after": {key: values[1] for key, values in results.figures().items()},
        }
    return found


def results_text(state: State) -> str:
    return json.dumps(figures(state), indent=1) + "\n"
