"""Benchmarks of lm-evaluation-harness on this project's models: `minimind evaluate --tasks ceval,cmmlu`.

Tasks are the harness's own (their data comes from Hugging Face) or, with --include, those of a folder with a task's
.yaml and its data. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel
from minimind.utils.display import say

_NAMES = {"ceval": "ceval-valid"}  # its test split has no answers


def evaluate_tasks(
    opened: LoadedModel,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    include: str | None = None,
    chat: bool = False,
    max_batch: int = 32,
) -> dict[str, Any]:
    """The harness's results: {"results": {task: {metric: value}}, "versions": ..., "n-shot": ...}.

    tasks: names, with * for any. few_shot: examples before each question, None as the task says. limit: questions of
    each task at most. include: folder of more tasks. chat: put questions into the model's chat template.
    ValueError, one line, without lm_eval, for an unknown task, or data that cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install lm-eval")
    from lm_eval import simple_evaluate

    from minimind.evaluation.harness_model import HarnessModel

    if include is not None and not Path(include).is_dir():
        raise ValueError(f"--include {include}: no such folder")
    if chat:
        opened.tokenizer.require_chat_template()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, manager = _matching(tasks, include)
    opened.model.compute_dtype = opened.dtype
    engine = Engine(opened.model, opened.tokenizer, dtype=opened.dtype, max_batch=max_batch)
    try:
        found = simple_evaluate(
            HarnessModel(opened.model, opened.tokenizer, engine), tasks=names, num_fewshot=few_shot, limit=limit,
            task_manager=manager, apply_chat_template=chat, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except OSError as error:  # no network, no such data set
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--tasks {','.join(names)}: the data cannot be read ({reason[0]})") from None
    return {key: found[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in found}


def report(found: dict[str, Any], folder: Path, console: Console) -> None:
    """Print a line for each task's figures and write all of them to folder/tasks.json."""
    for task, figures in found["results"].items():
        for metric, value in figures.items():
            name = metric.removesuffix(",none")
            if isinstance(value, (int, float)) and "stderr" not in metric and "sample" not in metric:
                say(console, f"{figures.get('alias', task):<40} {name:<24} {value:.4f}")
    path = folder / "tasks.json"
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    say(console, f"{path}")


def _matching(tasks: Sequence[str], include: str | None) -> tuple[list[str], Any]:
    """The tasks' full names and the TaskManager that knows them. Reading the harness's own takes seconds: they
    are left out where `include` has all that is wanted."""
    from lm_eval.tasks import TaskManager

    wanted = [name for text in tasks for name in text.replace(",", " ").split()]
    if not wanted:
        raise ValueError("--tasks: name some, such as ceval,cmmlu")
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        found = {name: sorted(manager.match_tasks([_NAMES.get(name, name)])) for name in wanted}
        if all(found.values()):
            return list(dict.fromkeys(task for names in found.values() for task in names)), manager
    unknown = next(name for name, names in found.items() if not names)
    raise ValueError(f"--tasks {unknown}: lm-evaluation-harness knows no such task; --include FOLDER adds some")
