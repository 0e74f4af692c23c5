"""Log-probabilities in OpenAI's two shapes. They are those of the distribution that was drawn from (see
minimind.inference.requests), of every sampled token but the control token that ended the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minimind.inference.requests import Delta, TopLogProbs

if TYPE_CHECKING:
    from minimind.serving.service import Service


def chat_logprobs(service: Service, deltas: Sequence[Delta]) -> dict[str, Any] | None:
    """None where these deltas have no token to report."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        raw = service.token_bytes[token] or service.token_text(token).encode()
        return {"token": service.token_text(token), "logprob": log_prob, "bytes": list(raw)}

    content = [
        {**entry(token, log_prob), "top_logprobs": [entry(*pair) for pair in top]}
        for token, log_prob, top in _tokens(deltas)
    ]
    return {"content": content, "refusal": None} if content else None


def completion_logprobs(service: Service, deltas: Sequence[Delta], offset: int) -> tuple[dict[str, Any], int]:
    """(the object, where the next token begins in the text). offset: where the first begins."""
    tokens, log_probs, tops, offsets = [], [], [], []
    for token, log_prob, top in _tokens(deltas):
        tokens.append(service.token_text(token))
        log_probs.append(log_prob)
        tops.append({service.token_text(other): value for other, value in top})
        offsets.append(offset)
        offset += len(tokens[-1])
    return {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": tops, "text_offset": offsets}, offset


def _tokens(deltas: Iterable[Delta]) -> Iterator[tuple[int, float, TopLogProbs]]:
    for delta in deltas:
        pairs = list(zip(delta.token_ids, delta.log_probs, strict=True))
        tops = delta.top_logprobs or ((),) * len(pairs)
        ended = delta.finish_reason == "stop" and isinstance(delta.stop, int)
        for (token, log_prob), top in list(zip(pairs, tops, strict=True))[: len(pairs) - ended]:
            yield token, log_prob, top
