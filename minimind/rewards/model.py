"""Reward models: ours (train/reward.py), any sequence classifier of transformers, and InternLM2-Reward's kind.

All see the conversation as their own chat template renders it, prompt and answer, and give a number of no fixed range:
weigh it, and compare it within a group or normalise it over the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind.rewards.base import Reward, Sample
from minimind.tokenization import ChatEncoder, load_tokenizer
from minimind.utils.device import choose_precision
from minimind.utils.files import read_json
from minimind.value_head import HEAD, ValueModel, load_value_model
from minimind.weights import checkpoint_folder

BATCH_TOKENS = 16384  # of a forward, padding included; one longer conversation goes alone


def model_reward(folder: str, device: torch.device, trust_remote_code: bool = False) -> Reward:
    """The reward model in `folder`, on `device`, in bfloat16 where that is the faster there. Raises ValueError, with
    the way out, where there is none or it brings its own code, which runs with trust_remote_code alone."""
    path = reward_weights(folder)
    if (path / HEAD).is_file():  # an adapter: the config is its base's
        return ValueReward.open(path, device)
    config = read_json(path / "config.json")
    if config is None:
        raise ValueError(
            f"model={folder}: no config.json in it; name a run of train/reward.py or a Hugging Face folder"
        )
    if "router_aux_loss_level" in config:  # a key of ours alone, which stands beside those of transformers
        return ValueReward.open(path, device)
    return _transformers_reward(path, config, device, trust_remote_code)


def reward_weights(folder: str) -> Path:
    """The folder with the weights of the reward model in `folder`. ValueError where there is no such folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"model={folder}: no such folder; name a run of train/reward.py or a Hugging Face folder")
    return checkpoint_folder(path) if any(path.glob("checkpoints/step-*")) else path


@dataclass
class ValueReward:
    """A ValueModel's value at the last token of the answer, before the token that ends its turn: as it was trained."""

    model: ValueModel
    encoder: ChatEncoder
    batch_tokens: int = BATCH_TOKENS

    @staticmethod
    def open(folder: Path, device: torch.device) -> ValueReward:
        tokenizer = load_tokenizer(folder)
        model = load_value_model(folder).to(device)
        model.config.with_tokenizer(tokenizer.vocab_size, f"model={folder}")  # not more ids than the model has
        model.compute_dtype = choose_precision(device, "auto").compute_dtype
        return ValueReward(model, ChatEncoder(tokenizer))

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        pieces = [self.encoder.pieces(conversation(sample)) for sample in samples]
        rows = [row.ids[: np.flatnonzero(row.trained)[-1]] for row in self.encoder.encode(pieces)]
        scores = np.empty(len(rows))
        for part in batches([len(row) for row in rows], self.batch_tokens, padded=False):
            bounds = np.cumsum([0, *(len(rows[i]) for i in part)])
            ids, ends = np.concatenate([rows[i] for i in part]).astype(np.int64), bounds[1:] - 1
            input_ids, cu_seqlens, last = (
                torch.from_numpy(array).to(self.model.device) for array in (ids[None], bounds.astype(np.int32), ends)
            )
            values = self.model(input_ids, cu_seqlens=cu_seqlens).values.flatten()
            scores[part] = values[last].double().cpu().numpy()
        return scores


@dataclass
class ClassifierReward:
    """The one logit of a sequence classifier of transformers."""

    model: Any
    tokenizer: Any
    batch_tokens: int = BATCH_TOKENS

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = [
            self.tokenizer.apply_chat_template(conversation(sample), tokenize=True, return_dict=False)
            for sample in samples
        ]
        scores = np.empty(len(rows))
        for part in batches([len(row) for row in rows], self.batch_tokens, padded=True):
            scores[part] = self._logits([rows[i] for i in part])
        return scores

    def _logits(self, rows: list[list[int]]) -> np.ndarray:
        """transformers finds a row's last token by the first pad token behind it. Many models pad with the token that
        ends a turn, and would lose the end; one that no row holds cannot be confused."""
        held = set(itertools.chain(*rows))
        pad = next(number for number in itertools.count() if number not in held)
        self.model.config.pad_token_id = pad
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits[:, 0].double().cpu().numpy()


@dataclass
class ScoresReward:
    """A model that brings get_scores(tokenizer, conversations), as InternLM2-Reward does."""

    model: Any
    tokenizer: Any
    batch_size: int = 16

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        chats = [conversation(sample) for sample in samples]
        parts = [chats[i : i + self.batch_size] for i in range(0, len(chats), self.batch_size)]
        return np.array([score for part in parts for score in self.model.get_scores(self.tokenizer, part)], float)


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The prompt's messages and the answer's."""
    return [*(dict(message) for message in sample.prompt), {"role": "assistant", "content": sample.text}]


def batches(lengths: Sequence[int], batch_tokens: int, padded: bool) -> Iterator[np.ndarray]:
    """Numbers of conversations of like length that share a forward of at most batch_tokens, padding included."""
    part: list[int] = []
    total = 0
    for i in np.argsort(lengths, kind="stable"):
        grown = (len(part) + 1) * lengths[i] if padded else total + lengths[i]
        if part and grown > batch_tokens:
            yield np.array(part)
            part, total = [], 0
        part.append(int(i))
        total += lengths[i]
    if part:
        yield np.array(part)


def _transformers_reward(
    path: Path, config: Mapping[str, Any], device: torch.device, trust_remote_code: bool
) -> Reward:
    foreign = config.get("auto_map") or {}
    if foreign and not trust_remote_code:
        raise ValueError(
            f"model={path}: it brings its own Python code; read it, then allow it with --trust-remote-code"
        )
    try:
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise ValueError(
            f"model={path}: needs transformers; pip install 'minimind[export]', or train one with train/reward.py"
        ) from None
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    dtype = torch.float32
    if device.type == "cuda":  # on CPUs transformers' bfloat16 is no faster
        dtype = choose_precision(device, "auto").compute_dtype or dtype
    scores_itself = "AutoModel" in foreign and "AutoModelForSequenceClassification" not in foreign
    kind = AutoModel if scores_itself else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = kind.from_pretrained(path, dtype=dtype, **options).to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model={path}: transformers cannot open it ({str(error).splitlines()[0]})") from error
    if scores_itself:
        if not hasattr(model, "get_scores"):
            raise ValueError(f"model={path}: {type(model).__name__} has no get_scores(tokenizer, conversations)")
        return ScoresReward(model, tokenizer)
    if model.config.num_labels != 1:
        raise ValueError(f"model={path}: a classifier of {model.config.num_labels} labels; a reward model has one")
    if not tokenizer.chat_template:
        raise ValueError(f"model={path}: its tokenizer has no chat template, so that it cannot be shown conversations")
    return ClassifierReward(model, tokenizer)
