"""Benchmarks of lm-evaluation-harness on this project's models: `minimind evaluate --tasks ceval,cmmlu`.

Tasks are the harness's own, whose data comes from Hugging Face, or those in the folder of --include.
https://github.com/EleutherAI/lm-evaluation-harness. This module needs the package lm_eval.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track
from torch import Tensor

from minimind.inference.engine import Engine
from minimind.inference.loading import LoadedModel
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.utils.display import say

_NAMES = {"ceval": "ceval-valid"}  # ceval's test split has no answers


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    include: str | None = None,
    chat: bool = False,
    max_batch: int = 32,
) -> dict[str, Any]:
    """The harness's results: {"results": {task: {metric: value}}, "versions": ..., "n-shot": ...}.

    tasks: names, in which * matches anything. few_shot: examples before each question; None: the task's own number.
    limit: at most this many questions of each task. include: folder with further tasks. chat: put questions into the
    model's chat template. ValueError, one line, for an unknown task or data that cannot be read.
    """
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"--include {include}: no such folder")
    if chat:
        loaded.tokenizer.require_chat_template()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, manager = _matching(tasks, include)
    loaded.model.compute_dtype = loaded.dtype
    engine = Engine(loaded.model, loaded.tokenizer, dtype=loaded.dtype, max_batch=max_batch)
    try:
        evaluation = simple_evaluate(
            HarnessModel(loaded.model, loaded.tokenizer, engine), tasks=names, num_fewshot=few_shot, limit=limit,
            task_manager=manager, apply_chat_template=chat, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except OSError as error:  # no network, no such data set
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--tasks {','.join(names)}: the data cannot be read ({reason[0]})") from None
    keys = ("results", "groups", "versions", "n-shot", "n-samples")
    return {key: evaluation[key] for key in keys if key in evaluation}


def report(evaluation: dict[str, Any], folder: Path, console: Console) -> None:
    """Print one line for each metric of each task, and write all results to folder/tasks.json."""
    for task, figures in evaluation["results"].items():
        for metric, value in figures.items():
            name = metric.removesuffix(",none")
            if isinstance(value, (int, float)) and "stderr" not in metric and "sample" not in metric:
                say(console, f"{figures.get('alias', task):<40} {name:<24} {value:.4f}")
    path = folder / "tasks.json"
    path.write_text(json.dumps(evaluation, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    say(console, f"{path}")


def _matching(tasks: Sequence[str], include: str | None) -> tuple[list[str], Any]:
    """The tasks' full names and the TaskManager that has them. Reading the harness's own tasks takes seconds, so they
    are left out if `include` contains all that are named."""
    wanted = [name for text in tasks for name in text.replace(",", " ").split()]
    if not wanted:
        raise ValueError("--tasks: name at least one, such as ceval,cmmlu")
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        matches = {name: sorted(manager.match_tasks([_NAMES.get(name, name)])) for name in wanted}
        if all(matches.values()):
            return list(dict.fromkeys(task for names in matches.values() for task in names)), manager
    unknown = next(name for name, names in matches.items() if not names)
    raise ValueError(f"--tasks {unknown}: lm-evaluation-harness has no such task; --include FOLDER adds some")


PACK_TOKENS = 4096  # tokens of one forward; their logits take 100 MiB
_GENERATION = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
Scored = tuple[float, bool]


class HarnessModel(TemplateLM):
    """The harness's interface to a model: log-likelihoods by packed forwards of `model`, generation by `engine`. Both
    share weights and are in eval mode.

    As in the harness's own adapters, prompts that do not fit the context lose their beginning, and a
    beginning-of-sequence token is added only to an empty context. So results are comparable with those of an exported
    folder.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, engine: Engine) -> None:
        super().__init__()
        self.model, self.engine, self.tokenizer = model, engine, tokenizer
        self._device = engine.device

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.engine.max_context

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's caches."""
        return self._tokenizer.fingerprint

    @property
    def _tokenizer(self) -> Tokenizer:
        assert isinstance(self.tokenizer, Tokenizer)
        return self.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without add_generation_prompt the last message is the beginning of an answer."""
        render = self._tokenizer.apply_chat_template
        if add_generation_prompt:
            return render(chat_history, add_generation_prompt=True)
        return render(chat_history[:-1], add_generation_prompt=True) + chat_history[-1]["content"]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: each token is scored once, with as much context as fits."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, scored = make_disjoint_window(window)
                pairs.append((None, list(context), list(scored)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        outputs = self.engine.generate([self._request(*request.args) for request in requests])
        for output in outputs:
            if output.error is not None:
                raise ValueError(f"--tasks: {output.error}")
        return [output.text for output in outputs]

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        unknown = sorted(settings.keys() - _GENERATION)
        if unknown:
            raise ValueError(f"--tasks: generation setting {unknown[0]!r} is not supported")
        longest = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
        longest = min(longest, self.max_length - 1)
        until = settings.get("until") or ()
        stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        sampled = bool(settings.get("do_sample", False))
        params = SamplingParams(
            longest,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(settings.get("top_k", 0)) if sampled else 0,
            stop=stop,
            seed=0,
        )
        prompt = self.tok_encode(context)[longest - self.max_length :] or [self.prefix_token_id]
        return Request(prompt, params)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Requests with the same input, such as the choices of one question, share one forward."""
        continuations_of: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"--tasks: a continuation has {len(continuation)} tokens, the context only {self.max_length}"
                )
            inputs = tuple((context + continuation)[-self.max_length - 1 :][:-1])
            continuations_of.setdefault(inputs, []).append((index, continuation))
        results: list[Scored] = [(0.0, True)] * len(requests)
        packs = list(_packs(sorted(continuations_of, key=len, reverse=True)))
        for pack in track(packs, "log-likelihoods", disable=disable_tqdm, transient=True):
            for inputs, log_probs in zip(pack, self._log_probs(pack, continuations_of), strict=True):
                best = log_probs.argmax(dim=-1)
                for index, continuation in continuations_of[inputs]:
                    if continuation:
                        targets = torch.tensor(continuation, device=log_probs.device)
                        rows = log_probs[-len(targets) :]
                        log_prob = rows.gather(1, targets.unsqueeze(1)).sum()
                        results[index] = float(log_prob), bool((best[-len(targets) :] == targets).all())
        return results

    def _log_probs(
        self, pack: Sequence[tuple[int, ...]], continuations_of: dict[tuple[int, ...], list[tuple[int, list[int]]]]
    ) -> Iterable[Tensor]:
        """Log-probabilities at the scored positions, which are the end of each input: float32 [n, V] each."""
        device = self.model.device
        lengths = torch.tensor([len(inputs) for inputs in pack])
        ends = lengths.cumsum(0)
        ids = torch.tensor([token for inputs in pack for token in inputs], device=device)
        cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)
        hidden = self.model(ids.unsqueeze(0), cu_seqlens=cu_seqlens, return_logits=False).hidden_states[0]
        counts = [max(len(continuation) for _, continuation in continuations_of[inputs]) for inputs in pack]
        wanted = [hidden[end - count : end] for end, count in zip(ends.tolist(), counts, strict=True)]
        logits = F.linear(torch.cat(wanted), self.model.head_weight.to(hidden.dtype))
        return F.log_softmax(logits.float(), dim=-1).split(counts)


def _packs(inputs: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    pack: list[tuple[int, ...]] = []
    for one in inputs:
        if pack and sum(map(len, pack)) + len(one) > PACK_TOKENS:
            yield pack
            pack = []
        pack.append(one)
    if pack:
        yield pack
