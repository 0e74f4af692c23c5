"""A model as lm-evaluation-harness asks for one; minimind/evaluation/harness.py imports it where lm_eval is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track
from torch import Tensor

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import Tokenizer

PACK_TOKENS = 4096  # computed together; the logits of all of them take 100 MiB
_GENERATION = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
Scored = tuple[float, bool]


class HarnessModel(TemplateLM):
    """Log-likelihoods by packed forwards of `model`, text by `engine`. Both share weights and are in eval mode.

    Prompts that do not fit the context lose their beginning, as in the harness's own adapters, and text gets no
    beginning-of-sequence token but where the context is empty: figures compare with those of an exported folder.
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
        """Names the tokenizer in the harness's caches."""
        return self._tokenizer.fingerprint

    @property
    def _tokenizer(self) -> Tokenizer:
        assert isinstance(self.tokenizer, Tokenizer)
        return self.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without add_generation_prompt the last message is an answer that has only begun."""
        render = self._tokenizer.apply_chat_template
        if add_generation_prompt:
            return render(chat_history, add_generation_prompt=True)
        return render(chat_history[:-1], add_generation_prompt=True) + chat_history[-1]["content"]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once, with as much context as fits."""
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
        """Requests with the same input, as the answers of a multiple choice often are, are computed once."""
        askers: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"--tasks: a continuation of {len(continuation)} tokens, the context has {self.max_length}"
                )
            inputs = tuple((context + continuation)[-self.max_length - 1 :][:-1])
            askers.setdefault(inputs, []).append((index, continuation))
        results: list[Scored] = [(0.0, True)] * len(requests)
        packs = list(_packs(sorted(askers, key=len, reverse=True)))
        for pack in track(packs, "log-likelihoods", disable=disable_tqdm, transient=True):
            for inputs, log_probs in zip(pack, self._log_probs(pack, askers), strict=True):
                best = log_probs.argmax(dim=-1)
                for index, continuation in askers[inputs]:
                    if continuation:
                        targets = torch.tensor(continuation, device=log_probs.device)
                        rows = log_probs[-len(targets) :]
                        found = rows.gather(1, targets.unsqueeze(1)).sum()
                        results[index] = float(found), bool((best[-len(targets) :] == targets).all())
        return results

    def _log_probs(
        self, pack: Sequence[tuple[int, ...]], askers: dict[tuple[int, ...], list[tuple[int, list[int]]]]
    ) -> Iterable[Tensor]:
        """Of the positions that are asked for, at the end of each input: float32 [n, V]."""
        device = self.model.device
        lengths = torch.tensor([len(inputs) for inputs in pack])
        ends = lengths.cumsum(0)
        ids = torch.tensor([token for inputs in pack for token in inputs], device=device)
        cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)
        hidden = self.model(ids.unsqueeze(0), cu_seqlens=cu_seqlens, return_logits=False).hidden_states[0]
        counts = [max(len(continuation) for _, continuation in askers[inputs]) for inputs in pack]
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
